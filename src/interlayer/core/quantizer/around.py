"""What a model has beside linear maps and convolutions: packed embeddings, and modules whose inputs and outputs are rounded."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from interlayer.core.quantizer.grid import Grid, Scaled
from interlayer.core.quantizer.layers import Held
from interlayer.core.quantizer.packing import pack, unpack


class PackedEmbedding(Held):
    """An embedding with packed rows, of which only those that are read are unpacked.

    Args:
        layer: ``nn.Embedding`` without a limit of norms. It is not changed.
        weights: The grid of its weight with scales; ``axis=0`` is one for each token, with groups one for each group of features. A
            ``Grid`` is fitted by the range.
        codes: Its codes, if they are not the nearest ones.

    Shapes: integers [...] to [..., D].

    Raises:
        ValueError: Another layer, or a grid with another axis.

    Examples:
        >>> small = PackedEmbedding(nn.Embedding(10, 32), Grid(4, 0, group=16))
        >>> small.codes.shape, torch.equal(small(torch.tensor([3])), small.weight[3:4])
        (torch.Size([10, 16]), True)
    """

    codes: Tensor

    def __init__(self, layer: nn.Module, weights: Grid | Scaled, *, codes: Tensor | None = None) -> None:
        super().__init__()
        grid = weights.grid if isinstance(weights, Scaled) else weights
        if type(layer) is not nn.Embedding or layer.max_norm is not None or grid.axis not in (None, 0) or grid.moves:
            raise ValueError(
                f"PackedEmbedding: {layer}, {grid}; expected a plain nn.Embedding without max_norm, and a grid with axis=None or 0 "
                "whose zero stays."
            )
        weight = layer.weight.detach()
        held = (weights if isinstance(weights, Scaled) else weights.fit(weight)).to(weight)
        codes = held.codes(weight) if codes is None else codes
        self.shape, self.grid = tuple(weight.shape), grid
        self.register_buffer("codes", pack(codes.short() - grid.low, grid.width))
        self._hold("", held)

    @property
    def packed_weights(self) -> int:
        """Weights that are codes, and no parameters."""
        return math.prod(self.shape)

    @property
    def weight(self) -> Float[Tensor, "tokens D"]:
        """All rows as floats."""
        return self(torch.arange(self.shape[0], device=self.codes.device))

    def forward(self, tokens: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows D"]:
        """Look up."""
        held = self._held("", self.grid)
        codes = unpack(F.embedding(tokens, self.codes), self.grid.width, self.shape[1]).short() + self.grid.low
        scale = held.scale if self.grid.axis is None else F.embedding(tokens, held.scale.view(self.shape[0], -1))
        wide = (codes.to(scale.dtype) - self.grid.middle).unflatten(-1, (scale.shape[-1] if scale.ndim else 1, -1))
        return (wide * (scale[..., None] if scale.ndim else scale)).flatten(-2)

    def structure(self) -> dict[str, Any]:
        """The grid, as ``restore`` needs it."""
        return {"kind": "PackedEmbedding", "grid": self.grid.options()}

    def extra_repr(self) -> str:
        """The shape and the grid."""
        return f"{list(self.shape)}, {self.grid.bits} bits {self.grid.kind}"


class Around(nn.Module):
    """A module whose floating-point inputs and outputs are rounded, by token: a norm, an activation, a packed layer.

    Args:
        module: The module.
        to: The grid; its groups are those that divide the features (``Grid.divided``).

    Shapes: those of the module.

    Examples:
        >>> rounded = Around(nn.GELU(), Grid(8, -1, group=16, powers=True))
        >>> x = rounded(torch.randn(3, 32))
        >>> torch.equal(Grid(8, -1, group=16, powers=True).by_token(x).fake(x), x)  # 8 bits hold it
        True
    """

    def __init__(self, module: nn.Module, to: Grid) -> None:
        super().__init__()
        self.module, self.grid = module, to

    @property
    def weight(self) -> Tensor | None:
        """The module's, for models that read it past the module."""
        return getattr(self.module, "weight", None)

    @property
    def bias(self) -> Tensor | None:
        """The module's."""
        return getattr(self.module, "bias", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Round, run, round."""
        given = {k: self.rounded(v) for k, v in kwargs.items()}
        return self.rounded(self.module(*(self.rounded(a) for a in args), **given))

    def rounded(self, x: Any) -> Any:
        """On the grid, if it is a tensor of floats."""
        return self.grid.by_token(x).fake(x) if isinstance(x, Tensor) and x.is_floating_point() else x

    def structure(self) -> dict[str, Any]:
        """The grid, and the structure of the module where it is packed."""
        inner: Any = getattr(self.module, "structure", None)
        return {"kind": "Around", "grid": self.grid.options(), "inner": inner() if inner else None}

    def extra_repr(self) -> str:
        """The grid."""
        return f"{self.grid.bits} bits {self.grid.kind} by token"
