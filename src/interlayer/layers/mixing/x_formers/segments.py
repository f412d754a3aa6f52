"""Sparse attention along lines and segments: rows and columns, and Transformer-XL's recurrence."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.mixer import Attention, Context, attend
from interlayer.core.parts import Linear, plain_linear
from interlayer.core.stream import QKV
from interlayer.layers.mixing.x_formers.refusals import refuse_dense


class Axial(Attention):
    """Blocks attend in turn along the rows and along the columns of a grid (Axial Transformer; Ho et al., arXiv:1912.12180).

    S (rows + columns) / 2 scores a head and block. A text is laid out in rows.

    Args:
        width: Features D.
        heads: Query heads.
        grid: Shape of the positions; a text has one side.
        layer: Number of the sublayer: its block attends along rows if even, along columns if odd.
        branches: Sublayers in a block.
        row: Length of a row. Defaults to the grid's, for a text to the square root of its length.
        **options: As for ``Attention``.

    Examples:
        >>> Axial(8, heads=2, grid=(3, 3), layer=0)(torch.randn(1, 9, 8)).shape
        torch.Size([1, 9, 8])
    """

    offers: ClassVar[frozenset[str]] = frozenset({"qkv", "share", "rotate"})

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        grid: tuple[int, ...],
        layer: int = 0,
        branches: int = 2,
        row: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(width, heads, **options)
        self.row = row or (grid[-1] if len(grid) > 1 else math.isqrt(grid[0] - 1) + 1)
        self.down = layer // branches % 2 == 1
        if not 1 < self.row < math.prod(grid):
            raise ValueError(f"Axial: rows of {self.row} in a grid {grid}; expected more than one row and column.")

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        length = q.shape[-2]
        more = -length % self.row
        real = torch.arange(length + more, device=q.device) < length
        real = real[None] if mask is None else F.pad(mask, (0, more))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        lines = [F.pad(t, (0, 0, 0, more)).unflatten(-2, (-1, self.row)) for t in (q, k, v)]
        real = real.unflatten(-1, (-1, self.row))
        if self.down:
            lines, real = [t.transpose(2, 3) for t in lines], real.transpose(1, 2)
        seen = real[:, None, :, None]
        if self.causal:
            seen = seen & torch.ones(2 * lines[0].shape[3:4], dtype=torch.bool, device=q.device).tril()
        y = F.scaled_dot_product_attention(*lines, attn_mask=seen | ~seen.any(-1, keepdim=True))
        return (y.transpose(2, 3) if self.down else y).flatten(2, 3)[:, :, :length]


class Segments(Attention):
    """Segment recurrence with relative positions (Transformer-XL; Dai et al., arXiv:1901.02860, section 3).

    A token sees its own segment and the one before, whose hidden states h get no gradient: keys and values are those of
    ``[stop(h_before), h]``. Layer on layer, what is known reaches one segment further back; a whole text is one pass here.
    ``score_ij = ((q_i + u) k_j + (q_i + v) W_R r_{i-j}) / sqrt(K)`` with sinusoids r and learned u and v.

    S 2 block scores a head. Take ``position="none"`` with it.

    Args:
        width: Features D, even.
        heads: Query heads.
        block: Tokens in a segment.
        length: Longest sequence, if known.
        linear: Called with ``inputs=, outputs=``.
        **options: As for ``Attention``.

    Raises:
        ValueError: A model of a single segment.

    Examples:
        >>> Segments(8, heads=2, block=3, causal=True).pattern(1, 8).int().tolist()
        [[0, 0, 0, 1, 1, 1, 1, 1]]
    """

    offers: ClassVar[frozenset[str]] = frozenset({"qkv", "cache", "order"})

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        block: int = 64,
        length: int | None = None,
        linear: Linear = plain_linear,
        **options: Any,
    ) -> None:
        super().__init__(width, heads, linear=linear, **options)
        if block < 1 or width % 2:
            raise ValueError(f"Segments: block {block}, width {width}; expected at least 1, and an even width.")
        if length is not None and length <= block:
            refuse_dense(self, length)
        self.block = block
        self.relative = linear(inputs=width, outputs=width, bias=False)
        self.u, self.v = (nn.Parameter(0.02 * torch.randn(heads, 1, self.head_width)) for _ in range(2))

    def pattern(self, new: int, total: int, device: torch.device | None = None) -> Tensor:
        """Which of ``total`` keys each of the last ``new`` queries sees."""
        i, j = torch.arange(total - new, total, device=device)[:, None], torch.arange(total, device=device)
        back = i // self.block - j // self.block
        return (back >= 0) & (back <= 1) & ((j <= i) | (not self.causal))

    def bias(self, q: Tensor, distance: Tensor) -> Tensor:
        """``(q + v) W_R r / sqrt(K)``, [B, H, n, a, c], of queries [B, H, n, a, K] and distances [a, c]."""
        width = self.heads * self.head_width
        low, high = 0 if self.causal else 1 - self.block, 2 * self.block
        rate = 10000 ** (-torch.arange(0, width, 2, device=q.device) / width)
        angle = torch.arange(low, high, device=q.device)[:, None] * rate
        table = torch.cat((angle.sin(), angle.cos()), -1).to(q.dtype)
        r = self.relative(table).unflatten(-1, (self.heads, -1)).transpose(0, 1)[:, None]  # [H, 1, distances, K]
        score = (q + self.v[:, None].to(q.dtype)) @ r.transpose(-1, -2) * q.shape[-1] ** -0.5
        at = (distance - low).clamp(0, high - low - 1)
        return score.gather(-1, at.expand(*score.shape[:-1], -1))

    def forward(self, x: Float[Tensor, "B S D"] | QKV, context: Context | None = None) -> Float[Tensor, "B S D"]:
        """Let every token read from its own segment and from the one before."""
        context = context or Context()
        q, k, v = self.project(x)
        if context.cache is not None:
            k, v = context.cache.extend("k", context.layer, k), context.cache.extend("v", context.layer, v)
        groups = self.heads // self.kv_heads
        if q.shape[-2] != k.shape[-2]:
            k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
            y = self.decoded(q, k, v, context.mask)
        else:
            old = QKV(*(t.detach() for t in x)) if isinstance(x, QKV) else x.detach()
            past = self.project(old)[1:] if torch.is_grad_enabled() else (k, v)
            k, v, old_k, old_v = (t.repeat_interleave(groups, 1) for t in (k, v, *past))
            y = self.blocks(q, k, v, old_k, old_v, context.mask)
        return self.out(y.transpose(1, 2).flatten(2))

    def decoded(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """All pairs, as decoding needs them, where nothing is learned."""
        new, total = q.shape[-2], k.shape[-2]
        index = torch.arange(total, device=q.device)
        bias = self.bias(q[:, :, None], index[total - new :, None] - index)[:, :, 0]
        seen = self.pattern(new, total, q.device)
        return attend(q + self.u.to(q.dtype), k, v, causal=False, mask=mask, bias=bias.masked_fill(~seen, -torch.inf))

    def blocks(
        self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Segment by segment; ``past_k`` and ``past_v`` are the keys and values of hidden states without gradient."""
        length, b = q.shape[-2], self.block
        count = -(-length // b)
        more = count * b - length
        q, k, v, past_k, past_v = (
            F.pad(t, (0, 0, 0, more)).unflatten(-2, (count, b)) for t in (q, k, v, past_k, past_v)
        )
        real = torch.arange(count * b, device=q.device) < length
        real = (real[None] if mask is None else F.pad(mask, (0, more))).unflatten(1, (count, b))
        past_k, past_v = (F.pad(t[:, :, :-1], (0, 0, 0, 0, 1, 0)) for t in (past_k, past_v))
        before = F.pad(real[:, :-1], (0, 0, 1, 0))
        own = torch.ones(b, b, dtype=torch.bool, device=q.device)
        own = own.tril() if self.causal else own
        seen = torch.cat((before[:, :, None].expand(-1, -1, b, -1), real[:, :, None] & own), -1)[:, None]
        seen = seen | ~seen.any(-1, keepdim=True)
        index = torch.arange(b, device=q.device)
        distance = index[:, None] - torch.cat((index - b, index))
        bias = self.bias(q, distance).masked_fill(~seen, -torch.inf)
        y = F.scaled_dot_product_attention(
            q + self.u[:, None].to(q.dtype), torch.cat((past_k, k), -2), torch.cat((past_v, v), -2), attn_mask=bias
        )
        return y.flatten(2, 3)[:, :, :length]
