"""Order: in which order, and how often, the blocks of a backbone run."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor, nn

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
