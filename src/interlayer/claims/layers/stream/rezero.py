"""ReZero against plain, residual and normed networks: how fast deep ones begin to learn."""

from __future__ import annotations

import math

import torch

from interlayer.claims import Claim, Scale, lowest
from interlayer.claims.training import judge, task, train
from interlayer.models import MLP, Transformer


def steps_to_90(arm: str, seed: int, depth: int, limit: int) -> float:
    """Steps until 90% validation accuracy on digits, looked at every 10; infinite if never."""
    torch.manual_seed(seed)
    shape = task("digits").shape
    model = MLP(shape.flat, shape.classes, depth=depth, width=64, stream=arm)
    arrived = math.inf

    def watch(step: int, loss: float) -> bool:
        nonlocal arrived
        if step % 10 == 9 and judge(model, "digits")["accuracy"] >= 0.9:
            arrived = step + 1
        return math.isfinite(arrived)

    train(model, "digits", seed=seed, steps=limit, lr=1e-3, batch=128, watch=watch)
    return arrived


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Steps to 90% of fully connected ReLU nets by depth; loss of a 24-layer Transformer that had no warm-up."""
    found = {f"steps at {depth}": steps_to_90(arm, seed, depth, scale.limit) for depth in scale.depths}
    if scale.lm_steps:
        torch.manual_seed(seed)
        model = Transformer(length=128, depth=24, width=64, heads=4, stream=arm)
        losses = train(model, "stdlib-bytes", seed=seed, steps=scale.lm_steps, lr=3e-3, batch=8, cut=64)
        found["loss of 24-layer Transformer"] = sum(losses[-10:]) / len(losses[-10:])
    return found


CLAIM = Claim(
    says="Fully connected ReLU nets of 128 layers reach 90% on digits in fewer steps with ReZero than plain, residual, "
    "pre-norm or post-norm, and a 24-layer Transformer without warm-up has a lower loss at equal steps.",
    measure=measure,
    arms=("feedforward", "residual", "pre-norm", "post-norm", "rezero"),
    expect=(lowest("steps at 128", "rezero"), lowest("loss of 24-layer Transformer", "rezero")),
    control="rezero(start=1.0)",
    scales={
        "smoke": {"depths": (128,), "limit": 3, "lm_steps": 1},
        "small": {"depths": (32, 128), "limit": 100, "lm_steps": 60},
        "full": {"depths": (32, 64, 128, 256), "limit": 2000, "lm_steps": 1000},
    },
)
