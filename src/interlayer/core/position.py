"""Position: what tells a Transformer where a token is."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn


class Position(nn.Module):
    """No position at all, and the protocol: ``embed`` acts on the input, ``rotate`` on queries and keys, ``bias`` on scores.

    ``needs`` names what a position asks of the mixer: one with a bias needs ``"bias"``,
    one that turns queries and keys ``"rotate"``.

    Args:
        width: Features D of the input.
        length: Longest sequence.
        head_width: Features of one head.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, width: int = 0, length: int = 0, head_width: int = 0) -> None:
        super().__init__()

    def embed(self, x_BSD: Tensor, offset: int = 0) -> Tensor:
        """Position added to the embedded input, whose first place is ``offset``."""
        return x_BSD

    def rotate(self, q_BHSK: Tensor, k_BHSK: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Position turned into queries and keys."""
        return q_BHSK, k_BHSK

    def bias(self, new: int, total: int) -> Tensor | None:
        """What is added to the scores of the last ``new`` of ``total`` places, broadcast to [B, H, new, total]."""
        return None


class Learned(Position):
    """One learned vector for each place."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(length, width) * 0.02)

    def embed(self, x_BSD: Tensor, offset: int = 0) -> Tensor:
        return x_BSD + self.table[offset : offset + x_BSD.shape[1]]


class Sinusoidal(Position):
    """Fixed sines and cosines of geometrically spaced wavelengths (Vaswani et al., arXiv:1706.03762, section 3.5)."""

    table: Tensor

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"Sinusoidal: width {width} is odd; an even one is needed.")
        angle = torch.outer(torch.arange(length), 10000 ** (-torch.arange(0, width, 2) / width))
        self.register_buffer("table", torch.stack((angle.sin(), angle.cos()), -1).flatten(1), persistent=False)

    def embed(self, x_BSD: Tensor, offset: int = 0) -> Tensor:
        return x_BSD + self.table[offset : offset + x_BSD.shape[1]].to(x_BSD.dtype)


class Rotary(Position):
    """Queries and keys turned by angles that grow with the place (Su et al., arXiv:2104.09864); halves, not pairs, turn together."""

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

    def rotate(self, q_BHSK: Tensor, k_BHSK: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        places = slice(offset, offset + q_BHSK.shape[-2])
        cos, sin = self.cos[places].to(q_BHSK.dtype), self.sin[places].to(q_BHSK.dtype)
        half = cos.shape[-1] // 2
        return (
            q_BHSK * cos + q_BHSK.roll(half, -1) * sin,
            k_BHSK * cos + k_BHSK.roll(half, -1) * sin,
        )
