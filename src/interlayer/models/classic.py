"""Convolutional networks without slots, as plain modules: what a method meets in the wild."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from interlayer.core.config import configured


def _conv(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([act()] if act else []))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., arXiv:1512.03385, figure 5 left)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(_conv(inputs, outputs, 3, stride=stride), _conv(outputs, outputs, 3, act=None))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, 1, stride=stride, act=None)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Branch plus shortcut."""
        return self.act(self.branch(x) + self.shortcut(x))


class SqueezeExcite(nn.Module):
    """Channels gated by a small network of their means, with a hard sigmoid (arXiv:1905.02244, section 5.3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 4, 4)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, inner, 1),
            nn.ReLU(),
            nn.Conv2d(inner, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Gate the channels."""
        return x * self.gate(x)


class InvertedResidual(nn.Module):
    """Expand, depthwise convolution, squeeze-and-excite, project (Howard et al., arXiv:1905.02244, figure 4)."""

    def __init__(
        self, inputs: int, inner: int, outputs: int, kernel: int, stride: int, excite: bool, act: type[nn.Module]
    ) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _conv(inputs, inner, 1, act=act) if inner != inputs else nn.Identity(),
            _conv(inner, inner, kernel, stride=stride, groups=inner, act=act),
            SqueezeExcite(inner) if excite else nn.Identity(),
            _conv(inner, outputs, 1, act=None),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Branch, plus the input where shapes agree."""
        return x + self.branch(x) if self.residual else self.branch(x)


class Staged(nn.Module):
    """Stem, a list of blocks, mean over places, linear head."""

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], features: int, classes: int) -> None:
        super().__init__()
        self.stem, self.blocks = stem, nn.Sequential(*blocks)
        self.head = nn.Linear(features, classes)

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, H, W] to logits [B, K]."""
        return self.head(self.blocks(self.stem(image)).mean((2, 3)))


@configured
class ResNet18(Staged):
    """ResNet-18 (He et al., arXiv:1512.03385, table 1) with the 3x3 stem that small images need.

    Args:
        channels: Channels C of the image.
        classes: Number of classes K.
        width: Channels of the first stage; 64 in the paper.

    Shapes: [B, C, H, W] to [B, K].
    """

    def __init__(self, channels: int = 3, classes: int = 10, *, width: int = 64) -> None:
        widths = [width * 2**stage for stage in range(4) for _ in range(2)]
        blocks = [BasicBlock(i, o, 1 if i == o else 2) for i, o in zip([width, *widths[:-1]], widths, strict=True)]
        super().__init__(_conv(channels, width, 3), blocks, widths[-1], classes)


# Table 2 of arXiv:1905.02244: kernel, inner, outputs, squeeze-and-excite, hard swish, stride.
_SMALL: list[tuple[int, int, int, bool, bool, int]] = [
    (3, 16, 16, True, False, 2),
    (3, 72, 24, False, False, 2),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
    (5, 576, 96, True, True, 1),
]


@configured
class MobileNetV3Small(Staged):
    """MobileNetV3-Small (Howard et al., arXiv:1905.02244, table 2); the stem keeps the size of images below 64 pixels.

    Args:
        channels: Channels C of the image.
        classes: Number of classes K.
        width: Factor of all channel counts.
        stride: Of the stem, and of the first two strided blocks: 2 in the paper, 1 for small images.

    Shapes: [B, C, H, W] to [B, K].
    """

    def __init__(self, channels: int = 3, classes: int = 10, *, width: float = 1.0, stride: int = 1) -> None:
        def scaled(n: int) -> int:
            return max(8, int(n * width + 4) // 8 * 8)

        blocks: list[nn.Module] = []
        inputs = scaled(16)
        for number, (kernel, inner, outputs, excite, swish, step) in enumerate(_SMALL):
            act: Any = nn.Hardswish if swish else nn.ReLU
            step = stride if step == 2 and number < 2 else step
            blocks.append(InvertedResidual(inputs, scaled(inner), scaled(outputs), kernel, step, excite, act))
            inputs = scaled(outputs)
        super().__init__(_conv(channels, scaled(16), 3, stride=stride, act=nn.Hardswish), blocks, inputs, classes)
