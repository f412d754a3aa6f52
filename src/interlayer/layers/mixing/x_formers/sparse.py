"""Sparse attention in patterns of positions: windows, blocks, global tokens, random blocks, gaps."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from interlayer.core.mixer import Attention, attend
from interlayer.layers.mixing.x_formers.refusals import refuse_dense


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
