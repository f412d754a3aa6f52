"""Overlap of a solid that comes back from its bytes: D'OH against networks that store their layers, sines and ReLUs."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.core.fields import BITS, Implicit, dequantize, grid, quantize
from interlayer.layers.hyper.doh import DOH

SINE: dict[str, Any] = {"activation": "sine", "frequencies": 0}
RELU: dict[str, Any] = {"activation": "relu", "frequencies": 5}
# Options and learning rate of each, the best of a few on another solid (two rings).
ARMS = {"D'OH": (SINE, 0.05), "COIN's": (SINE, 0.005), "D'OH, ReLU": (RELU, 0.05), "ReLU network": (RELU, 0.02)}
SIDE, STEPS, SEEDS = 24, 400, 4


def solid() -> tuple[Tensor, Tensor]:
    """Coordinates and occupancy of a trefoil knot, a tube of radius 0.22."""
    t = torch.linspace(0, 2 * math.pi, 240)
    ring = 2 + torch.cos(3 * t)
    curve = torch.stack((ring * torch.cos(2 * t), ring * torch.sin(2 * t), torch.sin(3 * t)), 1) / 3.8
    x = grid(SIDE, SIDE, SIDE)
    return x, (torch.cdist(x, curve).amin(1, keepdim=True) < 0.22).float()


def overlap(arm: str, size: int, seed: int) -> float:
    """Intersection over union after training and quantisation."""
    x, y = solid()
    torch.manual_seed(seed)
    options, lr = ARMS[arm]
    model: nn.Module = (DOH if arm.startswith("D'OH") else Implicit).within(size, 3, 1, depth=3, **options)
    optimiser = torch.optim.Adam(model.parameters(), lr)
    for step in range(STEPS):
        optimiser.param_groups[0]["lr"] = lr * (1 - step / STEPS)
        rows = torch.randint(len(x), (1500,))
        loss = F.binary_cross_entropy_with_logits(model(x[rows]), y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(dequantize(*quantize(p, BITS)))
        inside, wanted = model(x) > 0, y > 0.5
    return float((inside & wanted).sum() / (inside | wanted).sum().clamp_min(1))


def main() -> None:
    """Two sizes, the mean of a few seeds."""
    torch.set_num_threads(1)
    for size in (600, 1800):
        found = {arm: sum(overlap(arm, size, seed) for seed in range(SEEDS)) / SEEDS for arm in ARMS}
        print(f"{size} bytes: " + ", ".join(f"{arm} {value:.3f}" for arm, value in found.items()))


if __name__ == "__main__":
    main()
