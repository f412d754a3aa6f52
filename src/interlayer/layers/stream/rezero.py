"""ReZero: residual branches behind a scalar gate that is zero at initialisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from interlayer.core.example import Backbone, Example
from interlayer.core.stream import State, Stream


class ReZero(Stream):
    """Scale each block's branches by one learned scalar that is zero at initialisation.

    Paper: Bachlechner et al., "ReZero is All You Need: Fast Convergence at Large Depth", arXiv:2003.04887.

    Equation (section 2): ``x_{i+1} = x_i + alpha_i F_i(x_i)``, with ``alpha_i = 0`` at initialisation and no norm, so
    that the Jacobian of the stack is exactly the identity before the first step. The branches of a block share their
    scalar (in a Transformer: attention and MLP), as in the authors' code.

    Args:
        depth: Number of blocks.
        branches: Sublayers in a block.
        start: Initial value of every gate; 0 in the paper.

    Shapes: any; the state keeps the shape of the input.

    Raises:
        ValueError: ``depth`` or ``branches`` below 1.

    Examples:
        >>> import torch
        >>> from interlayer.models import Transformer
        >>> model = Transformer(vocab=50, length=16, depth=24, width=32, heads=2, stream="rezero")
        >>> model.trunk.stream.gate.shape
        torch.Size([24])
    """

    def __init__(self, depth: int, *, branches: int = 1, start: float = 0.0) -> None:
        super().__init__(depth, branches=branches)
        self.gate = nn.Parameter(torch.full((depth,), float(start)))

    def write(self, state: State, layer: int, branch: Tensor) -> State:
        state.x = torch.addcmul(state.x, self.gate[layer // self.branches].to(branch.dtype), branch)
        return state


EXAMPLE = Example(
    make=lambda: Backbone(ReZero),
    inputs=lambda: (torch.randn(2, 6, 8),),
    odd=lambda: (torch.randn(3, 7, 8),),
    axis=1,
    causal=True,
)
