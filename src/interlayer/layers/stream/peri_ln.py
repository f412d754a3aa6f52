"""Peri-LN: a norm before and after every sublayer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from interlayer.core.example import Backbone, Example
from interlayer.core.stream import Norm, PreNorm, State, Width, layernorm, widths


class PeriLN(PreNorm):
    """Normalise each sublayer's input and output, so that each adds about the same variance.

    Paper: Kim et al., "Peri-LN: Revisiting Layer Normalization in the Transformer Architecture", arXiv:2502.02732.

    Equation: ``x_{l+1} = x_l + norm(f_l(norm(x_l)))``, with norms of the embedded input before the first sublayer and of the
    stack's output after the last. At initialisation every branch has variance 1, so that the variance after l sublayers of
    independent outputs is 1 + l: it grows linearly, while it grows with the sublayers' weights in pre-norm, and stays at 1 in
    post-norm at the cost of vanishing gradients.

    There is one more norm for each sublayer than in pre-norm, and one for the embedding.

    Args:
        depth: Number of blocks.
        width: Features of a sublayer's input, one number or one for each sublayer.
        outputs: Features of a sublayer's output, where they differ.
        branches: Sublayers in a block.
        norm: Called with ``width=`` for each norm.

    Shapes: any that the norm takes; the state keeps the shape of the input.

    Raises:
        ValueError: Widths that differ in number from the sublayers.

    Examples:
        >>> import torch
        >>> from interlayer.models import Transformer
        >>> model = Transformer(vocab=50, length=16, depth=2, width=32, heads=2, stream="peri-ln", norm="rmsnorm")
        >>> sum("norm" in name for name, _ in model.trunk.stream.named_modules() if name.count(".") == 1)
        8
    """

    def __init__(
        self, depth: int, width: Width, *, outputs: Width | None = None, branches: int = 1, norm: Norm | None = None
    ) -> None:
        super().__init__(depth, width, outputs=outputs, branches=branches, norm=norm)
        norm = norm or layernorm
        self.first = norm(width=widths(width, self.layers)[0])
        self.output_norms = nn.ModuleList(norm(width=w) for w in widths(outputs or width, self.layers))

    def start(self, x: Tensor) -> State:
        return State(self.first(x))

    def write(self, state: State, layer: int, branch: Tensor) -> State:
        return super().write(state, layer, self.output_norms[layer](branch))


EXAMPLE = Example(
    make=lambda: Backbone(PeriLN),
    inputs=lambda: (torch.randn(2, 6, 8),),
    odd=lambda: (torch.randn(3, 7, 8),),
    axis=1,
    causal=True,
)
