"""Sparse attention: patterns of positions (window, blocks, global, random, dilated, axes), and patterns that content chooses."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.mixer import Attention, Context, attend
from interlayer.core.parts import Linear, plain_linear
from interlayer.core.position import Position
from interlayer.core.stream import QKV
from interlayer.layers.mixing.x_formers.linear import Late


class BlockSparse(Attention):
    """Attention in blocks: every block of queries gathers a few blocks of keys, so that cost grows linearly with length.

    A subclass says which blocks (``layout``) and, if not all pairs in them, which pairs (``keep``). ``pattern`` is the same as a
    matrix, which is the naive twin; it also serves decoding, where there are few new queries.

    S (c block) scores a head for c key blocks, in place of S^2. An input that is shorter than the pattern's reach is
    attended to densely, which is what the pattern says; a model whose longest input is that short is refused.

    Args:
        width: Features D.
        heads: Query heads.
        block: Positions in a block.
        length: Longest sequence, if known.
        **options: As for ``Attention``.

    Raises:
        ValueError: A pattern that is dense at ``length``.
    """

    offers: ClassVar[frozenset[str]] = frozenset({"qkv", "share", "cache", "rotate"})

    def __init__(self, width: int, heads: int, *, block: int = 64, length: int | None = None, **options: Any) -> None:
        super().__init__(width, heads, **options)
        if block < 1:
            raise ValueError(f"{type(self).__name__}: block {block} must be at least 1.")
        self.block = block
        if length is not None and self.dense(length):
            refuse_dense(self, length)

    def dense(self, length: int) -> bool:
        """Whether the pattern leaves no pair out at a length."""
        with torch.device("cpu"):
            count = -(-length // self.block)
            if count > self.layout(count).shape[1]:
                return False
            seen = self.pattern(length, length)
            return bool((seen | (torch.ones_like(seen).triu(1) & self.causal)).all())

    def layout(self, count: int) -> Tensor:
        """[count, c]: the key blocks of each query block, each once; numbers outside 0 .. count - 1 stand for none."""
        return torch.arange(count)[:, None]

    def keep(self, i: Tensor, j: Tensor) -> Tensor:
        """Which pairs of positions (query i, key j) may meet, of those in blocks that meet."""
        return torch.ones((), dtype=torch.bool, device=i.device)

    def pattern(self, new: int, total: int, device: torch.device | None = None) -> Tensor:
        """Which of ``total`` keys each of the last ``new`` queries sees."""
        count = -(-total // self.block)
        layout = self.layout(count).to(device)
        near = torch.zeros(count, count + 1, dtype=torch.bool, device=device)
        near.scatter_(1, torch.where((layout < 0) | (layout >= count), count, layout), True)
        i, j = torch.arange(total - new, total, device=device)[:, None], torch.arange(total, device=device)
        seen = near[i // self.block, j // self.block] & self.keep(i, j)
        return seen & (j <= i) if self.causal else seen

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if q.shape[-2] != k.shape[-2]:
            seen = self.pattern(q.shape[-2], k.shape[-2], q.device)
            return attend(q, k, v, causal=False, mask=mask, allowed=seen)
        return self.blocks(q, k, v, mask)

    def blocks(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """The fast path: [B, H, S, K] for equally many queries and keys."""
        return self.gathered(q, k, v, mask)

    def gathered(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, beside: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Every block of queries with its blocks of keys, and with further keys and values ``beside`` that all queries see."""
        length, b = q.shape[-2], self.block
        count = -(-length // b)
        if k.shape[1] != q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        real = torch.arange(count * b, device=q.device) < length
        real = real if mask is None else real & F.pad(mask, (0, count * b - length))[:, None]  # [B, 1, S] or [S]
        q, k, v = (F.pad(t, (0, 0, 0, count * b - length)).unflatten(-2, (count, b)) for t in (q, k, v))
        layout = self.layout(count).to(q.device)
        there = (layout >= 0) & (layout < count)
        at = layout.clamp(0, count - 1)
        index = torch.arange(count * b, device=q.device).view(count, b)
        i, j = index[:, :, None], index[at].flatten(1)[:, None]  # [n, b, 1], [n, 1, c b]
        seen = there.repeat_interleave(b, 1)[:, None] & self.keep(i, j)
        seen = seen & (j <= i) if self.causal else seen
        seen = seen & real.unflatten(-1, (count, b))[..., at, :].flatten(-2)[..., None, :]
        gathered_k, gathered_v = (t[:, :, at].flatten(3, 4) for t in (k, v))
        if beside is not None:
            gathered_k, gathered_v = (
                torch.cat((t, more[:, :, None].expand(-1, -1, count, -1, -1)), 3)
                for t, more in zip((gathered_k, gathered_v), beside, strict=True)
            )
            seen = F.pad(seen, (0, beside[0].shape[-2]), value=True)
        # A padding query may see nothing: it sees its own block, and is cut off below.
        blind = ~seen.any(-1, keepdim=True)
        y = F.scaled_dot_product_attention(q, gathered_k, gathered_v, attn_mask=seen | blind)
        return y.flatten(2, 3)[:, :, :length]


class BlockLocal(BlockSparse):
    """Every token sees the block that it lies in, and no other."""


class SlidingWindow(BlockSparse):
    """Band attention: a token sees those less than ``window`` positions away (causal: the last ``window``, itself among them).

    Args:
        width: Features D.
        heads: Query heads.
        window: Positions.
        **options: As for ``Attention``.
    """

    def __init__(self, width: int, heads: int, *, window: int = 64, **options: Any) -> None:
        super().__init__(width, heads, block=window, **options)

    def layout(self, count: int) -> Tensor:
        around = (-1, 0) if self.causal else (-1, 0, 1)
        return torch.arange(count)[:, None] + torch.tensor(around)

    def keep(self, i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs() < self.block


class Dilated(SlidingWindow):
    """A window with gaps: of the ``window x dilation`` positions around, a token sees every ``dilation``-th.

    Args:
        width: Features D.
        heads: Query heads.
        window: Positions that are seen on a side, itself included.
        dilation: Gap.
        **options: As for ``Attention``.
    """

    def __init__(self, width: int, heads: int, *, window: int = 64, dilation: int = 2, **options: Any) -> None:
        if dilation < 1:
            raise ValueError(f"Dilated: dilation {dilation} must be at least 1.")
        self.dilation = dilation  # before the base asks for the pattern
        super().__init__(width, heads, window=window, **options)

    def pattern(self, new: int, total: int, device: torch.device | None = None) -> Tensor:
        i, j = torch.arange(total - new, total, device=device)[:, None], torch.arange(total, device=device)
        seen = ((i - j) % self.dilation == 0) & ((i - j).abs() < self.block * self.dilation)
        return seen & (j <= i) if self.causal else seen

    def blocks(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        length, d = q.shape[-2], self.dilation
        more = -length % d
        mask = torch.ones(q.shape[0], length, dtype=torch.bool, device=q.device) if mask is None else mask
        if k.shape[1] != q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))

        def comb(t: Tensor) -> Tensor:  # every d-th position becomes a sequence of its own
            t = F.pad(t, (0, 0, 0, more)).unflatten(-2, (-1, d)).movedim(-2, 1)
            return t.flatten(0, 1)

        combed = F.pad(mask, (0, more)).unflatten(1, (-1, d)).transpose(1, 2).flatten(0, 1)
        y = super().blocks(comb(q), comb(k), comb(v), combed)
        return y.unflatten(0, (-1, d)).movedim(1, -2).flatten(2, 3)[:, :, :length]


class GlobalWindow(SlidingWindow):
    """A window, and the first ``tokens`` positions, which see and are seen by all (causal: by all later ones).

    Longformer's compound pattern (Beltagy et al., arXiv:2004.05150); ``window=1`` leaves the global tokens alone.

    Args:
        width: Features D.
        heads: Query heads.
        window: Positions.
        tokens: Global positions, at most ``window``.
        **options: As for ``Attention``.
    """

    def __init__(self, width: int, heads: int, *, window: int = 64, tokens: int = 1, **options: Any) -> None:
        if not 1 <= tokens <= window:
            raise ValueError(f"GlobalWindow: tokens {tokens} must lie between 1 and the window {window}.")
        self.tokens = tokens  # before the base asks for the pattern
        super().__init__(width, heads, window=window, **options)

    def layout(self, count: int) -> Tensor:
        near = super().layout(count)
        first = torch.where((near == 0).any(1, keepdim=True), -1, 0)  # block 0 once
        return torch.cat((near, first), 1)

    def keep(self, i: Tensor, j: Tensor) -> Tensor:
        return super().keep(i, j) | (j < self.tokens)

    def pattern(self, new: int, total: int, device: torch.device | None = None) -> Tensor:
        seen = super().pattern(new, total, device)
        if not self.causal:
            seen[: max(0, self.tokens - (total - new))] = True
        return seen

    def blocks(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().blocks(q, k, v, mask)
        if self.causal:
            return y
        whole = attend(q[:, :, : self.tokens], k, v, causal=False, mask=mask)
        return torch.cat((whole, y[:, :, self.tokens :]), 2)


class BigBird(BlockSparse):
    """Blocks beside, the first block, and blocks at random (Zaheer et al., arXiv:2007.14062), drawn once from ``seed``.

    Random blocks are drawn without repetition from those that are not seen anyway. The first block sees everything (causal: what
    is before it). With ``beside=False, first=False`` only random blocks and the own one are left: the survey's random
    attention.

    Args:
        width: Features D.
        heads: Query heads.
        random: Random blocks for each block of queries.
        beside: Whether neighbouring blocks are seen.
        first: Whether the first block is global.
        seed: Of the random blocks; in a causal model they are the same at every length, as decoding needs.
        **options: As for ``BlockSparse``.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        random: int = 2,
        beside: bool = True,
        first: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        # before the base asks for the pattern
        self.random, self.beside, self.first, self.seed = random, beside, first, seed
        super().__init__(width, heads, **options)

    def layout(self, count: int) -> Tensor:
        own = torch.arange(count)[:, None]
        around = (0,) if not self.beside else (-1, 0) if self.causal else (-1, 0, 1)
        near = torch.cat((own + torch.tensor(around), *([torch.zeros_like(own)] if self.first else [])), 1)
        reach = own + 1 if self.causal else torch.full_like(own, count)
        near = torch.where((near < 0) | (near >= reach), count, near).sort(1).values  # count stands for none
        taken = torch.where(F.pad(near[:, 1:] == near[:, :-1], (1, 0)), count, near)
        for draw in range(self.random):
            room = reach - (taken < count).sum(1, keepdim=True)
            one = _scrambled(own * 7919 + draw * 104729 + self.seed * 1299709) % room.clamp(min=1)
            for block in taken.sort(1).values.split(1, 1):  # number ``one`` of those that are free
                one = one + (one >= block)
            taken = torch.cat((taken, torch.where(room > 0, one, count)), 1)
        return torch.where(taken < count, taken, -1)

    def pattern(self, new: int, total: int, device: torch.device | None = None) -> Tensor:
        seen = super().pattern(new, total, device)
        if self.first and not self.causal:
            seen[: max(0, self.block - (total - new))] = True
        return seen

    def blocks(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().blocks(q, k, v, mask)
        if self.causal or not self.first:
            return y
        whole = attend(q[:, :, : self.block], k, v, causal=False, mask=mask)
        return torch.cat((whole, y[:, :, self.block :]), 2)


def _scrambled(x: Tensor) -> Tensor:
    """Integers that look random, the same for the same input: a compiled graph can make no generator."""
    for factor in (2246822519, 3266489917, 668265263):
        x = (x % 2**31 ^ (x % 2**31 >> 15)) * factor % 2**31
    return x ^ (x >> 13)


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
            raise ValueError(f"Axial: rows of {self.row} in a grid {grid}; wanted more than one row and column.")

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
            raise ValueError(f"Segments: block {block}, width {width}; wanted at least 1, and an even width.")
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


class TopK(Attention):
    """Only the ``keep`` highest scores of each query count (explicit sparse Transformer, Zhao et al., arXiv:1912.11637).

    The content chooses; all S^2 scores are computed for it.

    Args:
        width: Features D.
        heads: Query heads.
        keep: Keys that a query sees.
        length: Longest sequence, if known.
        **options: As for ``Attention``.

    Raises:
        ValueError: A ``length`` of at most ``keep``.
    """

    offers: ClassVar[frozenset[str]] = frozenset({"qkv", "share", "cache", "rotate"})

    def __init__(self, width: int, heads: int, *, keep: int = 8, length: int | None = None, **options: Any) -> None:
        super().__init__(width, heads, **options)
        if length is not None and length <= keep:
            refuse_dense(self, length)
        self.keep = keep

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            new, total = q.shape[-2], k.shape[-2]
            wide = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            score = q @ wide.transpose(-1, -2)
            if self.causal:
                past = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
                score = score.masked_fill(~past, -torch.inf)
            if mask is not None:
                score = score.masked_fill(~mask[:, None, None], -torch.inf)
            least = score.topk(min(self.keep, total), -1).values[..., -1:]
        return attend(q, k, v, causal=self.causal, mask=mask, allowed=score >= least)


class Routing(Late):
    """Queries and keys near the same centroid meet (Routing Transformer, Roy et al., arXiv:2003.05997).

    Each of c centroids takes the S / c queries and keys that are nearest; in training they move towards these. A token that
    several take gets the mean, one that none takes gets zero. S^2 / c scores a head, S sqrt(S) at c = sqrt(S).
    Who is among the nearest depends on all tokens, so there is no causal form. Positions do not move tokens between centroids.

    Args:
        width: Features D.
        heads: Query heads.
        clusters: Centroids c.
        decay: Of the centroids' moving average.
        **options: As for ``Attention``.

    Raises:
        ValueError: A causal model, or padding.
    """

    offers: ClassVar[frozenset[str]] = frozenset({"qkv", "share", "rotate"})
    centroids: Tensor

    def __init__(self, width: int, heads: int, *, clusters: int = 8, decay: float = 0.999, **options: Any) -> None:
        super().__init__(width, heads, **options)
        refuse_causal(self)
        self.decay = decay
        start = torch.randn(heads, clusters, self.head_width)
        self.register_buffer("centroids", F.normalize(start, dim=-1))

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, position: Position | None = None
    ) -> Tensor:
        refuse_mask(self, mask)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        take = -(-q.shape[-2] // self.centroids.shape[1])
        close = (self.centroids.to(t.dtype) @ F.normalize(t, dim=-1).transpose(-1, -2) for t in (q, k))
        at_q, at_k = (c.topk(take, -1).indices for c in close)  # [B, H, c, take]
        near_q, near_k = gather(q, at_q), gather(k, at_k)
        asks, keys = (q, k) if position is None else position.rotate(q, k)
        y = F.scaled_dot_product_attention(gather(asks, at_q), gather(keys, at_k), gather(v, at_k))
        if self.training:
            with torch.no_grad():
                mean = F.normalize((near_q + near_k).mean((0, 3)), dim=-1)
                self.centroids.lerp_(mean.to(self.centroids.dtype), 1 - self.decay)
        flat = at_q.flatten(2)[..., None]
        summed = torch.zeros_like(q).scatter_add(2, flat.expand(-1, -1, -1, q.shape[-1]), y.flatten(2, 3))
        count = torch.zeros_like(q[..., :1]).scatter_add(2, flat, torch.ones_like(y.flatten(2, 3)[..., :1]))
        return summed / count.clamp(min=1)


class Hashed(Attention):
    """Queries meet the keys that fall into their bucket (LSH attention; Reformer, Kitaev et al., arXiv:2001.04451, section 2).

    Queries and keys are one projection, ``k = q / |q|``. A vector's bucket is ``argmax([x R; -x R])`` for a random rotation
    R. Tokens are sorted by bucket and cut into chunks of ``2 S / buckets``; a query sees those of its own bucket in its
    own chunk and in the one before, and itself only if there is no other. ``rounds`` of hashing are joined as one softmax over
    the union. S rounds 4 S / buckets scores a head.

    Where a chunk ends depends on later tokens too. A causal model therefore has no chunks: a query sees all earlier tokens of
    its bucket (equation 4), at S^2 scores a head.

    Args:
        width: Features D.
        heads: Heads.
        buckets: How many, even.
        rounds: Independent rotations.
        causal: Whether a token sees only earlier ones.
        linear: Called with ``inputs=, outputs=``.

    Raises:
        ValueError: Padding, or an odd number of buckets.

    Examples:
        >>> Hashed(8, heads=2, buckets=4)(torch.randn(1, 9, 8)).shape
        torch.Size([1, 9, 8])
    """

    offers: ClassVar[frozenset[str]] = frozenset({"cache"})
    rotations: Tensor

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        buckets: int = 8,
        rounds: int = 2,
        causal: bool = False,
        linear: Linear = plain_linear,
    ) -> None:
        super().__init__(width, heads, causal=causal, values=False, linear=linear)
        if buckets < 2 or buckets % 2:
            raise ValueError(f"Hashed: buckets {buckets}; wanted an even number of at least 2.")
        self.buckets = buckets
        self.register_buffer("rotations", torch.randn(rounds, self.head_width, buckets // 2))

    def project(self, x: Tensor | QKV) -> list[Tensor]:
        q, v = super().project(x)
        return [q, F.normalize(q, dim=-1), v]

    def bucket(self, q: Tensor) -> Tensor:
        """The bucket of each query in each round, [B, H, rounds, S]."""
        turned = torch.einsum("bhsk,rkn->bhrsn", q.detach(), self.rotations.to(q.dtype))
        return torch.cat((turned, -turned), -1).argmax(-1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        refuse_mask(self, mask)
        return self.past(q, k, v) if self.causal else self.chunks(q, k, v)

    def past(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention to all earlier tokens that share a bucket in some round."""
        new, total = q.shape[-2], k.shape[-2]
        i, j = torch.arange(total - new, total, device=q.device)[:, None], torch.arange(total, device=q.device)
        met = (self.bucket(q)[..., :, None] == self.bucket(k)[..., None, :]).any(2) & (j < i)
        return attend(q, k, v, causal=False, allowed=met | ((i == j) & ~met.any(-1, keepdim=True)))

    def chunks(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention within sorted chunks, round by round."""
        length = q.shape[-2]
        size = -(-2 * length // self.buckets)
        count = -(-length // size)
        bucket = self.bucket(q)
        order = (bucket * length + torch.arange(length, device=q.device)).argsort(-1)
        chunk = order.argsort(-1) // size  # of every token in every round
        # Chunks of tokens, the last filled up with index S, which stands for nobody.
        token = F.pad(order, (0, count * size - length), value=length).unflatten(-1, (count, size))
        near = torch.cat((F.pad(token[..., :-1, :], (0, 0, 1, 0), value=length), token), -1)  # [B, H, R, c, 2 size]

        def rows(t: Tensor, at: Tensor) -> Tensor:  # [B, H, S, *] at [B, H, R, c, n] gives [B, H, R, c, n, *]
            t = F.pad(t, (0, 0, 0, 1))
            return t.gather(2, at.flatten(2)[..., None].expand(-1, -1, -1, t.shape[-1])).unflatten(2, at.shape[2:])

        # In how many rounds each of these pairs meets: it counts once in the union.
        chunk, bucket = chunk.transpose(2, 3), bucket.transpose(2, 3)  # [B, H, S, R]
        step = rows(chunk, token)[..., :, None, :] - rows(chunk, near)[..., None, :, :]
        met = (rows(bucket, token)[..., :, None, :] == rows(bucket, near)[..., None, :, :]) & (step >= 0) & (step <= 1)
        times = met.sum(-1)
        here = torch.diagonal(met.movedim(-1, 2), dim1=2, dim2=3).movedim(-1, 2)  # met in this very round
        score = rows(q, token) @ rows(k, near).transpose(-1, -2) * q.shape[-1] ** -0.5 - times.clamp(min=1).log()
        score = score.masked_fill(~here | (near == length)[..., None, :], -torch.inf)
        score = torch.where(token[..., :, None] == near[..., None, :], -1e5, score)  # itself, if there is no other
        total = score.logsumexp(-1, keepdim=True)
        y = (score - total).exp() @ rows(v, near)
        back = order.argsort(-1)[..., None]  # where each token stands in the sorted sequence
        y, total = (t.flatten(3, 4).gather(3, back.expand(*back.shape[:-1], t.shape[-1])) for t in (y, total))
        return (total.softmax(2) * y).sum(2)


def refuse_dense(mixer: Attention, length: int) -> None:
    """Raise because nothing is left out at the longest input."""
    raise ValueError(
        f"{type(mixer).__name__}: every token sees all others up to the model's length {length}, so nothing is sparse. Take a "
        "smaller window, block or number of keys, or mixer='attention'."
    )


def gather(t: Tensor, at: Tensor) -> Tensor:
    """Rows [B, H, c, n, K] of [B, H, S, K] at indices [B, H, c, n]."""
    picked = t.gather(2, at.flatten(2)[..., None].expand(-1, -1, -1, t.shape[-1]))
    return picked.unflatten(2, at.shape[2:])


def refuse_causal(mixer: Attention) -> None:
    """Raise in a causal model: the mixer has no causal form."""
    if mixer.causal:
        raise ValueError(
            f"{type(mixer).__name__}: what a token sees depends on all tokens, so there is no causal form; "
            "use it in an encoder or a vision Transformer."
        )


def refuse_mask(mixer: Attention, mask: Tensor | None) -> None:
    """Raise if there is padding, which the mixer cannot leave out."""
    if mask is not None:
        raise ValueError(f"{type(mixer).__name__}: takes no padding mask; give sequences of one length.")
