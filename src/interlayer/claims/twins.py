"""Broken twins that several claims share: the same part without what the idea adds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def frozen(make: Callable[..., nn.Module], *names: str) -> Callable[..., nn.Module]:
    """A part that does not learn: a control of what an idea learns.

    Args:
        make: Builds the part; a class or function that a slot takes.
        names: The parameters and modules that stay as initialised. Defaults to all.

    Examples:
        >>> twin = frozen(nn.Linear, "bias")(2, 1)
        >>> twin.weight.requires_grad, twin.bias.requires_grad
        (True, False)
    """

    @functools.wraps(make, updated=())
    def twin(*args: Any, **options: Any) -> nn.Module:
        part = make(*args, **options)
        for name in names:
            getattr(part, name).requires_grad_(False)
        return part if names else part.requires_grad_(False)

    return twin


def shuffled(values: Tensor) -> Tensor:
    """The same values in random order along the first axis: a control of what belongs together.

    Examples:
        >>> sorted(shuffled(torch.arange(4)).tolist())
        [0, 1, 2, 3]
    """
    return values[torch.randperm(len(values))]
