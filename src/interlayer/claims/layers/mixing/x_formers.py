"""The attention leaves of the survey's tree side by side: quality, and cost as the length grows."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from interlayer import catalog
from interlayer.claims import Claim, Scale, fits, lowest
from interlayer.claims.training import judge, train
from interlayer.core import cost
from interlayer.core.mixer import Attention, Context, attend
from interlayer.core.slots import fill
from interlayer.layers.mixing.x_formers import XFormer
from interlayer.layers.mixing.x_formers.prior import ResidualScores
from interlayer.layers.mixing.x_formers.sparse import SlidingWindow

FULL, BLIND, MASKED = "softmax attention", "no mixing", "window as a mask"
LEAVES = {
    leaf.name.removeprefix("module/attention/"): leaf for leaf in catalog.taxonomy().values() if "attention" in leaf.at
}
LINEAR = (
    "linearised/feature map", "linearised/random feature map", "linearised/aggregation rule",
    "sparse/position-based/band", "memory compression/projection", "low rank",
)  # fmt: skip
CAUSAL = ("linearised/aggregation rule",)  # has no form that sees both ways
SIZES = {"depth": 2, "width": 32, "heads": 4}


class NoMixing(torch.nn.Module):
    """The control of quality: tokens never meet."""

    def __init__(self) -> None:
        super().__init__()
        self.dummy = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Nothing is added."""
        return 0 * x * self.dummy

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """No product at all."""
        return 0 * v


class Masked(SlidingWindow):
    """The control of growth: the same window, but all scores are computed and most thrown away."""

    def blocks(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention over everything, masked."""
        seen = self.pattern(q.shape[-2], k.shape[-2], q.device)
        return attend(q, k, v, causal=False, mask=mask, allowed=seen)


def _use(arm: str) -> dict[str, Any]:
    if arm in (BLIND, MASKED):
        return {"mixer": NoMixing if arm == BLIND else partial(Masked, window=16)}
    return dict(LEAVES[arm].use) if arm in LEAVES else {"mixer": "attention"}


def _flops(arm: str, length: int) -> int:
    """FLOPs of one mixer between its projections, at one length."""
    use = _use(arm)
    sizes = {"width": 32, "heads": 4, "length": length, "causal": arm in CAUSAL, "kv_heads": use.get("kv_heads")}
    with torch.device("meta"):  # shapes are enough for counting
        layer = fill("mixer", use.get("mixer", "attention"), **sizes)
        q = k = v = torch.zeros(1, 4, length, 8)
        return cost.flops(_Mix(layer), q, k, v)


class _Mix(torch.nn.Module):
    """``mix`` of a mixer as a module, for the counter."""

    def __init__(self, layer: Attention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """What each head reads."""
        if isinstance(self.layer, ResidualScores):
            self.layer.context = Context()
        return self.layer.mix(q, k, v)


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Error on patches of photographs (64 tokens, both ways), and how the FLOPs of mixing grow with length."""
    found = {"error on photos": math.inf}
    if arm not in CAUSAL:
        torch.manual_seed(seed)
        model = XFormer("other", channels=1, image=(32, 32), patch=4, classes=16, **SIZES, **_use(arm))
        train(model, "photos", seed=seed, steps=scale.steps, lr=3e-3, batch=32, warmup=scale.steps // 10)
        found["error on photos"] = 1 - judge(model, "photos", most=scale.judged)["accuracy"]
    short, long = (_flops(arm, length) for length in scale.lengths)
    growth = math.log(max(long, 1) / max(short, 1)) / math.log(scale.lengths[1] / scale.lengths[0])
    return {**found, "growth": growth, "FLOPs at the longest over softmax": long / _flops(FULL, scale.lengths[1])}


CLAIM = Claim(
    says="Between lengths 512 and 8192 the FLOPs of the linear family grow with an exponent of at most 1.1, and on 64 tokens linear "
    "attention, a window and Nystroem landmarks err by at most two points more than softmax attention.",
    measure=measure,
    arms=(FULL, *LEAVES),
    expect=(
        *(fits("growth", arm, high=1.1) for arm in LINEAR),
        *(lowest("error on photos", arm, than=(FULL,), margin=-0.02) for arm in (LINEAR[0], LINEAR[3], LINEAR[5])),
    ),
    control=(*(MASKED for _ in LINEAR), BLIND, BLIND, BLIND),
    scales={
        "smoke": {"steps": 1, "judged": 1, "lengths": (64, 256)},
        "small": {"steps": 50, "judged": None, "lengths": (512, 8192)},
        "full": {"steps": 5000, "judged": None, "lengths": (512, 8192)},
    },
)
