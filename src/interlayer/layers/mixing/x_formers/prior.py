"""Attention with a prior: what is known before any query meets a key, beside the scores or in their place."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.mixer import Attention, Context, attend
from interlayer.core.parts import FeedForward, Linear, plain_linear

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
    """A Gaussian prior whose centre and width each query predicts (Yang et al., arXiv:1810.10182, equations 4 to 9).

    ``score_ij - (j - P_i)^2 / (2 s_i^2)`` with centre ``P_i = I sigmoid(u_p tanh(W q_i))``, window ``D_i = I sigmoid(u_d tanh(W q_i))``
    and ``s_i = D_i / 2`` over I positions, those that the query may see.

    Args:
        width: Features D.
        heads: Query heads.
        **options: As for ``Attention``.
    """

    offers: ClassVar[frozenset[str]] = CACHED - {"rotate"}

    def __init__(self, width: int, heads: int, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.hidden = nn.Linear(self.head_width, self.head_width, bias=False)
        self.centre, self.window = (nn.Linear(self.head_width, 1, bias=False) for _ in range(2))

    def prior(self, q: Tensor, total: int, mask: Tensor | None = None) -> Tensor:
        """What is added to the scores, [B, H, new, total]."""
        new = q.shape[-2]
        index = torch.arange(total, device=q.device, dtype=torch.float32)  # bfloat16 counts to 256
        reach = (index[total - new :] + 1)[:, None] if self.causal else index.new_full((), total)
        if mask is not None and not self.causal:
            reach = mask.sum(-1)[:, None, None, None].float()
        hidden = torch.tanh(self.hidden(q))
        centre, window = (reach * torch.sigmoid(part(hidden).float()) for part in (self.centre, self.window))
        return -2 * ((index - centre) / window).square()

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return attend(q, k, v, causal=self.causal, mask=mask, bias=self.prior(q, k.shape[-2], mask))


class ResidualScores(Attention):
    """The scores of the block before are added to this block's (RealFormer; He et al., arXiv:2012.11747, equation 3).

    All S^2 scores are kept for the next block.
    """

    def read(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attend with the scores of both blocks."""
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        bias = None if context.position is None else context.position.bias(q.shape[-2], k.shape[-2])
        score = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + context.kept.get("scores", 0)
        context.kept["scores"] = score
        score = score if bias is None else score + bias
        return attend(torch.zeros_like(q), k, v, causal=self.causal, mask=context.mask, bias=score)


class TaskPrior(Attention):
    """A prior for each task: learned scores within blocks of positions, scaled and shifted by the task (Pilault et al., arXiv:2009.09139).

    ``score_ij + [i, j in one block] ((1 + gamma_c(z)) A_ic + beta_c(z))`` with j the c-th position of its block and z the task's
    vector; gamma and beta are one linear map of z, A is zero at first, as in the authors' code. There z is shared by all layers,
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
        """What is added to the scores of the last ``new`` of ``total`` positions, [B or 1, 1, new, total]."""
        if total > self.length:
            raise ValueError(f"TaskPrior: {total} tokens, but it was built for length={self.length}; build it longer.")
        index = torch.arange(total, device=self.scores.device)
        rows, task = index[total - new :], torch.as_tensor(self.task, device=self.scores.device).reshape(-1)
        gamma, beta = self.modulate(self.tasks(task))[:, None].chunk(2, -1)
        block = (1 + gamma) * self.scores[rows] + beta
        same = rows[:, None] // self.side == index // self.side
        return (block[..., index % self.side] * same)[:, None]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return attend(q, k, v, causal=self.causal, mask=mask, bias=self.prior(q.shape[-2], k.shape[-2]))


class Synthesizer(Attention):
    """Only a prior: the scores are learned numbers for each pair of positions (random Synthesizer; Tay et al., arXiv:2005.00743).

    Queries and keys are not used; S^2 scores a head.

    Args:
        width: Features D.
        heads: Heads.
        length: Longest sequence.
        **options: As for ``Attention``.
    """

    offers: ClassVar[frozenset[str]] = CACHED - {"rotate"} | {"order"}

    def __init__(self, width: int, heads: int, *, length: int, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.scores = nn.Parameter(torch.randn(heads, length, length) * 0.02)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        new, total = q.shape[-2], k.shape[-2]
        bias = self.scores[:, total - new : total, :total]
        return attend(0 * q, k, v, causal=self.causal, mask=mask, bias=bias)


class Average(nn.Module):
    """Only the plainest prior: a token reads the mean of all tokens so far (average attention; Zhang et al., arXiv:1805.00631).

    ``g_i = FFN(mean_{j <= i} x_j)``, gates ``[a_i, b_i] = sigmoid(W [x_i, g_i])`` and ``y_i = a_i x_i + b_i g_i`` (equations 1 to 3);
    no query meets a key. An encoder takes the mean of all tokens. The FFN has hidden width D.

    Args:
        width: Features D.
        causal: Whether a token sees only itself and earlier ones.
        linear: Called with ``inputs=, outputs=``.

    Shapes: [B, S, D] to [B, S, D].
    """

    offers: ClassVar[frozenset[str]] = frozenset({"cache"})

    def __init__(self, width: int, *, causal: bool = False, linear: Linear = plain_linear) -> None:
        super().__init__()
        self.causal = causal
        self.ffn = FeedForward(width, hidden=width, activation=nn.ReLU, linear=linear)
        self.gate = linear(inputs=2 * width, outputs=2 * width)

    def forward(self, x: Float[Tensor, "B S D"], context: Context | None = None) -> Float[Tensor, "B S D"]:
        """Gate every token against the mean."""
        context = context or Context()
        seen = x if context.cache is None else context.cache.extend("x", context.layer, x[:, None])[:, 0]
        real = torch.ones_like(seen[..., :1]) if context.mask is None else context.mask[..., None].to(x.dtype)
        if self.causal:
            mean = (seen * real).cumsum(1)[:, -x.shape[1] :] / real.cumsum(1)[:, -x.shape[1] :].clamp(min=1)
        else:
            mean = ((seen * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)).expand_as(x)
        g = self.ffn(mean)
        a, b = torch.sigmoid(self.gate(torch.cat((x, g), -1))).chunk(2, -1)
        return a * x + b * g
