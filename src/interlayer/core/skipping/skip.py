"""The router of a skipped module, its training, and skipping in Transformers of Interlayer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interlayer.core import aside, taps
from interlayer.core.mixer import Cache, Context

Per = Literal["sequence", "token"]


class Skip(nn.Module):
    """A module that runs only for the sequences, or the tokens, that a linear router keeps.

    The router scores the mean of a sequence's real tokens, or each token: ``score = sigmoid(w x)``. What is kept follows from a
    threshold, or from a capacity: of B sequences the ``ceil(capacity B)`` with the highest scores. ``w`` is initialised to zero, so that a
    threshold of 0.5 keeps everything at first.

    In eval mode only what is kept is computed: cost falls in proportion. In training everything is computed and multiplied by
    the gate, 1 or 0, whose gradient is that of the score (straight-through), so that the router learns from what skips too.

    Reports the metric ``skip kept`` (the share that is kept), with a capacity ``skip dropped`` (the share of sequences with a score of at
    least 0.5 that find no room), and in training the loss ``weight * relu(kept - capacity)``, through ``core.aside``.

    Args:
        module: The sublayer or block.
        width: Features D of its input.
        per: One decision for each ``"sequence"`` or each ``"token"``. Later tokens do not attend to one that skips.
        threshold: Lowest score that is kept. None keeps by capacity; the sequences of a batch then compete.
        capacity: Share to keep, above 0 and at most 1.
        weight: Weight of the loss.
        passes: Whether what skips keeps its input (around a whole block). By default it gets 0 (around a sublayer whose output is added).

    Raises:
        ValueError: An option out of range.
    """

    def __init__(
        self,
        module: nn.Module,
        width: int,
        *,
        per: Per = "sequence",
        threshold: float | None = 0.5,
        capacity: float = 1.0,
        weight: float = 0.0,
        passes: bool = False,
    ) -> None:
        super().__init__()
        if per not in get_args(Per):
            raise ValueError(f"Skip: per={per!r} is not one of {', '.join(get_args(Per))}.")
        if not 0 < capacity <= 1:
            raise ValueError(f"Skip: capacity={capacity}; expected a share above 0 and at most 1.")
        if threshold is not None and not 0 < threshold < 1:
            raise ValueError(f"Skip: threshold={threshold}; expected a score between 0 and 1, or None for a capacity.")
        if threshold is None and per == "token":
            raise ValueError(
                "Skip: a capacity for tokens would let later tokens decide about earlier ones. Give a threshold, or per='sequence'."
            )
        if weight < 0:
            raise ValueError(f"Skip: weight={weight}; expected at least 0.")
        self.module, self.per, self.threshold, self.capacity = module, per, threshold, capacity
        self.weight, self.passes = weight, passes
        self.router = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.router.weight)

    def __getattr__(self, name: str) -> Any:
        """Attributes that the model reads from the wrapped module, such as ``layer_idx``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def decide(
        self, x: Float[Tensor, "B S D"], real: Bool[Tensor, "B S"] | None = None
    ) -> tuple[Bool[Tensor, "B ..."], Float[Tensor, "B ..."]]:
        """What is kept, and the gate that trains the router: [B] for sequences, [B, S] for tokens.

        Args:
            x: The module's input.
            real: False at padding, which is not averaged and never kept.
        """
        x = x.float()  # near the threshold a router in bfloat16 would flip
        if self.per == "sequence" and real is None:
            x = x.mean(1)
        elif self.per == "sequence":
            x = (x * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True).clamp(min=1)  # type: ignore[union-attr]
        with torch.autocast(x.device.type, enabled=False):
            score = F.linear(x, self.router.weight.float()).squeeze(-1).sigmoid()
        counted = None
        if self.threshold is None:
            best = score.topk(math.ceil(self.capacity * len(score))).indices
            keep = torch.zeros_like(score, dtype=torch.bool).index_fill(0, best, True)
            aside.metric("skip dropped", ((score >= 0.5) & ~keep).float().mean())
        else:
            keep = score >= self.threshold
            if self.per == "token" and real is not None:
                keep, counted = keep & real, real
        gate = keep.to(score.dtype) + (score - score.detach())
        share = gate.mean() if counted is None else gate[counted].mean()
        aside.metric("skip kept", share)
        if self.training and self.weight:
            aside.loss(self.weight * F.relu(share - self.capacity))
        return keep, gate

    def gated(self, out: Any, x: Tensor, gate: Tensor) -> Any:
        """The output of everything, computed and multiplied by the gate: how it trains, and what skipping must equal."""
        y = taps.first(out)
        g = gate.to(y.dtype).view(*gate.shape, *[1] * (y.ndim - gate.ndim))
        return taps.swap(out, y * g + x * (1 - g) if self.passes else y * g)

    def extra_repr(self) -> str:
        """The options."""
        kept = f"capacity={self.capacity}" if self.threshold is None else f"threshold={self.threshold}"
        return f"per={self.per!r}, {kept}"


class Held(Cache):
    """What a sublayer that skips keeps in the model's cache: which sequences it runs for, [B], and their keys and values alone."""

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.keep = keep


class SkipMixer(Skip):
    """Attention of a Transformer of Interlayer that runs only for the sequences that its router keeps.

    In decoding the prompt decides: a sequence that skips goes on skipping, and the cache holds neither keys nor values of it.

    Args:
        module: A ``core.mixer.Attention``.
        width: Features D.
        **options: See ``Skip``; sequences only.

    Shapes: [B, S, D] to [B, S, D].

    Raises:
        ValueError: Tokens are to skip (the position encoding counts them), the input is not one tensor, or the cache belongs to
            another model or batch.

    Examples:
        >>> from interlayer.core.mixer import Attention
        >>> layer = SkipMixer(Attention(8, 2, causal=True), 8).eval()
        >>> _ = layer.router.weight.data.fill_(1.0)
        >>> x = torch.cat((torch.ones(1, 3, 8), -torch.ones(1, 3, 8)))
        >>> layer(x).abs().sum((1, 2)) > 0
        tensor([ True, False])
    """

    def __init__(self, module: nn.Module, width: int, **options: Any) -> None:
        super().__init__(module, width, **options)
        if self.per != "sequence" or self.passes:
            raise ValueError("SkipMixer: skips whole sequences around attention; leave out per and passes.")

    def forward(self, x: Float[Tensor, "B S D"], context: Context | None = None) -> Float[Tensor, "B S D"]:
        """Attend for the sequences that are kept; 0 for the others."""
        if not isinstance(x, Tensor):
            raise ValueError(
                f"SkipMixer: the stream gives {type(x).__name__}; expected one input for queries, keys and values. Take another stream."
            )
        context = context or Context()
        real = None if context.mask is None else context.mask[:, -x.shape[1] :]
        if self.training:
            return self.gated(self.module(x, context), x, self.decide(x, real)[1])
        held = self._held(x, real, context)
        rows = (self.decide(x, real)[0] if held is None else held.keep).nonzero().squeeze(1)
        mask = None if context.mask is None else context.mask[rows]
        y = torch.zeros_like(x)
        if len(rows):
            y = self.module(x[rows] if len(rows) < len(x) else x, replace(context, cache=held, mask=mask))
        if held is not None:
            held.length += x.shape[1]
        return scatter(y, rows, len(x)) if len(rows) else y

    def _held(self, x: Tensor, real: Tensor | None, context: Context) -> Held | None:
        """What the cache holds of this sublayer; the first tokens decide."""
        cache = context.cache
        if cache is None:
            return None
        if not cache.length:
            cache.states[context.layer] = Held(self.decide(x, real)[0])
        held = cache.states.get(context.layer)
        if not isinstance(held, Held) or held.length != cache.length or len(held.keep) != len(x):
            found = f"{len(held.keep)} sequences" if isinstance(held, Held) else f"nothing of sublayer {context.layer}"
            raise ValueError(
                f"SkipMixer: the cache has {cache.length} tokens and {found}, for a batch of {len(x)}; it belongs to another model or "
                "batch. Begin with a new Cache()."
            )
        return held


def scatter(y: Tensor, rows: Tensor, size: int) -> Tensor:
    """Put rows back among ``size``, the others 0.

    Examples:
        >>> scatter(torch.ones(1, 2), torch.tensor([1]), 2)
        tensor([[0., 0.],
                [1., 1.]])
    """
    return y if len(y) == size else y.new_zeros(size, *y.shape[1:]).index_copy(0, rows, y)
