"""Weights, activations and gradients of few bits, and layers that have them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.quantizer import Grid, Scaled, fake, straight

LEAST = 1e-12  # size of a weight of zeros
WHOLE = 32  # the number of bits that means floats


def levels(bits: int) -> Scaled:
    """The ``2^bits`` weights: from -1 to 1 in equal steps."""
    n = 2**bits - 1
    return Scaled(Grid(bits, None, "midrise"), torch.tensor(2 / n), torch.tensor(n / 2))


def on_levels(weight: Tensor, bits: int) -> tuple[Scaled, Tensor]:
    """The grid of a weight, and the numbers that are rounded to it: ``tanh(w) / max |tanh(w)|``, or w itself at 1 bit."""
    if bits == 1:
        held = levels(1).to(weight.device)
        return Scaled(held.grid, held.scale * weight.detach().abs().mean().float().clamp_min(LEAST), held.zero), weight
    squeezed = weight.tanh()
    return levels(bits).to(weight.device), squeezed / squeezed.abs().max().clamp_min(LEAST)


def low_weight(weight: Float[Tensor, "*shape"], bits: int) -> Float[Tensor, "*shape"]:
    """Weights of ``bits`` bits: ``2 round_k(tanh(w) / (2 max |tanh(w)|) + 1/2) - 1``, or ``mean |w| sign(w)`` at 1 bit.

    ``round_k`` rounds to multiples of ``1 / (2^k - 1)``. Gradients pass the rounding unchanged. At 1 bit a weight of exactly zero counts
    as negative; in the authors' code it stays zero, which one bit cannot hold.

    >>> low_weight(torch.tensor([0.1, -0.2, 0.3]), 1).tolist(), low_weight(torch.tensor([0.1, -0.2, 0.3]), 2).mul(3).tolist()
    ([0.20000000298023224, -0.20000000298023224, 0.20000000298023224], [1.0, -3.0, 3.0])
    """
    held, exact = on_levels(weight, bits)
    return straight(exact, held.fake(exact.detach()))


def inputs(bits: int) -> Scaled:
    """The ``2^bits`` activations: from 0 to 1 in equal steps."""
    return Scaled(Grid(bits, None, "unsigned"), torch.tensor(1 / (2**bits - 1)), torch.tensor(0.0))


class LowGradient(torch.autograd.Function):
    """The identity, whose gradient is rounded: ``2 m (round_k(g / (2 m) + 1/2 + noise) - 1/2)``, m the largest ``|g|`` of an example.

    The noise is uniform, half a step to each side, so that the mean over the noise is the gradient. An example without any gradient
    keeps none (the authors' code divides by zero there).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bits: int) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.bits = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        largest = grad.detach().flatten(1).abs().amax(1).float()
        scale = (2 * largest / (2**ctx.bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)
        return fake(grad, Grid(ctx.bits, 0, "midrise"), scale, rounding="stochastic"), None


def _low(layer: LowConv2d | LowLinear, x: Tensor) -> Tensor:
    weights, activations, gradients = layer.bits
    if activations < WHOLE:
        x = inputs(activations).to(x.device).fake(x)
    weight = low_weight(layer.weight, weights) if weights < WHOLE else layer.weight
    if isinstance(layer, nn.Linear):
        out = F.linear(x, weight, layer.bias)
    else:
        out = layer._conv_forward(x, weight, layer.bias)
    return LowGradient.apply(out, gradients) if gradients < WHOLE else out


class LowConv2d(nn.Conv2d):
    """A convolution with weights, inputs and gradients of few bits; its parameters are floats.

    Args:
        *args: Those of ``nn.Conv2d``.
        bits: Of the weights, the inputs (which are brought into 0 to 1) and the gradients of the outputs; 32 is floats.
        **kwargs: Those of ``nn.Conv2d``.

    Examples:
        >>> LowConv2d(3, 8, 3, bits=(1, 2, 6))(torch.rand(2, 3, 5, 5)).shape
        torch.Size([2, 8, 3, 3])
    """

    def __init__(self, *args: Any, bits: tuple[int, int, int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bits = checked(bits)

    def forward(self, input: Float[Tensor, "*B C H W"]) -> Float[Tensor, "*B O h w"]:
        """Convolve."""
        return _low(self, input)


class LowLinear(nn.Linear):
    """A linear map in the same way: the arguments of ``nn.Linear``, and ``bits``.

    >>> LowLinear(3, 8, bits=(1, 2, 6))(torch.rand(2, 3)).shape
    torch.Size([2, 8])
    """

    def __init__(self, *args: Any, bits: tuple[int, int, int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bits = checked(bits)

    def forward(self, input: Float[Tensor, "B *S I"]) -> Float[Tensor, "B *S O"]:
        """Multiply."""
        return _low(self, input)


def checked(bits: tuple[int, int, int]) -> tuple[int, int, int]:
    """Three numbers of bits, each 1 to 8 or 32, not all 32.

    Raises:
        ValueError: They are not.
    """
    if any(b not in (*range(1, 9), WHOLE) for b in bits) or all(b == WHOLE for b in bits):
        raise ValueError(
            f"DoReFa: bits {tuple(bits)} of weights, activations and gradients; expected 1 to 8 each, or 32 for floats, but "
            "not 32 for all three."
        )
    return bits


def lowered(old: nn.Module, bits: tuple[int, int, int]) -> nn.Module:
    """The layer with its own parameters, at few bits."""
    if isinstance(old, nn.Linear):
        new: Any = LowLinear(old.in_features, old.out_features, old.bias is not None, device="meta", bits=bits)
    else:
        assert isinstance(old, nn.Conv2d)
        new = LowConv2d(
            old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation, old.groups,
            old.bias is not None, old.padding_mode, device="meta", bits=bits,
        )  # fmt: skip
    new.weight, new.bias = old.weight, old.bias
    return new.train(old.training)
