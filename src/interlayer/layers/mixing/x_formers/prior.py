"""Attention with a prior: what is known before any query meets a key, beside the scores or in their place."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.mixer import Attention, Context, attend
from interlayer.core.parts import Linear, plain_linear
from interlayer.core.stream import QKV

CACHED = frozenset({"qkv", "share", "cache", "rotate"})


def scores(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """``q k' / sqrt(K)`` with minus infinity where the causal order or padding forbids it."""
    new, total = q.shape[-2], k.shape[-2]
    score = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        past = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
        score = score.masked_fill(~past, -torch.inf)
    return score if mask is None else score.masked_fill(~mask[:, None, None], -torch.inf)


class Local(Attention):
    """A Gaussian prior: scores fall with the square of the distance, as fast as each head learns.

    ``score_ij - (i - j)^2 / (2 s_h^2)``; Yang et al. (arXiv:1810.10182) predict centre and width from
    the query, here every head has a width of its own and is centred on the query.

    Args:
        width: Features D.
        heads: Query heads.
        spread: s_h at the start, in places.
        **options: As for ``Attention``.
    """

    offers: ClassVar[frozenset[str]] = CACHED

    def __init__(self, width: int, heads: int, *, spread: float = 8.0, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.log_spread = nn.Parameter(torch.full((heads,), spread).log())

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        new, total = q.shape[-2], k.shape[-2]
        place = torch.arange(total, device=q.device, dtype=torch.float32)
        distance = place[total - new :, None] - place
        bias = -distance.square() / (2 * self.log_spread.exp()[:, None, None] ** 2)
        return attend(q, k, v, causal=self.causal, mask=mask, bias=bias)


class ResidualScores(Attention):
    """The scores of the layer below are added to this layer's (RealFormer; He et al., arXiv:2012.11747).

    All S^2 scores are kept for the next layer.
    """

    offers: ClassVar[frozenset[str]] = CACHED

    def forward(self, x: Float[Tensor, "B S D"] | QKV, context: Context | None = None) -> Float[Tensor, "B S D"]:
        """Attend with the scores of both layers."""
        self.context = context = context or Context()
        try:
            return super().forward(x, context)
        finally:
            del self.context

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        score = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + self.context.memory.get("scores", 0)
        self.context.memory["scores"] = score
        return attend(torch.zeros_like(q), k, v, causal=self.causal, mask=mask, bias=score)


class TaskPrior(Attention):
    """A prior for each task: learned scores within blocks of places, scaled and shifted by the task (Pilault et al., arXiv:2009.09139).

    ``score_ij + [i, j in one block] ((1 + gamma_c(z)) A_ic + beta_c(z))`` with j the c-th place of its block and z the task's
    vector; gamma and beta are one linear map of z, A starts at zero, as in the authors' code. There z is shared by all layers,
    here each has its own. All S^2 scores are computed.

    Args:
        width: Features D.
        heads: Query heads.
        length: Longest sequence.
        blocks: Blocks that it is cut into.
        tasks: Number of tasks.
        **options: As for ``Attention``.

    Attributes:
        task: Which task the next batch is for, a number or one for each item [B].

    Raises:
        ValueError: More tokens than ``length``.
    """

    offers: ClassVar[frozenset[str]] = CACHED

    def __init__(self, width: int, heads: int, *, length: int, blocks: int = 4, tasks: int = 2, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.length, self.side = length, -(-length // blocks)
        self.task: int | Tensor = 0
        self.tasks = nn.Embedding(tasks, width)
        self.modulate = nn.Linear(width, 2 * self.side)
        nn.init.zeros_(self.modulate.bias)
        self.scores = nn.Parameter(torch.zeros(length, self.side))

    def prior(self, new: int, total: int) -> Tensor:
        """What is added to the scores of the last ``new`` of ``total`` places, [B or 1, 1, new, total]."""
        if total > self.length:
            raise ValueError(f"TaskPrior: {total} tokens, but it was built for length={self.length}; build it longer.")
        place = torch.arange(total, device=self.scores.device)
        rows, task = place[total - new :], torch.as_tensor(self.task, device=self.scores.device).reshape(-1)
        gamma, beta = self.modulate(self.tasks(task))[:, None].chunk(2, -1)
        block = (1 + gamma) * self.scores[rows] + beta
        same = rows[:, None] // self.side == place // self.side
        return (block[..., place % self.side] * same)[:, None]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return attend(q, k, v, causal=self.causal, mask=mask, bias=self.prior(q.shape[-2], k.shape[-2]))


class Synthesizer(Attention):
    """Only a prior: the scores are learned numbers for each pair of places (random Synthesizer; Tay et al., arXiv:2005.00743).

    Queries and keys are not used; S^2 scores a head.

    Args:
        width: Features D.
        heads: Heads.
        length: Longest sequence.
        **options: As for ``Attention``.
    """

    offers: ClassVar[frozenset[str]] = CACHED - {"rotate"}

    def __init__(self, width: int, heads: int, *, length: int, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.scores = nn.Parameter(torch.randn(heads, length, length) * 0.02)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        new, total = q.shape[-2], k.shape[-2]
        bias = self.scores[:, total - new : total, :total]
        return attend(0 * q, k, v, causal=self.causal, mask=mask, bias=bias)


class Average(Attention):
    """Only the plainest prior: a token reads the mean of all values so far, gated by its query.

    Average attention (Zhang et al., arXiv:1805.00631): ``y = sigmoid(q) * mean(v)``; queries and keys do not meet.
    S K multiply-adds a head.
    """

    offers: ClassVar[frozenset[str]] = CACHED

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        real = torch.ones_like(v[..., :1]) if mask is None else mask[:, None, :, None].to(v.dtype).expand_as(v[..., :1])
        if self.causal:
            mean = (v * real).cumsum(-2) / real.cumsum(-2).clamp(min=1)
            mean = mean[..., -q.shape[-2] :, :]
        else:
            mean = (v * real).sum(-2, keepdim=True) / real.sum(-2, keepdim=True)
        return torch.sigmoid(q) * mean


class TalkingHeads(Attention):
    """Heads talk: scores, and again weights, are mixed across heads by learned matrices (Shazeer et al., arXiv:2003.02436).

    S^2 H^2 multiply-adds more than attention; the matrices start at the identity.
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
    """Each head learns how far back it looks: weights fade out over ``ramp`` places beyond its span (Sukhbaatar et al., arXiv:1905.07799).

    ``w_ij = m(i - j) e_ij / sum m(i - j) e_ij`` with ``m(d) = clamp((ramp + z_h - d) / ramp, 0, 1)``. A penalty on the spans
    (``extra_loss``) keeps them short. All S^2 scores are computed here; what lies beyond the longest span could be left out.

    Args:
        width: Features D.
        heads: Query heads.
        span: z_h at the start, in places.
        ramp: Width of the fading.
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

    def extra_loss(self) -> Tensor:
        """The penalty on the spans."""
        return self.penalty * self.span.clamp(min=0).mean()

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        new, total = q.shape[-2], k.shape[-2]
        place = torch.arange(total, device=q.device, dtype=torch.float32)  # bfloat16 counts to 256
        distance = (place[total - new :, None] - place).abs()
        fade = ((self.ramp + self.span.clamp(min=0)[:, None, None] - distance) / self.ramp).clamp(0, 1)
        weight = scores(q, k, self.causal, mask).softmax(-1) * fade.to(q.dtype)
        return weight / weight.sum(-1, keepdim=True).clamp(min=1e-8) @ v


class RoutedHeads(Attention):
    """What heads read is not put side by side but agreed upon: ``rounds`` of routing from heads to as many output capsules.

    Refined aggregation (Li et al., arXiv:1904.03100), the simple routing:
    every head makes a vote for every capsule, and votes that agree with the outcome gain weight.

    Args:
        width: Features D.
        heads: Query heads.
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
        logit = torch.zeros_like(vote[..., :1])
        for _ in range(self.rounds):
            out = (logit.softmax(2) * vote).sum(1, keepdim=True)
            squashed = out * out.square().sum(-1, keepdim=True).add(1e-6).rsqrt()
            logit = logit + (squashed * vote).sum(-1, keepdim=True)
        return (logit.softmax(2) * vote).sum(1)


class PersistentMemory(Attention):
    """Learned keys and values beside those of the tokens, which make the MLP dispensable (Sukhbaatar et al., arXiv:1907.01470).

    Take ``mlp="none"`` with it. ``slots`` S scores a head more than attention.

    Args:
        width: Features D.
        heads: Query heads.
        slots: Learned pairs for each head.
        **options: As for ``Attention``.
    """

    offers: ClassVar[frozenset[str]] = CACHED

    def __init__(self, width: int, heads: int, *, slots: int = 64, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.keys = nn.Parameter(torch.randn(heads, slots, self.head_width))
        self.values = nn.Parameter(torch.randn(heads, slots, self.head_width) * 0.1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        new, total, more = q.shape[-2], k.shape[-2], self.keys.shape[1]
        keys, values = (
            torch.cat((p.to(t.dtype).expand(len(t), -1, -1, -1), t), 2) for p, t in ((self.keys, k), (self.values, v))
        )
        seen = torch.ones(new, total, dtype=torch.bool, device=q.device)
        seen = seen.tril(total - new) if self.causal else seen
        seen = seen if mask is None else seen & mask[:, None, None]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=F.pad(seen, (more, 0), value=True))


class Lite(Attention):
    """Long-short range attention: half of the features attend, half are convolved (Lite Transformer; Wu et al., arXiv:2004.11886).

    Args:
        width: Features D, even.
        heads: Heads of the attending half.
        kernel: Places that the convolution sees.
        causal: Whether a token sees only earlier ones.
        values: Whether the attending half projects values of its own.
        linear: Called with ``inputs=, outputs=``.

    Raises:
        ValueError: Padding.
    """

    offers: ClassVar[frozenset[str]] = frozenset()

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
        super().__init__(width // 2, max(1, heads // 2), causal=causal, values=values, linear=linear)
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
        far = super().forward(x[..., : self.attending], Context(context.layer) if context else None)
        left = self.kernel - 1 if self.causal else (self.kernel - 1) // 2
        gated = F.glu(self.enter(x[..., self.attending :]), -1).transpose(1, 2)
        near = self.conv(F.pad(gated, (left, self.kernel - 1 - left))).transpose(1, 2)
        return torch.cat((far, self.leave(near)), -1)
