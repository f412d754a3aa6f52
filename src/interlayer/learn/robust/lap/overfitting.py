"""Catastrophic overfitting, seen layer by layer: a model that withstands one-step attacks and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from interlayer.core import taps
from interlayer.core.attack import Loss, attack, errors
from interlayer.core.data import answer, run

NOISES = 4  # random directions that a layer's sensitivity is averaged over


def layers(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all layers from the first to the last: trained parameters of two axes and more, a shared one once.

    Raises:
        ValueError: There is none.

    Examples:
        >>> list(layers(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))))
        ['0.weight', '3.weight']
    """
    found = {name: p for name, p in model.named_parameters() if p.ndim > 1 and p.requires_grad}
    if not found:
        raise ValueError(f"layers: {type(model).__name__} has no trained weight of two axes and more; expected some.")
    return found


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of examples whose class has the highest score, in eval mode."""
    with taps.at_rest(model), torch.no_grad():
        return (answer(run(model, x)).argmax(-1) == y).float().mean().item()


def gap(
    model: nn.Module, x: Tensor, y: Tensor, *, radius: float, steps: int = 10, bounds: tuple[float, float] | None = None
) -> dict[str, float]:
    """Accuracy without attack, under one step (``fgsm``) and under many (``pgd``), and the gap between the two.

    In catastrophic overfitting the first attack finds almost nothing and the second almost everything: the gap nears 1.

    Args:
        model: A classifier.
        x: Inputs.
        y: Classes.
        radius: Radius of the ball in the infinity norm.
        steps: Steps of PGD, from a random start.
        bounds: Smallest and largest value of an input.
    """
    one = attack(model, x, y, "inf", radius, steps=1, random=False, bounds=bounds)
    many = attack(model, x, y, "inf", radius, steps=steps, bounds=bounds)
    found = {"clean": accuracy(model, x, y), "fgsm": accuracy(model, one, y), "pgd": accuracy(model, many, y)}
    return found | {"gap": found["fgsm"] - found["pgd"]}


def sensitivity(
    model: nn.Module, x: Tensor, y: Any, *, ratio: float = 0.1, loss: Loss = errors, seed: int = 0
) -> dict[str, float]:
    """How much the loss rises when one layer's weight gets random noise of ``ratio`` times its own norm, by layer.

    The mean over four directions. Cost: four forward passes for each layer.

    Args:
        model: A classifier. It stays as it is.
        x: Inputs, plain ones or attacked ones.
        y: What ``loss`` takes.
        ratio: Norm of the noise over that of the weight.
        loss: From output and ``y`` to the loss of each example.
        seed: Of the noise.

    Examples:
        >>> net, x, y = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(5, 4), torch.arange(5) % 3
        >>> list(sensitivity(net, x, y))
        ['0.weight', '2.weight']
    """
    generator = torch.Generator().manual_seed(seed)
    with taps.at_rest(model), torch.no_grad():

        def value(name: str, weight: Tensor) -> float:
            return loss(answer(functional_call(model, {name: weight}, (x,))), y).mean().item()

        found = {}
        for name, weight in layers(model).items():
            rises = []
            for _ in range(NOISES):
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                rises.append(value(name, weight + ratio * weight.norm() / noise.norm() * noise))
            found[name] = sum(rises) / NOISES - value(name, weight)
    return found


def spectral(model: nn.Module) -> dict[str, float]:
    """The largest singular value of each layer's weight, seen as a matrix of its outputs.

    Examples:
        >>> net = nn.Linear(2, 2)
        >>> _ = net.weight.data.copy_(torch.diag(torch.tensor([3.0, 1.0])))
        >>> spectral(net)
        {'weight': 3.0}
    """
    return {n: float(torch.linalg.matrix_norm(w.detach().flatten(1).float(), 2)) for n, w in layers(model).items()}


def without_largest(model: nn.Module, share: float, at: Collection[str] | Callable[[str], bool]) -> nn.Module:
    """A copy in which this share of the weights of some layers, those largest in size, is zero: the test for pseudo-robust shortcuts.

    A shortcut answers one-step attacks by few large weights. Where robustness rests on it, the accuracy under FGSM falls
    without them, and that under PGD may rise.

    Args:
        model: Any model. It stays as it is.
        share: Share of each layer's weights, 0 to 1.
        at: Names of layers as ``layers`` gives them, or a function of the name.

    Raises:
        ValueError: A share out of range, or a layer that is not there.

    Examples:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[1.0, -3.0]]))
        >>> without_largest(net, 0.5, ["weight"]).weight.tolist()
        [[1.0, 0.0]]
    """
    there = layers(model)
    names = [n for n in there if at(n)] if callable(at) else list(at)
    if not 0 <= share <= 1 or (missing := [n for n in names if n not in there]):
        what = f"share {share}" if not 0 <= share <= 1 else f"layer {missing[0]!r}"
        raise ValueError(f"without_largest: {what}; expected a share from 0 to 1 and layers of {list(there)}.")
    result = copy.deepcopy(model)
    for name in names:
        weight = result.get_parameter(name).detach()
        gone = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        gone[weight.abs().flatten().topk(round(share * weight.numel())).indices] = True
        weight.masked_fill_(gone.view(weight.shape), 0)
    return result
