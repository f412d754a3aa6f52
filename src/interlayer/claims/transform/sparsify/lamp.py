"""Accuracy on handwritten digits against sparsity, for LAMP and the other ways to share it out."""

from __future__ import annotations

import copy
from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interlayer.claims import Claim, highest
from interlayer.core import weights
from interlayer.transform.sparsify.lamp import Lamp, shares

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
ARMS = ("lamp", "global", "uniform", "erdos-renyi-kernel", "lamp-shuffled")
REVERSED = "lamp-reversed"


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    split = train_test_split(x.reshape(-1, 1, 8, 8) / 16 - 0.3, y, test_size=0.3, random_state=0, stratify=y)
    x_train, x_test, y_train, y_test = (torch.as_tensor(part) for part in split)
    return x_train.float(), y_train, x_test.float(), y_test


def _net() -> nn.Module:
    def stage(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *stage(1, 16), *stage(16, 32), *stage(32, 32, 2), *stage(32, 64, 2), nn.Flatten(), nn.Linear(256, 10)
    )


def _train(model: nn.Module, steps: int, seed: int) -> None:
    x, y, _, _ = _digits()
    chance = torch.Generator().manual_seed(seed)
    model.train()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=chance)
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


@torch.no_grad()
def _accuracy(model: nn.Module) -> float:
    _, _, x, y = _digits()
    return (model.eval()(x).argmax(1) == y).double().mean().item()


@lru_cache(maxsize=8)
def _dense(steps: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = _net()
    _train(model, steps, seed)
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
    """Accuracy after one-shot pruning and fine-tuning at each sparsity, and before fine-tuning at the highest."""
    dense = copy.deepcopy(_dense(scale.steps, seed))
    result = {"accuracy_0": _accuracy(dense)}
    for sparsity in SPARSITIES:
        model = _prune(dense, sparsity, arm, seed)
        result["untuned_98"] = _accuracy(model)
        _train(model, scale.steps // 2, seed + 1000)
        result[f"accuracy_{round(100 * sparsity)}"] = _accuracy(model)
    return result


CLAIM = Claim(
    says="a convnet on 8x8 digits, pruned once by 98% and fine-tuned, is more accurate with LAMP than with global, "
    "uniform and Erdos-Renyi-kernel magnitude pruning",
    measure=measure,
    arms=ARMS,
    expect=highest("accuracy_98", "lamp", than=("global", "uniform", "erdos-renyi-kernel")),
    control=REVERSED,
    scales={"smoke": {"steps": 8}, "small": {"steps": 200}, "full": {"steps": 3000}},
    seeds=3,
)
