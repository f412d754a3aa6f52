"""Sparse shift: channels of an image that learn to move by whole pixels, most of which learn to stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interlayer.core import aside
from interlayer.core.config import configured
from interlayer.core.data import DataShape
from interlayer.core.example import Example


def shift(x_BCHW: Tensor, by_C2: Int[Tensor, "C 2"]) -> Tensor:
    """Move every channel by its own integer number of rows and columns: ``y[c, i, j] = x[c, i + a_c, j + b_c]``, zero outside.

    Args:
        x_BCHW: Images.
        by_C2: Displacements (a, b) of the channels.
    """
    height, width = x_BCHW.shape[-2:]
    rows, cols = (torch.arange(n, device=x_BCHW.device) + by_C2[:, i, None] for i, n in enumerate((height, width)))
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((cols >= 0) & (cols < width))[:, None]
    source = rows.clamp(0, height - 1)[:, :, None] * width + cols.clamp(0, width - 1)[:, None]
    moved = x_BCHW.flatten(2).gather(2, source.flatten(1).expand(x_BCHW.shape[0], -1, -1))
    return moved.view_as(x_BCHW) * inside.to(x_BCHW.dtype)


def bilinear_shift(x_BCHW: Tensor, by_C2: Float[Tensor, "C 2"]) -> Tensor:
    """``shift`` by fractions of pixels: the mean of the four neighbouring integer shifts, weighted bilinearly."""
    low = by_C2.floor()
    part = (by_C2 - low).to(x_BCHW.dtype)
    out = torch.zeros_like(x_BCHW)
    for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
        at = torch.tensor(corner, device=by_C2.device)
        weight = torch.where(at == 1, part, 1 - part).prod(1)
        out = out + weight[:, None, None] * shift(x_BCHW, low.long() + at)
    return out


class SparseShift(nn.Module):
    """Move every channel by a learned displacement, rounded to integer pixels; a penalty leaves most of them unshifted.

    Paper: Chen et al., "All You Need is a Few Shifts: Designing Efficient Convolutional Neural Networks for Image
    Classification", doi:10.1109/CVPR.2019.00741.

    Equation: ``y[c, i, j] = x[c, i + round(a_c), j + round(b_c)]``, zero outside the image. Quantisation-aware: the forward
    pass uses integer pixels, the gradient of ``a, b`` is that of bilinear interpolation at their real values. The loss gets
    ``penalty sum_c |a_c| + |b_c|``, the paper's, and ``decay / 2 sum_c a_c^2 + b_c^2``. The authors' code
    (github.com/hikvision-research/SparseShiftLayer) has the second alone, as weight decay of 4e-5, and learns the
    displacements in the first half of the training only (``settle``). The paper's weight of the first could not be
    verified; 5e-4 is this project's.

    At initialisation the channels are in nine equal groups, one for each of the nine neighbouring pixels, and the rest of
    the division stays unshifted. A pass costs no multiply-adds; ``deployed()`` moves the memory of shifted channels alone.

    Args:
        channels: Channels C.
        penalty: Weight of the displacements' absolute values in the loss.
        decay: Weight of half their squares.
        spread: Displacements are uniform within this many pixels at initialisation. Defaults to the nine groups.

    Shapes: [B, C, H, W] to the same.

    Raises:
        ValueError: Fewer than one channel, a negative penalty, decay or spread, or an input with other channels.

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

    def __init__(
        self, channels: int, *, penalty: float = 5e-4, decay: float = 0.0, spread: float | None = None
    ) -> None:
        super().__init__()
        if channels < 1 or penalty < 0 or decay < 0 or (spread is not None and spread < 0):
            raise ValueError(
                f"SparseShift: channels {channels}, penalty {penalty}, decay {decay}, spread {spread}; expected at least one "
                "channel and nothing negative."
            )
        self.penalty, self.decay = penalty, decay
        if spread is None:
            nine = torch.cartesian_prod(torch.arange(-1.0, 2.0), torch.arange(-1.0, 2.0))
            displacement = torch.zeros(channels, 2)
            displacement[: channels // 9 * 9] = nine.repeat_interleave(channels // 9, 0)
        else:
            displacement = torch.empty(channels, 2).uniform_(-spread, spread)
        self.displacement = nn.Parameter(displacement)

    @property
    def unshifted(self) -> float:
        """Share of the unshifted channels."""
        return (self.displacement.detach().round() == 0).all(1).float().mean().item()

    def regulariser(self) -> Tensor:
        """Penalty and decay, which training adds to the loss."""
        return self.penalty * self.displacement.abs().sum() + self.decay / 2 * self.displacement.square().sum()

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Move the channels."""
        _channels(self, x, len(self.displacement))
        if self.training:
            aside.loss(self.regulariser())
        y = shift(x, self.displacement.detach().round().long())
        if not (torch.is_grad_enabled() and self.displacement.requires_grad):
            return y
        smooth = bilinear_shift(x.detach(), self.displacement)
        return y + (smooth - smooth.detach())  # the value of y, and a gradient for the displacement

    def deployed(self) -> IntegerShift:
        """The same layer for inference."""
        return IntegerShift(self.displacement.detach().round().long())


class IntegerShift(nn.Module):
    """Integer shifts of some channels; the others are left untouched. What ``SparseShift.deployed`` returns.

    Args:
        displacement: [C, 2] integer pixels.

    Shapes: [B, C, H, W] to the same.

    Raises:
        ValueError: An input with another number of channels.
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
        """Move the shifted channels."""
        _channels(self, x, self.channels)
        return x.index_copy(1, self.moved, shift(x[:, self.moved], self.by)) if len(self.moved) else x


def _channels(module: nn.Module, x: Tensor, channels: int) -> None:
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(
            f"{type(module).__name__}: input {tuple(x.shape)}; expected [batch, {channels}, height, width]."
        )


def settle(model: nn.Module, progress: float, *, until: float = 0.5) -> None:
    """Learn displacements until a share of the training is done, then keep them, as the authors' code does.

    Args:
        model: Has ``SparseShift`` layers.
        progress: Share of the training that is done, 0 to 1; call it before each step.
        until: Share from which displacements are kept.

    Raises:
        ValueError: The model has no such layer.

    Examples:
        >>> layer = SparseShift(9)
        >>> [(settle(layer, step / 4), layer.displacement.requires_grad)[1] for step in range(4)]
        [True, True, False, False]
    """
    found = [module for module in model.modules() if isinstance(module, SparseShift)]
    if not found:
        raise ValueError(f"settle: {type(model).__name__} has no SparseShift layer.")
    for layer in found:
        layer.displacement.requires_grad_(progress < until)


Mix = Callable[[int], nn.Module]


def pool(channels: int) -> nn.Module:
    """Mean of 2 x 2 pixels; what the halving units have in place of shifts."""
    return nn.AvgPool2d(2)


class ShiftUnit(nn.Module):
    """Inverted bottleneck: 1x1 convolution to more channels, spatial mixing, 1x1 convolution back; without multiplications in between.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        expansion: Hidden channels as a multiple of ``outputs``.
        mix: Called with the hidden channels; what mixes pixels. ``pool`` halves the image.
        shortcut: Whether the input is added.

    Shapes: [B, inputs, H, W] to [B, outputs, H, W], or half of H and W with ``pool``.
    """

    def __init__(
        self, inputs: int, outputs: int, *, expansion: int = 6, mix: Mix = SparseShift, shortcut: bool = False
    ) -> None:
        super().__init__()
        hidden = expansion * outputs
        self.up = nn.Sequential(nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU())
        self.mix = mix(hidden)
        self.down = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = shortcut

    def forward(self, x: Float[Tensor, "B C H W"]) -> Tensor:
        """Mix pixels and channels."""
        y = self.down(self.mix(self.up(x)))
        return x + y if self.shortcut else y


class FEBlock(nn.Module):
    """Fully-exploited block: early units work on part of the channels; the others join unit by unit, unused before.

    Unit i of n (from 1) sees the last ``2^(i - n)`` of the channels; what it does not see waits as it is. All but the last
    unit have a shortcut; the last one sees everything, changes the channels and may halve the image.

    Args:
        inputs: Input channels, a multiple of ``2^(units - 1)``.
        outputs: Output channels.
        units: Number of units n.
        expansion: Of each unit.
        mix: Of each unit.
        halve: Whether the last unit has a pool in place of ``mix``.

    Shapes: [B, inputs, H, W] to [B, outputs, H, W], or half of H and W.

    Raises:
        ValueError: Channels that can't be halved so often.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        units: int = 3,
        *,
        expansion: int = 6,
        mix: Mix = SparseShift,
        halve: bool = False,
    ) -> None:
        super().__init__()
        if units < 1 or inputs % 2 ** (units - 1):
            raise ValueError(
                f"FEBlock: {inputs} channels for {units} units; expected a multiple of {2 ** max(units - 1, 0)}."
            )
        self.seen = [inputs // 2 ** (units - i) for i in range(1, units)]
        self.units = nn.ModuleList(ShiftUnit(c, c, expansion=expansion, mix=mix, shortcut=True) for c in self.seen)
        self.last = ShiftUnit(inputs, outputs, expansion=expansion, mix=pool if halve else mix)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Tensor:
        """Run the units on growing shares of the channels."""
        for unit, seen in zip(self.units, self.seen, strict=True):
            waiting = x.shape[1] - seen
            x = torch.cat((x[:, :waiting], unit(x[:, waiting:])), 1)
        return self.last(x)


# Units, outputs as a multiple of the stem's channels, and whether the image is halved: each block of the authors' network.
PAPER = ((3, 4, True), (4, 8, True), (4, 8, False), (4, 16, True), (3, 16, False))
SMALL = ((3, 4, True), (3, 4, False))  # for images of 8 to 32 pixels


@configured
class FENet(nn.Module):
    """The paper's network: a strided convolution, a shift unit, a halving unit, fully-exploited blocks, a wide last convolution.

    As in the authors' code, where width 16 is FE-Net 1x.

    Args:
        channels: Channels of the image.
        classes: Number of classes K.
        width: Channels of the stem.
        blocks: (units, outputs as a multiple of ``width``, whether it halves the image) of each block.
        stem: Stride of the first convolution.
        head: Channels of the last convolution.
        expansion: Of each unit in the blocks.
        dropout: Share of the last features that is dropped in training.
        mix: Called with the hidden channels of each unit: what mixes pixels.

    Shapes: [B, C, H, W] to [B, K].

    Raises:
        ValueError: An image of other channels, or smaller than the product of all strides.

    Examples:
        >>> import torch
        >>> FENet(1, 10, width=8, blocks=SMALL, stem=1, head=64)(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int = 3,
        classes: int = 1000,
        *,
        width: int = 16,
        blocks: Sequence[tuple[int, int, bool]] = PAPER,
        stem: int = 2,
        head: int = 1932,
        expansion: int = 6,
        dropout: float = 0.2,
        mix: Mix = SparseShift,
    ) -> None:
        super().__init__()
        self.channels, self.least = channels, stem * 2 ** (1 + sum(halve for _, _, halve in blocks))
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, stem, 1, bias=False), nn.BatchNorm2d(width))
        parts: list[nn.Module] = [
            ShiftUnit(width, width, expansion=4, mix=mix),
            ShiftUnit(width, 2 * width, expansion=5, mix=pool),
        ]
        inputs = 2 * width
        for units, times, halve in blocks:
            parts.append(FEBlock(inputs, times * width, units, expansion=expansion, mix=mix, halve=halve))
            inputs = times * width
        self.stages = nn.Sequential(*parts)
        self.wide = nn.Sequential(nn.Conv2d(inputs, head, 1, bias=False), nn.BatchNorm2d(head), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(head, classes))

    @classmethod
    def for_task(cls, shape: DataShape, **options: Any) -> Self:
        """A small net for a task of images and classes."""
        shape.require("FENet", "image", "classes")
        return cls(
            shape.channels, shape.classes, **{"blocks": SMALL, "stem": 1, "head": 128, "dropout": 0.0, **options}
        )

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        _channels(self, image, self.channels)
        if min(image.shape[2:]) < self.least:
            raise ValueError(
                f"FENet: image {tuple(image.shape)}; expected at least {self.least} pixels a side, the product of all strides. "
                "Give larger images, stem=1, or blocks that halve less often."
            )
        return self.head(self.wide(self.stages(self.stem(image))).mean((2, 3)))


EXAMPLE = Example(
    make=lambda: SparseShift(3, spread=2.0, decay=0.1),
    inputs=lambda: (torch.randn(2, 3, 5, 6),),
    odd=lambda: (torch.randn(3, 3, 1, 7),),
    axis=3,
    wrong=lambda: (torch.randn(2, 4, 5, 6),),
    gradient="surrogate",
    twin=lambda layer: (
        lambda x: shift(x, layer.displacement.detach().round().long()) + bilinear_shift(x.detach(), layer.displacement)
    ),
)
