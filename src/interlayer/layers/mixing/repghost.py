"""RepGhost: features reused by addition, in a form that fuses into one depthwise convolution for inference."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from interlayer.core.config import configured
from interlayer.core.data import DataShape
from interlayer.core.example import Example

# Units of the paper's network at width 1: kernel, middle channels, output channels, squeeze-and-excitation, stride.
PAPER = (
    (3, 8, 16, 0, 1), (3, 24, 24, 0, 2), (3, 36, 24, 0, 1), (5, 36, 40, 0.25, 2), (5, 60, 40, 0.25, 1),
    (3, 120, 80, 0, 2), (3, 100, 80, 0, 1), (3, 120, 80, 0, 1), (3, 120, 80, 0, 1), (3, 240, 112, 0.25, 1),
    (3, 336, 112, 0.25, 1), (5, 336, 160, 0.25, 2), (5, 480, 160, 0, 1), (5, 480, 160, 0.25, 1), (5, 480, 160, 0, 1),
    (5, 480, 160, 0.25, 1),
)  # fmt: skip
SMALL = ((3, 16, 16, 0, 1), (3, 32, 24, 0, 2), (3, 48, 24, 0, 1), (3, 48, 40, 0.25, 2), (3, 80, 40, 0.25, 1))


def _checked(module: nn.Module, x: Tensor, channels: int) -> None:
    if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape[2:]:
        raise ValueError(
            f"{type(module).__name__}: input {tuple(x.shape)}; expected [batch, {channels}, height, width] with at least "
            "one pixel."
        )


def _divisible(count: float) -> int:
    """The nearest multiple of 4, or the one above where that is more than a tenth below; at least 4."""
    near = max(4, int(count + 2) // 4 * 4)
    return near + 4 if near < 0.9 * count else near


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    line = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(line, nn.BatchNorm2d(outputs))


class RepGhost(nn.Module):
    """A 1x1 convolution makes channels and a cheap depthwise one adds to them: reuse by addition, not by concatenation.

    Paper: Chen et al., "RepGhost: A Hardware-Efficient Ghost Module via Re-parameterization", arXiv:2211.06088.

    Equation: ``x_1 = relu(BN(W * x))``, ``y = relu(BN(D * x_1) + BN'(x_1))`` with the depthwise D. There is no activation between,
    so that the two norms and D are one depthwise convolution with bias: its kernel is that of D, scaled, plus the scale of BN'
    at the centre. ``fused()`` gives that form and fuses the norm of the 1x1 convolution too.

    Cost: inputs outputs + k^2 outputs multiply-adds for each pixel, and 2 outputs for the branch in training.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        kernel: Side k of the depthwise kernel, odd.
        activation: Whether to apply ReLU, after the 1x1 convolution and at the end.
        branch: Whether to build the batch-norm branch; without it nothing is reused.

    Shapes: [B, inputs, H, W] to [B, outputs, H, W].

    Raises:
        ValueError: An even kernel, an input with another number of channels, or without pixels.

    Examples:
        >>> import torch
        >>> layer, x = RepGhost(3, 8).eval(), torch.randn(2, 3, 6, 6)
        >>> torch.allclose(layer.fused()(x), layer(x), atol=1e-5)
        True
    """

    def __init__(
        self, inputs: int, outputs: int, *, kernel: int = 3, activation: bool = True, branch: bool = True
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"RepGhost: kernel {kernel} is even; expected an odd one, which has a centre.")
        self.inputs = inputs
        self.primary, self.cheap = _conv(inputs, outputs, 1), _conv(outputs, outputs, kernel, groups=outputs)
        self.branch = nn.BatchNorm2d(outputs) if branch else None
        self.act: nn.Module = nn.ReLU() if activation else nn.Identity()

    def forward(self, x: Float[Tensor, "B inputs H W"]) -> Float[Tensor, "B outputs H W"]:
        """Make channels and add to them."""
        _checked(self, x, self.inputs)
        x = self.act(self.primary(x))
        y = self.cheap(x)
        return self.act(y if self.branch is None else y + self.branch(x))

    def fused(self) -> nn.Sequential:
        """The same function (of the running statistics) with two convolutions and nothing else, for inference."""
        primary, cheap = (_fused_pair(pair) for pair in (self.primary, self.cheap))
        if self.branch is not None:
            norm = self.branch
            assert norm.running_var is not None and norm.running_mean is not None and cheap.bias is not None
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            middle = cheap.kernel_size[0] // 2
            with torch.no_grad():
                cheap.weight[:, 0, middle, middle] += scale
                cheap.bias += norm.bias - norm.running_mean * scale
        return nn.Sequential(primary, copy.deepcopy(self.act), cheap, copy.deepcopy(self.act)).eval()


def _fused_pair(pair: nn.Sequential) -> nn.Conv2d:
    conv, norm = copy.deepcopy(pair).eval()
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    return fuse_conv_bn_eval(conv, norm)


class Ghost(nn.Module):
    """GhostNet's module (Han et al., arXiv:1911.11907): the cheap convolution's channels are concatenated with the first ones.

    Args:
        inputs: Input channels.
        outputs: Output channels, even.
        kernel: Side of the depthwise kernel, odd.
        activation: Whether to apply ReLU to both halves.

    Shapes: [B, inputs, H, W] to [B, outputs, H, W].
    """

    def __init__(self, inputs: int, outputs: int, *, kernel: int = 3, activation: bool = True) -> None:
        super().__init__()
        if outputs % 2:
            raise ValueError(
                f"Ghost: outputs {outputs} is odd; expected an even number, as one half is made from the other."
            )
        half = outputs // 2
        self.inputs = inputs
        self.primary, self.cheap = _conv(inputs, half, 1), _conv(half, half, kernel, groups=half)
        self.act: nn.Module = nn.ReLU() if activation else nn.Identity()

    def forward(self, x: Float[Tensor, "B inputs H W"]) -> Float[Tensor, "B outputs H W"]:
        """Make half of the channels, then the others from them."""
        _checked(self, x, self.inputs)
        x = self.act(self.primary(x))
        return torch.cat((x, self.act(self.cheap(x))), 1)

    def fused(self) -> Ghost:
        """A copy for inference with the norms fused into the convolutions."""
        twin = copy.deepcopy(self).eval()
        twin.primary, twin.cheap = (nn.Sequential(_fused_pair(pair)) for pair in (self.primary, self.cheap))
        return twin


class SqueezeExcite(nn.Module):
    """Scale channels by gates that depend on the mean of the image (Hu et al., arXiv:1709.01507).

    Args:
        channels: Channels C.
        ratio: Hidden channels as a share of C, rounded to a multiple of 4.
    """

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        hidden = _divisible(channels * ratio)
        self.down, self.up = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Scale the channels."""
        return x * F.hardsigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Bottleneck(nn.Module):
    """Two ghost modules with a depthwise stride between them, squeeze-and-excitation, and a shortcut.

    Args:
        inputs: Input channels.
        middle: Channels between the modules.
        outputs: Output channels.
        kernel: Side of the strided depthwise kernel and of the shortcut's.
        stride: 1 or 2.
        squeeze: Ratio of the squeeze-and-excitation; 0 for none.
        concatenate: Build GhostNet's modules, with twice the middle channels for the same FLOPs, except for the last
            depthwise kernel.
        branch: Whether RepGhost modules have their branch.
    """

    def __init__(
        self,
        inputs: int,
        middle: int,
        outputs: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        squeeze: float = 0.0,
        concatenate: bool = False,
        branch: bool = True,
    ) -> None:
        super().__init__()
        if concatenate:
            middle *= 2
            self.first: nn.Module = Ghost(inputs, middle)
            self.second: nn.Module = Ghost(middle, outputs, activation=False)
        else:
            self.first = RepGhost(inputs, middle, branch=branch)
            self.second = RepGhost(middle, outputs, activation=False, branch=branch)
        between = [_conv(middle, middle, kernel, stride, middle)] if stride > 1 else []
        self.between = nn.Sequential(*between, *([SqueezeExcite(middle, squeeze)] if squeeze else []))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Sequential(
            *([] if same else [_conv(inputs, inputs, kernel, stride, inputs), _conv(inputs, outputs, 1)])
        )

    def forward(self, x: Float[Tensor, "B inputs H W"]) -> Tensor:
        """Both modules and the shortcut."""
        return self.second(self.between(self.first(x))) + self.shortcut(x)


@configured
class RepGhostNet(nn.Module):
    """The paper's network, or a small one for small images, of RepGhost bottlenecks (or of GhostNet's, for comparison).

    Channel counts are those of the authors' code at each of their widths. Its dropout before the last layer is left out.

    Args:
        channels: Channels of the image.
        classes: Number of classes K.
        width: Factor of all channel counts, which are then rounded to multiples of 4 as in the authors' code.
        units: (kernel, middle, outputs, squeeze, stride) of each unit.
        stem: Stride of the first convolution.
        head: Features of the last hidden layer.
        concatenate: Build GhostNet's bottlenecks.
        branch: Whether RepGhost modules have their branch.

    Shapes: [B, C, H, W] to [B, K].

    Examples:
        >>> import torch
        >>> RepGhostNet(1, 10, units=SMALL, stem=1, head=64)(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int = 3,
        classes: int = 1000,
        *,
        width: float = 1.0,
        units: Sequence[tuple[int, int, int, float, int]] = PAPER,
        stem: int = 2,
        head: int = 1280,
        concatenate: bool = False,
        branch: bool = True,
    ) -> None:
        super().__init__()
        self.channels = channels

        inputs = _divisible(16 * width)
        self.stem = nn.Sequential(*_conv(channels, inputs, 3, stem), nn.ReLU())
        blocks: list[nn.Module] = []
        for kernel, middle, outputs, squeeze, stride in units:
            sizes = (inputs, _divisible(middle * width), _divisible(outputs * width))
            options = {"squeeze": squeeze, "concatenate": concatenate, "branch": branch}
            blocks.append(Bottleneck(*sizes, kernel=kernel, stride=stride, **options))  # type: ignore[arg-type]
            inputs = sizes[2]
        last = _divisible(units[-1][1] * width * 2)
        self.blocks = nn.Sequential(*blocks, *_conv(inputs, last, 1), nn.ReLU())
        self.hidden, self.head = nn.Linear(last, head), nn.Linear(head, classes)

    @classmethod
    def for_task(cls, shape: DataShape, **options: Any) -> Self:
        """A small net for a task of images and classes."""
        shape.require("RepGhostNet", "image", "classes")
        return cls(shape.channels, shape.classes, **{"units": SMALL, "stem": 1, "head": 128, **options})

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        _checked(self, image, self.channels)
        return self.head(F.relu(self.hidden(self.blocks(self.stem(image)).mean((2, 3)))))

    def fused(self) -> RepGhostNet:
        """A copy for inference: every module and every other batch norm fused."""
        net = copy.deepcopy(self).eval()
        _fuse(net)
        return net


def _fuse(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, RepGhost | Ghost):
            setattr(module, name, child.fused())
            continue
        _fuse(child)
        if isinstance(child, nn.Sequential):
            parts: list[nn.Module] = []
            for part in child:
                if isinstance(part, nn.BatchNorm2d) and parts and isinstance(parts[-1], nn.Conv2d):
                    parts[-1] = fuse_conv_bn_eval(parts[-1], part)
                else:
                    parts.append(part)
            setattr(module, name, nn.Sequential(*parts))


def _shifted() -> RepGhost:
    """Norms with non-zero biases: with zero ones, whole regions lie exactly on the kink of the last ReLU."""
    layer = RepGhost(3, 4)
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, 0.1, 0.5)
    return layer


EXAMPLE = Example(
    make=_shifted,
    inputs=lambda: (torch.randn(2, 3, 5, 6),),
    odd=lambda: (torch.randn(3, 3, 1, 7),),
    axis=3,
    modes={"without its branch or activation": lambda: RepGhost(3, 4, branch=False, activation=False)},
    wrong=lambda: (torch.randn(2, 4, 5, 6),),
)
