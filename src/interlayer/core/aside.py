"""What layers report beside their output: auxiliary losses, such as penalties and load balancing, and metrics.

A layer reports during its forward pass; whoever wants to know collects. Nothing is left on the module, and without a
collector nothing happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Told", "collect", "listening", "loss", "metric"]

_open: list[Told] = []  # the collectors; the last one is the innermost


@dataclass
class Told:
    """What was reported while a collector was open.

    Attributes:
        losses: Auxiliary losses, each already weighted as the layer's paper says.
        metrics: Numbers by name, in the order in which they came.
    """

    losses: list[Tensor] = field(default_factory=list)
    metrics: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor | None:
        """The sum of the auxiliary losses; None if there are none."""
        return sum(self.losses[1:], self.losses[0]) if self.losses else None

    def means(self) -> dict[str, float]:
        """The mean of each metric."""
        return {name: float(torch.stack(found).mean()) for name, found in self.metrics.items()}


@contextmanager
def collect() -> Iterator[Told]:
    """Collect what layers report in the forward passes within. A collector inside another takes what comes there for itself.

    Examples:
        >>> from torch import nn
        >>> class Small(nn.Linear):
        ...     def forward(self, x):
        ...         loss(0.1 * self.weight.abs().sum())
        ...         metric("largest", self.weight.max())
        ...         return super().forward(x)
        >>> net = nn.Sequential(Small(2, 2, bias=False), nn.ReLU())
        >>> _ = nn.init.ones_(net[0].weight)
        >>> with collect() as told:
        ...     out = net(torch.ones(1, 2))
        >>> round(told.loss.item(), 3), told.means()
        (0.4, {'largest': 1.0})
    """
    told = Told()
    _open.append(told)
    try:
        yield told
    finally:
        _open.remove(told)


def listening() -> bool:
    """Whether anyone collects, so that a layer can leave out metrics that cost time."""
    return bool(_open)


def loss(value: Tensor) -> None:
    """Report an auxiliary loss: one number, which training adds to the task's loss.

    Args:
        value: A scalar with its graph, already weighted.

    Raises:
        ValueError: It is not a scalar.
    """
    if value.dim():
        raise ValueError(f"aside.loss: shape {tuple(value.shape)}; expected a scalar. Take its mean or sum.")
    if _open:
        _open[-1].losses.append(value)


def metric(name: str, value: Tensor) -> None:
    """Report a number that tells how a layer works, such as tokens dropped or the solver's residual.

    Args:
        name: What it is called in records.
        value: A scalar; its graph is not kept.

    Raises:
        ValueError: It is not a scalar.
    """
    if value.dim():
        raise ValueError(
            f"aside.metric: {name!r} has shape {tuple(value.shape)}; expected a scalar. Take its mean or sum."
        )
    if _open:
        _open[-1].metrics.setdefault(name, []).append(value.detach())
