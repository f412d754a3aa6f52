"""Accuracy on handwritten digits against sparsity, for LAMP and the other ways to share it out."""

from __future__ import annotations

import copy
from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import nn

from interlayer.claims import Claim, highest
from interlayer.claims.training import judge, train
from interlayer.core import weights
from interlayer.transform.sparsify.lamp import Lamp, shares

ARMS = ("lamp", "global", "uniform", "erdos-renyi-kernel", "lamp-shuffled")
REVERSED = "lamp-reversed"


def _net() -> nn.Module:
    def stage(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *stage(1, 16), *stage(16, 32), *stage(32, 32, 2), *stage(32, 64, 2), nn.Flatten(), nn.Linear(256, 10)
    )


@lru_cache(maxsize=8)
def _dense(steps: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = _net()
    train(model, "digits", seed=seed, steps=steps, lr=2e-3)
    return model


def _prune(dense: nn.Module, sparsity: float, arm: str, seed: int) -> nn.Module:
    scope = "lamp" if arm.startswith("lamp") else arm
    model = Lamp().plan(dense, sparsity=sparsity, scope=scope).apply()
    masks = weights.masks(model)
    if arm == "lamp-shuffled":  # LAMP's number of weights in each layer, but not its choice of them
        chance = torch.Generator().manual_seed(seed)
        for mask in masks.values():
            mask.copy_(mask.flatten()[torch.randperm(mask.numel(), generator=chance)].view(mask.shape))
    if arm == REVERSED:  # LAMP's densities, the last layer's given to the first and so on
        wanted = [
            m.double().mean().item() * w.numel() for m, w in zip(reversed(masks.values()), masks.values(), strict=True)
        ]
        counts = shares(wanted, [m.numel() for m in masks.values()], sum(int(m.sum()) for m in masks.values()))
        for (name, mask), count in zip(masks.items(), counts, strict=True):
            best = dense.get_parameter(name).abs().flatten().topk(count).indices
            mask.copy_(torch.zeros(mask.numel(), dtype=torch.bool).index_fill_(0, best, True).view(mask.shape))
    return model


def measure(arm: str, seed: int, scale: SimpleNamespace) -> dict[str, float]:
    """Accuracy after one-shot pruning and fine-tuning at each sparsity, and before any fine-tuning."""
    dense = copy.deepcopy(_dense(scale.steps, seed))
    result = {"accuracy_0": judge(dense, "digits")["accuracy"]}
    for sparsity in scale.sparsities:
        model = _prune(dense, sparsity, arm, seed)
        result[f"untuned_{round(100 * sparsity)}"] = judge(model, "digits")["accuracy"]
        train(model, "digits", seed=seed + 1000, steps=scale.steps // 2, lr=1e-3)
        result[f"accuracy_{round(100 * sparsity)}"] = judge(model, "digits")["accuracy"]
    return result


CLAIM = Claim(
    says="a convnet on 8x8 digits, pruned once by 98% and fine-tuned, is more accurate with LAMP than with global, "
    "uniform and Erdos-Renyi-kernel magnitude pruning",
    measure=measure,
    arms=ARMS,
    expect=highest("accuracy_98", "lamp", than=("global", "uniform", "erdos-renyi-kernel")),
    control=REVERSED,
    scales={
        "smoke": {"steps": 4, "sparsities": (0.98,)},
        "small": {"steps": 200, "sparsities": (0.5, 0.8, 0.9, 0.95, 0.98)},
        "full": {"steps": 3000, "sparsities": (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)},
    },
    seeds=3,
)
