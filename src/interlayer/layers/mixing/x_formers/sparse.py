"""Sparse attention: patterns of places (sliding window, blocks, global, random, dilated), and patterns that content chooses."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from interlayer.core.mixer import Attention, attend


class BlockSparse(Attention):
    """Attention in blocks: every block of queries gathers a few blocks of keys, so that cost grows linearly with length.

    A subclass says which blocks (``layout``) and, if not all pairs in them, which pairs (``keep``). ``pattern`` is the same as a
    matrix, which is the naive twin; it also serves decoding, where there are few new queries.

    S (c block) scores a head for c key blocks, in place of S^2.

    Args:
        width: Features D.
        heads: Query heads.
        block: Places in a block.
        **options: As for ``Attention``.
    """

    offers: ClassVar[frozenset[str]] = frozenset({"qkv", "share", "cache", "rotate"})

    def __init__(self, width: int, heads: int, *, block: int = 64, **options: Any) -> None:
        super().__init__(width, heads, **options)
        if block < 1:
            raise ValueError(f"{type(self).__name__}: block {block} must be at least 1.")
        self.block = block

    def layout(self, count: int) -> Tensor:
        """[count, c]: the key blocks of each query block, each once; numbers outside 0 .. count - 1 stand for none."""
        return torch.arange(count)[:, None]

    def keep(self, i: Tensor, j: Tensor) -> Tensor:
        """Which pairs of places (query i, key j) may meet, of those in blocks that meet."""
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
        place = torch.arange(count * b, device=q.device).view(count, b)
        i, j = place[:, :, None], place[at].flatten(1)[:, None]  # [n, b, 1], [n, 1, c b]
        seen = there.repeat_interleave(b, 1)[:, None] & self.keep(i, j)
        seen = seen & (j <= i) if self.causal else seen
        seen = seen & real.unflatten(-1, (count, b))[..., at, :].flatten(-2)[..., None, :]
        gathered_k, gathered_v = (t[:, :, at].flatten(3, 4) for t in (k, v))
        # A padding query may see nothing: it sees its own block, and is cut off below.
        blind = ~seen.any(-1, keepdim=True)
        y = F.scaled_dot_product_attention(q, gathered_k, gathered_v, attn_mask=seen | blind)
        return y.flatten(2, 3)[:, :, :length]


class BlockLocal(BlockSparse):
    """Every token sees the block that it lies in, and no other."""


class SlidingWindow(BlockSparse):
    """Band attention: a token sees those less than ``window`` places away (causal: the last ``window``, itself among them).

    Args:
        width: Features D.
        heads: Query heads.
        window: Places.
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
    """A window with gaps: of the ``window x dilation`` places around, a token sees every ``dilation``-th.

    Args:
        width: Features D.
        heads: Query heads.
        window: Places that are seen on a side, itself included.
        dilation: Gap.
        **options: As for ``Attention``.
    """

    def __init__(self, width: int, heads: int, *, window: int = 64, dilation: int = 2, **options: Any) -> None:
        super().__init__(width, heads, window=window, **options)
        if dilation < 1:
            raise ValueError(f"Dilated: dilation {dilation} must be at least 1.")
        self.dilation = dilation

    def pattern(self, new: int, total: int, device: torch.device | None = None) -> Tensor:
        i, j = torch.arange(total - new, total, device=device)[:, None], torch.arange(total, device=device)
        seen = ((i - j) % self.dilation == 0) & ((i - j).abs() < self.block * self.dilation)
        return seen & (j <= i) if self.causal else seen

    def blocks(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        length, d = q.shape[-2], self.dilation
        more = -length % d
        mask = torch.ones(len(q), length, dtype=torch.bool, device=q.device) if mask is None else mask
        if k.shape[1] != q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))

        def comb(t: Tensor) -> Tensor:  # every d-th place becomes a sequence of its own
            t = F.pad(t, (0, 0, 0, more)).unflatten(-2, (-1, d)).movedim(-2, 1)
            return t.flatten(0, 1)

        combed = F.pad(mask, (0, more)).unflatten(1, (-1, d)).transpose(1, 2).flatten(0, 1)
        y = super().blocks(comb(q), comb(k), comb(v), combed)
        return y.unflatten(0, (-1, d)).movedim(1, -2).flatten(2, 3)[:, :, :length]


class GlobalWindow(SlidingWindow):
    """A window, and the first ``tokens`` places, which see and are seen by all (causal: by all later ones).

    Longformer's and ETC's compound pattern (Beltagy et al., arXiv:2004.05150); with ``window=1`` nearly Star-Transformer's.

    Args:
        width: Features D.
        heads: Query heads.
        window: Places.
        tokens: Global places, at most ``window``.
        **options: As for ``Attention``.
    """

    def __init__(self, width: int, heads: int, *, window: int = 64, tokens: int = 1, **options: Any) -> None:
        super().__init__(width, heads, window=window, **options)
        if not 1 <= tokens <= window:
            raise ValueError(f"GlobalWindow: tokens {tokens} must lie between 1 and the window {window}.")
        self.tokens = tokens

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

    The first block sees everything (causal: what is before it). With ``beside=False, first=False`` only random blocks and
    the own one are left: the survey's random attention.

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
        super().__init__(width, heads, **options)
        self.random, self.beside, self.first, self.seed = random, beside, first, seed

    def layout(self, count: int) -> Tensor:
        own = torch.arange(count)[:, None]
        parts = [
            own + torch.tensor((-1, 0, 1) if self.beside and not self.causal else (-1, 0) if self.beside else (0,))
        ]
        if self.first:
            parts.append(torch.zeros_like(own))
        reach = own + 1 if self.causal else torch.full_like(own, count)
        parts.append(_scrambled(own * 7919 + torch.arange(self.random) * 104729 + self.seed * 1299709) % reach)
        layout = torch.cat(parts, 1).sort(1).values
        again = F.pad(layout[:, 1:] == layout[:, :-1], (1, 0))
        return torch.where(again, -1, layout)

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
    """Whole numbers that look random, the same for the same input: a generator could not be made inside a compiled graph."""
    for factor in (2246822519, 3266489917, 668265263):
        x = (x % 2**31 ^ (x % 2**31 >> 15)) * factor % 2**31
    return x ^ (x >> 13)


class Segments(BlockSparse):
    """Segment recurrence: a token sees its own segment and the one before, which gets no gradient through it.

    Transformer-XL's (Dai et al., arXiv:1901.02860) within one pass: layer on layer, what is known reaches one segment
    further back.
    """

    def layout(self, count: int) -> Tensor:
        return torch.arange(count)[:, None] + torch.tensor((-1, 0))

    def blocks(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Own and earlier segment apart, so that only the own one is learned through."""
        length, b = q.shape[-2], self.block
        mask = torch.ones(len(q), length, dtype=torch.bool, device=q.device) if mask is None else mask
        if k.shape[1] != q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        count = -(-length // b)
        more = count * b - length
        q, k, v = (F.pad(t, (0, 0, 0, more)).unflatten(-2, (count, b)) for t in (q, k, v))
        real = F.pad(mask, (0, more)).unflatten(1, (count, b))
        before_k, before_v = (F.pad(t.detach()[:, :, :-1], (0, 0, 0, 0, 1, 0)) for t in (k, v))
        before = F.pad(real[:, :-1], (0, 0, 1, 0))
        own = torch.ones(b, b, dtype=torch.bool, device=q.device)
        own = own.tril() if self.causal else own
        seen = torch.cat((before[:, :, None].expand(-1, -1, b, -1), real[:, :, None] & own), -1)[:, None]
        seen = seen | ~seen.any(-1, keepdim=True)
        y = F.scaled_dot_product_attention(
            q, torch.cat((before_k, k), -2), torch.cat((before_v, v), -2), attn_mask=seen
        )
        return y.flatten(2, 3)[:, :, :length]


class TopK(Attention):
    """Only the ``keep`` highest scores of each query count (explicit sparse Transformer, Zhao et al., arXiv:1912.11637).

    The content chooses; all S^2 scores are computed for it.

    Args:
        width: Features D.
        heads: Query heads.
        keep: Keys that a query sees.
        **options: As for ``Attention``.
    """

    offers: ClassVar[frozenset[str]] = frozenset({"qkv", "share", "cache", "rotate"})

    def __init__(self, width: int, heads: int, *, keep: int = 8, **options: Any) -> None:
        super().__init__(width, heads, **options)
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


class Routing(Attention):
    """Queries and keys near the same centroid meet (Routing Transformer, Roy et al., arXiv:2003.05997).

    Each of c centroids takes the S / c queries and keys that are nearest; in training they move towards these. A token that
    several take gets the mean, one that none takes gets zero. S^2 / c scores a head, S sqrt(S) at c = sqrt(S).
    Who is among the nearest depends on all tokens, so there is no causal form.

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

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        refuse_mask(self, mask)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        take = -(-q.shape[-2] // self.centroids.shape[1])
        close = (self.centroids.to(t.dtype) @ F.normalize(t, dim=-1).transpose(-1, -2) for t in (q, k))
        at_q, at_k = (c.topk(take, -1).indices for c in close)  # [B, H, c, take]
        near_q, near_k = gather(q, at_q), gather(k, at_k)
        y = F.scaled_dot_product_attention(near_q, near_k, gather(v, at_k))
        if self.training:
            with torch.no_grad():
                mean = F.normalize((near_q + near_k).mean((0, 3)), dim=-1)
                self.centroids.lerp_(mean.to(self.centroids.dtype), 1 - self.decay)
        flat = at_q.flatten(2)[..., None]
        summed = torch.zeros_like(q).scatter_add(2, flat.expand(-1, -1, -1, q.shape[-1]), y.flatten(2, 3))
        count = torch.zeros_like(q[..., :1]).scatter_add(2, flat, torch.ones_like(y.flatten(2, 3)[..., :1]))
        return summed / count.clamp(min=1)


def gather(t: Tensor, at: Tensor) -> Tensor:
    """Rows [B, H, c, n, K] of [B, H, S, K] at places [B, H, c, n]."""
    picked = t.gather(2, at.flatten(2)[..., None].expand(-1, -1, -1, t.shape[-1]))
    return picked.unflatten(2, at.shape[2:])


def refuse_causal(mixer: Attention) -> None:
    """Say why there is no causal form."""
    if mixer.causal:
        raise ValueError(
            f"{type(mixer).__name__}: what a token sees depends on all tokens, so there is no causal form; "
            "use it in an encoder or a vision Transformer."
        )


def refuse_mask(mixer: Attention, mask: Tensor | None) -> None:
    """Say that padding cannot be left out."""
    if mask is not None:
        raise ValueError(f"{type(mixer).__name__}: takes no padding mask; give sequences of one length.")
