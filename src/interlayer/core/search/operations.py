"""The operations of DARTS by name, and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.parts import Same

Make = Callable[[int, int, bool], nn.Module]  # channels, stride, affine


class Zero(nn.Module):
    """No connection: zeros of the output's shape."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        """Zeros."""
        return x[:, :, :: self.stride, :: self.stride] * 0


class Halved(nn.Module):
    """Half the side without losing a pixel: two 1x1 convolutions of stride 2, one of them shifted by a pixel."""

    def __init__(self, ins: int, outs: int, affine: bool) -> None:
        super().__init__()
        self.even = nn.Conv2d(ins, outs - outs // 2, 1, 2, bias=False)
        self.odd = nn.Conv2d(ins, outs // 2, 1, 2, bias=False)
        self.norm = nn.BatchNorm2d(outs, affine=affine)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Sides of odd length are padded by a zero, so that both halves have the same shape."""
        x = nn.functional.pad(x.relu(), (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return self.norm(torch.cat((self.even(x), self.odd(x[:, :, 1:, 1:])), 1))


def projected(ins: int, outs: int, affine: bool) -> nn.Sequential:
    """ReLU, 1x1 convolution and norm: what a cell does with its inputs."""
    return nn.Sequential(nn.ReLU(), nn.Conv2d(ins, outs, 1, bias=False), nn.BatchNorm2d(outs, affine=affine))


def _depthwise(channels: int, side: int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    padding = dilation * (side - 1) // 2
    return [
        nn.ReLU(),
        nn.Conv2d(channels, channels, side, stride, padding, dilation, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    ]


def _separable(side: int) -> Make:
    def make(channels: int, stride: int, affine: bool) -> nn.Module:
        first = _depthwise(channels, side, stride, 1, affine)
        return nn.Sequential(*first, *_depthwise(channels, side, 1, 1, affine))

    return make


def _dilated(side: int) -> Make:
    return lambda channels, stride, affine: nn.Sequential(*_depthwise(channels, side, stride, 2, affine))


def _skip(channels: int, stride: int, affine: bool) -> nn.Module:
    return Same() if stride == 1 else Halved(channels, channels, affine)


OPERATIONS: dict[str, Make] = {
    "none": lambda channels, stride, affine: Zero(stride),
    "max_pool_3x3": lambda channels, stride, affine: nn.MaxPool2d(3, stride, 1),
    "avg_pool_3x3": lambda channels, stride, affine: nn.AvgPool2d(3, stride, 1, count_include_pad=False),
    "skip_connect": _skip,
    "sep_conv_3x3": _separable(3),
    "sep_conv_5x5": _separable(5),
    "dil_conv_3x3": _dilated(3),
    "dil_conv_5x5": _dilated(5),
}
"""The eight candidates of DARTS (arXiv:1806.09055, section 3.1.1), in the order and under the names of the authors' code."""


def known(names: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple.

    Raises:
        ValueError: None, an unknown one, or one twice.
    """
    names = tuple(names)
    if not names:
        raise ValueError(f"search: no operations; expected some of {list(OPERATIONS)}.")
    if unknown := [n for n in names if n not in OPERATIONS]:
        raise ValueError(f"search: unknown operation {unknown[0]!r}; expected some of {list(OPERATIONS)}.")
    if len(set(names)) < len(names):
        raise ValueError(f"search: operations {list(names)}; expected each once.")
    return names


def operation(name: str, channels: int, *, stride: int = 1, affine: bool = True) -> nn.Module:
    """One operation: [B, C, H, W] to [B, C, H / stride, W / stride].

    Args:
        name: One of ``OPERATIONS``.
        channels: Channels C.
        stride: 1 or 2.
        affine: Whether norms have gains and biases. During a search they have none, because a gain could undo an
            operation's weight.

    Raises:
        ValueError: Unknown name.

    Examples:
        >>> operation("sep_conv_3x3", 4, stride=2)(torch.randn(1, 4, 8, 8)).shape
        torch.Size([1, 4, 4, 4])
    """
    return OPERATIONS[known((name,))[0]](channels, stride, affine)


class Mixed(nn.Module):
    """The weighted sum of candidate operations, ``sum_o w_o o(x)``.

    Whoever searches makes the weights, by a softmax or otherwise; the module has no architecture parameter of its own. Every
    candidate runs, so time and memory grow with their number.

    Args:
        operations: The candidates by name; any modules that give equal shapes.

    Shapes: x and weights [O] to what the candidates give.

    Raises:
        ValueError: No candidates, or another number of weights.

    Examples:
        >>> mixed = Mixed({"skip": nn.Identity(), "negate": nn.Hardtanh(-1, 0)})
        >>> mixed(torch.tensor([-2.0, 2.0]), torch.tensor([0.5, 0.5]))
        tensor([-1.5000,  1.0000])
    """

    def __init__(self, operations: dict[str, nn.Module]) -> None:
        super().__init__()
        if not operations:
            raise ValueError("Mixed: no operations; expected at least one.")
        self.candidates = nn.ModuleDict(operations)

    def forward(self, x: Float[Tensor, "..."], weights: Float[Tensor, " O"]) -> Float[Tensor, "..."]:
        """Mix."""
        if weights.shape != (len(self.candidates),):
            raise ValueError(f"Mixed: weights {tuple(weights.shape)}; expected [{len(self.candidates)}], one each.")
        terms = [w * candidate(x) for w, candidate in zip(weights.unbind(), self.candidates.values(), strict=True)]
        return sum(terms[1:], terms[0])
