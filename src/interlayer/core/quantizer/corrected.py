"""Packed weights whose error a product of low rank makes up for, and whose inputs may be divided by features first."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.quantizer.grid import Grid, Scaled
from interlayer.core.quantizer.layers import Packed, weight_of

Factors = tuple[Float[Tensor, "out rank"], Float[Tensor, "rank inputs"]]


def alternate(
    weight: Float[Tensor, "out inputs"], grid: Grid, rank: int, *, rounds: int = 10
) -> tuple[Scaled, Tensor, Factors]:
    """Split a matrix into rounded numbers and a product of low rank, by turns: ``Q = round(W - L R)``, ``L R = svd_rank(W - Q)``.

    No data is needed. It is the split of LoftQ (Li et al., arXiv:2310.08659) and of DiTAS.

    Args:
        weight: The matrix W.
        grid: Of Q.
        rank: Of the product, from 1 to the smaller side.
        rounds: How often both are found. The turn with the least error counts.

    Returns:
        The grid of Q with its scales, the codes of Q, and L and R.

    Examples:
        >>> w = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
        >>> held, codes, (left, right) = alternate(w, Grid(3, 0), 4)
        >>> off = w - held.values(codes) - left @ right
        >>> bool(off.norm() < 0.8 * (w - Grid(3, 0).fit(w).fake(w)).norm())
        True
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    low, least = torch.zeros_like(wide), math.inf
    for _ in range(rounds):
        held = grid.fit(wide - low)
        codes = held.codes(wide - low)
        u, s, v = torch.linalg.svd(wide - held.values(codes), full_matrices=False)
        root = s[:rank].sqrt()
        left, right = u[:, :rank] * root, root[:, None] * v[:rank]
        low = left @ right
        if (error := float(s[rank:].square().sum())) < least:  # of W - Q - L R; a turn may make it worse
            least, best = error, (held, codes, (left.to(weight.dtype), right.to(weight.dtype)))
    return best


class Corrected(Packed):
    """A packed linear map ``Q x' + L R x'`` with ``x'`` the inputs over ``divisor``, rounded if ``Packed`` rounds them.

    Memory beside that of ``Packed``: rank numbers for each output and each input, and one for each input for the divisor.

    Args:
        layer: A linear map. It is not changed.
        weights: See ``Packed``.
        codes: See ``Packed``.
        inputs: See ``Packed``.
        factors: L and R; None for no product of low rank.
        divisor: What each feature of the inputs is divided by; None where this is done before.

    Shapes: those of ``layer``.

    Raises:
        ValueError: A layer that is no linear map, or what ``Packed`` raises.

    Examples:
        >>> layer, x = nn.Linear(32, 16), torch.ones(1, 32)
        >>> held, codes, factors = alternate(layer.weight, Grid(3, 0), 4)
        >>> new = Corrected(layer, held, codes=codes, factors=factors)
        >>> torch.allclose(new(x), F.linear(x, new.weight + new.left @ new.right, layer.bias), atol=1e-5)
        True
    """

    def __init__(
        self,
        layer: nn.Module,
        weights: Grid | Scaled,
        *,
        codes: Tensor | None = None,
        inputs: Scaled | Grid | None = None,
        factors: Factors | None = None,
        divisor: Float[Tensor, " inputs"] | None = None,
    ) -> None:
        if weight_of(layer).ndim != 2:
            raise ValueError(f"Corrected: {type(layer).__name__}; expected a linear map.")
        super().__init__(layer, weights, codes=codes, inputs=inputs)
        self.register_buffer("divisor", None if divisor is None else divisor.detach().to(weight_of(layer)).clone())
        left, right = (None, None) if factors is None else (nn.Parameter(f.detach().clone()) for f in factors)
        self.left, self.right = left, right

    def before(self, x: Tensor) -> Tensor:
        """The inputs over the divisor."""
        divisor: Any = self.divisor
        return x if divisor is None else x / divisor

    def call(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer with float weights."""
        return self._corrected(super().call(x, weight), x)

    def product(self, x: Tensor, inputs: Scaled) -> Tensor:
        """The product of integers, and that of low rank."""
        found = super().product(x, inputs)
        return found if self.left is None else self._corrected(found, inputs.fake(x))

    def _corrected(self, found: Tensor, x: Tensor) -> Tensor:
        return (
            found if self.left is None or self.right is None else found + F.linear(F.linear(x, self.right), self.left)
        )

    def structure(self) -> dict[str, Any]:
        """The grids, the rank and whether inputs are divided, as ``restore`` needs them."""
        rank = 0 if self.left is None else self.left.shape[1]
        return {**super().structure(), "rank": rank, "divided": self.divisor is not None}
