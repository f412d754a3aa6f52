"""Dynamic layer tying against the untied Transformer: perplexity, parameters that train, memory of a step."""

from __future__ import annotations

import math
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from interlayer.claims import Claim, Scale, effect, lowest
from interlayer.claims.training import batches, judge
from interlayer.core.cost import parameters, peak_bytes
from interlayer.layers.stream.layer_tying import LayerTying
from interlayer.models import Transformer


class Inert(LayerTying):
    """A control: the agent learns and decides, but nothing is tied."""

    def act(self, layer: int, action: int) -> None:
        pass


def build(arm: str, scale: Scale) -> Transformer:
    """A language model of bytes; the arms differ in their rule."""
    return Transformer(depth=scale.depth, width=scale.width, heads=4)


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Perplexity on held-out text, share of the untied parameters that train along the way, bytes of a step at its fullest."""
    torch.manual_seed(seed)
    model = build(arm, scale)
    whole = parameters(model)
    clip = 256.0  # the perplexity of guessing; within the default 10, all rewards of a young byte model are the same
    rule: LayerTying
    if arm == "inert":
        rule = Inert(model, lr=2e-3, seed=seed, clip=clip, decay=scale.decay)
    elif arm in ("untied", "one layer"):  # the agent is never asked
        rule = LayerTying(model, lr=2e-3, start="free" if arm == "untied" else "tied", every=scale.steps + 1)
        rule.steps = 1
    else:
        rule = LayerTying(model, lr=2e-3, seed=seed, clip=clip, decay=1.0 if arm == "random" else scale.decay)
    shares, peaks = [], []

    def step(batch: tuple[Tensor, Tensor]) -> None:
        shares.append(rule.step(batch)["trainable"] / whole)

    for number, (x, y) in enumerate(batches("stdlib-bytes", seed, scale.batch, scale.steps)):
        batch = x[:, : scale.length], y[:, : scale.length]
        if (number + 2) % (
            scale.steps // scale.peaks
        ) == 0:  # between two decisions; the optimiser has its moments by now
            model.zero_grad(set_to_none=True)
            moments = chain.from_iterable(s.values() for s in rule.optimiser.state.values())
            peaks.append(peak_bytes(partial(step, batch), [*model.parameters(), *moments, *batch]))
        else:
            step(batch)
    loss = judge(model, "stdlib-bytes", batch=64, most=scale.judged, cut=scale.length)["loss"]
    found = {
        "perplexity": math.exp(loss),
        "trained share": sum(shares) / len(shares),
        "peak bytes": sum(peaks) / len(peaks),
    }
    quarter = len(shares) // 4
    for q in range(4):
        found[f"trained share, quarter {q + 1}"] = sum(shares[q * quarter : (q + 1) * quarter]) / quarter
    return found


CLAIM = Claim(
    says="A Transformer whose layers a Q-learning agent ties while it trains has a lower perplexity than the untied one after "
    "equal steps, trains fewer parameters all along, and a step takes less memory at its fullest.",
    measure=measure,
    build=build,
    arms=("untied", "q-learning", "one layer"),
    statements=(
        effect("", lowest("perplexity", "q-learning", than=("untied",)), control="random"),
        effect("", lowest("trained share", "q-learning", than=("untied",)), control="inert"),
        effect("", lowest("peak bytes", "q-learning", than=("untied",)), control="inert"),
    ),
    scales={
        "smoke": {"depth": 3, "width": 16, "length": 8, "batch": 2, "steps": 8, "peaks": 1, "decay": 0.5, "judged": 1},
        "small": {
            "depth": 6,
            "width": 64,
            "length": 64,
            "batch": 8,
            "steps": 320,
            "peaks": 4,
            "decay": 0.8,
            "judged": 8,
        },
        "full": {
            "depth": 48,
            "width": 768,
            "length": 128,
            "batch": 64,
            "steps": 40000,
            "peaks": 20,
            "decay": 0.95,
            "judged": 200,
        },
    },
)
