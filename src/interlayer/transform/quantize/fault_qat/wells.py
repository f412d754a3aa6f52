"""The levels that memory cells can read, and wells around them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from interlayer.core.faults import Devices


@dataclass(frozen=True)
class Levels:
    """What the weights of one layer can be read as: a value for each code, and on real devices one for each code and weight.

    Args:
        values: The value of each code on ideal devices, [2^bits].
        devices: The layer's cells; None are ideal.
    """

    values: Tensor
    devices: Devices | None = None

    def __iter__(self) -> Iterator[tuple[int, Tensor | float, Tensor | float]]:
        """Each code, the factor of its value (by weight), and 1 where the cells can hold it, else 0."""
        for code in range(len(self.values)):
            if self.devices is None:
                yield code, 1.0, 1.0
            else:
                middle = (len(self.values) - 1) / 2
                factor = (self.devices.read(code) - middle) / (code - middle)
                yield code, factor, self.devices.keeps(code).to(factor)

    def nearest(self, weight: Float[Tensor, "*shape"]) -> tuple[UInt8[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """The codes whose readings are nearest to the weights, and these readings."""
        codes = torch.zeros_like(weight, dtype=torch.uint8)
        best, found = torch.full_like(weight, torch.inf), torch.zeros_like(weight)
        for code, factor, kept in self:
            value = self.values[code] * factor
            off = torch.where(torch.as_tensor(kept, device=weight.device) > 0, (weight - value).abs(), torch.inf)
            closer = off < best
            codes, best = codes.masked_fill(closer, code), torch.where(closer, off, best)
            found = torch.where(closer, value, found)
        return codes, found


class Wells(torch.autograd.Function):
    """``-sum_w sum_k v_k exp(-(w - l_k)^2 / sigma^2)``, a well around each level that a weight's cells can hold.

    Its gradients are found in the forward pass, so that memory does not grow with the number of levels. A weight moves by all wells;
    a level by those weights alone to which it is nearest, for by all of them every level would move to where weights are densest.

    Args:
        weight: w, [*shape].
        values: The values of the codes, [2^bits].
        sigma: Width of a well.
        devices: The cells; None are ideal.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, sigma: float, devices: Devices | None) -> Float[Tensor, ""]:
        total, slopes = weight.new_zeros(()), torch.zeros_like(weight)
        codes, least = torch.zeros_like(weight, dtype=torch.long), torch.full_like(weight, torch.inf)
        own = torch.zeros_like(weight)
        for code, factor, kept in Levels(values, devices):
            off = (weight - values[code] * factor) / sigma
            depth = kept * torch.exp(-off * off)
            slope = 2 / sigma * off * depth
            total -= depth.sum()
            slopes += slope
            closer = (off.abs() < least) & torch.as_tensor(kept, device=weight.device).bool()
            codes, least = codes.masked_fill(closer, code), torch.where(closer, off.abs(), least)
            own = torch.where(closer, slope * factor, own)
        by_level = torch.zeros_like(values).index_add_(0, codes.flatten(), own.flatten(), alpha=-1)
        ctx.save_for_backward(slopes, by_level)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        slopes, by_level = ctx.saved_tensors
        return grad * slopes, grad * by_level, None, None
