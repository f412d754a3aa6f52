"""Leaves that are neither mixers nor positions nor orders: another norm, a large memory, no MLP at all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ScaleNorm(nn.Module):
    """``g x / |x|`` with one learned scalar (Nguyen and Salazar, arXiv:1910.05895).

    Args:
        width: Features D; the scalar starts at its square root.
        eps: Least length.
    """

    def __init__(self, width: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.gain = nn.Parameter(torch.tensor(width**0.5))

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Give every vector the same length."""
        if x.shape[-1] != self.width:
            raise ValueError(f"ScaleNorm: input {tuple(x.shape)}; expected [..., {self.width}].")
        return self.gain.to(x.dtype) * F.normalize(x, dim=-1, eps=self.eps)


class ProductKeys(nn.Module):
    """A large memory in the MLP's place: ``keys^2`` values, of which ``top`` are read (Lample et al., arXiv:1907.05242).

    The query is split in two; the best ``top`` of each half's ``keys`` sub-keys give ``top^2`` candidates, of which the best are
    read. 2 keys D + top^2 multiply-adds for the search of a position, in place of keys^2 D.

    Args:
        width: Features D, even.
        keys: Sub-keys of each half.
        top: Values that are read.
        heads_read: Independent queries.
    """

    def __init__(self, width: int, *, keys: int = 32, top: int = 8, heads_read: int = 2) -> None:
        super().__init__()
        if width % 2 or top > keys:
            raise ValueError(f"ProductKeys: width {width} must be even, and top {top} at most keys {keys}.")
        self.top, self.heads_read = top, heads_read
        self.query = nn.Linear(width, heads_read * width)
        self.keys = nn.Parameter(torch.randn(heads_read, 2, keys, width // 2) * (width // 2) ** -0.5)
        self.values = nn.Parameter(torch.randn(keys * keys, width) * width**-0.5)

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """Read the values whose product keys fit best."""
        q = self.query(x).unflatten(-1, (self.heads_read, 2, -1))
        score = torch.einsum("...hpd,hpkd->...hpk", q, self.keys)
        best, at = score.topk(self.top, -1)
        pairs = (best[..., 0, :, None] + best[..., 1, None, :]).flatten(-2)
        index = (at[..., 0, :, None] * self.keys.shape[2] + at[..., 1, None, :]).flatten(-2)
        weight, chosen = pairs.topk(self.top, -1)
        rows = F.embedding(index.gather(-1, chosen), self.values)
        return (weight.softmax(-1)[..., None] * rows).sum((-2, -3))


class NoMLP(nn.Module):
    """No channel mixing: zero, for mixers that do it too (``persistent-memory``).

    Args:
        width: Features D.
    """

    def __init__(self, width: int = 0) -> None:
        super().__init__()

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Zero, with the input in its graph: the norm before it gets a gradient, which distributed training asks for."""
        return 0 * x
