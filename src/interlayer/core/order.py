"""Order: in which order, and how often, the blocks of a backbone run."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from interlayer.core.stream import State

Step = Callable[[State, int], State]


class Sequential(nn.Module):
    """Every block once, in order; and the protocol of the slot.

    Args:
        depth: Number of blocks.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth

    def forward(self, state: State, step: Step) -> State:
        """Run ``step(state, block)`` over the blocks."""
        for block in range(self.depth):
            state = step(state, block)
        return state


class Looped(Sequential):
    """The whole stack ``times`` times with the same weights, as in a universal Transformer (arXiv:1807.03819).

    A key-value cache holds one entry for a block, so a looped stack decodes without one.
    """

    caches = False

    def __init__(self, depth: int, *, times: int = 2) -> None:
        super().__init__(depth)
        self.times = times

    def forward(self, state: State, step: Step) -> State:
        for _ in range(self.times):
            state = super().forward(state, step)
        return state
