"""The straight line between two networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.core import taps


def interpolate(model: nn.Module, other: nn.Module, weight: float, data: Any = None) -> nn.Module:
    """A new model at ``(1 - weight) * model + weight * other``.

    Running statistics of batch norms don't interpolate; with ``data`` they are estimated anew.
    """
    out = copy.deepcopy(model)
    others = other.state_dict()
    with torch.no_grad():
        for name, value in out.state_dict().items():
            if isinstance(value, Tensor) and value.is_floating_point():
                value.copy_((1 - weight) * model.state_dict()[name] + weight * others[name])
    if data is not None:
        estimate_statistics(out, data)
    return out


def estimate_statistics(model: nn.Module, data: Any) -> None:
    """Set the running statistics of batch norms, in place, to their plain average over the batches of ``data``."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    modes = [(m, m.training) for m in model.modules()]
    momenta = [m.momentum for m in norms]
    model.eval()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a cumulative average
        m.train()
    with torch.no_grad():
        for _ in taps.feed(model, data):
            pass
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    for module, mode in modes:
        module.training = mode


def barrier(
    model: nn.Module, other: nn.Module, loss: Callable[[nn.Module], float], *, points: int = 11, data: Any = None
) -> float:
    """The loss barrier: ``max over w of L((1 - w) A + w B) - (L(A) + L(B)) / 2``.

    Args:
        model: A.
        other: B.
        loss: L, from a model to a number.
        points: Values of w between 0 and 1, both included.
        data: For estimating batch-norm statistics anew in between.
    """
    ends = (loss(model), loss(other))
    between = [loss(interpolate(model, other, w, data)) for w in torch.linspace(0, 1, points).tolist()[1:-1]]
    return max(*ends, *between) - sum(ends) / 2
