"""LIMe against the plain Transformer: loss at equal steps, and how many directions values and hidden states fill by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interlayer.claims import Claim, Scale, effect, highest, lowest
from interlayer.claims.training import batches, built, language
from interlayer.core.mixer import Cache
from interlayer.core.stream import State
from interlayer.layers.stream.lime import LIMe
from interlayer.models import Transformer


class Stranger(LIMe):
    """The control: what a layer mixes in from earlier ones belongs to another sequence of the batch."""

    def share(self, state: State, layer: int, k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mix, then hand the own states on one sequence further."""
        out = super().share(state, layer, k, v)
        block = layer // self.branches
        state.kept[block] = state.kept[block].roll(1, 0)
        return out


ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lime": {"stream": "lime"},
    "plain, grouped": {"kv_heads": 2},
    "lime, grouped": {"kv_heads": 2, "stream": "lime"},
    "stranger": {"stream": Stranger},
    "stranger, grouped": {"kv_heads": 2, "stream": Stranger},
}


def entropy(x_BSD: Tensor, alpha: float = 0.5) -> float:
    """Renyi entropy of the spectrum of each sequence's Gram matrix, features standardised; mean over the sequences.

    ``log sum_i (lambda_i / sum lambda)^alpha / (1 - alpha)``, at the alpha of the authors' code.
    """
    x = x_BSD.double()
    x = (x - x.mean((0, 1))) / (x.std((0, 1)) + 1e-5)
    spectrum = torch.linalg.eigvalsh(x @ x.transpose(1, 2)).clamp(min=0)
    share = spectrum / spectrum.sum(-1, keepdim=True)
    return float(((share**alpha).sum(-1).log() / (1 - alpha)).mean())


@torch.no_grad()
def entropies(model: Transformer, tokens: Tensor) -> tuple[list[float], list[float]]:
    """Entropy of the values that each layer attends to, and of the hidden state after each block."""
    stream, values, hidden = model.trunk.stream, [], []
    share, write = stream.share, stream.write

    def see_values(*args: Any) -> tuple[Tensor, Tensor]:
        k, v = share(*args)
        values.append(entropy(v.transpose(1, 2).flatten(2)))
        return k, v

    def see_hidden(state: State, layer: int, branch: Tensor) -> State:
        state = write(state, layer, branch)
        if stream.ends_block(layer):
            hidden.append(entropy(state.x))
        return state

    stream.share, stream.write = see_values, see_hidden
    model.eval()(tokens)
    del stream.share, stream.write
    return values, hidden


def build(arm: str, scale: Scale) -> Transformer:
    """A language model of bytes."""
    return Transformer(depth=scale.depth, width=scale.width, heads=4, **ARMS[arm])


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Validation loss after equal steps, entropies by layer, and cache bytes of a token."""
    model = built(lambda: build(arm, scale), seed)
    loss = language(model, seed, scale)
    tokens = next(batches("stdlib-bytes", 99, 16, 1))[0][:, : scale.length]
    values, hidden = entropies(model, tokens)
    cache, late = Cache(), slice(scale.depth // 2, None)
    with torch.no_grad():
        model(tokens[:1], cache=cache)
    return {
        "loss": loss,
        "late value entropy": sum(values[late]) / len(values[late]),
        "late hidden entropy": sum(hidden[late]) / len(hidden[late]),
        "cache bytes": cache.bytes / cache.length,
        **{f"value entropy {i}": v for i, v in enumerate(values, start=1)},
        **{f"hidden entropy {i}": h for i, h in enumerate(hidden, start=1)},
    }


CLAIM = Claim(
    says="At equal steps layer-integrated memory lowers the Transformer's validation loss, with all heads and with grouped "
    "queries, and the values that the later half of the layers attends to fill more directions.",
    measure=measure,
    build=build,
    arms=("plain", "lime", "plain, grouped", "lime, grouped"),
    statements=(
        effect("", lowest("loss", "lime", than=("plain",)), control="stranger"),
        effect("", lowest("loss", "lime, grouped", than=("plain, grouped",)), control="stranger, grouped"),
        effect("", highest("late value entropy", "lime", than=("plain",)), control="stranger"),
    ),
    scales={
        "smoke": {"depth": 3, "width": 32, "length": 16, "steps": 2, "judged": 1},
        "small": {"depth": 6, "width": 64, "length": 64, "steps": 120, "judged": 8},
        "full": {"depth": 16, "width": 768, "length": 128, "steps": 20000, "judged": 200},
    },
)
