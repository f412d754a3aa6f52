"""Sparse attention with external global nodes, which are no tokens and pass from block to block."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.mixer import Attention, Context
from interlayer.core.parts import Linear, plain_linear
from interlayer.core.stream import QKV
from interlayer.layers.mixing.x_formers.refusals import refuse_causal, refuse_mask
from interlayer.layers.mixing.x_formers.sparse import SlidingWindow


class Star(Attention):
    """Tokens form a ring around one relay node (Star-Transformer; Guo et al., arXiv:1902.09113, section 3).

    A token reads ``[h_{i-1}, h_i, h_{i+1}, e_i, s]``: its neighbours on the ring, its embedding e and the relay s. Then the
    relay reads the tokens: ``s <- LayerNorm(ReLU(Attention(s, [s, H])))``; it begins as the mean of the embeddings. The
    stream joins tokens; a block's relay is brought up to date when the next block begins.

    6 S scores a head.

    Args:
        width: Features D.
        heads: Query heads.
        layer: Number of the sublayer; the first has no relay to update.
        causal: Whether a token sees only earlier ones.
        linear: Called with ``inputs=, outputs=``.

    Raises:
        ValueError: A causal model, or padding.

    Examples:
        >>> Star(8, heads=2)(torch.randn(1, 9, 8)).shape
        torch.Size([1, 9, 8])
    """

    offers: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self, width: int, heads: int, *, layer: int = 0, causal: bool = False, linear: Linear = plain_linear
    ) -> None:
        super().__init__(width, heads, causal=causal, linear=linear)
        refuse_causal(self)
        self.relay = Attention(width, heads, linear=linear) if layer else None
        self.norm = nn.LayerNorm(width) if layer else nn.Identity()

    def forward(self, x: Float[Tensor, "B S D"] | QKV, context: Context | None = None) -> Float[Tensor, "B S D"]:
        """Let every token read from its neighbours and from the relay."""
        assert isinstance(x, Tensor)
        context = context or Context()
        refuse_mask(self, context.mask)
        if self.relay is None or "star" not in context.kept:
            embedded, s = x, x.mean(1, keepdim=True)
        else:
            embedded, s = context.kept["star"]
            both = torch.cat((s, x), 1)
            s = self.norm(F.relu(self.relay(QKV(s, both, both))))
        context.kept["star"] = embedded, s
        q, k, v = self.project(torch.cat((x, embedded, s), 1))
        length = x.shape[1]
        keys, values = (
            torch.stack(
                (h.roll(1, 2), h, h.roll(-1, 2), t[:, :, length:-1], t[:, :, -1:].expand_as(h)), 3
            )
            for t, h in ((k, k[:, :, :length]), (v, v[:, :, :length]))
        )  # fmt: skip
        y = F.scaled_dot_product_attention(q[:, :, :length, None], keys, values)[:, :, :, 0]
        return self.out(y.transpose(1, 2).flatten(2))


class ExternalNodes(SlidingWindow):
    """A window, and global nodes beside the tokens (ETC; Ainslie et al., arXiv:2004.08483, section 3).

    Tokens read the tokens of their window and all global nodes; the nodes read everything, with projections of their own:
    ``g <- LayerNorm(g + Attention(g, [g, x]))``. They begin as learned vectors.

    S (3 window + nodes) scores a head.

    Args:
        width: Features D.
        heads: Query heads.
        window: Positions.
        nodes: Global nodes.
        layer: Number of the sublayer; the first holds the vectors that nodes begin with.
        depth: Number of blocks; the last need not update the nodes.
        branches: Sublayers in a block.
        linear: Called with ``inputs=, outputs=``.
        **options: As for ``SlidingWindow``.

    Raises:
        ValueError: A causal model: the nodes see all tokens.

    Examples:
        >>> ExternalNodes(8, heads=2, window=3)(torch.randn(1, 9, 8)).shape
        torch.Size([1, 9, 8])
    """

    offers: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        window: int = 64,
        nodes: int = 4,
        layer: int = 0,
        depth: int = 1,
        branches: int = 2,
        linear: Linear = plain_linear,
        **options: Any,
    ) -> None:
        super().__init__(width, heads, window=window, linear=linear, **options)
        refuse_causal(self)
        last = layer + branches >= depth * branches
        self.nodes = None if layer else nn.Parameter(0.02 * torch.randn(nodes, width))
        self.update = None if last else Attention(width, heads, kv_heads=self.kv_heads, linear=linear)
        self.norm = nn.Identity() if last else nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "B S D"] | QKV, context: Context | None = None) -> Float[Tensor, "B S D"]:
        """Let every token read from its window and from the nodes."""
        assert isinstance(x, Tensor)
        context = context or Context()
        mask = context.mask
        if self.nodes is not None:
            g = self.nodes.to(x.dtype).expand(x.shape[0], -1, -1)
        elif "nodes" in context.kept:
            g = context.kept["nodes"]
        else:
            raise ValueError("ExternalNodes: the first block holds the nodes; run it before this one.")
        q, k, v = self.project(x)
        _, node_k, node_v = (t.repeat_interleave(self.heads // t.shape[1], 1) for t in self.project(g))
        y = self.gathered(q, k, v, mask, (node_k, node_v))
        if self.update is not None:
            both = torch.cat((g, x), 1)
            seen = None if mask is None else F.pad(mask, (g.shape[1], 0), value=True)
            g = self.norm(g + self.update(QKV(g, both, both), Context(mask=seen)))
        context.kept["nodes"] = g
        return self.out(y.transpose(1, 2).flatten(2))
