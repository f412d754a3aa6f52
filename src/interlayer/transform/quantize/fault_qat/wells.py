"""The levels that memory cells can read, and wells around them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from interlayer.core.faults import Devices

TABLE = 2**18  # numbers in a table of levels by weights that is held at a time


@dataclass(frozen=True)
class Levels:
    """What the weights of one layer can be read as: a value for each code, and on real devices one for each code and weight.

    Args:
        values: The value of each code on ideal devices, [2^bits].
        devices: The layer's cells; None are ideal.
    """

    values: Tensor
    devices: Devices | None = None

    def tables(self, weight: Float[Tensor, " n"]) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Some weights at a time: which, the factor of the value of each code, whether the cells can hold it, and how far the weight
        is from there; [2^bits, some], where the first two are [2^bits, 1] if they are the same for all weights.
        """
        codes = len(self.values)
        middle, exact = (codes - 1) / 2, self.devices is None or self.devices.exact
        some = max(1, TABLE // codes)
        for start in range(0, len(weight), some):
            places = slice(start, start + some)
            factor = torch.ones_like(self.values)[:, None]
            kept = torch.ones_like(factor, dtype=torch.bool)
            if self.devices is not None:
                read, kept = self.devices.table(places)
                if not exact:
                    factor = (read - middle) / (torch.arange(codes, device=read.device)[:, None] - middle)
            yield places, factor, kept, weight[places] - self.values[:, None] * factor

    def nearest(self, weight: Float[Tensor, "*shape"]) -> tuple[UInt8[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """The codes whose readings are nearest to the weights, and these readings."""
        flat, codes = weight.flatten(), torch.zeros(weight.numel(), dtype=torch.uint8, device=weight.device)
        found = torch.zeros_like(flat)
        for places, factor, kept, off in self.tables(flat):
            best = off.abs().masked_fill(~kept, torch.inf).argmin(0)
            codes[places] = best.to(torch.uint8)
            found[places] = self.values[best] * factor.expand(off.shape).gather(0, best[None])[0]
        return codes.view(weight.shape), found.view(weight.shape)


class Wells(torch.autograd.Function):
    """``-sum_w sum_k v_k exp(-(w - l_k)^2 / sigma^2)``, a well around each level that a weight's cells can hold.

    Its gradients are found in the forward pass, so that no table of levels is kept for the backward pass. A weight moves by all wells; a
    level only by the weights nearest to it. If all weights moved it, every level would drift to where they are densest.

    Args:
        weight: w, [*shape].
        values: The values of the codes, [2^bits].
        sigma: Width of a well.
        devices: The cells; None are ideal.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, sigma: float, devices: Devices | None) -> Float[Tensor, ""]:
        flat, total, by_level = weight.flatten(), weight.new_zeros(()), torch.zeros_like(values)
        slopes = torch.zeros_like(flat)
        for places, factor, kept, off in Levels(values, devices).tables(flat):
            depth = kept * torch.exp(-((off / sigma) ** 2))
            each = 2 / sigma**2 * off * depth
            total -= depth.sum()
            slopes[places] = each.sum(0)
            best = off.abs().masked_fill(~kept, torch.inf).argmin(0)
            own = (each * factor).gather(0, best[None])[0]
            by_level.index_add_(0, best, own, alpha=-1)
        ctx.save_for_backward(slopes.view(weight.shape), by_level)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        slopes, by_level = ctx.saved_tensors
        return grad * slopes, grad * by_level, None, None
