"""SmeLU: how far replicas of one model, trained apart, differ in what they predict."""

from __future__ import annotations

from itertools import combinations

import torch

from interlayer.claims import Claim, Scale, highest, lowest
from interlayer.claims.training import task, train
from interlayer.models import MLP

ARMS = ("smelu", "relu", "gelu", "silu")
SHARP, FLAT = "smelu(beta=0.001)", "smelu(beta=100.0)"


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Replicas differ in initial weights and in the order of the data; the distance is between their class probabilities."""
    x, y = task("digits").data["validation"]  # type: ignore[attr-defined]
    found = []
    for replica in range(scale.replicas):
        torch.manual_seed(1000 * seed + replica)
        net = MLP(64, 10, depth=3, width=64, activation=arm)
        train(net, "digits", seed=1000 * seed + replica, steps=scale.steps, lr=2e-3)
        with torch.no_grad():
            found.append(net.eval()(x).softmax(-1))
    apart = [(a - b).abs().sum(-1).mean() for a, b in combinations(found, 2)]
    right = [(p.argmax(-1) == y).float().mean() for p in found]
    return {
        "prediction difference": torch.stack(apart).mean().item(),
        "accuracy": torch.stack(right).mean().item(),
        "predictions that flip": torch.stack(
            [(a.argmax(-1) != b.argmax(-1)).float().mean() for a, b in combinations(found, 2)]
        ).mean().item(),
    }  # fmt: skip


CLAIM = Claim(
    says="Replicas of a network with SmeLU differ less in their predictions than replicas with ReLU, GELU or swish, at an accuracy no "
    "more than half a point lower.",
    measure=measure,
    arms=ARMS,
    expect=(lowest("prediction difference", "smelu"), highest("accuracy", "smelu", margin=-0.005)),
    control=(SHARP, FLAT),
    scales={
        "smoke": {"steps": 2, "replicas": 2},
        "small": {"steps": 300, "replicas": 5},
        "full": {"steps": 5000, "replicas": 10},
    },
)
