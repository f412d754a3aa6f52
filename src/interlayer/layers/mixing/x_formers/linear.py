"""Linearised attention: the softmax replaced by a product of features, so that keys and values meet first."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.core.mixer import Attention

CHUNK = 64  # tokens whose scores are written out in the causal form


class Linear(Attention):
    """``phi(q) (phi(k)' v) / (phi(q) sum phi(k))`` with ``phi(x) = elu(x) + 1`` (Katharopoulos et al., arXiv:2006.16236).

    S K^2 multiply-adds a head. The causal form runs in chunks: sums over earlier chunks, scores within a chunk.

    Args:
        width: Features D.
        heads: Query heads.
        **options: As for ``Attention``.
    """

    offers: ClassVar[frozenset[str]] = frozenset({"qkv", "share", "cache", "rotate"})

    def features(self, x: Tensor, shift: tuple[int, ...] = ()) -> Tensor:
        """phi, of queries or keys; a factor that is constant along the dimensions ``shift`` cancels in the quotient."""
        return F.elu(x.contiguous()) + 1  # elu's compiled gradient mistakes the strides of a transposed input

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        # A factor of a key's own would not cancel, and one taken from later keys would let the future in by underflow.
        fq, fk = self.features(q, (-1,)), self.features(k, () if self.causal else (-2, -1))
        if mask is not None:
            fk = fk * mask[:, None, :, None]
        v = torch.cat((v, torch.ones_like(v[..., :1])), -1)  # the last column becomes the denominator
        if not self.causal or q.shape[-2] == 1:
            y = fq @ (fk.transpose(-1, -2) @ v)
        elif q.shape[-2] != k.shape[-2]:
            y = naive(fq, fk, v)
        else:
            y = causal_product(fq, fk, v)
        return y[..., :-1] / y[..., -1:].clamp(min=torch.finfo(y.dtype).tiny)


def naive(fq: Tensor, fk: Tensor, v: Tensor) -> Tensor:
    """The causal product with all scores written out; the last query sees all keys."""
    new, total = fq.shape[-2], fk.shape[-2]
    past = torch.ones(new, total, dtype=torch.bool, device=fq.device).tril(total - new)
    return (fq @ fk.transpose(-1, -2)).masked_fill(~past, 0) @ v


def causal_product(fq: Tensor, fk: Tensor, v: Tensor) -> Tensor:
    """``naive`` in time linear in the length."""
    length = fq.shape[-2]
    more = -length % CHUNK
    fq, fk, v = (F.pad(t, (0, 0, 0, more)).unflatten(-2, (-1, CHUNK)) for t in (fq, fk, v))
    sums = (fk.transpose(-1, -2) @ v).cumsum(2)
    before = F.pad(sums[:, :, :-1], (0, 0, 0, 0, 1, 0))
    within = (fq @ fk.transpose(-1, -2)).tril() @ v
    return (within + fq @ before).flatten(2, 3)[..., :length, :]


class Performer(Linear):
    """Positive random features that approximate the softmax without bias (FAVOR+; Choromanski et al., arXiv:2009.14794).

    ``phi(x) = exp(W x - |x|^2 / 2) / sqrt(m)`` for x scaled by K^(-1/4), with the rows of W orthogonal Gaussians; shifts that
    cancel keep the exponents small.

    Args:
        width: Features D.
        heads: Query heads.
        count: Random features m; ``2 K`` unless told.
        **options: As for ``Attention``.
    """

    directions: Tensor

    def __init__(self, width: int, heads: int, *, count: int | None = None, **options: Any) -> None:
        super().__init__(width, heads, **options)
        rows = count or 2 * self.head_width
        parts = [
            torch.linalg.qr(torch.randn(self.head_width, self.head_width))[0]
            for _ in range(-(-rows // self.head_width))
        ]
        lengths = torch.randn(rows, self.head_width).norm(dim=1, keepdim=True)
        self.register_buffer("directions", torch.cat(parts)[:rows] * lengths)

    def features(self, x: Tensor, shift: tuple[int, ...] = ()) -> Tensor:
        x = x * self.head_width**-0.25
        power = x @ self.directions.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2
        if shift:
            power = power - power.detach().amax(shift, keepdim=True)
        return power.exp() / math.sqrt(len(self.directions))


class Delta(Attention):
    """The delta rule in place of plain sums: a key's old value is taken out before the new one is written.

    Fast weight programmers (Schlag et al., "Linear Transformers Are Secretly Fast Weight Programmers", arXiv:2102.11174):
    ``M_t = M_{t-1} + b_t (v_t - M_{t-1} k_t) k_t'``, ``y_t = M_t q_t`` with keys of length 1 and a learned rate b_t in (0, 1).
    Solved chunk by chunk with one triangular system each: S C K + S K^2 multiply-adds a head, a loop over S / C chunks.

    Args:
        width: Features D.
        heads: Heads.
        **options: As for ``Attention``.

    Raises:
        ValueError: A model that is not causal, padding, or fewer key-value heads.
    """

    offers: ClassVar[frozenset[str]] = frozenset({"qkv", "share", "rotate"})

    def __init__(self, width: int, heads: int, **options: Any) -> None:
        super().__init__(width, heads, **options)
        if not self.causal or self.kv_heads != heads:
            raise ValueError(
                "Delta: writes in the order of the tokens, one memory a head; it needs a causal model and no kv_heads."
            )
        self.rate = nn.Linear(self.head_width, 1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            raise ValueError("Delta: takes no padding mask; give sequences of one length.")
        length = q.shape[-2]
        rate = torch.sigmoid(self.rate(k))
        k, q = (F.normalize(F.elu(t) + 1, p=1.0, dim=-1) for t in (k, q))
        k = F.normalize(k, dim=-1)
        more = -length % CHUNK
        qs, ks, vs, bs = (F.pad(t, (0, 0, 0, more)).unflatten(-2, (-1, CHUNK)) for t in (q, k, v, rate))
        memory = torch.zeros_like(qs[:, :, 0, :1]).transpose(-1, -2) @ torch.zeros_like(vs[:, :, 0, :1])  # [B, H, K, V]
        eye = torch.eye(CHUNK, dtype=q.dtype, device=q.device)
        out = []
        for n in range(qs.shape[2]):
            cq, ck, cv, cb = qs[:, :, n], ks[:, :, n], vs[:, :, n], bs[:, :, n]
            system = eye + (cb * (ck @ ck.transpose(-1, -2))).tril(-1)
            new = torch.linalg.solve_triangular(
                system.float(), (cb * (cv - ck @ memory)).float(), upper=False, unitriangular=True
            )
            new = new.to(v.dtype)
            out.append(cq @ memory + (cq @ ck.transpose(-1, -2)).tril() @ new)
            memory = memory + ck.transpose(-1, -2) @ new
        return torch.cat(out, -2)[..., :length, :]
