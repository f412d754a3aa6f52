"""Sparse shift: integer shifts with the gradient of interpolation, how few channels need to move, and accuracy against depthwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, check, effect, fits, highest, mechanism
from interlayer.claims.training import built, judge, task, train
from interlayer.core import cost
from interlayer.layers.mixing.sparse_shift import FENet, SparseShift, bilinear_shift, shift


def _depthwise(channels: int) -> nn.Module:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)


class Grouped(SparseShift):
    """Fixed shifts: the channels go to the nine neighbours in equal groups (Wu et al., arXiv:1711.08141)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.displacement.requires_grad_(False)


class Unshifted(SparseShift):
    """The control: no channel ever moves."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, penalty=0.0, spread=0.0)
        self.displacement.requires_grad_(False)


class Fractional(SparseShift):
    """The control of integer shifts: interpolation in the forward pass too."""

    def forward(self, x: Tensor) -> Tensor:
        """Fractions of pixels."""
        return bilinear_shift(x, self.displacement)


class Floor(SparseShift):
    """A mutant: displacements are rounded down."""

    def forward(self, x: Tensor) -> Tensor:
        """Another rounding."""
        smooth = bilinear_shift(x.detach(), self.displacement)
        return shift(x, self.displacement.detach().floor().long()) + (smooth - smooth.detach())


class Straight(SparseShift):
    """A mutant: the gradient is that of interpolation at the rounded displacement."""

    def forward(self, x: Tensor) -> Tensor:
        """Another point of the same gradient."""
        whole = self.displacement + (self.displacement.round() - self.displacement).detach()
        return bilinear_shift(x, whole)


class Rounded(SparseShift):
    """The control of the gradient: rounding alone, which has none."""

    def forward(self, x: Tensor) -> Tensor:
        """The value of the layer."""
        return shift(x, self.displacement.round().long()) + 0.0 * self.displacement.sum()


# In so few steps no displacement gets from one pixel to the next, so they are spread between pixels at initialisation, and
# the penalty is larger than for a long training. Rates: see `pilots`.
ARMS: dict[str, tuple[Callable[[int], nn.Module], float]] = {
    "sparse shift": (partial(SparseShift, penalty=5e-3, spread=1.0), 3e-3),
    "depthwise 3x3": (_depthwise, 3e-3),
    "grouped shift": (Grouped, 3e-3),
}
TWINS: dict[str, tuple[Callable[[int], nn.Module], float]] = {
    "no penalty": (partial(SparseShift, penalty=0.0, spread=1.0), 3e-3),
    "no shift": (Unshifted, 3e-3),
}
EXACT: dict[str, type[SparseShift]] = {
    "sparse shift": SparseShift,
    "fractional": Fractional,
    "rounded down": Floor,
    "rounding alone": Rounded,
    "gradient at whole pixels": Straight,
}


@cache
def multiply_adds(width: int, arm: str) -> float:
    """Multiply-adds of one image."""
    shape = task("digits").shape
    with torch.device("meta"):  # shapes are enough for counting
        net = FENet.for_task(shape, width=width, mix=(ARMS | TWINS)[arm][0])
        return cost.flops(net.eval(), torch.zeros(1, shape.channels, shape.height, shape.width)) / 2


def equal_width(arm: str, scale: Scale) -> int:
    """The width at which the multiply-adds are closest to the sparse shift's."""
    goal = multiply_adds(scale.width, "sparse shift")
    return min(range(2, scale.width + 1, 2), key=lambda w: abs(multiply_adds(w, arm) - goal))


def build(arm: str, scale: Scale) -> FENet:
    """A classifier of digits."""
    return FENet.for_task(task("digits").shape, width=equal_width(arm, scale), mix=(ARMS | TWINS)[arm][0])


def exact(kind: type[SparseShift], seed: int) -> dict[str, float]:
    """Largest deviation of the output from moves by integer pixels, and of the displacements' gradient from that of resampling."""
    torch.manual_seed(seed)
    layer = kind(6, spread=2.0).double()
    x, push = torch.randn(2, 2, 6, 7, 5, dtype=torch.double)
    wanted, by = torch.zeros_like(x), layer.displacement.detach()
    for c, (a, b) in enumerate(by.round().long().tolist()):
        padded = F.pad(x[:, c], (2, 2, 2, 2))
        wanted[:, c] = padded[:, 2 + a : 9 + a, 2 + b : 7 + b]
    real = by.clone().requires_grad_()
    offset = torch.stack([real[:, 1] / 2.5, real[:, 0] / 3.5], 1)  # half a width and half a height are 1
    theta = torch.cat([torch.eye(2, dtype=torch.double).expand(6, 2, 2), offset[..., None]], 2)
    grid = F.affine_grid(theta, [6, 1, 7, 5], align_corners=False)
    moved = F.grid_sample(x.transpose(0, 1), grid, padding_mode="zeros", align_corners=False).transpose(0, 1)
    (right,) = torch.autograd.grad((moved * push).sum(), real)
    y = layer(x)
    (found,) = torch.autograd.grad((y * push).sum(), layer.displacement)
    return {
        "error of the output": float((y.detach() - wanted).abs().max()),
        "error of the gradient": float((found - right).abs().max() / right.abs().max()),
    }


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Output and gradient of the layer; accuracy on digits, share of unshifted channels, multiply-adds."""
    found = exact(EXACT[arm], seed) if arm in EXACT else {}
    if arm not in ARMS | TWINS:
        return found
    net = built(lambda: build(arm, scale), seed)
    train(net, "digits", seed=seed, steps=scale.steps, lr=(ARMS | TWINS)[arm][1], batch=32)
    shifts = [m for m in net.modules() if isinstance(m, SparseShift)]
    channels = sum(len(m.displacement) for m in shifts)
    still = sum(m.unshifted * len(m.displacement) for m in shifts) / channels if shifts else 0.0
    return found | {
        "accuracy": judge(net, "digits")["accuracy"],
        "unshifted channels": still,
        "thousands of multiply-adds": multiply_adds(equal_width(arm, scale), arm) / 1e3,
    }


CLAIM = Claim(
    says="The layer moves channels by integer pixels with the gradient of interpolation; with the shift penalty at least half of the "
    "channels end unshifted, and at equal multiply-adds the network is no more than two points less accurate on digits than with "
    "depthwise convolutions or with all groups of channels shifted.",
    measure=measure,
    build=build,
    arms=ARMS,
    statements=(
        mechanism(
            "The output is that of moves by integer pixels",
            fits("error of the output", "sparse shift", high=1e-12),
            control="fractional",
            mutant="rounded down",
        ),
        mechanism(
            "The gradient of the displacements is that of bilinear resampling at their real values",
            fits("error of the gradient", "sparse shift", high=1e-9),
            control="rounding alone",
            mutant="gradient at whole pixels",
        ),
        effect("", fits("unshifted channels", "sparse shift", low=0.5), control="no penalty"),
        effect(
            "",
            highest("accuracy", "sparse shift", than=("depthwise 3x3",), margin=-0.02),
            control="no shift",
        ),
        effect(
            "",
            highest("accuracy", "sparse shift", than=("grouped shift",), margin=-0.02),
            control="no shift",
        ),
    ),
    checks=(
        check("The network with depthwise convolutions is right on 85%", fits("accuracy", "depthwise 3x3", low=0.85)),
        check("The network with all groups shifted is right on 85%", fits("accuracy", "grouped shift", low=0.85)),
    ),
    first_seed=100,
    pilots="Digits, width 4, batches of 32. Seed 1000, 100 steps, rates 0.003, 0.005, 0.01, 0.02: depthwise .93 .92 .80 .56, groups of "
    "shifts .96 .94 .93 .52; sparse shift (penalty 0.002) .94 .87 - -, (0.001) - .90 .89 .66; seed 1001 at 0.003: .95, .95, .96. "
    "Unshifted after 100 steps at 0.003, penalties 0.002 and 0.003: .32 .43; at 0.01, penalties 0.001, 0.003, 0.01: .39 .74 .92 "
    "with accuracy .89 .84 .80, and no shift .70; 130 steps at 0.003, penalty 0.003: .43 .49 with .95 .86, no shift .76 .90; "
    "penalty 0.005: .54 .58 with .93 .91. Chosen: 0.003 for all, 130 steps, penalty 0.005. An older form of this claim looked at "
    "seeds 0 to 3 on patches of photographs; models and batches are now of seeds 100 and up.",
    scales={
        "smoke": {"width": 2, "steps": 1},
        "small": {"width": 4, "steps": 130},
        "full": {"width": 16, "steps": 10000},
    },
)
