"""Plain networks of 44 and 110 layers on digits, trained for longer than the claim of `deep-plain` at its small scale has time for.

Every arm has its best of the same rates on one seed that is not reported.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import torch
from torch import nn

from interlayer.claims.training import judge
from interlayer.core.pairing import paired
from interlayer.layers.stream.deep_plain import DeepPlain, Plain
from interlayer.models import ConvNet
from interlayer.study import tasks

NOTHING: dict[str, Any] = {"strength": 0.0, "modulate": False}
ARMS = {"plain": NOTHING | {"orthogonal": False}, "orthogonal start": NOTHING, "deep-plain": {}}
STEPS = {44: 300, 110: 600}
RATES, BATCH, WIDTH, TUNED, SEEDS = (0.03, 0.1, 0.3), 64, 8, 1000, range(4)


def trained(arm: str, depth: int, seed: int, lr: float) -> tuple[float, float, float]:
    """Training loss of the last ten steps; accuracy on held-out digits; the first layer's error over the last one's at the start."""
    task = tasks.load("digits")

    def build() -> nn.Module:
        return ConvNet(task.shape.channels, task.shape.classes, depth=depth, width=WIDTH, stream=Plain)

    model = paired(build, seed).model
    torch.manual_seed(seed)
    rule, losses, steps = DeepPlain(model, **ARMS[arm]), list[float](), STEPS[depth]
    errors = list(rule.errors(next(task.batches(seed, 16))).values())
    for step, batch in enumerate(islice(task.batches(seed, BATCH), steps)):
        rule.optimiser.param_groups[0]["lr"] = lr * (1 - step / steps) * min(1.0, (step + 1) / 5)
        losses.append(rule.step(batch)["loss"])
        if not math.isfinite(losses[-1]):
            break
    return sum(losses[-10:]) / 10, judge(model, "digits")["accuracy"], errors[0] / errors[-1]


def main() -> None:
    """Means over seeds."""
    torch.set_num_threads(1)
    for depth in STEPS:
        for arm in ARMS:
            tried = {lr: trained(arm, depth, TUNED, lr)[0] for lr in RATES}
            lr = min(tried, key=lambda rate: tried[rate] if math.isfinite(tried[rate]) else math.inf)
            found = [trained(arm, depth, seed, lr) for seed in SEEDS]
            loss, accuracy, ratio = (sum(values) / len(SEEDS) for values in zip(*found, strict=True))
            each = " ".join(f"{a:.3f}" for _, a, _ in found)
            print(
                f"{depth} layers, {arm} at {lr}: loss {loss:.3f}, held-out accuracy {accuracy:.3f} ({each}), "
                f"error at the first layer over the last {ratio:.3g}",
                flush=True,
            )


if __name__ == "__main__":
    main()
