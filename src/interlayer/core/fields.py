"""Neural fields: a signal as a small network from coordinates to values, with weights given from outside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

ACTIVATIONS = ("relu", "sine")
BITS = 8  # of a stored number


def grid(
    *sizes: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Float[Tensor, "N D"]:
    """Coordinates of every point of a regular grid over [-1, 1]^D, the last axis running fastest.

    Examples:
        >>> grid(2, 3).tolist()
        [[-1.0, -1.0], [-1.0, 0.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    axes = [torch.linspace(-1, 1, n, dtype=dtype, device=device) if n > 1 else torch.zeros(1, dtype=dtype, device=device)
            for n in sizes]  # fmt: skip
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def encode(x: Float[Tensor, "*B D"], frequencies: int) -> Float[Tensor, "*B E"]:
    """Positional encoding ``x, sin(2^k pi x), cos(2^k pi x)`` for k below ``frequencies``: E = D (1 + 2 frequencies).

    Mildenhall et al., arXiv:2003.08934, equation 4, with the coordinates themselves in front.
    """
    turns = x.unsqueeze(-2) * (math.pi * 2.0 ** torch.arange(frequencies, device=x.device, dtype=x.dtype)).unsqueeze(-1)
    return torch.cat((x, turns.sin().flatten(-2), turns.cos().flatten(-2)), -1)


class Layout:
    """Layers of a neural field and the standard deviation of its initial weights.

    Args:
        inputs: Coordinates D.
        outputs: Values C.
        width: Features of each hidden layer.
        depth: Hidden layers.
        activation: ``relu`` (weights as He's) or ``sine``, ``sin(omega (W x + b))`` (Sitzmann et al., arXiv:2006.09661).
        frequencies: Of the positional encoding; 0 for none.
        omega: Frequency of the sines.

    Raises:
        ValueError: A size below 1, or an unknown activation.

    Examples:
        >>> layout = Layout(2, 3, width=16, depth=2, frequencies=4)
        >>> layout.shapes
        [(16, 18), (16, 16), (3, 16)]
        >>> layout.count
        627
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        width: int = 32,
        depth: int = 3,
        activation: str = "relu",
        frequencies: int = 0,
        omega: float = 30.0,
    ) -> None:
        if min(inputs, outputs, width, depth) < 1 or frequencies < 0:
            raise ValueError(
                f"implicit: inputs {inputs}, outputs {outputs}, width {width}, depth {depth}, frequencies {frequencies}; "
                "expected sizes of at least 1 and frequencies of at least 0."
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"implicit: activation {activation!r} is not one of {ACTIVATIONS}.")
        self.inputs, self.outputs, self.activation = inputs, outputs, activation
        self.frequencies, self.omega = frequencies, omega
        sizes = [inputs * (1 + 2 * frequencies), *[width] * depth, outputs]
        self.shapes = [(o, i) for i, o in pairwise(sizes)]

    @property
    def count(self) -> int:
        """Weights and biases in all."""
        return sum(o * i + o for o, i in self.shapes)

    def spread(self) -> list[tuple[float, float]]:
        """Standard deviation of the initial weights and biases of each layer."""
        found = []
        for layer, (_, i) in enumerate(self.shapes):
            weight = math.sqrt(2 / i)
            if self.activation == "sine":
                weight = 1 / (i * math.sqrt(3)) if layer == 0 else math.sqrt(2 / i) / self.omega
            found.append((weight, 1 / math.sqrt(3 * i)))
        return found

    def split(self, flat: Float[Tensor, " P"]) -> list[tuple[Tensor, Tensor]]:
        """All numbers in a row as (weight, bias) of each layer."""
        parts = flat.split([n for o, i in self.shapes for n in (o * i, o)])
        return [(parts[2 * k].view(shape), parts[2 * k + 1]) for k, shape in enumerate(self.shapes)]

    def __call__(self, x: Float[Tensor, "*B D"], layers: Sequence[tuple[Tensor, Tensor]]) -> Float[Tensor, "*B C"]:
        """The values at coordinates, a pure function of these and the weights."""
        if x.ndim == 0 or x.shape[-1] != self.inputs:
            raise ValueError(
                f"implicit: coordinates {tuple(x.shape)}; expected [..., {self.inputs}], the built-in dimension."
            )
        h = encode(x, self.frequencies) if self.frequencies else x
        for weight, bias in layers[:-1]:
            h = F.linear(h, weight, bias)
            h = torch.sin(self.omega * h) if self.activation == "sine" else F.relu(h)
        return F.linear(h, *layers[-1])


class Implicit(nn.Module):
    """An implicit network whose layers hold their own weights: a coordinate MLP or SIREN, as COIN stores images.

    Args:
        inputs: Coordinates D.
        outputs: Values C.
        **options: See ``Layout``.

    Shapes: [..., D] to [..., C].

    Examples:
        >>> Implicit(2, 1, width=8, depth=2, activation="sine")(grid(4, 4)).shape
        torch.Size([16, 1])
    """

    @classmethod
    def within(cls, size: int, inputs: int, outputs: int, **options: Any) -> Self:
        """The widest network that fits into ``size`` bytes; see ``stored_bytes``.

        Raises:
            ValueError: Not even a network of width 1 fits.
        """

        def bytes_of(width: int) -> int:
            shapes = Layout(inputs, outputs, width=width, **options).shapes
            return stored_bytes([n for o, i in shapes for n in (o * i, o)])

        width = 0
        while bytes_of(width + 1) <= size:
            width += 1
        if not width:
            raise ValueError(
                f"implicit: size {size} bytes; a network of width 1 takes {bytes_of(1)}. Allow more bytes."
            )
        return cls(inputs, outputs, width=width, **options)

    def __init__(self, inputs: int, outputs: int, **options: object) -> None:
        super().__init__()
        self.layout = Layout(inputs, outputs, **options)  # type: ignore[arg-type]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for (o, i), (w, b) in zip(self.layout.shapes, self.layout.spread(), strict=True):
            top = math.sqrt(3)  # of a uniform distribution with deviation 1
            self.weights.append(nn.Parameter(torch.empty(o, i).uniform_(-top * w, top * w)))
            self.biases.append(nn.Parameter(torch.empty(o).uniform_(-top * b, top * b)))

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B C"]:
        """Values at coordinates."""
        return self.layout(x, list(zip(self.weights, self.biases, strict=True)))


def stored_bytes(sizes: Sequence[int]) -> int:
    """Bytes of tensors of so many numbers: ``BITS`` for a number, and minimum and step of each tensor's grid as float32.

    >>> stored_bytes([100, 20])
    136
    """
    return sum(n * BITS // 8 + 8 for n in sizes)


def quantize(x: Tensor, bits: int) -> tuple[Tensor, float, float]:
    """Integers below 2^bits on a uniform grid from the minimum to the maximum; with the grid's minimum and step."""
    low, high = float(x.min()), float(x.max())
    step = (high - low) / (2**bits - 1) or 1.0
    return ((x - low) / step).round().long(), low, step


def dequantize(levels: Tensor, low: float, step: float) -> Tensor:
    """The float32 values of whole numbers, the same on every machine."""
    return (levels.double() * step + low).float()
