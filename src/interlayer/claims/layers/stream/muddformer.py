"""MUDDFormer against the plain Transformer and DenseFormer at equal steps, and what its connections cost."""

from __future__ import annotations

from typing import Any

import torch

from interlayer.claims import Claim, Scale, effect, lowest
from interlayer.claims.training import built, language
from interlayer.claims.twins import frozen
from interlayer.core import cost
from interlayer.layers.stream.muddformer import MUDDFormer, widening
from interlayer.models import Transformer

ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "denseformer": {"stream": "denseformer"},
    "muddformer": {"stream": "muddformer"},
    "muddformer, widening": {"stream": "muddformer", "mlp": widening},
    "frozen": {"stream": frozen(MUDDFormer, "alpha", "dynamic")},  # nothing of earlier blocks is ever read
}


def build(arm: str, scale: Scale) -> Transformer:
    """A language model of bytes."""
    return Transformer(depth=scale.depth, width=scale.width, heads=4, **ARMS[arm])


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Validation loss after equal steps, and parameters and FLOPs of a pass in percent above the plain Transformer."""
    model, plain = (built(lambda name=name: build(name, scale), seed) for name in (arm, "plain"))
    loss = language(model, seed, scale)
    tokens = torch.zeros(1, 128, dtype=torch.long)
    return {
        "loss": loss,
        "parameters +%": 100 * (cost.parameters(model) / cost.parameters(plain) - 1),
        "FLOPs +%": 100 * (cost.flops(model, tokens) / cost.flops(plain, tokens) - 1),
    }


CLAIM = Claim(
    says="At equal steps multiway dynamic dense connections lower the Transformer's validation loss below plain and "
    "DenseFormer.",
    measure=measure,
    build=build,
    arms=tuple(a for a in ARMS if a != "frozen"),
    statements=(effect("", lowest("loss", "muddformer", than=("plain", "denseformer")), control="frozen"),),
    scales={
        "smoke": {"depth": 3, "width": 32, "length": 16, "steps": 2, "judged": 1},
        "small": {"depth": 6, "width": 64, "length": 64, "steps": 150, "judged": 8},
        "full": {"depth": 24, "width": 1024, "length": 128, "steps": 13500, "judged": 200},
    },
)
