"""Sparse attention whose pattern the content chooses: the highest scores, centroids, hashes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from interlayer.core.mixer import Attention, attend
from interlayer.core.parts import Linear, plain_linear
from interlayer.core.position import Position
from interlayer.core.stream import QKV
from interlayer.layers.mixing.x_formers.linear import Late
from interlayer.layers.mixing.x_formers.refusals import refuse_causal, refuse_dense, refuse_mask


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
            raise ValueError(f"Hashed: buckets {buckets}; expected an even number of at least 2.")
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


def gather(t: Tensor, at: Tensor) -> Tensor:
    """Rows [B, H, c, n, K] of [B, H, S, K] at indices [B, H, c, n]."""
    picked = t.gather(2, at.flatten(2)[..., None].expand(-1, -1, -1, t.shape[-1]))
    return picked.unflatten(2, at.shape[2:])
