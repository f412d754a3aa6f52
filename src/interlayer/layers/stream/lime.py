"""Layer-integrated memory: attention over a learned mixture of the keys and values of all layers so far."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from interlayer.core.example import Backbone, Example
from interlayer.core.stream import Norm, PreNorm, State, Width


class LIMe(PreNorm):
    """Each key-value head of a layer attends to its own learned mixture of all heads of all layers up to this one.

    Paper: Gerasimov et al., "You Do Not Fully Utilize Transformer's Representation Capacity", arXiv:2502.09245.

    Equation: ``[K'_{l,h}, V'_{l,h}] = sum_{j <= l} sum_g R^l_{h,(j,g)} [K_{j,g}, V_{j,g}]``, the same router R for keys and
    values, for every layer l but the first; then ordinary attention. By default ``R^l_{h,(j,g)} = [j = l][g = h]`` at
    initialisation, which is the plain Transformer. The authors' code draws the weights on earlier layers from the uniform
    distribution within ``sqrt(3 / (l H))`` (``init="random"``) and trains routers at a learning rate of 0.01, ten times
    that of the other weights (``rate=10``).

    Rotary positions are linear and the same in all layers, so that keys can be mixed before or after them. The cache holds
    the mixture instead of the layer's own keys and values, at the same size. A pass keeps the states of its own tokens only.
    With H key-value heads of K features and L layers, mixing costs 2 H^2 K multiply-adds for each token, layer and source,
    L^2 H^2 K for each token in all.

    Args:
        depth: Number of blocks.
        width: Features D.
        heads: Query heads.
        kv_heads: Key-value heads H, if fewer.
        branches: Sublayers in a block; the first one is the attention.
        norm: Called with ``width=``.
        init: ``identity``, or ``random`` weights on earlier layers.
        rate: Learning rate of the routers relative to the other weights'. The parameters hold ``R / rate``, so it holds
            for optimisers whose steps do not depend on the scale of the gradient (Adam), without weight decay.

    Shapes: keys and values [B, H, S, K], equal in all layers; needs a mixer that offers ``share``.

    Raises:
        ValueError: No heads, or keys with another number of heads; an unknown ``init``, a ``rate`` that is not positive; blocks
            that run out of order.

    Examples:
        >>> import torch
        >>> from interlayer.models import Transformer
        >>> model = Transformer(vocab=50, length=16, depth=3, width=32, heads=4, kv_heads=2, stream="lime")
        >>> [tuple(r.shape) for r in model.trunk.stream.router]  # heads, and heads of all layers so far
        [(2, 4), (2, 6)]
    """

    needs = frozenset({"share"})

    def __init__(
        self,
        depth: int,
        width: Width,
        heads: int = 0,
        *,
        kv_heads: int | None = None,
        branches: int = 2,
        norm: Norm | None = None,
        init: str = "identity",
        rate: float = 1.0,
    ) -> None:
        super().__init__(depth, width, branches=branches, norm=norm)
        if heads < 1:
            raise ValueError(f"LIMe: heads {heads}; it needs attention and at least one head.")
        if init not in ("identity", "random") or rate <= 0:
            raise ValueError(
                f"LIMe: init {init!r} and rate {rate}; expected 'identity' or 'random', and a positive rate."
            )
        self.heads, self.rate = kv_heads or heads, rate
        self.router = nn.ParameterList()
        for block in range(1, depth):
            earlier = torch.zeros(self.heads, block * self.heads)
            if init == "random":
                bound = (3 / ((block + 1) * self.heads)) ** 0.5
                earlier.uniform_(-bound, bound)
            self.router.append(torch.cat((earlier, torch.eye(self.heads)), 1) / rate)

    def share(self, state: State, layer: int, k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
        assert v is not None
        if k.shape[1] != self.heads or k.shape != v.shape:
            raise ValueError(
                f"LIMe: keys {tuple(k.shape)} and values {tuple(v.shape)}; expected equal shapes [batch, {self.heads}, ...]: "
                "give the mixer's heads (or kv_heads)."
            )
        block = layer // self.branches
        state.kept[block] = torch.cat((k, v), -1).flatten(2)
        if block == 0:
            return k, v
        if missing := [j for j in range(block) if j not in state.kept]:
            raise ValueError(
                f"LIMe: block {block} runs before block {missing[0]}, whose keys and values it reads. "
                "Take order='sequential'."
            )
        # One product for each source is faster than one over all: nothing is copied or kept twice.
        parts_HH = (self.rate * self.router[block - 1]).split(self.heads, 1)
        first, *rest = (part.expand(k.shape[0], -1, -1) for part in parts_HH)
        mixed_BHX = torch.bmm(first, state.kept[0])
        for j, part in enumerate(rest, start=1):
            mixed_BHX = torch.baddbmm(mixed_BHX, part, state.kept[j])
        mixed_k, mixed_v = mixed_BHX.unflatten(-1, (-1, 2 * k.shape[-1])).chunk(2, -1)
        return mixed_k, mixed_v


EXAMPLE = Example(
    make=lambda: Backbone(lambda depth, width, branches: LIMe(depth, width, 2, branches=branches)),
    inputs=lambda: (torch.randn(2, 6, 8),),
    odd=lambda: (torch.randn(3, 7, 8),),
    axis=1,
    causal=True,
)
