"""Plain convolutional nets of 44 and 110 layers on digits, with and without orthonormal filters and modulated errors."""

from __future__ import annotations

import math
from typing import Any

import torch

from interlayer.claims import Claim, Scale, effect, lowest
from interlayer.claims.training import batches, judge, task
from interlayer.layers.stream.deep_plain import DeepPlain, Plain
from interlayer.models import ConvNet

ARMS: dict[str, dict[str, Any]] = {
    "plain": {"strength": 0.0, "modulate": False, "orthogonal": False},
    "modulated": {"strength": 0.0, "orthogonal": False},
    "both": {},
    "good start": {"strength": 0.0, "modulate": False},
}


def build(arm: str, scale: Scale) -> ConvNet:
    """The deepest net."""
    return net(max(scale.depths), scale)


def net(depth: int, scale: Scale) -> ConvNet:
    """A plain net for digits; the arms differ in their rule."""
    shape = task("digits").shape
    return ConvNet(shape.channels, shape.classes, depth=depth, width=scale.width, stream=Plain)


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Training loss and accuracy of the last steps, and the error at the first convolution over that at the last one."""
    found = {}
    probe = next(batches("digits", seed, 64, 1))
    for depth, steps in scale.depths.items():
        torch.manual_seed(seed)
        model = net(depth, scale)
        rule = DeepPlain(model, **ARMS[arm])
        errors = [list(rule.errors(probe).values())]
        metrics = []
        for number, batch in enumerate(batches("digits", seed, 64, steps)):
            rule.optimiser.param_groups[0]["lr"] = 0.1 * (1 - number / steps)
            metrics.append(rule.step(batch))
            if not math.isfinite(metrics[-1]["loss"]):
                break
        errors.append(list(rule.errors(probe).values()))
        last = metrics[-10:]
        loss = sum(t["loss"] for t in last) / len(last)
        found[f"loss at {depth}"] = loss if math.isfinite(loss) else math.inf
        found[f"accuracy in training at {depth}"] = sum(t["accuracy"] for t in last) / len(last)
        found[f"held-out accuracy at {depth}"] = judge(model, "digits")["accuracy"]
        for when, e in zip(("before", "after"), errors, strict=True):
            for name, at in (("first", 0), ("middle", len(e) // 2)):
                found[f"{depth}: error at the {name} layer over the last, {when}"] = e[at] / e[-1]
    return found


CLAIM = Claim(
    says="Plain Conv-BN-ReLU nets of 44 and of 110 layers reach a lower training loss on digits in equal steps with the "
    "orthonormality regulariser and modulated errors than without.",
    measure=measure,
    build=build,
    arms=("plain", "modulated", "both"),
    statements=(
        effect("", lowest("loss at 44", "both", than=("plain",)), control="good start"),
        effect("", lowest("loss at 110", "both", than=("plain",)), control="good start"),
    ),
    scales={
        "smoke": {"depths": {8: 2}, "width": 4},
        "small": {"depths": {44: 150, 110: 240}, "width": 8},
        "full": {"depths": {44: 20000, 110: 20000}, "width": 16},
    },
)
