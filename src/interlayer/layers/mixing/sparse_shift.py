"""Sparse shift: channels of an image that learn to move by whole pixels, most of which learn to stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interlayer.core.config import configured
from interlayer.core.data import DataShape
from interlayer.core.example import Example


def shift(x_BCHW: Tensor, by_C2: Int[Tensor, "C 2"]) -> Tensor:
    """Move every channel by its own whole number of rows and columns: ``y[c, i, j] = x[c, i + a_c, j + b_c]``, zero outside.

    Args:
        x_BCHW: Images.
        by_C2: Displacements (a, b) of the channels.
    """
    height, width = x_BCHW.shape[-2:]
    rows, cols = (torch.arange(n, device=x_BCHW.device) + by_C2[:, i, None] for i, n in enumerate((height, width)))
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((cols >= 0) & (cols < width))[:, None]
    place = rows.clamp(0, height - 1)[:, :, None] * width + cols.clamp(0, width - 1)[:, None]
    moved = x_BCHW.flatten(2).gather(2, place.flatten(1).expand(x_BCHW.shape[0], -1, -1))
    return moved.view_as(x_BCHW) * inside.to(x_BCHW.dtype)


def bilinear_shift(x_BCHW: Tensor, by_C2: Float[Tensor, "C 2"]) -> Tensor:
    """``shift`` by fractions of pixels: the mean of the four whole shifts around, weighted by nearness."""
    low = by_C2.floor()
    part = (by_C2 - low).to(x_BCHW.dtype)
    out = torch.zeros_like(x_BCHW)
    for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
        at = torch.tensor(corner, device=by_C2.device)
        weight = torch.where(at == 1, part, 1 - part).prod(1)
        out = out + weight[:, None, None] * shift(x_BCHW, low.long() + at)
    return out


class SparseShift(nn.Module):
    """Every channel moves by a learned displacement, rounded to whole pixels; a penalty keeps most of them where they are.

    Paper: Chen et al., "All You Need is a Few Shifts: Designing Efficient Convolutional Neural Networks for Image
    Classification", doi:10.1109/CVPR.2019.00741.

    Equation: ``y[c, i, j] = x[c, i + round(a_c), j + round(b_c)]``, zero outside the image. Quantisation-aware: the forward
    pass takes whole pixels, the gradient of ``a, b`` is that of bilinear interpolation at their real values. The loss gets
    ``penalty sum_c |a_c| + |b_c|`` (``extra_loss``). The paper's constants (start of the displacements, weight of the
    penalty) could not be verified: uniform in [-spread, spread] and 5e-4 are this project's.

    A pass costs no multiply-adds; ``deployed()`` moves the memory of shifted channels alone.

    Args:
        channels: Channels C.
        penalty: Weight of the displacements' absolute values in the loss.
        spread: Largest displacement at the start, in pixels.

    Shapes: [B, C, H, W] to the same.

    Raises:
        ValueError: Below one channel, a negative penalty or spread, or an input of other channels.

    Examples:
        >>> import torch
        >>> layer = SparseShift(4)
        >>> with torch.no_grad():
        ...     _ = layer.displacement.copy_(torch.tensor([[0.0, 1.2], [0.4, 0.3], [0, 0], [0, 0]]))
        >>> layer(torch.arange(12.0).view(1, 1, 3, 4).expand(1, 4, 3, 4))[0, 0]
        tensor([[ 1.,  2.,  3.,  0.],
                [ 5.,  6.,  7.,  0.],
                [ 9., 10., 11.,  0.]], grad_fn=<SelectBackward0>)
        >>> layer.unshifted
        0.75
    """

    def __init__(self, channels: int, *, penalty: float = 5e-4, spread: float = 1.0) -> None:
        super().__init__()
        if channels < 1 or penalty < 0 or spread < 0:
            raise ValueError(
                f"SparseShift: channels {channels}, penalty {penalty}, spread {spread}; wanted at least 1, 0 and 0."
            )
        self.penalty = penalty
        self.displacement = nn.Parameter(torch.empty(channels, 2).uniform_(-spread, spread))

    @property
    def unshifted(self) -> float:
        """Share of the channels that stay where they are."""
        return (self.displacement.detach().round() == 0).all(1).float().mean().item()

    def extra_loss(self) -> Tensor:
        """The shift penalty, for the loss."""
        return self.penalty * self.displacement.abs().sum()

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Move the channels."""
        _channels(self, x, len(self.displacement))
        y = shift(x, self.displacement.detach().round().long())
        if not (torch.is_grad_enabled() and self.displacement.requires_grad):
            return y
        smooth = bilinear_shift(x.detach(), self.displacement)
        return y + (smooth - smooth.detach())  # the value of y, and a gradient for the displacement

    def deployed(self) -> IntegerShift:
        """The same layer for inference."""
        return IntegerShift(self.displacement.detach().round().long())


class IntegerShift(nn.Module):
    """Whole shifts of some channels; the others are not touched. What ``SparseShift.deployed`` gives.

    Args:
        displacement: [C, 2] whole pixels.

    Shapes: [B, C, H, W] to the same.

    Raises:
        ValueError: An input of other channels.
    """

    moved: Tensor
    by: Tensor

    def __init__(self, displacement: Int[Tensor, "C 2"]) -> None:
        super().__init__()
        self.channels = len(displacement)
        moved = displacement.ne(0).any(1).nonzero()[:, 0]
        self.register_buffer("moved", moved)
        self.register_buffer("by", displacement[moved])

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Move the channels that move."""
        _channels(self, x, self.channels)
        return x.index_copy(1, self.moved, shift(x[:, self.moved], self.by)) if len(self.moved) else x


def _channels(module: nn.Module, x: Tensor, channels: int) -> None:
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"{type(module).__name__}: input {tuple(x.shape)}; wanted [batch, {channels}, height, width].")


class ShiftUnit(nn.Module):
    """1x1 convolution to more channels, spatial mixing by shifts, 1x1 convolution back, and a shortcut where shapes allow.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        expansion: Inner channels as a multiple of ``outputs``.
        stride: Of the second convolution.
        mix: Called with the inner channels; what mixes pixels.

    Shapes: [B, inputs, H, W] to [B, outputs, H / stride, W / stride].
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        expansion: int = 3,
        stride: int = 1,
        mix: Callable[[int], nn.Module] = SparseShift,
    ) -> None:
        super().__init__()
        inner = expansion * outputs
        self.up = nn.Sequential(nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU())
        self.mix = mix(inner)
        self.down = nn.Sequential(nn.Conv2d(inner, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Float[Tensor, "B C H W"]) -> Tensor:
        """Mix pixels and channels."""
        y = self.down(self.mix(self.up(x)))
        return x + y if self.shortcut else y


class FEBlock(nn.Module):
    """Fully-exploited block: early units work on part of the channels; the others join unit by unit, unused before.

    Unit i of n (from 1) sees the first ``2^(i - n)`` of the channels; what it does not see waits as it is. All are seen by
    the last. The paper's exact shares could not be verified.

    Args:
        channels: Channels C, a multiple of ``2^(units - 1)``.
        units: How many units n.
        expansion: Of each unit.
        mix: Of each unit.

    Shapes: [B, C, H, W] to the same.

    Raises:
        ValueError: Channels that can't be halved so often.
    """

    def __init__(
        self, channels: int, units: int = 2, *, expansion: int = 3, mix: Callable[[int], nn.Module] = SparseShift
    ) -> None:
        super().__init__()
        if units < 1 or channels % 2 ** (units - 1):
            raise ValueError(
                f"FEBlock: {channels} channels for {units} units; wanted a multiple of {2 ** max(units - 1, 0)}."
            )
        self.seen = [channels // 2 ** (units - i) for i in range(1, units + 1)]
        self.units = nn.ModuleList(ShiftUnit(c, c, expansion=expansion, mix=mix) for c in self.seen)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Run the units on growing shares of the channels."""
        for unit, seen in zip(self.units, self.seen, strict=True):
            x = torch.cat((unit(x[:, :seen]), x[:, seen:]), 1)
        return x


@configured
class FENet(nn.Module):
    """A network of 1x1 convolutions and shifts: a stem, then stages of a halving unit and a fully-exploited block.

    Args:
        channels: Channels of the image.
        classes: Number of classes K.
        width: Channels of the first stage, doubled in each of the next.
        stages: How many.
        units: Units of each block.
        expansion: Of each unit.
        mix: Called with the inner channels of each unit: what mixes pixels.

    Shapes: [B, C, H, W] to [B, K]; H and W of at least 2 to the number of stages.

    Examples:
        >>> import torch
        >>> FENet(1, 10, width=8)(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int = 3,
        classes: int = 10,
        *,
        width: int = 16,
        stages: int = 3,
        units: int = 2,
        expansion: int = 3,
        mix: Callable[[int], nn.Module] = SparseShift,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        parts: list[nn.Module] = []
        for stage in range(stages):
            out = width * 2**stage
            parts.append(ShiftUnit(max(width, out // 2), out, expansion=expansion, stride=2, mix=mix))
            parts.append(FEBlock(out, units, expansion=expansion, mix=mix))
        self.stages = nn.Sequential(*parts)
        self.head = nn.Linear(width * 2 ** (stages - 1), classes)

    @classmethod
    def for_task(cls, shape: DataShape, **options: Any) -> Self:
        """A net for a task of images and classes."""
        shape.require("FENet", "image", "classes")
        return cls(shape.channels, shape.classes, **options)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        _channels(self, image, self.channels)
        return self.head(self.stages(self.stem(image)).mean((2, 3)))


EXAMPLE = Example(
    make=lambda: SparseShift(3, spread=2.0),
    inputs=lambda: (torch.randn(2, 3, 5, 6),),
    odd=lambda: (torch.randn(3, 3, 1, 7),),
    axis=3,
    wrong=lambda: (torch.randn(2, 4, 5, 6),),
    exceptions={"gradcheck": "the displacement's gradient is that of the interpolation, not of the rounded shift"},
)
