"""Order: in which order, and how often, the blocks of a backbone run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.stream import State


class Step(Protocol):
    """Run one block of the backbone."""

    def __call__(self, state: State, block: int, source: Tensor | None = None) -> State:
        """Advance ``state``; keys and values are read from ``source``, by default from the state."""


class Sequential(nn.Module):
    """Every block once, in order; and the protocol of the slot.

    ``needs`` names what an order asks of the mixer: one that gives a block a ``source`` needs ``"qkv"``. An order says by
    ``caches``, ``masks`` and ``rotates`` whether it runs with a key-value cache, with padding, and with positions that
    act inside the mixer.

    Args:
        depth: Number of blocks.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    caches: bool = True
    masks: ClassVar[bool] = True
    rotates: ClassVar[bool] = True

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth

    def forward(self, state: State, step: Step) -> State:
        """Run ``step(state, block)`` over the blocks."""
        for block in range(self.depth):
            state = step(state, block)
        return state


class Looped(Sequential):
    """The whole stack ``times`` times with the same weights.

    A key-value cache holds one entry for a block, so a looped stack decodes without one.

    Args:
        depth: Number of blocks.
        times: How often they run.
    """

    caches = False

    def __init__(self, depth: int, *, times: int = 2) -> None:
        super().__init__(depth)
        self.times = times

    def forward(self, state: State, step: Step) -> State:
        for _ in range(self.times):
            state = super().forward(state, step)
        return state


class _Recorder(Sequential):
    """The plain order, keeping what each block leaves in the stream."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.seen: list[list[Tensor]] = [[] for _ in range(depth)]

    def forward(self, state: State, step: Step) -> State:
        for block in range(self.depth):
            state = step(state, block)
            self.seen[block].append(state.x)
        return state


@contextmanager
def behind(model: nn.Module, at: str) -> Iterator[list[list[Tensor]]]:
    """Keep the hidden states behind each block of a list, while the context is open: for each block, one for each call.

    They stay in the graph. In the backbones of ``interlayer.models`` they are what a block leaves in the stream; elsewhere the
    first tensor of its output.

    Args:
        model: Any model.
        at: Name of the list of blocks, as ``select.blocks`` gives it.

    Raises:
        ValueError: The blocks run in an order of their own, so that it is not known what follows what.

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
        >>> with behind(net, "1") as seen:
        ...     _ = net(torch.zeros(5, 2))
        >>> [tuple(states[0].shape) for states in seen]
        [(5, 3), (5, 3)]
    """
    owner: Any = model.get_submodule(at.rpartition(".")[0])
    count = len(model.get_submodule(at))  # type: ignore[arg-type]
    trained = getattr(owner, "order", None)
    if not isinstance(trained, Sequential):
        names = [f"{at}.{i}" for i in range(count)]
        found: list[list[Tensor]] = [[] for _ in names]
        with taps.read(model, lambda name, module: name in names, every=True, detach=False) as seen:
            yield found
            for states, name in zip(found, names, strict=True):
                states += seen.get(name, [])
        return
    if type(trained) is not Sequential:
        raise ValueError(
            f"behind: the blocks of {at!r} run in {type(trained).__name__} order; expected the plain one, order='sequential'."
        )
    owner.order = _Recorder(count)
    try:
        yield owner.order.seen
    finally:
        owner.order = trained
