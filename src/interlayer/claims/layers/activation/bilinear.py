"""Bilinear layers against other MLPs of as many parameters, on text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interlayer.claims import Claim, Scale, effect, lowest
from interlayer.claims.training import language
from interlayer.core.cost import parameters
from interlayer.layers.activation.bilinear import Bilinear, evaluate, residual_stack
from interlayer.models import Transformer


class OneSided(Bilinear):
    """The control: the second factor is left out, so that the layer is linear."""

    def forward(self, x: Tensor) -> Tensor:
        """``W_3 W_1 x``, with the parameters of ``W_2`` unused but for a zero."""
        return self.down(self.gate(x) + 0 * self.up(x))


ARMS: dict[str, dict[str, Any]] = {
    "bilinear": {"mlp": "bilinear"},
    "relu": {"mlp": "mlp", "activation": "relu"},
    "gelu": {"mlp": "mlp", "activation": "gelu"},
    "swiglu": {"mlp": "glu"},
}


def build(arm: str, scale: Scale) -> Transformer:
    """A language model of bytes."""
    return Transformer(depth=scale.depth, width=scale.width, heads=4, **ARMS.get(arm, {"mlp": OneSided}))


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Validation loss after equal steps; and how far the tensor form of a stack is from the layers, relative, in float64."""
    torch.manual_seed(seed)
    model = build(arm, scale)
    found = {"loss": language(model, seed, scale), "parameters": float(parameters(model))}
    if arm == "bilinear":
        layers = [Bilinear(4, hidden=6).double() for _ in range(2)]
        x = y = torch.randn(4, dtype=torch.float64)
        with torch.no_grad():
            for layer in layers:
                y = y + layer(y)
            found["error of the tensor form"] = ((evaluate(residual_stack(layers), x) - y).norm() / y.norm()).item()
    return found


CLAIM = Claim(
    says="At equal parameters and steps a Transformer with bilinear layers has a lower loss than with ReLU or GELU MLPs, and one no "
    "more than 0.01 nats above SwiGLU's.",
    measure=measure,
    build=build,
    arms=tuple(ARMS),
    statements=(
        effect("", lowest("loss", "bilinear", than=("relu", "gelu")), control="one-sided"),
        effect("", lowest("loss", "bilinear", than=("swiglu",), margin=-0.01), control="one-sided"),
    ),
    scales={
        "smoke": {"depth": 2, "width": 24, "steps": 2, "length": 64, "judged": 1},
        "small": {"depth": 4, "width": 72, "steps": 150, "length": 64, "judged": 8},
        "full": {"depth": 12, "width": 768, "steps": 20000, "length": 64, "judged": 200},
    },
)
