"""Linearised attention: a product of features in place of the softmax, so that keys and values meet first."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from interlayer.core.mixer import Attention, Context
from interlayer.core.parts import Linear as MakeLinear
from interlayer.core.parts import plain_linear
from interlayer.core.position import Position
from interlayer.core.stream import QKV

CHUNK = 64  # tokens whose scores are written out in the causal form


class Late(Attention, ABC):
    """What mixers share that rotate by positions after they have made features: ``mix`` gets the position too."""

    def place(self, q: Tensor, k: Tensor, position: Position | None, offset: int) -> tuple[Tensor, Tensor]:
        """Cache keys as they are."""
        return q, k

    def read(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Hand the position on."""
        return self.mix(q, k, v, context.mask, context.position)

    @abstractmethod
    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, position: Position | None = None
    ) -> Tensor:
        """What each head reads, [B, H, new, K]."""


def elu_plus_one(x: Tensor) -> Tensor:
    """``elu(x) + 1``, positive features."""
    return F.elu(x.contiguous()) + 1  # elu's compiled gradient mistakes the strides of a transposed input


class Kernel(Attention, ABC):
    """``phi(q) (phi(k)' v) / (phi(q) sum phi(k))``: what mixers with features phi share.

    The causal form runs in chunks: sums over earlier chunks, scores within a chunk.
    """

    offers: ClassVar[frozenset[str]] = frozenset({"qkv", "share", "cache", "rotate"})

    @abstractmethod
    def features(self, x: Tensor, shift: tuple[int, ...] = ()) -> Tensor:
        """phi, of queries or keys; a factor that is constant along the dimensions ``shift`` cancels in the quotient."""

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, position: Position | None = None
    ) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        # A factor of a key's own would not cancel, and one taken from later keys would let the future in by underflow.
        fq, fk = self.features(q, (-1,)), self.features(k, () if self.causal else (-2, -1))
        if mask is not None:
            fk = fk * mask[:, None, :, None]
        ones = torch.ones_like(v[..., :1])
        if position is None or "rotate" not in position.needs:
            y = self.product(fq, fk, torch.cat((v, ones), -1))
            y, total = y[..., :-1], y[..., -1:]
        else:
            y, total = self.product(*position.rotate(fq, fk), v), self.product(fq, fk, ones)
        return y / total.clamp(min=torch.finfo(y.dtype).tiny)

    def product(self, fq: Tensor, fk: Tensor, v: Tensor) -> Tensor:
        """``fq fk' v`` over the keys that each query sees."""
        if not self.causal or fq.shape[-2] == 1:
            return fq @ (fk.transpose(-1, -2) @ v)
        return (naive if fq.shape[-2] != fk.shape[-2] else causal_product)(fq, fk, v)


class Linear(Kernel, Late):
    """Linear attention with ``phi(x) = elu(x) + 1`` (Katharopoulos et al., arXiv:2006.16236, equation 7).

    Rotary positions act after the features, in the numerator alone (RoFormer, arXiv:2104.09864, equation 19), so that what a
    query reads depends on distances. S K^2 multiply-adds a head. Its arguments are those of ``Attention``.
    """

    def features(self, x: Tensor, shift: tuple[int, ...] = ()) -> Tensor:
        return elu_plus_one(x)


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


class Performer(Kernel):
    """Positive random features that approximate the softmax without bias (FAVOR+; Choromanski et al., arXiv:2009.14794).

    ``phi(x) = exp(W x - |x|^2 / 2) / sqrt(m)`` for x scaled by K^(-1/4), with the rows of W orthogonal Gaussians; shifts that
    cancel keep the exponents small. Rotary positions act before the features, which then approximate the softmax of rotated
    queries and keys.

    Args:
        width: Features D.
        heads: Query heads.
        count: Random features m. Defaults to ``2 K``.
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


class Delta(Late):
    """The delta rule in place of plain sums: a key's old value is taken out before the new one is written.

    Fast weight programmers (Schlag et al., "Linear Transformers Are Secretly Fast Weight Programmers", arXiv:2102.11174,
    equations 21 to 26): ``M_t = M_{t-1} + b_t (v_t - M_{t-1} k_t) k_t'``, ``y_t = M_t q_t`` with features ``elu + 1`` of keys and queries
    divided by their sum and a rate ``b_t = sigmoid(W x_t)``. Rotary positions act after that, so that products depend on
    distances. Solved chunk by chunk with one triangular system each: S C K + S K^2 multiply-adds a head, a loop over S / C
    chunks.

    Args:
        width: Features D.
        heads: Heads.
        linear: Called with ``inputs=, outputs=``.
        **options: As for ``Attention``.

    Raises:
        ValueError: A model that is not causal, padding, or fewer key-value heads.
    """

    offers: ClassVar[frozenset[str]] = frozenset({"qkv", "share", "rotate"})

    def __init__(self, width: int, heads: int, *, linear: MakeLinear = plain_linear, **options: Any) -> None:
        super().__init__(width, heads, linear=linear, **options)
        if not self.causal or self.kv_heads != heads:
            raise ValueError(
                "Delta: writes in the order of the tokens, one memory a head; it needs a causal model and no kv_heads."
            )
        self.rate = linear(inputs=width, outputs=heads)

    def project(self, x: Tensor | QKV) -> list[Tensor]:
        """Queries, keys with the logit of their rate as a further feature, and values."""
        q, k, *v = super().project(x)
        rate = self.rate(x.k if isinstance(x, QKV) else x).transpose(1, 2)[..., None]
        return [q, torch.cat((k, rate), -1), *v]

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, position: Position | None = None
    ) -> Tensor:
        if mask is not None:
            raise ValueError("Delta: takes no padding mask; give sequences of one length.")
        length = q.shape[-2]
        k, rate = k[..., :-1], torch.sigmoid(k[..., -1:])
        q, k = (F.normalize(elu_plus_one(t), p=1.0, dim=-1) for t in (q, k))
        if position is not None:
            q, k = position.rotate(q, k)
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
