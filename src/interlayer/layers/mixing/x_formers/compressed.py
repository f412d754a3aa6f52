"""Fewer queries, fewer keys, or fewer dimensions: prototypes, compressed memories, inducing points, low rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.core.mixer import Attention, attend
from interlayer.core.parts import Linear, plain_linear
from interlayer.core.position import Position
from interlayer.core.stream import QKV
from interlayer.layers.mixing.x_formers.refusals import refuse_causal, refuse_mask
from interlayer.layers.mixing.x_formers.sparse import SlidingWindow


class Whole(Attention, ABC):
    """What the mixers of this file share: they see the whole sequence, without padding."""

    offers: ClassVar[frozenset[str]] = frozenset({"qkv", "share", "rotate"})

    def __init__(self, width: int, heads: int, **options: Any) -> None:
        super().__init__(width, heads, **options)
        refuse_causal(self)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        refuse_mask(self, mask)
        return self.reduced(q, *(t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v)))

    @abstractmethod
    def reduced(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The cheaper attention, over equally many heads."""


class Clustered(Whole):
    """Queries are grouped by k-means; a group reads once, through its mean (Vyas et al., arXiv:2007.04825).

    c S scores a head and ``rounds`` times as many for the grouping.

    Args:
        width: Features D.
        heads: Query heads.
        clusters: Groups c.
        rounds: Lloyd iterations, from evenly spaced queries.
        **options: As for ``Attention``.
    """

    def __init__(self, width: int, heads: int, *, clusters: int = 16, rounds: int = 3, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.clusters, self.rounds = clusters, rounds

    def groups(self, q: Tensor) -> Tensor:
        """The group [B, H, S] of each query."""
        count = min(self.clusters, q.shape[-2])
        with torch.no_grad():
            at = torch.linspace(0, q.shape[-2] - 1, count, device=q.device).round().long()
            centre = q[:, :, at]
            for _ in range(self.rounds):
                nearest = torch.cdist(q.float(), centre.float()).argmin(-1)
                centre = self.means(q, nearest, count)
            return torch.cdist(q.float(), centre.float()).argmin(-1)

    def means(self, q: Tensor, group: Tensor, count: int) -> Tensor:
        """The mean query [B, H, c, K] of each group; zero for an empty one."""
        member = F.one_hot(group, count).to(q.dtype)
        return member.transpose(-1, -2) @ q / member.sum(-2)[..., None].clamp(min=1)

    def reduced(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = self.groups(q)
        y = F.scaled_dot_product_attention(self.means(q, group, min(self.clusters, q.shape[-2])), k, v)
        return y.gather(2, group[..., None].expand(-1, -1, -1, y.shape[-1]))


class Compressed(Attention):
    """Keys and values of every ``ratio`` tokens become one by a learned, strided convolution (Liu et al., arXiv:1801.10198).

    The convolution runs within a head and begins as the mean.

    Causal: a query sees the compressed groups that lie wholly before its own, and its own group token by token.
    S^2 / ratio + S ratio scores a head.

    Args:
        width: Features D.
        heads: Query heads.
        ratio: Tokens that become one.
        **options: As for ``Attention``.

    Raises:
        ValueError: Padding.
    """

    offers: ClassVar[frozenset[str]] = frozenset({"qkv", "share", "cache"})

    def __init__(self, width: int, heads: int, *, ratio: int = 3, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.ratio = ratio
        self.squeeze_k, self.squeeze_v = (
            nn.Parameter(torch.eye(self.head_width).expand(ratio, -1, -1) / ratio) for _ in range(2)
        )

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        refuse_mask(self, mask)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        new, total, r = q.shape[-2], k.shape[-2], self.ratio
        more = -total % r
        whole = [F.pad(t, (0, 0, 0, more)).unflatten(-2, (-1, r)) for t in (k, v)]
        small_k, small_v = (
            torch.einsum("bhnrk,rkj->bhnj", t, w.to(t.dtype))
            for t, w in zip(whole, (self.squeeze_k, self.squeeze_v), strict=True)
        )
        if not self.causal:
            # The last group is padded with zeros, which count in its sum.
            return F.scaled_dot_product_attention(q, small_k, small_v)
        index = torch.arange(total - new, total, device=q.device)
        group, count = index // r, small_k.shape[-2]
        near_k, near_v = (t[:, :, group] for t in whole)  # [B, H, new, r, K]
        scale = q.shape[-1] ** -0.5
        far = (q @ small_k.transpose(-1, -2) * scale).masked_fill(
            torch.arange(count, device=q.device) >= group[:, None], -torch.inf
        )
        near = (near_k @ q[..., None])[..., 0] * scale
        near = near.masked_fill(torch.arange(r, device=q.device) > (index % r)[:, None], -torch.inf)
        weight = torch.cat((far, near), -1).softmax(-1)
        return weight[..., :count] @ small_v + (weight[..., None, count:] @ near_v)[..., 0, :]


class Linformer(Whole):
    """Keys and values are projected along the sequence, from S to ``rank`` (Wang et al., arXiv:2006.04768); for a fixed length.

    S rank scores a head.

    Args:
        width: Features D.
        heads: Query heads.
        length: Longest sequence; a shorter one uses the first columns.
        rank: Keys that are left.
        **options: As for ``Attention``.

    Raises:
        ValueError: A longer sequence, a causal model, or padding.
    """

    def __init__(self, width: int, heads: int, *, length: int, rank: int = 32, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.project_k, self.project_v = (nn.Parameter(torch.randn(rank, length) * length**-0.5) for _ in range(2))

    def reduced(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = k.shape[-2]
        if length > self.project_k.shape[1]:
            raise ValueError(f"Linformer: {length} tokens, but it was built for length={self.project_k.shape[1]}.")
        return F.scaled_dot_product_attention(q, self.project_k[:, :length] @ k, self.project_v[:, :length] @ v)


class Induced(Attention):
    """A few learned points read the sequence, and the sequence reads them (Set Transformer's ISAB; Lee et al., arXiv:1810.00825).

    ``y = Attention(x, H, H)`` with ``H = MAB(I, x)`` (equations 9 and 10), where ``MAB(I, x) = LayerNorm(A + ReLU(W A))`` and
    ``A = LayerNorm(I + Attention(I, x, x))`` (equations 6 and 7), for learned points I. The stream and the MLP complete the outer
    MAB. The order of the tokens counts only as far as the input holds it. 2 S points scores a head.

    Args:
        width: Features D.
        heads: Query heads.
        points: Inducing points.
        linear: Called with ``inputs=, outputs=``.
        **options: As for ``Attention``.

    Raises:
        ValueError: A causal model.

    Examples:
        >>> Induced(8, heads=2, points=3)(torch.randn(1, 9, 8)).shape
        torch.Size([1, 9, 8])
    """

    offers: ClassVar[frozenset[str]] = frozenset({"qkv", "share"})

    def __init__(
        self, width: int, heads: int, *, points: int = 16, linear: Linear = plain_linear, **options: Any
    ) -> None:
        super().__init__(width, heads, linear=linear, **options)
        refuse_causal(self)
        self.points = nn.Parameter(torch.randn(points, width))
        self.ask, self.back, self.forth = (linear(inputs=width, outputs=width) for _ in range(3))
        self.keys, self.values = (linear(inputs=width, outputs=width) for _ in range(2))
        self.norm_read, self.norm_forth = nn.LayerNorm(width), nn.LayerNorm(width)

    def split(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, H, N, K]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def induce(self, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """``MAB(I, x)``, [B, points, D], from keys and values of x."""
        points = self.points.to(k.dtype).expand(k.shape[0], -1, -1)
        read = attend(self.split(self.ask(points)), k, v, causal=False, mask=mask)
        a = self.norm_read(points + self.back(read.transpose(1, 2).flatten(2)))
        return self.norm_forth(a + F.relu(self.forth(a)))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.induce(k, v, mask)
        return F.scaled_dot_product_attention(q, self.split(self.keys(h)), self.split(self.values(h)))


class LowRank(SlidingWindow):
    """Scores of low rank for what is far, a band for what is near (Guo et al., doi:10.1109/TASLP.2019.2944078).

    ``softmax(q_r k_r' / sqrt(r)) v + band(q k' / sqrt(K)) v``: queries and keys of only ``rank`` features a head reach everywhere, full
    ones meet within the window. S^2 scores of r features and S window of K.

    Args:
        width: Features D.
        heads: Query heads.
        rank: Features r of the far queries and keys.
        window: Positions of the band.
        causal: Whether a token sees only earlier ones.
        length: Longest sequence, if known.
        linear: Called with ``inputs=, outputs=``.

    Raises:
        ValueError: A rank that is not below K, or a window as long as ``length``.

    Examples:
        >>> LowRank(8, heads=2, rank=2, window=3)(torch.randn(1, 9, 8)).shape
        torch.Size([1, 9, 8])
    """

    offers: ClassVar[frozenset[str]] = frozenset({"share", "cache"})

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rank: int = 4,
        window: int = 16,
        causal: bool = False,
        length: int | None = None,
        linear: Linear = plain_linear,
    ) -> None:
        super().__init__(width, heads, window=window, causal=causal, length=length, linear=linear)
        if not 1 <= rank < self.head_width:
            raise ValueError(f"LowRank: rank {rank}; expected 1 to {self.head_width - 1}, less than a head's features.")
        self.low = linear(inputs=width, outputs=2 * heads * rank)

    def project(self, x: Tensor | QKV) -> list[Tensor]:
        """Queries and keys, each with its features of low rank at the end, and values."""
        assert isinstance(x, Tensor)
        q, k, v = super().project(x)
        low = self.low(x).unflatten(-1, (2, self.heads, -1)).movedim(1, 3)
        return [torch.cat((t, part), -1) for t, part in zip((q, k), low.unbind(1), strict=True)] + [v]

    def place(self, q: Tensor, k: Tensor, position: Position | None, offset: int) -> tuple[Tensor, Tensor]:
        """There is nothing to rotate: the band knows what is near."""
        return q, k

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        full = self.head_width
        far = attend(q[..., full:], k[..., full:], v, causal=self.causal, mask=mask)
        return far + super().mix(q[..., :full], k[..., :full], v, mask)


class Nystrom(Whole):
    """The softmax matrix from a few landmarks: ``A_ql pinv(A_ll) A_lk v`` (Nystroemformer; Xiong et al., arXiv:2102.03902, equation 13).

    Landmarks are means of equal segments. The pseudo-inverse Z is ``rounds`` steps of the paper's third-order iteration (equation 11).
    For random queries and keys and 8 to 32 landmarks, ``A Z A`` is off A by up to 4% after the 6 rounds of the paper, 0.3% after
    10 and 0.02% after 20; an inverse as exact as that has large gradients, and learned worse in the pilots of the claim.
    2 S m scores a head for m landmarks.

    Args:
        width: Features D.
        heads: Query heads.
        landmarks: How many, m.
        rounds: Iterations for the pseudo-inverse.
        **options: As for ``Attention``.
    """

    def __init__(self, width: int, heads: int, *, landmarks: int = 16, rounds: int = 10, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.landmarks, self.rounds = landmarks, rounds

    def reduced(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length, m = q.shape[-2], min(self.landmarks, q.shape[-2])
        segment = torch.arange(length, device=q.device) * m // length
        mean = F.one_hot(segment, m).to(q.dtype)
        mean = (mean / mean.sum(0)).T
        small_q, small_k = mean @ q, mean @ k
        scale = q.shape[-1] ** -0.5
        left = (q @ small_k.transpose(-1, -2) * scale).softmax(-1)
        core = (small_q @ small_k.transpose(-1, -2) * scale).softmax(-1)
        right = F.scaled_dot_product_attention(small_q, k, v)
        return left @ (pseudo_inverse(core, self.rounds).to(right.dtype) @ right)


def pseudo_inverse(a: Tensor, rounds: int) -> Tensor:
    """``Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4`` from ``A' / (|A|_1 |A|_inf)``, in at least single precision."""
    with torch.autocast("cuda" if a.is_cuda else "cpu", enabled=False):
        a = a if a.dtype == torch.float64 else a.float()
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        z = a.transpose(-1, -2) / (a.abs().sum(-2).amax(-1) * a.abs().sum(-1).amax(-1))[..., None, None]
        for _ in range(rounds):
            az = a @ z
            z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
        return z
