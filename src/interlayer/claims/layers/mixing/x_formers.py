"""The attention leaves of the survey's tree side by side: quality at two lengths, and cost as the length grows."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer import catalog
from interlayer.claims import Claim, Scale, effect, fits, lowest
from interlayer.claims.training import batches, task
from interlayer.core import cost
from interlayer.core.extra import extra_loss
from interlayer.core.mixer import Attention, Context
from interlayer.core.slots import fill
from interlayer.core.trunk import build_trunk, initialise
from interlayer.layers.mixing.x_formers.linear import Linear
from interlayer.layers.mixing.x_formers.prior import ResidualScores

FULL, BLIND, WRITTEN = "softmax attention", "no mixing", "linear attention, all scores written out"
LEAVES = {
    leaf.name.removeprefix("module/attention/"): leaf for leaf in catalog.taxonomy().values() if "attention" in leaf.at
}
LINEAR = (
    "linearised/feature map", "linearised/random feature map", "linearised/aggregation rule",
    "sparse/position-based/band", "memory compression/projection", "low rank",
)  # fmt: skip
CAUSAL = ("linearised/aggregation rule",)  # has no form that sees both ways: it fills in from what is before alone
SIZES = {"width": 32, "heads": 4}
SHORT, LONG = 32, 128


class NoMixing(nn.Module):
    """The control of quality: tokens never meet."""

    def forward(self, x: Tensor) -> Tensor:
        """Nothing is added."""
        return 0 * x


class Written(Linear):
    """The control of growth: the same function as linear attention, with queries and keys multiplied first."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """All S^2 scores."""
        score = self.features(q) @ self.features(k).transpose(-1, -2)
        return score / score.sum(-1, keepdim=True) @ v


MIXERS: dict[str, dict[str, Any]] = {
    FULL: {"mixer": "attention"},
    BLIND: {"mixer": NoMixing},
    WRITTEN: {"mixer": Written},
}


def _use(arm: str) -> dict[str, Any]:
    return dict(LEAVES[arm].use) if arm in LEAVES else dict(MIXERS[arm])


class Filler(nn.Module):
    """Tells which byte stood at every place."""

    def __init__(self, arm: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(256, SIZES["width"]), nn.Linear(SIZES["width"], 256)
        initialise(self)
        self.trunk = build_trunk(depth=2, length=LONG, causal=arm in CAUSAL, **SIZES, **_use(arm))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.trunk(self.embed(tokens)))

    def loss(self, text: Tensor, generator: torch.Generator) -> Tensor:
        """Cross-entropy of the 15% of bytes that are hidden, as zeros, which text does not have."""
        hidden = torch.rand(text.shape, generator=generator) < 0.15
        return F.cross_entropy(self(text.masked_fill(hidden, 0))[hidden], text[hidden])


def build(arm: str, scale: Scale) -> Filler:
    """The network that fills in hidden bytes."""
    return Filler(arm)


def _flops(arm: str, length: int) -> int:
    """FLOPs of one mixer between its projections, at one length."""
    use = _use(arm)
    sizes = {**SIZES, "length": length, "causal": arm in CAUSAL, "kv_heads": use.get("kv_heads")}
    with torch.device("meta"):  # shapes are enough for counting
        layer = fill("mixer", use.get("mixer", "attention"), **sizes)
        q = k = v = torch.zeros(1, 4, length, 8)
        return cost.flops(_Mix(layer), q, k, v)


class _Mix(nn.Module):
    """``mix`` of a mixer as a module, for the counter."""

    def __init__(self, layer: Attention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What each head reads."""
        if isinstance(self.layer, ResidualScores):
            self.layer.context = Context()
        return self.layer.mix(q, k, v)


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Loss on hidden bytes of Python's standard library at both lengths, and how the FLOPs of mixing grow."""
    torch.manual_seed(seed)
    model, generator = build(arm, scale), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for step, (text, _) in enumerate(batches("stdlib-bytes", seed, 16, scale.steps)):
        loss = model.loss(text[:, :SHORT] if step % 2 else text[: 16 * SHORT // LONG], generator)
        more = extra_loss(model)
        optimiser.zero_grad()
        (loss if more is None else loss + more).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    model.eval()
    found = {}
    for length in (SHORT, LONG):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            judged = islice(task("stdlib-bytes").batches(0, 64, "validation"), scale.judged)
            losses = [model.loss(text[:, :length], generator).item() for text, _ in judged]
        found[f"loss at {length}"] = sum(losses) / len(losses)
    if arm == BLIND:
        return found
    counts = {length: _flops(arm, length) for length in (SHORT, LONG, *scale.lengths)}
    for length in (SHORT, LONG, scale.lengths[1]):
        found[f"FLOPs at {length} over softmax"] = counts[length] / _flops(FULL, length)
    short, long = (max(1, counts[length]) for length in scale.lengths)
    return {**found, "growth": math.log(long / short) / math.log(scale.lengths[1] / scale.lengths[0])}


CLAIM = Claim(
    says="Between lengths 512 and 8192 the FLOPs of the linear family grow with an exponent of at most 1.1, and in filling in hidden "
    "bytes of 128 linear attention, a window and Nystroem landmarks lose at most a tenth of a nat to softmax attention.",
    measure=measure,
    build=build,
    arms=(FULL, *LEAVES),
    statements=(
        *(effect("", fits("growth", arm, high=1.1), control=WRITTEN) for arm in LINEAR),
        *(
            effect("", lowest(f"loss at {LONG}", arm, than=(FULL,), margin=-0.1), control=BLIND)
            for arm in (LINEAR[0], LINEAR[3], LINEAR[5])
        ),
    ),
    scales={
        "smoke": {"steps": 1, "judged": 1, "lengths": (64, 256)},
        "small": {"steps": 240, "judged": 4, "lengths": (512, 8192)},
        "full": {"steps": 20000, "judged": None, "lengths": (512, 8192)},
    },
)
