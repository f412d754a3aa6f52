"""RepGhost against concatenation at equal FLOPs, and what fusing changes."""

from __future__ import annotations

import torch
from torch import nn

from interlayer.claims import Claim, Scale, effect, fits, highest
from interlayer.claims.training import judge, task, train
from interlayer.core import cost
from interlayer.layers.mixing.repghost import RepGhost, RepGhostNet


def build(arm: str, scale: Scale) -> RepGhostNet:
    """A classifier for patches of photographs."""
    branch = arm not in ("no branch", "concatenation")
    net = RepGhostNet.for_task(
        task("photos").shape, width=scale.width, concatenate=arm == "concatenation", branch=branch
    )
    if arm == "no cheap operation":
        for module in net.modules():
            if isinstance(module, RepGhost):
                nn.init.zeros_(module.cheap[1].weight).requires_grad_(False)  # type: ignore[arg-type]
    return net


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Accuracy on photographs, multiply-adds in training form, and the fused network's difference."""
    torch.manual_seed(seed)
    net = build(arm, scale)
    train(net, "photos", seed=seed, steps=scale.steps, lr=2e-3, batch=32)
    x = next(task("photos").batches(0, 32, "validation"))[0]
    fused = net.fused() if arm != "fused without branch" else _branchless(net)
    with torch.no_grad():
        right = net.eval()(x)
        error = ((fused(x) - right).abs().max() / right.abs().max()).item()
    return {
        "accuracy": judge(net, "photos", most=scale.judged)["accuracy"],
        "error of fusing": error,
        "millions of multiply-adds": cost.flops(fused, x[:1]) / 2e6,
        "parameters": float(cost.parameters(fused)),
    }


def _branchless(net: RepGhostNet) -> RepGhostNet:
    """The second control: the branch is forgotten when fusing."""
    kept = {name: m.branch for name, m in net.named_modules() if isinstance(m, RepGhost)}
    for name in kept:
        net.get_submodule(name).branch = None  # type: ignore[assignment]
    fused = net.fused()
    for name, branch in kept.items():
        net.get_submodule(name).branch = branch  # type: ignore[assignment]
    return fused


CLAIM = Claim(
    says="At equal FLOPs the RepGhost network is no more than two points less accurate than with concatenation, is more accurate than "
    "without the batch-norm branch, and the fused network is the same function to 1e-4.",
    measure=measure,
    build=build,
    arms=("repghost", "concatenation", "no branch"),
    statements=(
        effect(
            "", highest("accuracy", "repghost", than=("concatenation",), margin=-0.02), control="no cheap operation"
        ),
        effect("", highest("accuracy", "repghost", than=("no branch",)), control="no cheap operation"),
        effect("", fits("error of fusing", "repghost", high=1e-4), control="fused without branch"),
    ),
    scales={
        "smoke": {"width": 0.25, "steps": 1, "judged": 1},
        "small": {"width": 1.0, "steps": 120, "judged": None},
        "full": {"width": 2.0, "steps": 10000, "judged": None},
    },
)
