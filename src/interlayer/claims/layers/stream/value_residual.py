"""Value residual: attention concentration by layer, and loss against its neighbours."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from interlayer.claims import Claim, Scale, lowest
from interlayer.claims.training import batches, language
from interlayer.core.mixer import Attention, Cache, Context
from interlayer.layers.stream.value_residual import ValueResidual
from interlayer.models import Transformer

ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "denseformer": {"stream": "denseformer"},
    "grouped-queries": {"kv_heads": 2},
    "resformer": {"stream": "value-residual"},
    "learnable": {"stream": "value-residual(mode='learnable')"},
    "sparse": {"stream": "value-residual(mode='sparse')"},
    "svformer": {"stream": "value-residual(mode='shared')"},
}


class Shuffled(ValueResidual):
    """The control: what is mixed in belongs to other tokens."""

    def share(self, state: Any, layer: int, k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mix, but with the first layer's values of shuffled places."""
        if layer == 0:
            assert v is not None
            order = torch.randperm(v.shape[2], generator=torch.Generator().manual_seed(0))
            state.kept["v"] = v[:, :, order]
            return k, v
        return super().share(state, layer, k, v)


class CrossLayer(ValueResidual):
    """Cross-layer attention (Brandon et al., arXiv:2405.12981) in its value half: pairs of layers share values."""

    def __init__(self, depth: int, width: int, **rest: Any) -> None:
        super().__init__(depth, width, mode="shared", **rest)

    def value_layer(self, layer: int) -> int:
        """The first of each pair of layers."""
        return layer - layer % (2 * self.branches)

    def share(self, state: Any, layer: int, k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keep the values of the first of a pair for the second."""
        if v is not None:
            state.kept["v"] = v
            return k, v
        return k, state.kept["v"]


TWINS: dict[str, dict[str, Any]] = {"cross-layer": {"stream": CrossLayer}, "shuffled": {"stream": Shuffled}}


@torch.no_grad()
def entropy(model: Transformer, tokens: Tensor) -> list[float]:
    """Entropy of the attention that a token receives, by layer, as a share of the largest: 1 is even, 0 is one token."""
    found: list[float] = []

    def see(module: Attention, args: tuple[Any, ...], out: Tensor) -> None:
        context: Context = args[1]
        q, k = module.project(args[0])[:2]
        if context.position is not None:
            q, k = context.position.rotate(q, k)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        length = score.shape[-1]
        score = score.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        received = score.softmax(-1).mean((0, 1, 2))
        found.append(float(torch.distributions.Categorical(received).entropy()) / math.log(length))

    hooks = [m.register_forward_hook(see) for m in model.modules() if isinstance(m, Attention)]
    model.eval()(tokens)
    for hook in hooks:
        hook.remove()
    return found


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Validation loss after equal steps, attention entropy in the last third of the layers, cache bytes of a token."""
    torch.manual_seed(seed)
    model = Transformer(depth=scale.depth, width=scale.width, heads=4, **(ARMS | TWINS)[arm])
    loss = language(model, seed, scale)
    tokens = next(batches("stdlib-bytes", 99, 8, 1))[0][:, : scale.length]
    late = entropy(model, tokens)[-max(scale.depth // 3, 1) :]
    cache = Cache()
    with torch.no_grad():
        model(tokens[:1], cache=cache)
    return {"loss": loss, "late entropy": sum(late) / len(late), "cache bytes": cache.bytes / cache.length}


CLAIM = Claim(
    says="Mixing the first layer's values into later layers lowers the loss at equal steps below plain and DenseFormer, and "
    "sharing them (SVFormer) is better than grouped queries and cross-layer values.",
    measure=measure,
    arms=(*ARMS, "cross-layer"),
    expect=(
        lowest("loss", "resformer", than=("plain", "denseformer")),
        lowest("loss", "svformer", than=("grouped-queries", "cross-layer")),
    ),
    control="shuffled",
    scales={
        "smoke": {"depth": 3, "width": 32, "length": 16, "steps": 2, "judged": 1},
        "small": {"depth": 6, "width": 64, "length": 64, "steps": 120, "judged": 8},
        "full": {"depth": 12, "width": 768, "length": 128, "steps": 20000, "judged": 200},
    },
)
