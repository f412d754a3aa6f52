"""Rational units in deep Q-learning, against ReLU and SiLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from interlayer.claims import Claim, Scale, effect, highest
from interlayer.claims.twins import frozen
from interlayer.core.rl import DQN, sizes
from interlayer.layers.activation.rational_activation import Rational, fit, joint, rational_naive
from interlayer.models import MLP

ENVIRONMENTS = ("CartPole-v1", "Acrobot-v1")


ACTIVATIONS: dict[str, Callable[[], Any]] = {
    "relu": lambda: nn.ReLU,
    "silu": lambda: nn.SiLU,
    "rational": lambda: Rational,
    "recurrent-rational": joint,
    "frozen": lambda: frozen(Rational),
}


@torch.no_grad()
def moved(model: nn.Module) -> float:
    """By how much the functions differ from their start on [-3, 3], at most."""
    x = torch.linspace(-3, 3, 201)
    gaps = [0.0]
    for unit in model.modules():
        if isinstance(unit, Rational):
            a, b = (torch.tensor(c, dtype=x.dtype) for c in fit(unit.like, unit.degrees))
            gaps.append(float((unit(x) - rational_naive(x, a, b)).abs().max()))
    return max(gaps)


def build(arm: str, scale: Scale, environment: str = ENVIRONMENTS[-1]) -> MLP:
    """A network of action values."""
    features, actions = sizes(environment)
    return MLP(features, actions, depth=2, width=64, activation=ACTIVATIONS[arm]())


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Mean return of the episodes that ended in the last quarter of training."""
    found = {}
    for name, steps in zip(ENVIRONMENTS, scale.steps, strict=True):
        torch.manual_seed(seed)
        q = build(arm, scale, name)
        run = DQN(steps=steps, ratio=2 / scale.copies, copies=scale.copies, warm=scale.warm).train(q, name, seed=seed)
        late = [r for r, at in zip(run.returns, run.at, strict=True) if at > 0.75 * steps]
        found[name] = float(np.mean(late)) if late else float("nan")
        found[f"moved on {name}"] = moved(q)
    return found


CLAIM = Claim(
    says="Deep Q-networks with learned rational units, one for each layer or one for all, earn more in the last quarter of "
    "equal training than the same networks with ReLU or SiLU, on CartPole and on Acrobot.",
    measure=measure,
    build=build,
    arms=("relu", "silu", "rational", "recurrent-rational"),
    statements=tuple(
        effect("", highest(name, arm, than=("relu", "silu")), control="frozen")
        for arm in ("rational", "recurrent-rational")
        for name in ENVIRONMENTS
    ),
    scales={
        "smoke": {"steps": (510, 510), "copies": 1, "warm": 505},
        "small": {"steps": (20_000, 20_000), "copies": 8, "warm": 1000},
        "full": {"steps": (200_000, 500_000), "copies": 8, "warm": 5000},
    },
)
