"""Leaves that are no mixers: relative positions, another norm, a large memory, no MLP at all, adaptive depth."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.order import Sequential, Step
from interlayer.core.position import Position
from interlayer.core.stream import State


class RelativeBias(Position):
    """A learned number for each head and bucket of distances is added to the scores (T5; Raffel et al., arXiv:1910.10683).

    Half of the buckets are single distances, half grow logarithmically up to ``farthest``. All layers share it.

    Args:
        heads: Query heads.
        buckets: How many; half of them for each direction, so that one table serves causal models and encoders.
        farthest: Distance from which on all is one bucket.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"bias"})

    def __init__(self, heads: int, *, buckets: int = 32, farthest: int = 128) -> None:
        super().__init__()
        if buckets < 4 or buckets % 4 or farthest <= buckets // 4:
            raise ValueError(
                f"RelativeBias: {buckets} buckets up to {farthest}; wanted a multiple of 4, and farther than a quarter of it."
            )
        self.buckets, self.farthest = buckets, farthest
        self.table = nn.Parameter(torch.randn(buckets, heads) * 0.02)

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of key minus query."""
        half = self.buckets // 2
        exact, far = half // 2, distance.abs()
        ratio = (far.clamp(min=1).float() / exact).log() / torch.log(torch.tensor(self.farthest / exact))
        grown = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
        return torch.where(far < exact, far, grown) + half * (distance > 0)

    def bias(self, new: int, total: int) -> Tensor:
        place = torch.arange(total, device=self.table.device)
        return self.table[self.bucket(place - place[total - new :, None])].permute(2, 0, 1)


class ScaleNorm(nn.Module):
    """``g x / |x|`` with one learned scalar (Nguyen and Salazar, arXiv:1910.05895).

    Args:
        width: Features D; the scalar starts at its square root.
        eps: Least length.
    """

    def __init__(self, width: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.gain = nn.Parameter(torch.tensor(width**0.5))

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Give every vector the same length."""
        if x.shape[-1] != self.width:
            raise ValueError(f"ScaleNorm: input {tuple(x.shape)}; wanted [..., {self.width}].")
        return self.gain.to(x.dtype) * F.normalize(x, dim=-1, eps=self.eps)


class ProductKeys(nn.Module):
    """A large memory in the MLP's place: ``keys^2`` values, of which ``top`` are read (Lample et al., arXiv:1907.05242).

    The query is split in two; the best ``top`` of each half's ``keys`` sub-keys give ``top^2`` candidates, of which the best are
    read. 2 keys D + top^2 multiply-adds for the search of a position, in place of keys^2 D.

    Args:
        width: Features D, even.
        keys: Sub-keys of each half.
        top: Values that are read.
        heads_read: Independent queries.
    """

    def __init__(self, width: int, *, keys: int = 32, top: int = 8, heads_read: int = 2) -> None:
        super().__init__()
        if width % 2 or top > keys:
            raise ValueError(f"ProductKeys: width {width} must be even, and top {top} at most keys {keys}.")
        self.top, self.heads_read = top, heads_read
        self.query = nn.Linear(width, heads_read * width)
        self.keys = nn.Parameter(torch.randn(heads_read, 2, keys, width // 2) * (width // 2) ** -0.5)
        self.values = nn.Parameter(torch.randn(keys * keys, width) * width**-0.5)

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """Read the values whose product keys fit best."""
        q = self.query(x).unflatten(-1, (self.heads_read, 2, -1))
        score = torch.einsum("...hpd,hpkd->...hpk", q, self.keys)
        best, at = score.topk(self.top, -1)
        pairs = (best[..., 0, :, None] + best[..., 1, None, :]).flatten(-2)
        index = (at[..., 0, :, None] * self.keys.shape[2] + at[..., 1, None, :]).flatten(-2)
        weight, chosen = pairs.topk(self.top, -1)
        rows = F.embedding(index.gather(-1, chosen), self.values)
        return (weight.softmax(-1)[..., None] * rows).sum((-2, -3))


class NoMLP(nn.Module):
    """No channel mixing: zero, for mixers that do it too (``persistent-memory``).

    Args:
        width: Features D.
    """

    def __init__(self, width: int = 0) -> None:
        super().__init__()

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Zero, with the input in its graph: the norm before it gets a gradient, which distributed training asks for."""
        return 0 * x


class AdaptiveDepth(Sequential):
    """Every token decides after each block whether to halt; its output is the mean of its states (ACT; Dehghani et al., arXiv:1807.03819).

    Adaptive computation time as in the Universal Transformer, over distinct blocks: after block n a token halts with
    ``p_n = sigmoid(w x_n + b)``; when the sum of the p reaches ``1 - rest`` (or at the last block) the remainder is spent, and ``y =
    sum_n p_n x_n``. ``extra_loss`` asks for few blocks. All blocks are computed for all tokens here: it is the halting that is
    learned, and a token that has halted changes no more.

    Args:
        depth: Number of blocks.
        width: Features D.
        rest: What may be left of the probability.
        penalty: Weight of the mean number of blocks in the loss.
    """

    caches = False

    def __init__(self, depth: int, *, width: int, rest: float = 0.01, penalty: float = 1e-3) -> None:
        super().__init__(depth)
        self.halt = nn.Linear(width, 1)
        nn.init.constant_(self.halt.bias, -1.0)
        self.rest, self.penalty = rest, penalty
        self.ponder: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: not the graph of the last pass."""
        return {**self.__dict__, "ponder": None}

    def extra_loss(self) -> Tensor:
        """The penalty on the depth that the last pass took."""
        return self.halt.bias.new_zeros(()) if self.ponder is None else self.penalty * self.ponder

    def forward(self, state: State, step: Step) -> State:
        """Run all blocks and weigh their states."""
        spent = state.x.new_zeros(*state.x.shape[:-1], 1)
        blocks, out = spent, torch.zeros_like(state.x)
        for block in range(self.depth):
            running = (spent < 1 - self.rest).to(spent.dtype)
            before = state.x
            state = step(state, block)
            state.x = torch.where(running.bool(), state.x, before)
            chance = torch.sigmoid(self.halt(state.x))
            last = block == self.depth - 1
            done = (spent + chance >= 1 - self.rest) | last
            share = running * torch.where(done, 1 - spent, chance)
            out = out + share * state.x
            blocks = blocks + running * (1 + done.to(spent.dtype) * (1 - spent))
            spent = spent + share
        self.ponder = blocks.mean() if self.training else None
        state.x = out
        return state
