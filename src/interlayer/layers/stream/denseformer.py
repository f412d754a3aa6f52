"""DenseFormer: a learned average over the outputs of all earlier blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.core.example import Backbone, Example
from interlayer.core.stream import Norm, PreNorm, State, Width


class DenseFormer(PreNorm):
    """Each block is followed by a depth-weighted average (DWA) of its output, earlier blocks' outputs and the embedding.

    Paper: Pagliardini et al., "DenseFormer: Enhancing Information Flow in Transformers via Depth Weighted Averaging",
    arXiv:2402.02622.

    Equation (section 3): ``X_i = B_i(Y_{i-1})``, ``Y_i = sum_{j <= i} alpha_{i,j} X_j``, with ``X_0 = Y_0`` the embedded
    input; ``alpha_{i,i} = 1`` and all others 0 at initialisation, which is the plain Transformer. With dilation ``k`` only
    ``j = i, i - k, i - 2k, ...`` are averaged; with period ``p`` only every p-th block is followed by an average.

    An output is kept only while a later average will read it: about depth outputs at ``k = p = 1``. An average over n
    outputs costs n multiply-adds for each feature, depth^2 / (2 k p) in all.

    Args:
        depth: Number of blocks.
        width: Features D.
        outputs: Features of a sublayer's output, where they differ.
        branches: Sublayers in a block.
        norm: Called with ``width=``.
        dilation: k, in blocks.
        period: p, in blocks.

    Shapes: any that the norm takes; the state keeps the shape of the input.

    Raises:
        ValueError: ``dilation`` or ``period`` below 1.

    Examples:
        >>> import torch
        >>> from interlayer.models import Transformer
        >>> model = Transformer(vocab=50, length=16, depth=4, width=32, heads=2, stream="denseformer(dilation=2)")
        >>> model.trunk.stream.matrix().diagonal(1)
        tensor([1., 1., 1., 1.])
    """

    def __init__(
        self,
        depth: int,
        width: Width,
        *,
        outputs: Width | None = None,
        branches: int = 1,
        norm: Norm | None = None,
        dilation: int = 1,
        period: int = 1,
    ) -> None:
        super().__init__(depth, width, outputs=outputs, branches=branches, norm=norm)
        if dilation < 1 or period < 1:
            raise ValueError(f"DenseFormer: dilation {dilation} and period {period} must be at least 1.")
        self.sources = {i: list(range(i % dilation, i, dilation)) for i in range(period, depth + 1, period)}
        self.last_reader = {j: i for i, earlier in self.sources.items() for j in earlier}
        # alpha_i over sources[i], then block i itself.
        self.alpha = nn.ParameterDict({str(i): torch.eye(len(js) + 1)[-1].clone() for i, js in self.sources.items()})

    def start(self, x: Tensor) -> State:
        return State(x, {0: x} if 0 in self.last_reader else {})

    def write(self, state: State, layer: int, branch: Tensor) -> State:
        state = super().write(state, layer, branch)
        if not self.ends_block(layer):
            return state
        i = layer // self.branches + 1
        x = state.x
        if i in self.sources:
            if missing := [j for j in self.sources[i] if j not in state.kept]:
                raise ValueError(
                    f"{type(self).__name__}: block {i} reads the output of block {missing[0]}, which was not kept: every "
                    "block must run once, in order. Take order='sequential'."
                )
            state.x = self.average(state, i)
        if i in self.last_reader:
            state.kept[i] = x
        state.kept = {j: x for j, x in state.kept.items() if self.last_reader[j] > i}
        return state

    def average(self, state: State, i: int) -> Tensor:
        """``Y_i`` from ``X_i``, in ``state.x``, and the kept outputs."""
        alpha = self.alpha[str(i)].to(state.x.dtype)
        y = state.x * alpha[-1]
        for weight, j in zip(alpha, self.sources[i], strict=False):
            y = torch.addcmul(y, weight, state.kept[j])
        return y

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """The learned weights as [depth, depth + 1]: row i - 1 is block i, column j the output of block j (0: input)."""
        table = next(self.alpha.parameters(), torch.empty(0)).new_zeros(self.depth, self.depth + 1)
        for i in range(1, self.depth + 1):
            table[i - 1, [*self.sources.get(i, []), i]] = self.alpha[str(i)] if i in self.sources else table.new_ones(1)
        return table

    def figure(self) -> Any:
        """Heat map of ``matrix()`` as a matplotlib figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 4), layout="constrained")
        axes = figure.subplots()
        table = self.matrix()
        top = float(table.abs().max())
        image = axes.imshow(table.float().cpu().numpy(), cmap="RdBu_r", vmin=-top, vmax=top)
        axes.set(xlabel="read from block (0: embedding)", ylabel="after block", yticks=range(self.depth))
        axes.set_yticklabels([str(i) for i in range(1, self.depth + 1)])
        figure.colorbar(image, label="weight")
        return figure


EXAMPLE = Example(
    make=lambda: Backbone(DenseFormer),
    inputs=lambda: (torch.randn(2, 6, 8),),
    odd=lambda: (torch.randn(3, 7, 8),),
    axis=1,
    causal=True,
    modes={
        "dilated": lambda: Backbone(partial(DenseFormer, dilation=2)),
        "periodic": lambda: Backbone(partial(DenseFormer, period=2)),
    },
)
