"""Value residual: the first layer's attention values shared with all later layers."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from interlayer.core.example import Backbone, Example
from interlayer.core.stream import Norm, PreNorm, State, Width

MODES = ("identity", "constant", "learnable", "sparse", "shared")


class ValueResidual(PreNorm):
    """The values of the first attention layer are mixed into those of later layers (ResFormer) or replace them (SVFormer).

    Paper: Zhou et al., "Value Residual Learning For Alleviating Attention Concentration In Transformers",
    arXiv:2410.17897.

    Equation: ``V'_n = lambda_{n,1} V_1 + lambda_{n,2} V_n`` before attention, for every layer n > 1.

    ``identity`` has both weights 1/2, as in the authors' code; ``constant`` has ``weight`` on V_1 and 1 on V_n;
    ``learnable`` trains both; ``sparse`` mixes like ``constant`` only in the last third of the layers;
    ``shared`` is SVFormer: no layer but the first projects or caches values. The constants of the paper's constant and
    sparse variants were not in the public code: 2 and the last third are this project's reading.

    Args:
        depth: Number of blocks.
        width: Features D.
        branches: Sublayers in a block; the first one is the attention.
        norm: Called with ``width=``.
        mode: One of ``identity``, ``constant``, ``learnable``, ``sparse``, ``shared``.
        weight: lambda_{n,1} of ``constant`` and ``sparse``. Defaults to 2.
        weights: Initial lambda_{n,1} and lambda_{n,2} of ``learnable``; (0, 1) begins as a plain Transformer. Defaults to
            1/2 and 1/2, as in the authors' code.

    Shapes: values [B, H, S, K], equal in all layers; needs a mixer that offers ``share``.

    Raises:
        ValueError: Unknown ``mode``, or an option that the mode does not use.

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
        self,
        depth: int,
        width: Width,
        *,
        branches: int = 2,
        norm: Norm | None = None,
        mode: str = "identity",
        weight: float | None = None,
        weights: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(depth, width, branches=branches, norm=norm)
        if mode not in MODES:
            raise ValueError(f"ValueResidual: mode {mode!r} is not one of {MODES}.")
        for name, value, modes in (("weight", weight, ("constant", "sparse")), ("weights", weights, ("learnable",))):
            if value is not None and mode not in modes:
                raise ValueError(
                    f"ValueResidual: {name}={value!r} has no effect in mode {mode!r}; it belongs to {' and '.join(modes)}. "
                    "Leave it out, or change the mode."
                )
        self.mode, self.weight = mode, 2.0 if weight is None else weight
        if mode == "learnable":
            self.mix = nn.Parameter(torch.tensor(weights or (0.5, 0.5)).float().repeat(depth, 1))

    def value_layer(self, layer: int) -> int:
        return 0 if self.mode == "shared" else layer

    def share(self, state: State, layer: int, k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
        if layer == 0:
            assert v is not None
            state.kept["v"] = v
            return k, v
        first: Tensor = state.kept["v"]
        if v is None:  # shared
            return k, first
        block = layer // self.branches
        if self.mode == "identity":
            return k, 0.5 * (first + v)
        if self.mode == "learnable":
            mix = self.mix[block].to(v.dtype)
            return k, mix[0] * first + mix[1] * v
        if self.mode == "sparse" and block < self.depth - max(self.depth // 3, 1):
            return k, v
        return k, self.weight * first + v


EXAMPLE = Example(
    make=lambda: Backbone(ValueResidual),
    inputs=lambda: (torch.randn(2, 6, 8),),
    odd=lambda: (torch.randn(3, 7, 8),),
    axis=1,
    causal=True,
    modes={mode: lambda mode=mode: Backbone(partial(ValueResidual, mode=mode)) for mode in MODES},
)
