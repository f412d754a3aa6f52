"""D'OH against networks that hold their layers themselves, at equal bits: photographs and a solid."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, effect, highest
from interlayer.core import datasets
from interlayer.core.fields import BITS, Implicit, dequantize, grid, quantize
from interlayer.layers.hyper.doh import DOH

PHOTOS = ("camera", "coffee", "astronaut")  # one for each seed; all come inside scikit-image
SINE: dict[str, Any] = {"activation": "sine", "frequencies": 0}
RELU: dict[str, Any] = {"activation": "relu", "frequencies": 5}
WIDTH, DEPTH = 32, 3  # of what D'OH makes at every rate
# Learning rates for photographs and for solids: the best of a few for each arm, within noise, chosen beforehand on a photograph
# (coins) and a solid (two rings) that are not in the claim.
ARMS = {
    "doh": (RELU, 0.02, 0.05),
    "doh-sine": (SINE, 0.02, 0.05),
    "mlp": (RELU, 0.05, 0.02),
    "coin": (SINE, 0.005, 0.005),
}


def photograph(seed: int, side: int) -> tuple[Tensor, Tensor]:
    """Coordinates and grey values of the middle of a photograph."""
    picture = torch.from_numpy(datasets.photograph(PHOTOS[seed % 3])).float()
    grey = (picture if picture.ndim == 2 else picture.mean(-1)) / 255
    whole = min(grey.shape)
    top, left = ((n - whole) // 2 for n in grey.shape)
    square = grey[top : top + whole, left : left + whole]
    return grid(side, side), F.interpolate(square[None, None], size=(side, side), mode="area").flatten().unsqueeze(1)


def solid(side: int) -> tuple[Tensor, Tensor]:
    """Coordinates and occupancy of a trefoil knot, a tube of radius 0.22."""
    t = torch.linspace(0, 2 * math.pi, 240)
    ring = 2 + torch.cos(3 * t)
    curve = torch.stack((ring * torch.cos(2 * t), ring * torch.sin(2 * t), torch.sin(3 * t)), 1) / 3.8
    x = grid(side, side, side)
    return x, (torch.cdist(x, curve).amin(1, keepdim=True) < 0.22).float()


def build(arm: str, scale: Scale) -> nn.Module:
    """The network for photographs at the largest size."""
    return net(arm, 2, max(scale.sizes))


def net(arm: str, inputs: int, size: int) -> nn.Module:
    """The network of an arm that fits ``size`` bytes."""
    options = ARMS.get(arm, ARMS["doh"])[0]
    if arm in ("mlp", "coin"):
        return Implicit.within(size, inputs, 1, depth=DEPTH, **options)
    return DOH.within(size, inputs, 1, width=WIDTH, depth=DEPTH, **options)


@torch.no_grad()
def stored(model: nn.Module, arm: str) -> nn.Module:
    """The model as it comes back from its bits."""
    if isinstance(model, DOH):
        if arm == "wrong seed":
            other = DOH(**(model.config | {"seed": 1}))  # type: ignore
            other.load_state_dict(model.state_dict())
            model = other
        return model.quantized(BITS)
    for p in model.parameters():
        p.copy_(dequantize(*quantize(p, BITS)))
    return model


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Peak signal-to-noise ratio of the photograph and overlap of the solid, after quantisation, by the size of the code."""
    _, *rates = ARMS.get(arm, ARMS["doh"])
    found = {}
    signals = (("PSNR", photograph(seed, scale.side)), ("overlap", solid(scale.solid)))
    for (name, (x, y)), lr in zip(signals, rates, strict=True):
        for size in scale.sizes:
            torch.manual_seed(seed)
            model = net(arm, x.shape[1], size)
            optimiser = torch.optim.Adam(model.parameters(), lr)
            for step in range(scale.steps):
                rows = torch.randint(len(x), (scale.points,))
                for group in optimiser.param_groups:
                    group["lr"] = lr * (1 - step / scale.steps)
                given = model(x[rows])
                loss = (
                    F.mse_loss(given, y[rows]) if name == "PSNR" else F.binary_cross_entropy_with_logits(given, y[rows])
                )
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            with torch.no_grad():
                given = stored(model, arm)(x)
            if name == "PSNR":
                value = -10 * math.log10(float(F.mse_loss(given.clamp(0, 1), y)))
            else:
                inside, wanted = given > 0, y > 0.5
                value = float((inside & wanted).sum() / (inside | wanted).sum().clamp_min(1))
            found[f"{name} at {size} bytes"] = value
    return found


SIZES = (600, 1800)

CLAIM = Claim(
    says="With one and the same generated network at every rate, a quantised latent code gives photographs at a higher PSNR and a "
    "solid at a larger overlap than a network of equal bits that holds its layers itself: a ReLU network with positional "
    "encoding and, both with sines, COIN's.",
    measure=measure,
    build=build,
    arms=tuple(ARMS),
    statements=tuple(
        effect("", highest(f"{name} at {size} bytes", arm, than=(other,)), control="wrong seed")
        for arm, other in (("doh", "mlp"), ("doh-sine", "coin"))
        for name in ("PSNR", "overlap")
        for size in SIZES
    ),
    scales={
        "smoke": {"side": 12, "solid": 6, "sizes": SIZES, "steps": 2, "points": 64},
        "small": {"side": 48, "solid": 24, "sizes": SIZES, "steps": 800, "points": 1500},
        "full": {"side": 256, "solid": 96, "sizes": SIZES, "steps": 50_000, "points": 20_000},
    },
)
