"""Position encodings of Transformers."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn


class Position(nn.Module):
    """No position encoding, and the protocol: ``embed`` acts on the input, ``rotate`` on queries and keys, ``bias`` on scores.

    ``needs`` names what a position encoding asks of the mixer: ``"bias"`` if it biases the scores, ``"rotate"`` if it
    rotates queries and keys. One that cannot embed a sequence piece by piece sets ``caches`` to False, and one whose
    ``embed`` would see padding sets ``masks`` to False.

    Args:
        width: Features D of the input.
        length: Longest sequence.
        head_width: Features of one head.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    caches: ClassVar[bool] = True
    masks: ClassVar[bool] = True

    def __init__(self, width: int = 0, length: int = 0, head_width: int = 0) -> None:
        super().__init__()

    def embed(self, x_BSD: Tensor, offset: int = 0) -> Tensor:
        """Add the position to the embedded input, whose first index is ``offset``."""
        return x_BSD

    def rotate(self, q_BHSK: Tensor, k_BHTK: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys by their positions. Keys begin at ``offset``; the last query is at the last key."""
        return q_BHSK, k_BHTK

    def bias(self, new: int, total: int) -> Tensor | None:
        """Bias for the scores of the last ``new`` of ``total`` positions, broadcast to [B, H, new, total]."""
        return None


class Learned(Position):
    """One learned vector for each position."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(length, width) * 0.02)

    def embed(self, x_BSD: Tensor, offset: int = 0) -> Tensor:
        return x_BSD + self.table[offset : offset + x_BSD.shape[1]]


class Sinusoidal(Position):
    """Fixed sines and cosines of geometrically spaced wavelengths (Vaswani et al., arXiv:1706.03762, section 3.5).

    Args:
        width: Features D, even.
        length: Longest sequence.
        scale: Amplitude. A backbone gives the standard deviation of its embedded input, which is 1 in the paper.
    """

    table: Tensor

    def __init__(self, width: int, length: int, *, scale: float = 1.0) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"Sinusoidal: width {width} is odd; give an even one.")
        angle = torch.outer(torch.arange(length), 10000 ** (-torch.arange(0, width, 2) / width))
        self.register_buffer("table", scale * torch.stack((angle.sin(), angle.cos()), -1).flatten(1), persistent=False)

    def embed(self, x_BSD: Tensor, offset: int = 0) -> Tensor:
        return x_BSD + self.table[offset : offset + x_BSD.shape[1]].to(x_BSD.dtype)


class Rotary(Position):
    """Queries and keys rotated in proportion to their position (Su et al., arXiv:2104.09864), the two halves of a head as pairs."""

    needs: ClassVar[frozenset[str]] = frozenset({"rotate"})
    cos: Tensor
    sin: Tensor

    def __init__(self, length: int, head_width: int, *, base: float = 10000.0) -> None:
        super().__init__()
        if head_width % 2:
            raise ValueError(f"Rotary: head width {head_width} is odd; give an even width / heads.")
        half = head_width // 2
        angle = torch.outer(torch.arange(length), base ** (-torch.arange(half) / half))
        self.register_buffer("cos", torch.cat((angle.cos(), angle.cos()), -1), persistent=False)
        self.register_buffer("sin", torch.cat((-angle.sin(), angle.sin()), -1), persistent=False)

    def rotate(self, q_BHSK: Tensor, k_BHTK: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        end = offset + k_BHTK.shape[-2]
        return self.turn(q_BHSK, end - q_BHSK.shape[-2], end), self.turn(k_BHTK, offset, end)

    def turn(self, x_BHSK: Tensor, start: int, end: int) -> Tensor:
        """Rotate what stands at positions ``start`` to ``end``."""
        cos, sin = self.cos[start:end].to(x_BHSK.dtype), self.sin[start:end].to(x_BHSK.dtype)
        return x_BHSK * cos + x_BHSK.roll(cos.shape[-1] // 2, -1) * sin


class AxialSinusoidal(Position):
    """Fixed sines and cosines of the column in one half of the features and of the row in the other, for images.

    Args:
        width: Features D, a multiple of 4.
        grid: Rows and columns; positions run row by row.
    """

    table: Tensor

    def __init__(self, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"AxialSinusoidal: width {width}; expected a multiple of 4.")
        angle = torch.stack(axial_angles(grid, width // 4))
        self.register_buffer(
            "table", torch.cat([f(a) for a in angle for f in (torch.sin, torch.cos)], -1), persistent=False
        )

    def embed(self, x_BSD: Tensor, offset: int = 0) -> Tensor:
        return x_BSD + self.table[offset : offset + x_BSD.shape[1]].to(x_BSD.dtype)


class AxialRotary(Rotary):
    """``Rotary`` on a grid: half of a head's pairs are rotated in proportion to the column, half to the row.

    Args:
        grid: Rows and columns; positions run row by row.
        head_width: Features of one head, a multiple of 4.
    """

    def __init__(self, grid: tuple[int, int], head_width: int) -> None:
        super().__init__(grid[0] * grid[1], head_width)
        if head_width % 4:
            raise ValueError(
                f"AxialRotary: head width {head_width}; expected a multiple of 4. Choose other heads or width."
            )
        angle = torch.cat(axial_angles(grid, head_width // 4), -1)
        self.cos = torch.cat((angle.cos(), angle.cos()), -1)
        self.sin = torch.cat((-angle.sin(), angle.sin()), -1)


def axial_angles(grid: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    """Column and row of each position times ``count`` falling frequencies from 1 down towards 1/10000: two [N, count]."""
    frequency = 10000.0 ** (-torch.arange(count) / count)
    row, column = (i.flatten() for i in torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij"))
    return torch.outer(column, frequency), torch.outer(row, frequency)
