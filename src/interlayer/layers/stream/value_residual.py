"""Value residual: the first layer's attention values shared with all later layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.core.example import Backbone, Example
from interlayer.core.slots import choose
from interlayer.core.stream import Norm, PreNorm, State, Width


class Average(nn.Module):
    """``(V_1 + V_n) / 2``, as in the authors' code."""

    def forward(self, first: Tensor, own: Tensor, block: int) -> Tensor:
        """The values of a block other than the first, from those of the first and its own."""
        return 0.5 * (first + own)


class Constant(nn.Module):
    """``w V_1 + V_n``.

    Args:
        weight: w. The public code does not have the paper's; 2 is this project's.
    """

    def __init__(self, weight: float = 2.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, first: Tensor, own: Tensor, block: int) -> Tensor:
        """Mix."""
        return self.weight * first + own


class Sparse(Constant):
    """``w V_1 + V_n`` in the last blocks, ``V_n`` before them.

    Args:
        depth: Number of blocks.
        weight: w.
        share: Share of the blocks that mix. The public code does not have the paper's choice; a third is this project's.
    """

    def __init__(self, depth: int, weight: float = 2.0, share: float = 1 / 3) -> None:
        super().__init__(weight)
        self.first = depth - max(int(depth * share + 1e-9), 1)

    def forward(self, first: Tensor, own: Tensor, block: int) -> Tensor:
        """Mix, or not."""
        return own if block < self.first else super().forward(first, own, block)


class Learnable(nn.Module):
    """``a_n V_1 + b_n V_n``, both trained.

    Args:
        depth: Number of blocks.
        weights: a_n and b_n at initialisation; (0, 1) is the plain Transformer. Defaults to the authors' code's.
    """

    def __init__(self, depth: int, weights: tuple[float, float] = (0.5, 0.5)) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights).float().repeat(depth, 1))

    def forward(self, first: Tensor, own: Tensor, block: int) -> Tensor:
        """Mix."""
        a, b = self.weights[block].to(own.dtype)
        return a * first + b * own


class Shared(nn.Module):
    """``V_1``: SVFormer, in which no block but the first projects or caches values."""


MODES: dict[str, Callable[..., nn.Module]] = {
    "identity": Average,
    "constant": Constant,
    "learnable": Learnable,
    "sparse": Sparse,
    "shared": Shared,
}


class ValueResidual(PreNorm):
    """The values of the first attention layer are mixed into those of later layers (ResFormer) or replace them (SVFormer).

    Paper: Zhou et al., "Value Residual Learning For Alleviating Attention Concentration In Transformers",
    arXiv:2410.17897.

    Equation: ``V'_n = lambda_{n,1} V_1 + lambda_{n,2} V_n`` before attention, for every layer n > 1. The weights are what the
    modes differ in.

    Args:
        depth: Number of blocks.
        width: Features D.
        branches: Sublayers in a block; the first one is the attention.
        norm: Called with ``width=``.
        mode: ``identity`` (1/2 and 1/2), ``constant(weight=2.0)``, ``sparse(weight=2.0, share=1/3)``,
            ``learnable(weights=(0.5, 0.5))``, ``shared`` (SVFormer), or a class or factory of your own, called with ``depth=``
            if it names it, whose modules take (first, own, block).

    Shapes: values [B, H, S, K], equal in all layers; needs a mixer that offers ``share``.

    Raises:
        ValueError: Unknown ``mode``, or an option that the mode does not have.

    Examples:
        >>> import torch
        >>> from interlayer.core.mixer import Cache
        >>> from interlayer.models import Transformer
        >>> model = Transformer(vocab=50, length=16, depth=4, width=32, heads=2, stream="value-residual(mode='shared')")
        >>> cache = Cache()
        >>> _ = model(torch.zeros(1, 10, dtype=torch.long), cache=cache)
        >>> cache.bytes  # keys of four layers, values of one: 5 x 10 tokens x 32 features x 4 bytes
        6400
    """

    needs = frozenset({"share"})

    def __init__(
        self, depth: int, width: Width, *, branches: int = 2, norm: Norm | None = None, mode: Any = "identity"
    ) -> None:
        super().__init__(depth, width, branches=branches, norm=norm)
        self.mode = choose("ValueResidual: mode", mode, MODES, depth=depth)

    def projects(self, layer: int) -> bool:
        return layer == 0 or not isinstance(self.mode, Shared)

    def share(self, state: State, layer: int, k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
        if layer == 0:
            assert v is not None
            state.kept["v"] = v
            return k, v
        first: Tensor = state.kept["v"]
        return k, first if v is None else self.mode(first, v, layer // self.branches)


EXAMPLE = Example(
    make=lambda: Backbone(ValueResidual),
    inputs=lambda: (torch.randn(2, 6, 8),),
    odd=lambda: (torch.randn(3, 7, 8),),
    axis=1,
    causal=True,
    modes={mode: lambda mode=mode: Backbone(partial(ValueResidual, mode=mode)) for mode in MODES},
)
