"""What heads do together: talk, learn their span, agree, and share a memory or the work with a convolution."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core import aside
from interlayer.core.mixer import Attention, Context, attend
from interlayer.core.parts import Linear, plain_linear
from interlayer.core.position import Position
from interlayer.core.stream import QKV
from interlayer.layers.mixing.x_formers.linear import Late
from interlayer.layers.mixing.x_formers.prior import CACHED, scores


class TalkingHeads(Attention):
    """Heads talk: scores, and again weights, are mixed across heads by learned matrices (Shazeer et al., arXiv:2003.02436).

    S^2 H^2 multiply-adds more than attention. The matrices are initialised as the identity.
    """

    offers: ClassVar[frozenset[str]] = CACHED

    def __init__(self, width: int, heads: int, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.before, self.after = nn.Parameter(torch.eye(heads)), nn.Parameter(torch.eye(heads))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        score = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        score = torch.einsum("gh,bhij->bgij", self.before, score)
        blocked = scores(torch.zeros_like(q), k, self.causal, mask)  # minus infinity where nothing may be seen
        weight = torch.einsum("gh,bhij->bgij", self.after, (score + blocked).softmax(-1))
        return weight @ v


class AdaptiveSpan(Attention):
    """Each head learns how far back it looks (adaptive span; Sukhbaatar et al., arXiv:1905.07799).

    Weights fade out over ``ramp`` positions beyond a head's span z_h.
    ``w_ij = m(i - j) e_ij / sum m(i - j) e_ij`` with ``m(d) = clamp((ramp + z_h - d) / ramp, 0, 1)``. A penalty on the spans keeps
    them short. All S^2 scores are computed here; what lies beyond the longest span could be left out.

    Args:
        width: Features D.
        heads: Query heads.
        span: Initial z_h, in positions.
        ramp: Width of the fading, in positions.
        penalty: Weight of the mean span in the loss.
        **options: As for ``Attention``.
    """

    offers: ClassVar[frozenset[str]] = CACHED

    def __init__(
        self, width: int, heads: int, *, span: float = 32.0, ramp: float = 16.0, penalty: float = 1e-5, **options: Any
    ) -> None:
        super().__init__(width, heads, **options)
        self.ramp, self.penalty = ramp, penalty
        self.span = nn.Parameter(torch.full((heads,), span))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.training:
            aside.loss(self.penalty * self.span.clamp(min=0).mean())
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        new, total = q.shape[-2], k.shape[-2]
        index = torch.arange(total, device=q.device, dtype=torch.float32)  # bfloat16 counts to 256
        distance = (index[total - new :, None] - index).abs()
        fade = ((self.ramp + self.span.clamp(min=0)[:, None, None] - distance) / self.ramp).clamp(0, 1)
        weight = scores(q, k, self.causal, mask).softmax(-1) * fade.to(q.dtype)
        return weight / weight.sum(-1, keepdim=True).clamp(min=1e-8) @ v


class RoutedHeads(Attention):
    """What heads read is agreed upon, not put side by side (routing by agreement; Li et al., arXiv:1904.03100, simple routing).

    Head h votes ``V_hn = o_h W_hn`` for output n. From ``B = 0``, ``rounds`` times: ``C_hn = softmax_n(B_hn)``,
    ``y_n = sum_h C_hn V_hn / sum_h C_hn``, ``B_hn += y_n V_hn``.

    Args:
        width: Features D.
        heads: Query heads, and outputs.
        rounds: Iterations.
        **options: As for ``Attention``.
    """

    offers: ClassVar[frozenset[str]] = CACHED

    def __init__(self, width: int, heads: int, *, rounds: int = 3, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.rounds = rounds
        eye = torch.eye(heads)[:, :, None, None] * torch.eye(self.head_width)
        self.votes = nn.Parameter(eye + 0.02 * torch.randn_like(eye))  # [from, to, K, K]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        heads = attend(q, k, v, causal=self.causal, mask=mask)
        vote = torch.einsum("bhsk,hgkj->bhgsj", heads, self.votes)
        share, out = torch.zeros_like(vote[..., :1]).softmax(2), vote
        logit = torch.zeros_like(share)
        for _ in range(self.rounds):
            out = (share * vote).sum(1, keepdim=True) / share.sum(1, keepdim=True)
            logit = logit + (out * vote).sum(-1, keepdim=True)
            share = logit.softmax(2)
        return out[:, 0]


class PersistentMemory(Late):
    """Learned keys and values beside those of the tokens, which make the MLP dispensable (Sukhbaatar et al., arXiv:1907.01470).

    One softmax over the scores of the tokens and ``q m' / sqrt(K)`` of the learned keys m, which have no position: positions act
    on the tokens' scores alone. Take ``mlp="none"`` with it. ``slots`` S scores a head more than attention.

    Args:
        width: Features D.
        heads: Query heads.
        slots: Learned pairs for each head.
        **options: As for ``Attention``.
    """

    def __init__(self, width: int, heads: int, *, slots: int = 64, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.keys = nn.Parameter(torch.randn(heads, slots, self.head_width))
        self.values = nn.Parameter(torch.randn(heads, slots, self.head_width) * 0.1)

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, position: Position | None = None
    ) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        stored = q @ self.keys.transpose(-1, -2).to(q.dtype) * q.shape[-1] ** -0.5
        bias = None
        if position is not None:
            q, k = position.rotate(q, k)
            bias = position.bias(q.shape[-2], k.shape[-2])
        score = scores(q, k, self.causal, mask)
        score = score if bias is None else score + bias.to(score.dtype)
        weight = torch.cat((stored, score), -1).softmax(-1)
        slots = self.keys.shape[1]
        return weight[..., :slots] @ self.values.to(v.dtype) + weight[..., slots:] @ v


class Lite(Attention):
    """Long-short range attention: half of the features attend, half are convolved (Lite Transformer; Wu et al., arXiv:2004.11886).

    Args:
        width: Features D, even.
        heads: Heads of the whole width, even: half of them attend.
        kernel: Positions that the convolution sees.
        causal: Whether a token sees only earlier ones.
        values: Whether the attending half projects values of its own.
        linear: Called with ``inputs=, outputs=``.

    Raises:
        ValueError: An odd number of heads, or padding.
    """

    offers: ClassVar[frozenset[str]] = frozenset({"rotate"})

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kernel: int = 5,
        causal: bool = False,
        values: bool = True,
        linear: Linear = plain_linear,
    ) -> None:
        if heads % 2:
            raise ValueError(f"Lite: heads {heads} must be even: half of them attend.")
        super().__init__(width // 2, heads // 2, causal=causal, values=values, linear=linear)
        self.kernel, self.attending = kernel, width // 2
        rest = width - self.attending
        self.enter, self.conv, self.leave = (
            nn.Linear(rest, 2 * rest),
            nn.Conv1d(rest, rest, kernel, groups=rest),
            nn.Linear(rest, rest),
        )

    def forward(self, x: Float[Tensor, "B S D"] | QKV, context: Context | None = None) -> Float[Tensor, "B S D"]:
        """Both halves."""
        assert isinstance(x, Tensor)
        if context is not None and context.mask is not None:
            raise ValueError("Lite: takes no padding mask; its convolution would see the padding.")
        far = super().forward(x[..., : self.attending], Context(position=context.position) if context else None)
        left = self.kernel - 1 if self.causal else (self.kernel - 1) // 2
        gated = F.glu(self.enter(x[..., self.attending :]), -1).transpose(1, 2)
        near = self.conv(F.pad(gated, (left, self.kernel - 1 - left))).transpose(1, 2)
        return torch.cat((far, self.leave(near)), -1)
