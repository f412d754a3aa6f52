"""Identity mappings: pre-activated residual nets against the original unit and shortcuts that are not the identity."""

from __future__ import annotations

from interlayer.claims import Claim, Scale, effect, lowest
from interlayer.claims.training import built, judge, task, train
from interlayer.layers.stream.identity_mappings import ORDERS, SHORTCUTS
from interlayer.models import ConvNet

ARMS = {
    **{order: f"identity-mappings(order={order!r})" for order in ORDERS},
    **{s: f"identity-mappings(order='original', shortcut={s!r})" for s in SHORTCUTS if s != "identity"},
    "no shortcut": "feedforward",
    "half path": "identity-mappings(shortcut='constant')",
}


def build(arm: str, scale: Scale) -> ConvNet:
    """The deepest net."""
    return net(arm, max(scale.depths), scale.width)


def net(arm: str, depth: int, width: int) -> ConvNet:
    """A residual net for digits."""
    shape = task("digits").shape
    return ConvNet(shape.channels, shape.classes, depth=depth, width=width, stream=ARMS[arm])


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Mean training loss of the last steps and validation error on digits, by depth."""
    found = {}
    for depth in scale.depths:
        model = built(lambda depth=depth: net(arm, depth, scale.width), seed)
        losses = train(model, "digits", seed=seed, steps=scale.steps, lr=2e-3, batch=32)
        found[f"loss at {depth}"] = sum(losses[-5:]) / len(losses[-5:])
        found[f"error at {depth}"] = 1 - judge(model, "digits")["accuracy"]
    return found


CLAIM = Claim(
    says="In a residual net of 164 layers, full pre-activation trains to a lower loss on digits than the original unit "
    "and than every shortcut that is not the identity.",
    measure=measure,
    build=build,
    arms=tuple(a for a in ARMS if a not in ("no shortcut", "half path")),
    statements=(
        effect(
            "",
            lowest(
                "loss at 164",
                "pre",
                than=("original", "constant", "exclusive-gate", "shortcut-gate", "conv", "dropout"),
            ),
            control="half path",
        ),
    ),
    scales={
        "smoke": {"depths": (8,), "width": 4, "steps": 1},
        "small": {"depths": (20, 164), "width": 4, "steps": 25},
        "full": {"depths": (20, 56, 110, 164, 1004), "width": 16, "steps": 2000},
    },
)
