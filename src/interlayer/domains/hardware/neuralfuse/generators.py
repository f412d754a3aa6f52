"""The six generators of NeuralFuse: small encoders and decoders from an image to a perturbation of it."""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from interlayer.core.quantizer import Grid

Name = Literal["ConvL", "ConvS", "DeConvL", "DeConvS", "UNetL", "UNetS"]
BITS = 8  # of a generator's weights; it runs at nominal voltage


def _conv(inputs: int, *outputs: int, bias: bool = True) -> list[nn.Module]:
    """Blocks of convolution, batch norm and ReLU."""
    found: list[nn.Module] = []
    for i, o in zip((inputs, *outputs), outputs, strict=False):
        found += [nn.Conv2d(i, o, 3, padding=1, bias=bias), nn.BatchNorm2d(o), nn.ReLU()]
    return found


def _up(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]


class UNet(nn.Module):
    """An encoder of four levels whose features the decoder reads too (table 5 of the paper)."""

    def __init__(self, channels: int, first: int) -> None:
        super().__init__()
        sizes = [first * 2**level for level in range(4)]
        block = partial(_conv, bias=False)
        self.down = nn.ModuleList(
            nn.Sequential(*block(i, o, o)) for i, o in zip([channels, *sizes], sizes, strict=False)
        )
        self.up = nn.ModuleList()
        for big, small in zip(sizes[:0:-1], sizes[-2::-1], strict=True):
            self.up += [nn.ConvTranspose2d(big, small, 2, 2, 1), nn.Sequential(*block(big, small, small))]
        self.out = nn.Conv2d(first, channels, 1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Encode, and decode beside what was encoded."""
        seen: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            seen.append(x)
        for level in range(3):
            skip = seen[-2 - level]
            x = self.up[2 * level](x)
            high, wide = (a - b for a, b in zip(skip.shape[2:], x.shape[2:], strict=True))
            x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
            x = self.up[2 * level + 1](torch.cat((skip, x), 1))
        return self.out(x)


def network(name: Name, channels: int, width: float = 1.0) -> nn.Module:
    """One of the paper's generators (tables 4 and 5).

    Args:
        name: ``Conv`` decodes by upsampling and convolving, ``DeConv`` by transposed convolutions, ``UNet`` reads the encoder's
            features too; ``L`` is large, ``S`` small.
        channels: Channels C of the image.
        width: Factor of all other channel counts.

    Raises:
        ValueError: Unknown name, or a width that leaves no channel.

    Examples:
        >>> from interlayer.core.cost import parameters
        >>> [parameters(network(name, 3)) for name in ("ConvL", "ConvS", "UNetS")]
        [723273, 113187, 121195]
    """
    if name not in get_args(Name):
        raise ValueError(f"neuralfuse: generator {name!r}; expected one of {', '.join(get_args(Name))}.")
    if not 8 * width >= 1:
        raise ValueError(f"neuralfuse: width {width!r}; expected at least 0.125, which leaves each layer a channel.")
    a, b, c = (round(n * width) for n in ((32, 64, 128) if name.endswith("L") else (32, 64, 64)))
    pool, larger = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
    last = [nn.BatchNorm2d(channels), nn.Tanh()]
    if name.startswith("UNet"):
        return UNet(channels, round((16 if name == "UNetL" else 8) * width))
    if name.endswith("L"):
        encoder = [*_conv(channels, a, a), pool, *_conv(a, b, b), pool, *_conv(b, c, c), pool, *_conv(c, c)]
    else:
        encoder = [*_conv(channels, a), pool, *_conv(a, b), pool, *_conv(b, c), pool]
    decoder = {
        "ConvL": lambda: [
            *(larger, *_conv(c, c, b), larger, *_conv(b, b, a), larger, *_conv(a, a)),
            nn.Conv2d(a, channels, 3, padding=1),
        ],
        "ConvS": lambda: [
            *(*_conv(c, b), larger, *_conv(b, a), larger, *_conv(a, channels), larger),
            nn.Conv2d(channels, channels, 3, padding=1),
        ],
        "DeConvL": lambda: [
            *(*_up(c, b), *_conv(b, b), *_up(b, a), *_conv(a, a)),
            nn.ConvTranspose2d(a, channels, 4, 2, 1),
        ],
        "DeConvS": lambda: [*_up(c, b), *_up(b, a), nn.ConvTranspose2d(a, channels, 4, 2, 1)],
    }
    return nn.Sequential(*encoder, *decoder[name](), *last)


class Generator(nn.Module):
    """NeuralFuse's transformation of the input: ``F(x) = clip(x + G(x))`` into the range of the data (equation 1).

    Args:
        name: See ``network``.
        channels: Channels C.
        low: Smallest value of the transformed input; -1 in the paper.
        high: Largest; 1 in the paper. G is scaled by half of the range.
        width: Factor of G's channel counts.

    Shapes: [B, C, H, W] of any size to the same; images are padded to multiples of 8 within, and to 16 for a UNet.

    Raises:
        ValueError: An unknown name, an empty range, or an image of other channels.

    Examples:
        >>> Generator("UNetS", 1)(torch.zeros(2, 1, 9, 13)).shape
        torch.Size([2, 1, 9, 13])
    """

    def __init__(self, name: Name, channels: int, low: float = -1.0, high: float = 1.0, width: float = 1.0) -> None:
        super().__init__()
        if not low < high:
            raise ValueError(f"neuralfuse: inputs from {low} to {high}; expected a range. Pass span=(low, high).")
        self.channels, self.low, self.high = channels, low, high
        self.least = 16 if name.startswith("UNet") else 8
        self.network = network(name, channels, width)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Transform."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"neuralfuse: input {tuple(x.shape)}; expected images [batch, {self.channels}, height, width]."
            )
        height, wide = x.shape[2:]
        right, below = (max(-side % 8, self.least - side) for side in (wide, height))
        whole = F.pad(x, (0, right, 0, below))
        change = self.network(whole)[..., :height, :wide]
        return (x + change * ((self.high - self.low) / 2)).clamp(self.low, self.high).to(x.dtype)

    def rounded(self) -> dict[str, Tensor]:
        """The weights of matrices and kernels on a grid of 8 bits, with the gradients of the weights."""
        grid = Grid(BITS)
        return {n: grid.fit(p).fake(p) for n, p in self.named_parameters() if p.ndim > 1}

    def training_pass(self, x: Tensor) -> Tensor:
        """Transform with weights as they will be stored."""
        found: Tensor = functional_call(self, self.rounded(), (x,))
        return found

    @torch.no_grad()
    def store(self) -> None:
        """Round the weights to what is stored."""
        for name, value in self.rounded().items():
            self.get_parameter(name).copy_(value)
