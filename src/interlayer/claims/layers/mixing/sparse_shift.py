"""Sparse shift: how few channels need to move, and what that costs against depthwise convolution."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import nn

from interlayer.claims import Claim, Scale, effect, fits, highest
from interlayer.claims.training import judge, task, train
from interlayer.core import cost
from interlayer.layers.mixing.sparse_shift import FENet, SparseShift


def _depthwise(channels: int) -> nn.Module:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)


class Grouped(SparseShift):
    """Fixed shifts: the channels go to the nine neighbours in equal groups (Wu et al., arXiv:1711.08141)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.displacement.requires_grad_(False)


# In so few steps no displacement gets from one pixel to the next, so they are spread between pixels at initialisation, and
# the penalty is larger than for a long training.
MIXES: dict[str, Callable[[int], nn.Module]] = {
    "sparse shift": partial(SparseShift, penalty=1e-2, spread=1.0),
    "depthwise 3x3": _depthwise,
    "grouped shift": Grouped,
    "no penalty": partial(SparseShift, penalty=0.0, spread=1.0),
    "no shift": partial(SparseShift, penalty=0.0, spread=0.0),
}


@cache
def multiply_adds(width: int, arm: str) -> float:
    """Multiply-adds of one photograph's patch."""
    shape = task("photos").shape
    with torch.device("meta"):  # shapes are enough for counting
        net = FENet.for_task(shape, width=width, mix=MIXES[arm])
        return cost.flops(net.eval(), torch.zeros(1, shape.channels, shape.height, shape.width)) / 2


def build(arm: str, scale: Scale) -> FENet:
    """A classifier for patches of photographs."""
    net = FENet.for_task(task("photos").shape, width=equal_width(arm, scale), mix=MIXES[arm])
    if arm == "no shift":
        for module in net.modules():
            if isinstance(module, SparseShift):
                module.displacement.requires_grad_(False)
    return net


def equal_width(arm: str, scale: Scale) -> int:
    """The width at which the multiply-adds are closest to the sparse shift's."""
    goal = multiply_adds(scale.width, "sparse shift")
    return min(range(2, scale.width + 1, 2), key=lambda w: abs(multiply_adds(w, arm) - goal))


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Accuracy on photographs, share of unshifted channels, multiply-adds."""
    torch.manual_seed(seed)
    net = build(arm, scale)
    train(net, "photos", seed=seed, steps=scale.steps, lr=2e-3, batch=32)
    shifts = [m for m in net.modules() if isinstance(m, SparseShift)]
    channels = sum(len(m.displacement) for m in shifts)
    still = sum(m.unshifted * len(m.displacement) for m in shifts) / channels if shifts else 0.0
    return {
        "accuracy": judge(net, "photos", most=scale.judged)["accuracy"],
        "unshifted channels": still,
        "thousands of multiply-adds": multiply_adds(equal_width(arm, scale), arm) / 1e3,
    }


CLAIM = Claim(
    says="With the shift penalty at least half of the channels end unshifted, and at equal multiply-adds the network is no more "
    "than two points less accurate than with depthwise convolutions or with every channel shifted.",
    measure=measure,
    build=build,
    arms=("sparse shift", "depthwise 3x3", "grouped shift"),
    statements=(
        effect(
            "",
            highest("accuracy", "sparse shift", than=("depthwise 3x3", "grouped shift"), margin=-0.02),
            control="no shift",
        ),
        effect("", fits("unshifted channels", "sparse shift", low=0.5), control="no penalty"),
    ),
    scales={
        "smoke": {"width": 2, "steps": 1, "judged": 1},
        "small": {"width": 4, "steps": 150, "judged": None},
        "full": {"width": 16, "steps": 10000, "judged": None},
    },
)
