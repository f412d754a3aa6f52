"""Surrogate gradients: what stands in for the derivative of a spike, which is zero nearly everywhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Surrogate(ABC):
    """A smooth rise from 0 to 1 around the threshold, whose slope is used as the gradient of a spike.

    A subclass gives ``rise`` and its derivative ``slope``, and is then known by its name, under which the fast whole-sequence form
    looks it up in the backward pass.

    Args:
        sharpness: Slope at the threshold, unless a subclass says otherwise.

    Raises:
        ValueError: A sharpness that is not positive.

    Examples:
        >>> Clamp().slope(torch.tensor([-0.6, 0.0, 0.4]))
        tensor([0., 1., 1.])
    """

    known: ClassVar[dict[str, type[Surrogate]]] = {}
    name: ClassVar[str]

    sharpness: float = 1.0

    def __init_subclass__(cls) -> None:
        cls.name = f"{cls.__module__}.{cls.__qualname__}"
        Surrogate.known[cls.name] = cls

    def __post_init__(self) -> None:
        if not self.sharpness > 0:
            raise ValueError(f"{type(self).__name__}: sharpness {self.sharpness}; expected a positive number.")

    @abstractmethod
    def rise(self, v: Tensor) -> Tensor:
        """The smooth stand-in for the step, of the potential above the threshold."""

    @abstractmethod
    def slope(self, v: Tensor) -> Tensor:
        """The derivative of ``rise``, a new tensor."""

    def spike(self, v: Tensor) -> Tensor:
        """1 where ``v`` is positive, else 0, with the gradient of ``rise``: the definition, which autograd differentiates."""
        rise = self.rise(v)
        return (v > 0).to(v.dtype) + (rise - rise.detach())


class Clamp(Surrogate):
    """A straight rise within ``1 / (2 sharpness)`` of the threshold, ends included; flat beyond."""

    def rise(self, v: Tensor) -> Tensor:
        """``clamp(sharpness v + 1/2, 0, 1)``."""
        return (self.sharpness * v + 0.5).clamp(0, 1)

    def slope(self, v: Tensor) -> Tensor:
        """``sharpness`` inside."""
        return (v.abs() <= 0.5 / self.sharpness).to(v.dtype).mul_(self.sharpness)


class Atan(Surrogate):
    """An arc tangent; other libraries' ``alpha`` is twice its ``sharpness``."""

    def rise(self, v: Tensor) -> Tensor:
        """``atan(pi sharpness v) / pi + 1/2``."""
        return torch.atan(torch.pi * self.sharpness * v) / torch.pi + 0.5

    def slope(self, v: Tensor) -> Tensor:
        """``sharpness / (1 + (pi sharpness v)^2)``."""
        wide = 1 / (torch.pi * self.sharpness) ** 2
        return v.square().add_(wide).reciprocal_().mul_(self.sharpness * wide)


class Sigmoid(Surrogate):
    """A logistic function; other libraries' ``alpha`` is four times its ``sharpness``."""

    def rise(self, v: Tensor) -> Tensor:
        """``sigmoid(4 sharpness v)``."""
        return torch.sigmoid(4 * self.sharpness * v)

    def slope(self, v: Tensor) -> Tensor:
        """``4 sharpness s (1 - s)`` with ``s`` the rise."""
        s = self.rise(v)
        return s.addcmul_(s, s, value=-1).mul_(4 * self.sharpness)
