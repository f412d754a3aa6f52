"""Auxiliary losses of layers, such as penalties and load balancing."""

from __future__ import annotations

from torch import Tensor, nn


def extra_loss(model: nn.Module) -> Tensor | None:
    """Sum ``extra_loss()`` over the modules of a model that have this method; None if there are none.

    Training loops add it to the task's loss; ``compare`` and the claims do so. The method returns one scalar, already
    weighted as the layer's paper says, computed from the current weights and, if needed, the last forward pass.

    Examples:
        >>> import torch
        >>> class Small(nn.Linear):
        ...     def extra_loss(self):
        ...         return 0.1 * self.weight.abs().sum()
        >>> net = nn.Sequential(Small(2, 2, bias=False), nn.ReLU())
        >>> _ = nn.init.ones_(net[0].weight)
        >>> round(extra_loss(net).item(), 3)
        0.4
    """
    asked = [getattr(m, "extra_loss", None) for m in model.modules()]
    terms = [ask() for ask in asked if callable(ask)]
    return sum(terms[1:], terms[0]) if terms else None
