"""i-RevNet: a classifier that loses nothing of the image before its last, linear layer, and can be run backwards from there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.config import configured
from interlayer.core.data import DataShape
from interlayer.core.example import Example
from interlayer.core.reversible import Coupling, Pair, halves, inverse, ordinary, reversible


def squeeze(x: Float[Tensor, "B C H W"], side: int) -> Float[Tensor, "B side*side*C H/side W/side"]:
    """Invertible down-sampling: move each square of pixels into channels; those of one pixel stay together.

    Examples:
        >>> squeeze(torch.arange(8.0).view(1, 2, 2, 2), 2).flatten().tolist()
        [0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0]
    """
    x = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    return x.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)


def unsqueeze(y: Float[Tensor, "B side*side*C H W"], side: int) -> Float[Tensor, "B C side*H side*W"]:
    """The inverse of ``squeeze``."""
    y = y.unflatten(1, (side, side, -1))
    return y.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)


class Unit(Coupling):
    """One unit: a bottleneck of three 3x3 convolutions, pre-activated, added to the other half.

    Args:
        inputs: Channels of the half that it reads.
        outputs: Channels of each half that it gives.
        stride: Side of the squares that become channels, and stride of the first convolution.
        dropout: Probability, before the last norm.
        ratio: ``outputs`` over the bottleneck's channels.
        first: Whether to leave out the first norm and activation.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, dropout: float, ratio: float, first: bool) -> None:
        hidden = max(int(outputs // ratio), 1)
        self.stride = stride
        super().__init__(
            nn.Sequential(
                *([] if first else [nn.BatchNorm2d(inputs), nn.ReLU()]),
                nn.Conv2d(inputs, hidden, 3, stride, 1, bias=False),
                nn.BatchNorm2d(hidden),
                nn.ReLU(),
                nn.Conv2d(hidden, hidden, 3, padding=1, bias=False),
                nn.Dropout(dropout),
                nn.BatchNorm2d(hidden),
                nn.ReLU(),
                nn.Conv2d(hidden, outputs, 3, padding=1, bias=False),
            )
        )

    def carry(self, x: Float[Tensor, "B C H W"]) -> Tensor:
        """S: down-sample without loss."""
        return x if self.stride == 1 else squeeze(x, self.stride)

    def back(self, y: Float[Tensor, "B C H W"]) -> Tensor:
        """The inverse of S."""
        return y if self.stride == 1 else unsqueeze(y, self.stride)


@configured
class IRevNet(nn.Module):
    """A deep network of invertible units: everything up to the final projection onto the classes can be undone.

    Paper: Jacobsen, Smeulders and Oyallon, "i-RevNet: Deep Invertible Networks", arXiv:1802.07088.

    Equation 1: ``x_{j+1} = S_{j+1} x~_j`` and ``x~_{j+1} = S_{j+1} x_j + F_{j+1} x~_j`` for the two halves x and x~ of the channels,
    with a bottleneck F and S, which moves squares of pixels into channels where the resolution falls.

    Where ``widths`` are None, the network is bijective: every tensor of the last layer's shape belongs to one image. Wider ones
    make it injective: channels of zeros are put before those of the image, so that the half which the first unit reads holds the image.
    The authors' code puts them behind. There the first unit reads zeros alone and never learns; made again from outputs, these zeros
    would be rounding errors, which its norms would magnify.

    Widths, units, dropout and the last norm's momentum are those of the authors' code (jhjacobsen/pytorch-i-revnet) for CIFAR-10,
    which trains with SGD: rate 0.1, divided by 5 after 60, 120 and 160 of 200 epochs, momentum 0.9, weight decay 5e-4, batches of
    128. For ImageNet it has ``blocks=(6, 16, 72, 6), strides=(2, 2, 2, 2), widths=None, down=2, dropout=0``. The authors can
    pad at later stages too; here only the image is padded.

    Cost: training keeps the activations of one unit whatever the depth (``core.reversible``), for one more evaluation of every F.

    Args:
        channels: Channels C of the image.
        classes: Number of classes K.
        blocks: Units in each stage.
        strides: Stride of each stage's first unit; it multiplies the channels by its square.
        widths: Channels of each half in each stage; None for those without padding.
        down: Side of the squares that become channels before the first unit.
        dropout: Probability of dropout inside units; inversion needs evaluation mode.
        ratio: Channels of a half over those of its bottleneck.
        recompute: Whether the backward pass makes activations again; without it they are kept, in less time.

    Shapes: [B, C, H, W] to [B, K]; features are [B, 2 widths[-1], H', W'], whose sides are
        those of the image divided by ``down`` and all strides.

    Raises:
        ValueError: Stages of different number, an odd number of channels to split, a width that does not follow from the one before,
            or an image of another number of channels or a size that the strides do not divide.
        RuntimeError: ``inverse`` in training mode, where dropout and statistics of the batch change the units.

    Examples:
        >>> net = IRevNet(1, 10, blocks=(2, 2), strides=(1, 2), widths=None, down=2).eval()
        >>> image = torch.randn(3, 1, 8, 8)
        >>> net(image).shape, net.features(image).shape
        (torch.Size([3, 10]), torch.Size([3, 16, 2, 2]))
        >>> torch.allclose(net.inverse(net.features(image)), image, atol=1e-5)
        True
    """

    unit: ClassVar[type[Unit]] = Unit

    def __init__(
        self,
        channels: int = 3,
        classes: int = 10,
        *,
        blocks: Sequence[int] = (18, 18, 18),
        strides: Sequence[int] = (1, 2, 2),
        widths: Sequence[int] | None = (16, 64, 256),
        down: int = 1,
        dropout: float = 0.1,
        ratio: float = 4,
        recompute: bool = True,
    ) -> None:
        super().__init__()
        inputs = channels * down**2
        if widths is None:
            if inputs % 2:
                raise ValueError(
                    f"IRevNet: {inputs} channels to split; expected an even number. Set down=2, or pad by giving widths."
                )
            widths, half = [], inputs // 2
            for stride in strides:
                half *= stride**2
                widths.append(half)
        if not len(blocks) == len(strides) == len(widths) or not blocks or min(blocks) < 1:
            raise ValueError(
                f"IRevNet: blocks {tuple(blocks)}, strides {tuple(strides)} and widths {tuple(widths)}; expected as many of each, "
                "and at least one unit in a stage."
            )
        self.channels, self.down, self.recompute = channels, down, recompute
        half = widths[0] // strides[0] ** 2
        self.padding = 2 * half - inputs
        self.scale = down
        self.units = nn.ModuleList()
        for stage, (count, stride, width) in enumerate(zip(blocks, strides, widths, strict=True)):
            if width != half * stride**2 or self.padding < 0:
                raise ValueError(
                    f"IRevNet: stage {stage} has width {width}; expected {half * stride**2}, stride {stride} squared times the {half} "
                    f"before it, and in all at least the {inputs} channels of the image. Change widths, strides or down."
                )
            for number in range(count):
                first, step = not self.units, 1 if number else stride
                self.units.append(self.unit(half, width, stride=step, dropout=dropout, ratio=ratio, first=first))
                half = width
            self.scale *= stride
        self.norm, self.head = nn.BatchNorm2d(2 * half, momentum=0.9), nn.Linear(2 * half, classes)

    @classmethod
    def for_task(cls, shape: DataShape, **options: Any) -> Self:
        """A small net for a task of images and classes."""
        shape.require("IRevNet", "image", "classes")
        small = {"blocks": (3, 3), "strides": (1, 2), "widths": (16, 64), "down": 2, "ratio": 2, "dropout": 0.0}
        return cls(shape.channels, shape.classes, **{**small, **options})

    def split(self, image: Float[Tensor, "B C H W"]) -> Pair:
        """The image as two halves of its channels, after down-sampling and padding."""
        if image.ndim != 4 or image.shape[1] != self.channels or any(n % self.scale or not n for n in image.shape[2:]):
            raise ValueError(
                f"IRevNet: image {tuple(image.shape)}; expected [batch, {self.channels}, height, width] with sides that {self.scale} "
                "divides, as all strides together do."
            )
        return halves(F.pad(squeeze(image, self.down), (0, 0, 0, 0, self.padding, 0)))

    def trajectory(self, image: Float[Tensor, "B C H W"]) -> Iterator[Float[Tensor, "B C_j H_j W_j"]]:
        """The halves together, before the first unit and after each: equal information at every depth."""
        pair = self.split(image)
        yield torch.cat(pair, 1)
        for unit in self.units:
            pair = unit(*pair)
            yield torch.cat(pair, 1)

    def features(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 2W h w"]:
        """The last unit's outputs, from which ``inverse`` makes the image again."""
        run = reversible if self.recompute else ordinary
        return torch.cat(run(self.units, self.split(image)), 1)  # type: ignore[arg-type]

    def inverse(self, features: Float[Tensor, "B 2W h w"]) -> Float[Tensor, "B C H W"]:
        """The image that has these features; where the network is injective, that without what the padding's channels hold."""
        if self.training:
            raise RuntimeError(
                "IRevNet.inverse: the model is in training mode, where dropout and batch statistics differ; call eval()."
            )
        if features.ndim != 4 or features.shape[1] != self.head.in_features:
            raise ValueError(
                f"IRevNet.inverse: features {tuple(features.shape)}; expected [batch, {self.head.in_features}, height, width]."
            )
        image = torch.cat(inverse(self.units, halves(features)), 1)  # type: ignore[arg-type]
        return unsqueeze(image[:, self.padding :], self.down)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits of the classes: a norm, ReLU and the mean over all positions, then the projection."""
        return self.head(F.relu(self.norm(self.features(image))).mean((2, 3)))


def _small(**options: Any) -> IRevNet:
    """Norms with biases: where a ReLU before gives zeros alone, padded channels would lie exactly on the kink of the next."""
    net = IRevNet(1, 10, **{"blocks": (1, 1), "strides": (1, 2), "widths": (4, 16), "ratio": 2, **options})
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, 0.1, 0.5)
    return net


EXAMPLE = Example(
    make=_small,
    inputs=lambda: (torch.randn(2, 1, 8, 8),),
    odd=lambda: (torch.randn(3, 1, 2, 6),),
    wrong=lambda: (torch.randn(2, 1, 8, 7),),
    modes={
        "bijective": lambda: _small(widths=None, down=2, strides=(2, 1)),
        "activations kept": lambda: _small(recompute=False),
    },
)
