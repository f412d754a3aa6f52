"""The orders in which blocks run, and the modules that run them so."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from interlayer.core import order as orders
from interlayer.core import taps
from interlayer.core.stream import State

Variant = Literal["skip", "middle-repeat", "reverse", "random-order", "parallel", "looped-parallel"]
VARIANTS = get_args(Variant)
Order = list[int | list[int]]


def execution(variant: str, count: int, start: int, end: int, *, loops: int = 1, seed: int = 0) -> Order:
    """In which order ``count`` blocks run: numbers, and lists of blocks that share one input and are averaged.

    >>> execution("looped-parallel", 6, 1, 4, loops=2)
    [0, [1, 2, 3], [1, 2, 3], 4, 5]
    """
    middle = list(range(start, end))
    changed: dict[str, Order] = {
        "skip": [],
        "middle-repeat": [(start + end) // 2] * len(middle),
        "reverse": [*reversed(middle)],
        "random-order": [*_mixed(middle, seed)] if variant == "random-order" else [],
        "parallel": [middle],
        "looped-parallel": [middle] * loops,
    }
    return [*range(start), *changed[variant], *range(end, count)]


def _mixed(middle: list[int], seed: int) -> list[int]:
    chance = torch.Generator().manual_seed(seed)
    mixed = middle
    while mixed == middle and len(middle) > 1:  # the trained order is none of the random ones
        mixed = [middle[i] for i in torch.randperm(len(middle), generator=chance).tolist()]
    return mixed


def cost(order: Order) -> dict[str, int]:
    """Blocks one after another (``depth``: the latency where parallel blocks cost no time) and in all (``work``)."""
    return {"depth": len(order), "work": sum(len(o) if isinstance(o, list) else 1 for o in order)}


class Parallel(nn.Module):
    """Blocks that all get one input; their outputs are averaged. What else they return is the last one's."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As a single block is called."""
        outputs = [block(*args, **kwargs) for block in self.members]
        return taps.swap(outputs[-1], torch.stack([taps.first(o) for o in outputs]).mean(0))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # such as ``attention_type``, which some models ask of a block
            return getattr(next(iter(self.members)), name)


class Route(orders.Sequential):
    """The slot ``order`` of interlayer's own backbones, filled with an ``execution``."""

    def __init__(self, count: int, order: Order) -> None:
        super().__init__(count)
        self.order = order
        run = flat(order)
        self.caches = len(set(run)) == len(run)  # keys and values are kept by block, so a repeated one has no place

    def forward(self, state: State, step: orders.Step) -> State:
        for item in self.order:
            ends = []
            for block in item if isinstance(item, list) else [item]:
                if not state.kept:
                    ends.append(step(copy.copy(state), block))
                if state.kept:  # copies share it
                    raise ValueError(
                        "painters: this model's stream keeps earlier outputs for later blocks, which ties them to their "
                        "order. Take a stream without memory, such as 'pre-norm'."
                    )
            state = ends[-1]
            state.x = torch.stack([end.x for end in ends]).mean(0) if len(ends) > 1 else state.x
        return state


def flat(order: Order) -> list[int]:
    """The blocks of an order, one run after another."""
    return [block for item in order for block in (item if isinstance(item, list) else [item])]
