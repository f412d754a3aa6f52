"""Sequential and parallel sublayers under Euler, midpoint, RK4 and an adapted pair, at equal right-hand-side evaluations."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interlayer.claims import Claim, Scale, effect, lowest
from interlayer.claims.training import judge, task, train
from interlayer.core.solve import TABLEAUS, Tableau
from interlayer.core.stream import State
from interlayer.layers.stream.node_transformer import Integrate, NODETransformer
from interlayer.models import Transformer, VisionTransformer


class Late(NODETransformer):
    """A control: the MLP of a place reads the place before it, so that the two sublayers do not see the same state."""

    def read(self, state: State, layer: int) -> Tensor:
        """The state, shifted by one place for the MLP."""
        x = self.norms[layer](state.x)
        return x if layer % self.branches == 0 else F.pad(x, (0, 0, 1, -1))


# A control: the stages of RK4 weighted so that the method is consistent but of first order.
FIRST = Tableau(TABLEAUS["rk4"].a, (0.4, 0.3, 0.2, 0.1), TABLEAUS["rk4"].c, 1)

ARMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sequential": ("pre-norm", {"solver": "euler", "steps": 4}),
    "parallel": (NODETransformer, {"solver": "euler", "steps": 4}),
    "midpoint": (NODETransformer, {"solver": "midpoint", "steps": 2}),
    "rk4": (NODETransformer, {"solver": "rk4"}),
    "adapted": (NODETransformer, {"solver": "bogacki-shampine", "tolerance": 3e-2}),
    "shifted": (Late, {"solver": "euler", "steps": 4}),
    "first order": (NODETransformer, {"solver": FIRST}),
}


def build(arm: str, scale: Scale) -> Transformer:
    """A language model of bytes."""
    return Transformer(**_sizes(arm, scale))


def _sizes(arm: str, scale: Scale) -> dict[str, Any]:
    stream, options = ARMS[arm]
    return {
        "depth": scale.depth,
        "width": scale.width,
        "heads": 4,
        "stream": stream,
        "order": partial(Integrate, **options),
    }


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Validation loss on bytes and on photographs of the same blocks under the arm's solver, and its evaluations."""
    found = {}
    if arm not in ("adapted", "first order"):  # adapted steps see the whole sequence; the other is judged on images
        torch.manual_seed(seed)
        model = build(arm, scale)
        train(model, "stdlib-bytes", seed=seed, steps=scale.steps, lr=2e-3, batch=16, warmup=10, cut=scale.length)
        found["language loss"] = judge(model, "stdlib-bytes", batch=64, most=scale.judged, cut=scale.length)["loss"]
    torch.manual_seed(seed)
    shape = task("digits").shape
    vision = VisionTransformer(shape.channels, shape.height, patch=2, classes=shape.classes, **_sizes(arm, scale))
    train(vision, "digits", seed=seed, steps=scale.image_steps, lr=2e-3, batch=32, warmup=10)
    judged = judge(vision, "digits")
    order = vision.trunk.order
    assert isinstance(order, Integrate)
    return {
        **found,
        "image loss": judged["loss"],
        "image error": 1 - judged["accuracy"],
        "evaluations": order.evaluations,
    }


CLAIM = Claim(
    says="With the same blocks and 8 evaluations of the right-hand side, parallel sublayers have a lower loss than sequential "
    "ones on bytes and on digits, and RK4 a lower one than four Euler steps on digits.",
    measure=measure,
    build=build,
    arms=tuple(a for a in ARMS if a not in ("shifted", "first order")),
    statements=(
        effect("", lowest("language loss", "parallel", than=("sequential",)), control="shifted"),
        effect("", lowest("image loss", "parallel", than=("sequential",)), control="shifted"),
        effect("", lowest("image loss", "rk4", than=("parallel",)), control="first order"),
    ),
    scales={
        "smoke": {"depth": 1, "width": 32, "length": 16, "steps": 1, "image_steps": 1, "judged": 1},
        "small": {"depth": 2, "width": 64, "length": 64, "steps": 60, "image_steps": 200, "judged": 8},
        "full": {"depth": 6, "width": 512, "length": 128, "steps": 20000, "image_steps": 20000, "judged": 200},
    },
)
