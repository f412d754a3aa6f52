"""Ladder side tuning: a small network beside a frozen one reads its states and gives the last state in its place."""

from __future__ import annotations

from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from interlayer.core.attach import Part, attach, host_of
from interlayer.core.select import blocks
from interlayer.core.trunk import Trunk

M = TypeVar("M", bound=nn.Module)


class Ladder(Part):
    """``h = side_n(g_n h + (1 - g_n) D_n x_n)`` over the states x_n ahead of each block, and ``U h`` in place of the last state.

    Sung, Cho and Bansal, arXiv:2206.06522, with gates ``sigmoid(a / 0.1)`` that begin at one half, and without their pruned initial
    weights. Each side block is one of a Transformer, bidirectional.

    Args:
        host: The last block of the backbone.
        depth: Its blocks.
        width: Features D of the states.
        length: Longest sequence.
        reduction: D over the features of the side network.
    """

    kind = "ladder"
    spans = True

    def __init__(self, host: nn.Module, *, depth: int, width: int, length: int, reduction: int = 8) -> None:
        super().__init__()
        hidden = width // reduction
        self.side = nn.ModuleList(
            Trunk(depth=1, width=hidden, heads=1, length=length, causal=False, position="none") for _ in range(depth)
        )
        self.down = nn.ModuleList(nn.Linear(width, hidden) for _ in range(depth + 1))
        self.gates, self.up = nn.Parameter(torch.zeros(depth + 1)), nn.Linear(hidden, width)
        self.rung: Tensor | None = None

    def between(self, number: int, x: Tensor) -> Tensor:
        """Run a side block."""
        new, gate = self.down[number](x.detach()), (self.gates[number] / 0.1).sigmoid()
        h = new if self.rung is None or number == 0 else gate * self.rung + (1 - gate) * new
        if number < len(self.side):
            self.rung = self.side[number](h)
            return x
        self.rung = None
        return self.up(h)


def ladder(model: M, *, length: int = 64, reduction: int = 8) -> M:
    """Freeze a model of this package and put a ladder beside its blocks, in place."""
    at, found = blocks(model)
    trunk = cast(Trunk, model.trunk)
    make = partial(Ladder, depth=len(found), width=trunk.width, length=length, reduction=reduction)
    return attach(model, {host_of(model, at): at}, make)
