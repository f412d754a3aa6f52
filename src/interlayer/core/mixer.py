"""Token mixers: attention, the context that a mixer gets, and the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from interlayer.core.parts import Linear, plain_linear
from interlayer.core.position import Position
from interlayer.core.stream import QKV


class Cache:
    """What sublayers keep of the tokens seen so far: keys and values in growing buffers, and states of a fixed size.

    Buffers double when they are full, so n tokens cost O(n) copies in all. What several sublayers use is stored once.
    ``states`` holds by sublayer what a recurrence carries (``core.recurrent``).

    Raises:
        ValueError: What is stored does not fit the model or batch that uses it.
    """

    def __init__(self) -> None:
        self.length = 0
        self.buffers: dict[tuple[str, int], Tensor] = {}
        self.states: dict[int, Any] = {}
        self.step: tuple[int, dict[int, tuple[Tensor, tuple[str, int]]]] = (0, {})  # what was stored at which length

    def extend(self, part: str, layer: int, new: Tensor) -> Tensor:
        """Append ``new`` [B, H, S, K] after the ``length`` tokens there are, and return all of them.

        A tensor that another sublayer has stored in this step, because the stream shares it, is read from there.
        """
        if self.step[0] != self.length:
            self.step = (self.length, {})
        _, owner = self.step[1].setdefault(id(new), (new, (part, layer)))
        end = self.length + new.shape[-2]
        if owner != (part, layer):
            return self.buffers[owner][..., :end, :]
        old = self.buffers.get(owner)
        if old is None and self.length:
            raise self._strange(f"no {part} of sublayer {layer}")
        if old is not None and (*old.shape[:-2], old.shape[-1]) != (*new.shape[:-2], new.shape[-1]):
            raise self._strange(f"{part} of sublayer {layer} {tuple(old.shape)} for {tuple(new.shape)}")
        if old is None or old.shape[-2] < end:
            grown = new.new_empty(*new.shape[:-2], max(2 * self.length, end, 16), new.shape[-1])
            if old is not None:
                grown[..., : self.length, :] = old[..., : self.length, :]
            self.buffers[owner] = old = grown
        old[..., self.length : end, :] = new
        return old[..., :end, :]

    def state(self, layer: int, first: Any) -> Any:
        """The state that a sublayer left, or ``first`` before the first token."""
        if not self.length:
            return first
        if layer not in self.states:
            raise self._strange(f"no state of sublayer {layer}")
        found, wanted = ([tuple(t.shape) for t in tree_leaves(s)] for s in (self.states[layer], first))
        if found != wanted:
            raise self._strange(f"a state of sublayer {layer} of shapes {found} for {wanted}")
        return self.states[layer]

    def _strange(self, what: str) -> ValueError:
        return ValueError(
            f"Cache: {self.length} tokens are stored, but {what}; it belongs to another model or batch. Begin with a new Cache()."
        )

    @property
    def bytes(self) -> int:
        """Bytes that the stored tokens and states take (not the spare room of the buffers)."""
        kept = [*(b[..., : self.length, :] for b in self.buffers.values()), *tree_leaves(self.states)]
        return sum(t.bytes if isinstance(t, Cache) else t.numel() * t.element_size() for t in kept)


@dataclass
class Context:
    """What a mixer may use of the pass that it is part of.

    Attributes:
        layer: Number of the sublayer.
        position: The position encoding, if it acts inside the mixer.
        cache: What sublayers keep of earlier tokens, if decoding.
        mask: [B, S] with True at real tokens, if there is padding.
        share: How the stream changes keys and values: ``(layer, k, v) -> (k, v)``.
        kept: Whatever mixers keep in this pass for those of later sublayers.
    """

    layer: int = 0
    position: Position | None = None
    cache: Cache | None = None
    mask: Tensor | None = None
    share: Callable[[int, Tensor, Tensor | None], tuple[Tensor, Tensor]] | None = None
    kept: dict[str, Any] = field(default_factory=dict)


class Attention(nn.Module):
    """Scaled dot-product attention with any number of key-value heads (Vaswani et al., arXiv:1706.03762; grouped
    queries: Ainslie et al., arXiv:2305.13245).

    Args:
        width: Features D.
        heads: Query heads H; ``width`` is a multiple of it.
        kv_heads: Key-value heads; ``heads`` is a multiple of it. Defaults to ``heads``.
        causal: Whether a token sees only itself and earlier ones.
        values: Whether this sublayer projects values of its own; if not, the stream's ``share`` gives them.
        linear: Called with ``inputs=, outputs=``.

    Shapes: [B, S, D] to [B, S, D].

    ``offers`` names what a mixer does for other parts: ``"qkv"`` separate inputs, ``"share"`` keys and values that a stream
    changes, ``"cache"`` decoding, ``"bias"`` a position's bias of the scores, ``"rotate"`` its rotation, ``"order"`` positions
    of its own. One without ``offers`` is called with the input alone.
    """

    offers: ClassVar[frozenset[str]] = frozenset({"qkv", "share", "cache", "bias", "rotate"})

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        causal: bool = False,
        values: bool = True,
        linear: Linear = plain_linear,
    ) -> None:
        super().__init__()
        kv_heads = kv_heads or heads
        if width % heads or heads % kv_heads:
            raise ValueError(
                f"Attention: width {width} must be a multiple of heads {heads}, and heads of kv_heads {kv_heads}."
            )
        self.heads, self.kv_heads, self.causal, self.head_width = heads, kv_heads, causal, width // heads
        kv = kv_heads * self.head_width
        self.sizes = [width, kv, kv] if values else [width, kv]
        self.qkv = linear(inputs=width, outputs=sum(self.sizes))
        self.out = linear(inputs=width, outputs=width)
        self.attend: nn.Module | None = None  # what computes attention in place of ``attend``, such as rounded products

    def project(self, x: Tensor | QKV) -> list[Tensor]:
        """Queries, keys and (where it has its own) values as [B, heads, S, K]."""
        if not isinstance(x, QKV):
            parts = list(self.qkv(x).split(self.sizes, -1))
        elif type(self.qkv) is nn.Linear:  # each input meets only its own rows of the fused weight
            weights = self.qkv.weight.split(self.sizes)
            biases = self.qkv.bias.split(self.sizes) if self.qkv.bias is not None else [None] * len(weights)
            parts = [F.linear(*one) for one in zip(x, weights, biases, strict=False)]
        else:
            parts = [self.qkv(part).split(self.sizes, -1)[i] for i, part in enumerate(x[: len(self.sizes)])]
        return [p.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for p in parts]

    def forward(self, x: Float[Tensor, "B S D"] | QKV, context: Context | None = None) -> Float[Tensor, "B S D"]:
        """Let every token read from the others."""
        context = context or Context()
        cache, offset = context.cache, context.cache.length if context.cache else 0
        q, k, *own = self.project(x)
        v = own[0] if own else None
        q, k = self.place(q, k, context.position, offset)
        if context.share is not None:
            k, v = context.share(context.layer, k, v)
        assert v is not None
        if cache is not None:
            k, v = cache.extend("k", context.layer, k), cache.extend("v", context.layer, v)
        return self.out(self.read(q, k, v, context).transpose(1, 2).flatten(2))

    def place(self, q: Tensor, k: Tensor, position: Position | None, offset: int) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys before they are cached; a mixer that needs them as they are rotates in ``read``."""
        return (q, k) if position is None else position.rotate(q, k, offset)

    def read(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """What each head reads, [B, H, new, K], with the position's bias."""
        bias = None if context.position is None else context.position.bias(q.shape[-2], k.shape[-2])
        if bias is None:
            return self.mix(q, k, v, context.mask)
        return (self.attend or attend)(q, k, v, causal=self.causal, mask=context.mask, bias=bias)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """What each head reads, [B, H, new, K], without a bias. Another kind of attention may override this alone.

        One that cannot add a position's bias to the scores does not offer ``"bias"``.
        """
        return (self.attend or attend)(q, k, v, causal=self.causal, mask=mask)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    mask: Tensor | None = None,
    scale: float | None = None,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``softmax(q k' * scale + bias) v`` with the causal mask placed at the end of the keys, and padding left out.

    Args:
        q: [B, H, new, K].
        k: [B, H, total, K].
        v: [B, H, total, K].
        causal: Whether a query sees only its own key and earlier ones.
        mask: [B, total], True at real tokens.
        scale: Factor of the scores. Defaults to ``K^-0.5``.
        allowed: Pairs that may meet, broadcast to [B, H, new, total]. Defaults to all.
        bias: Added to the scores, broadcast to [B, H, new, total].
    """
    new, all_ = q.shape[-2], k.shape[-2]
    if causal and new > 1 and new == all_ and mask is None and allowed is None and bias is None:
        met, fused = None, True  # torch.jit.trace gives sizes as tensors
    else:
        met, fused = meetings(q, k, causal=causal, mask=mask, allowed=allowed, bias=bias), False
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=met,
        is_causal=fused,
        scale=scale,
        enable_gqa=bool(q.shape[1] != k.shape[1]),
    )


def meetings(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool,
    mask: Tensor | None = None,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor | None:
    """Which queries meet which keys: a mask of bool, or scores to add; None if all meet. Arguments are those of ``attend``."""
    new, all_ = q.shape[-2], k.shape[-2]
    if causal and new > 1:
        past = torch.ones(new, all_, dtype=torch.bool, device=q.device).tril(all_ - new)
        allowed = past if allowed is None else past & allowed
    if mask is not None:
        if mask.shape != (q.shape[0], all_) or mask.dtype != torch.bool:
            raise ValueError(
                f"attention: mask {tuple(mask.shape)} {mask.dtype}; expected bool {(q.shape[0], all_)}, True at real tokens."
            )
        allowed = mask[:, None, None] if allowed is None else mask[:, None, None] & allowed
    if bias is not None:
        bias = bias.to(q.dtype)
        allowed = bias if allowed is None else torch.where(allowed, bias, -torch.inf)
    return allowed
