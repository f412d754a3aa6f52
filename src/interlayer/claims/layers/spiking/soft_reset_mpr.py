"""Soft reset and rectifier against hard reset: what is lost, and accuracy and firing rates on digits and on their events."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, check, effect, fits, highest, mechanism
from interlayer.claims.training import batches, built, task
from interlayer.core import aside
from interlayer.core.cost import operations
from interlayer.core.fit import descend
from interlayer.core.spike import LIF, Clamp
from interlayer.layers.spiking.soft_reset_mpr import SoftResetMPR, SpikingNet, rectify

# The four cells of the paper's ablation, and a larger baseline for head room.
NETS: dict[str, dict[str, Any]] = {
    "hard reset": {"reset": "hard", "rectify": False},
    "soft reset": {"rectify": False},
    "rectifier": {"reset": "hard"},
    "soft reset and rectifier": {},
    "wider, hard reset": {"reset": "hard", "rectify": False},
    "idle": {"reset": "hard", "rectify": False},
}
BOTH = "soft reset and rectifier"
TASKS = {"digits": "digits", "events": "digit-events"}
RATES: dict[str, dict[str, float]] = {name: dict.fromkeys(TASKS, 0.1) for name in NETS}  # see `pilots`

RESETS: dict[str, LIF] = {
    BOTH: SoftResetMPR(),
    "reset to zero": SoftResetMPR(reset="hard"),
    "subtracts the threshold": LIF(decay=1.0, threshold=0.5, drop=0.5, surrogate=Clamp()),
}
RECTIFIERS: dict[str, Callable[[Tensor], Tensor]] = {
    BOTH: rectify,
    "identity": lambda u: u,
    "cubes for cube roots": lambda u: torch.where(u > 1, u**3, torch.where(u < 0, 1 - (1 - u) ** 3, rectify(u))),
}


def rate_error(neurons: LIF, steps: int = 64) -> float:
    """Largest gap between a constant current from 0 to 1 and the rate at which it makes a neuron fire."""
    currents = torch.linspace(0, 1, 101)
    spikes = neurons(currents.expand(1, steps, -1))
    return float((spikes.mean(1) - currents).abs().max())


def share_left(change: Callable[[Tensor], Tensor], potentials: Tensor) -> float:
    """Mean squared gap between potentials and their spikes after a change, as a share of that before."""
    spikes = (potentials > 0.5).to(potentials.dtype)
    return float((change(potentials) - spikes).square().mean() / (potentials - spikes).square().mean())


def build(arm: str, scale: Scale, name: str = "digits") -> SpikingNet:
    """The network for digits (direct encoding), or for their events."""
    width = 2 * scale.width if arm.startswith("wider") else scale.width
    options = {"steps": scale.steps} if name == "digits" else {}
    with torch.device("cpu"):
        shape = task(TASKS[name]).shape
    return SpikingNet.for_task(shape, width=width, depth=scale.depth, **options, **NETS[arm])


def learn(net: nn.Module, name: str, seed: int, scale: Scale, lr: float) -> None:
    """The authors' training: SGD with momentum, cross-entropy of the mean logits, a cosine to zero."""
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    for step, (x, y) in enumerate(batches(name, seed, scale.batch, scale.updates)):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * step / scale.updates)) / 2
        descend(net.train(), optimizer, lambda x=x, y=y: task(name).loss(net(x), y), share=step / scale.updates, clip=None)


@torch.no_grad()
def scores(net: SpikingNet, name: str) -> dict[str, float]:
    """Accuracy and firing rate on held-out data, picojoules an example, and quantisation error before and after the rectifier."""
    currents: list[Tensor] = []
    neurons = [m for m in net.modules() if isinstance(m, SoftResetMPR)]
    handles = [m.register_forward_pre_hook(lambda m, given: currents.append(given[0])) for m in neurons]
    x, y = (torch.cat(parts) for parts in zip(*task(name).batches(0, 256, "validation"), strict=True))
    with aside.collect() as told:
        right = net.eval()(x).argmax(-1) == y
    for handle in handles:
        handle.remove()
    lost = [m.lost(c.unflatten(0, (-1, net.steps))) for m, c in zip(neurons, currents, strict=True)]
    before, after = (float(torch.stack(each).mean()) for each in zip(*lost, strict=True))
    energy = operations(net, x[:32]).picojoules / 32
    return {"accuracy": float(right.float().mean()), "rate": told.means()["firing rate"], "pJ": energy, "before": before, "after": after}


def measure(arm: str, seed: int, scale: Scale) -> Mapping[str, float]:
    """What the arm is for."""
    found: dict[str, float] = {}
    if arm in RESETS:
        found["rate error"] = rate_error(RESETS[arm])
    if arm in RECTIFIERS:
        found["share left"] = share_left(RECTIFIERS[arm], 0.5 + torch.randn(10_000))
    for name, where in TASKS.items() if arm in NETS else ():
        net = built(lambda name=name: build(arm, scale, name), seed)
        learn(net, where, seed, scale, RATES[arm][name])
        found |= {f"{what} on {name}": value for what, value in scores(net, where).items()}
    return found
