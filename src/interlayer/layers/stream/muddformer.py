"""MUDDFormer: what a block reads as query, key, value and residual is mixed from all earlier blocks, position by position."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.example import Backbone, Example
from interlayer.core.parts import FeedForward, Linear, plain_linear
from interlayer.core.stream import QKV, Norm, State, layernorm
from interlayer.layers.stream.denseformer import DenseFormer

WAYS = "qkvr"


class DynamicWeights(nn.Module):
    """Connection weights of every position from its hidden state: ``GELU(RMSNorm(x) W_1) W_2``, zero at initialisation.

    Args:
        width: Features D of the hidden state.
        ways: Number of ways C.
        sources: Outputs N that each way reads.
        hidden: Hidden features.

    Shapes: [B, S, D] to [B, S, C, N].
    """

    def __init__(self, width: int, ways: int, sources: int, hidden: int) -> None:
        super().__init__()
        self.ways, self.sources = ways, sources
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, ways * sources, bias=False)
        nn.init.normal_(self.up.weight, std=width**-0.5)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B C N"]:
        """The weights, without their static part."""
        hidden = F.gelu(self.up(F.rms_norm(x, x.shape[-1:], eps=1e-6)))
        return self.down(hidden).unflatten(-1, (self.ways, self.sources))


class MUDDFormer(DenseFormer):
    """After a block, four averages over all earlier outputs become the next one's query, key, value and residual inputs.

    Paper: Xiao et al., "MUDDFormer: Breaking Residual Bottlenecks in Transformers via Multiway Dynamic Dense
    Connections", arXiv:2502.12170.

    Equation: ``Y_i^c = sum_{j <= i} (a_{ij}^c + A_{ij}^c(X_i)) X_j`` for each way c of q, k, v, r, where ``X_0`` is the
    embedded input and ``A_i(x) = GELU(RMSNorm(x) W_1) W_2`` has one weight for each position, way and source. The next
    block computes ``h = Y^r + attention(norm(Y^q), norm(Y^k), norm(Y^v))``, ``X_{i+1} = h + MLP(norm(h))``. At initialisation
    ``W_2 = 0`` and ``a_{ij} = [i = j]``, which is the plain pre-norm Transformer. After the last block there is only one way.

    As in the authors' code are the 4 (i + 1) hidden features of ``A_i`` (there rounded up to multiples of 64 for accelerators),
    the initialisation, separate norms for q, k and v, and the norm without gain before ``W_1``. Dilation and period are
    DenseFormer's; the authors' code has none. Their norms around the averages, for very deep models, are left out.

    An average over n outputs costs 4 n multiply-adds for each feature and its weights 4 n (D + 4 n) for each position,
    2 depth^2 / (k p) multiply-adds a feature in all at dilation k and period p. The backward pass keeps the four averages of
    a block and the outputs that they read, each once. Weights depend on their own position alone, so that a key-value cache
    does not grow.

    Args:
        depth: Number of blocks.
        width: Features D.
        branches: Sublayers in a block; the first one is the attention.
        norm: Called with ``width=``.
        dilation: k, in blocks.
        period: p, in blocks.

    Shapes: [B, S, D]; needs a mixer that takes separate inputs for q, k and v.

    Raises:
        ValueError: ``dilation`` or ``period`` below 1; several widths; blocks that run twice or out of order.

    Examples:
        >>> import torch
        >>> from interlayer.models import Transformer
        >>> model = Transformer(vocab=50, length=16, depth=4, width=32, heads=2, stream="muddformer", mlp=widening)
        >>> model(torch.zeros(1, 7, dtype=torch.long)).shape
        torch.Size([1, 7, 50])
        >>> [tuple(a.shape) for a in model.trunk.stream.alpha.values()]  # ways, and outputs that each one reads
        [(4, 2), (4, 3), (4, 4), (1, 5)]
        >>> [block.mlp.up.out_features for block in model.trunk.blocks]
        [64, 128, 128, 192]
    """

    needs = frozenset({"qkv"})

    def __init__(
        self,
        depth: int,
        width: int,
        *,
        branches: int = 2,
        norm: Norm | None = None,
        dilation: int = 1,
        period: int = 1,
    ) -> None:
        if not isinstance(width, int):
            raise ValueError(f"MUDDFormer: widths {width}; it needs attention and blocks of one width.")
        super().__init__(depth, width, branches=branches, norm=norm, dilation=dilation, period=period)
        norm = norm or layernorm
        self.dynamic, self.kv_norms = nn.ModuleDict(), nn.ModuleDict()
        for i, alpha in list(self.alpha.items()):
            ways, n = 1 if int(i) == depth else 4, len(alpha)
            self.alpha[i] = alpha.detach().repeat(ways, 1)
            self.dynamic[i] = DynamicWeights(width, ways, n, hidden=4 * n)
            if ways > 1:
                self.kv_norms[str(int(i) * branches)] = nn.ModuleList([norm(width=width), norm(width=width)])

    def read(self, state: State, layer: int) -> Tensor | QKV:
        if str(layer) not in self.kv_norms:
            return self.norms[layer](state.x)
        q, k, v, state.x = state.x.unbind(-2)
        k_norm, v_norm = cast(nn.ModuleList, self.kv_norms[str(layer)])
        return QKV(self.norms[layer](q), k_norm(k), v_norm(v))

    def average(self, state: State, i: int) -> Tensor:
        """All ways, [B, S, 4, D], which the next block reads; after the last block [B, S, D]."""
        weight_BSCN = self.dynamic[str(i)](state.x) + self.alpha[str(i)]
        sources = [*(state.kept[j] for j in self.sources[i]), state.x]
        average = mixture if torch.compiler.is_compiling() else Mixture.apply  # a compiler knows what to keep
        y_BSCD = average(weight_BSCN.to(state.x.dtype), *sources)
        return y_BSCD if i < self.depth else y_BSCD.squeeze(-2)

    @torch.no_grad()
    def matrix(self, way: str = "r") -> Tensor:
        """The static weights of one of the ways q, k, v, r, laid out as ``DenseFormer.matrix``; the last block has only r."""
        at = WAYS.index(way) - len(WAYS)
        table = next(self.parameters()).new_zeros(self.depth, self.depth + 1)
        for i in range(1, self.depth + 1):
            row = self.alpha[str(i)] if i in self.sources else table.new_ones(4, 1)
            if len(row) >= -at:
                table[i - 1, [*self.sources.get(i, []), i]] = row[at]
        return table


def mixture(weight_BSCN: Tensor, *sources_BSD: Tensor) -> Tensor:
    """Weighted sums of N sources, C of them for each position."""
    return weight_BSCN @ torch.stack(sources_BSD, -2)


class Mixture(torch.autograd.Function):
    """``mixture`` that keeps its sources, not their stack, which over all blocks would be depth^2 / 2 outputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight_BSCN: Tensor, *sources_BSD: Tensor) -> Tensor:
        return mixture(weight_BSCN, *sources_BSD)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy_BSCD: Tensor) -> tuple[Tensor, ...]:
        weight_BSCN, *sources_BSD = ctx.saved_tensors
        dy_BSCD = dy_BSCD.to(weight_BSCN.dtype)
        dweight = dy_BSCD @ torch.stack(sources_BSD, -2).transpose(-1, -2)
        return dweight, *(weight_BSCN.transpose(-1, -2) @ dy_BSCD).unbind(-2)

    @staticmethod
    def jvp(ctx: Any, tweight_BSCN: Tensor, *tsources_BSD: Tensor) -> Tensor:
        weight_BSCN, *sources_BSD = ctx.saved_tensors
        return mixture(tweight_BSCN, *sources_BSD) + mixture(weight_BSCN, *tsources_BSD)


def widening(
    width: int,
    depth: int,
    layer: int,
    *,
    branches: int = 2,
    hidden: int | None = None,
    multiple: int | None = None,
    activation: Callable[[], nn.Module] = nn.GELU,
    linear: Linear = plain_linear,
    mlp: Callable[..., nn.Module] = FeedForward,
) -> nn.Module:
    """MLPs that widen with depth at equal total parameters; for the slot ``mlp``, meant for MUDDFormer.

    Equation: block i of L has ``hidden (i / (L - 1) + 1/2)`` hidden features, i from 0, rounded to a multiple of 128 in the
    authors' code: one half of ``hidden`` in the first block, three halves in the last.

    Args:
        width: Features D.
        depth: Number of blocks L.
        layer: Number of the sublayer.
        branches: Sublayers in a block.
        hidden: Hidden features in the middle. Defaults to 4 D.
        multiple: Hidden features are a multiple of this. Defaults to ``min(128, hidden // 2)``.
        activation: Called without arguments.
        linear: Called with ``inputs=, outputs=``.
        mlp: What is built, with ``hidden=``.

    Raises:
        ValueError: ``multiple`` below 1.
    """
    hidden = hidden or 4 * width
    multiple = min(128, hidden // 2) if multiple is None else multiple
    if multiple < 1:
        raise ValueError(f"widening: multiple {multiple} must be at least 1.")
    share = layer // branches / (depth - 1) if depth > 1 else 0.5
    hidden = max(round(hidden * (share + 0.5) / multiple), 1) * multiple
    return mlp(width, hidden=hidden, activation=activation, linear=linear)


EXAMPLE = Example(
    make=lambda: Backbone(MUDDFormer),
    inputs=lambda: (torch.randn(2, 6, 8),),
    odd=lambda: (torch.randn(3, 7, 8),),
    axis=1,
    causal=True,
    modes={
        "dilated": lambda: Backbone(partial(MUDDFormer, dilation=2)),
        "periodic": lambda: Backbone(partial(MUDDFormer, period=2)),
    },
)
