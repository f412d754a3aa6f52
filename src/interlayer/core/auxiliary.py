"""Losses that layers bring themselves: penalties and balances that the task's loss does not know of."""

from __future__ import annotations

from torch import Tensor, nn


def extra_loss(model: nn.Module) -> Tensor | None:
    """The sum of ``extra_loss()`` over the modules of a model that have such a method; None if there are none.

    A training loop adds it to the task's loss; ``compare`` and the claims do. The method gives one number, with whatever
    weight the layer's paper gives it, for the weights (and the last forward pass) as they are.

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
