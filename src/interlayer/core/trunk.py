"""The stack of blocks that all Transformers share, and its slots."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from interlayer.catalog import nearest
from interlayer.core.mixer import Cache, Context
from interlayer.core.slots import factory, fill, norms
from interlayer.core.stream import QKV, State


class Block(nn.Module):
    """One mixer and one MLP; the stream joins them."""

    mixer: nn.Module
    mlp: nn.Module

    def __init__(self, mixer: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.mixer, self.mlp = mixer, mlp


def offered(block: nn.Module) -> frozenset[str] | None:
    """What a block's mixer offers (see ``core.mixer.Attention``); None for one that is called with its input alone."""
    return getattr(block.mixer, "offers", None)


class Trunk(nn.Module):
    """The stack of blocks that all Transformers here share: [B, S, D] to [B, S, D].

    Args:
        depth: Number of blocks.
        width: Features D.
        heads: Attention heads.
        length: Longest sequence.
        causal: Whether a token sees only earlier ones.
        kv_heads: Key-value heads, if fewer.
        hidden: Hidden features of the MLP.
        grid: Shape of the positions, such as rows and columns of patches. Defaults to ``(length,)``.
        scale: Standard deviation of the embedded input at initialisation.
        stream: How sublayers are joined.
        norm: The norm of the stream.
        mixer: What mixes tokens; a list is gone through from block to block, again and again.
        mlp: What mixes channels.
        activation: The activation of the MLP. Defaults to the MLP's own.
        position: The position encoding. Defaults to rotary where mixer and order allow it, to none where the mixer has
            positions of its own, else to learned vectors.
        order: The order in which the blocks run.
        linear: Every linear map.
    """

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        heads: int,
        length: int,
        causal: bool,
        kv_heads: int | None = None,
        hidden: int | None = None,
        grid: tuple[int, ...] | None = None,
        scale: float = 0.02,
        stream: Any = "pre-norm",
        norm: Any = "layernorm",
        mixer: Any = "attention",
        mlp: Any = "mlp",
        activation: Any = None,
        position: Any = None,
        order: Any = "sequential",
        linear: Any = "linear",
    ) -> None:
        super().__init__()
        self.width, self.length = width, length
        sizes: dict[str, Any] = {"depth": depth, "width": width, "heads": heads, "length": length, "branches": 2}
        sizes |= {"causal": causal, "grid": grid or (length,)}
        line = factory("linear", linear)
        inner = {"activation": factory("activation", activation)} if activation else {}
        make_norm = norms("Transformer", norm, "features")
        self.stream = fill("stream", stream, norm=make_norm, kv_heads=kv_heads, **sizes)
        self.blocks = nn.ModuleList()
        mixers = mixer if isinstance(mixer, list | tuple) else [mixer]
        if not 0 < len(mixers) <= depth:
            raise ValueError(f"Transformer: {len(mixers)} mixers for {depth} blocks; expected one to {depth}.")
        for layer in range(0, 2 * depth, 2):
            attention = fill(
                "mixer", mixers[layer // 2 % len(mixers)], **sizes, kv_heads=kv_heads, linear=line, layer=layer,
                values=self.stream.projects(layer), norm=make_norm,
            )  # fmt: skip
            channels = fill("mlp", mlp, **sizes, hidden=hidden, linear=line, layer=layer, **inner)
            self.blocks.append(Block(attention, channels))
        each = [offered(block) for block in self.blocks]
        self.offers = frozenset.intersection(*(o or frozenset() for o in each))
        # A mixer with an order of its own needs no position encoding; in a mixture the position is for the others.
        placed = frozenset.intersection(*([o for o in each if o is not None and "order" not in o] or [self.offers]))
        self.order = fill("order", order, **sizes)
        rotary = "rotate" in placed and self.order.rotates
        default = "rotary" if rotary else "none" if all(o is None or "order" in o for o in each) else "learned"
        self.position = fill(
            "position", default if position is None else position, **sizes, head_width=width // heads, scale=scale
        )
        for slot, part, offers in (
            ("stream", self.stream, self.offers),
            ("position", self.position, placed),
            ("order", self.order, self.offers),
        ):
            if missing := part.needs - offers:
                lacks = next(b.mixer for b, o in zip(self.blocks, each, strict=True) if missing - (o or frozenset()))
                raise ValueError(
                    f"Transformer: {slot} {type(part).__name__} needs a mixer that offers {sorted(missing)}; "
                    f"{type(lacks).__name__} does not. Take mixer='attention' or another {slot}."
                )
        if not self.order.rotates and self.position.needs:
            raise ValueError(
                f"Transformer: order {type(self.order).__name__} changes the length between blocks, which position "
                f"{type(self.position).__name__} cannot follow. Take a position that acts on the input, such as 'sinusoidal'."
            )

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        *,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        answer: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Run the blocks. ``answer`` is how the model turns the output into logits, for orders that ask early."""
        stream, order = self.stream, self.order
        start = cache.length if cache is not None else 0
        if start + x.shape[1] > self.length:
            raise ValueError(
                f"Transformer: {start + x.shape[1]} tokens, but the model was built for length={self.length}; "
                "shorten the input or build it longer."
            )
        self.check(cache, mask)
        state = stream.start(self.position.embed(x, start))
        if answer is not None:
            state.answer = lambda at: answer(stream.finish(replace(at, kept=dict(at.kept))))
        kept: dict[str, Any] = {}
        last: list[Any] = []  # the state that the last block left, and its shape

        def step(state: State, block: int, source: Tensor | None = None) -> State:
            layer, here = 2 * block, cast(Block, self.blocks[block])
            context = Context(layer, self.position, cache, mask, lambda at, k, v: stream.share(state, at, k, v), kept)
            inputs = stream.read(state, layer)
            if source is not None:
                keys = stream.read(replace(state, x=source), layer)
                if isinstance(inputs, QKV) or isinstance(keys, QKV):
                    raise ValueError(
                        f"Transformer: {type(order).__name__} order and stream {type(stream).__name__} both set keys."
                    )
                inputs = QKV(inputs, keys, keys)
            if block == 0:
                kept.clear()  # the blocks begin anew
            elif kept and (last[0] is not state or last[1] != state.x.shape):
                raise ValueError(
                    f"Transformer: {type(here.mixer).__name__} keeps things for later blocks, but {type(order).__name__} order gives "
                    "them another sequence. Take order='sequential' or another mixer."
                )
            mixed = here.mixer(inputs, context) if offered(here) is not None else here.mixer(inputs)
            state = stream.write(state, layer, mixed)
            state = stream.write(state, layer + 1, here.mlp(stream.read(state, layer + 1)))
            last[:] = state, state.x.shape
            return state

        x = stream.finish(order(state, step))
        if cache is not None:
            cache.length += x.shape[1]
        return x

    def check(self, cache: Cache | None, mask: Tensor | None) -> None:
        """Raise if a part cannot use the cache or the mask that it would get."""
        order, position = self.order, self.position
        for slot, part, caches, masks in (
            *(("mixer", b.mixer, "cache" in (offered(b) or ()), offered(b) is not None) for b in self.blocks),
            ("order", order, order.caches, order.masks),
            ("position", position, position.caches, position.masks),
        ):
            if cache is not None and not caches:
                raise ValueError(
                    f"Transformer: {type(part).__name__} {slot} cannot use a cache; run the whole sequence."
                )
            if mask is not None and not masks:
                raise ValueError(
                    f"Transformer: {type(part).__name__} {slot} takes no padding mask; give sequences of one length."
                )


def initialise(model: nn.Module) -> None:
    """GPT-2 initialisation: normal(0, 0.02), zero biases. Parameters that a stream initialised itself are left alone."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def build_trunk(**options: Any) -> Trunk:
    """A ``Trunk`` with GPT-2's initial weights; an unknown option is one clear error."""
    try:
        trunk = Trunk(**options)
    except TypeError as error:
        names = [n for n in inspect.signature(Trunk.__init__).parameters if n != "self"]
        if wrong := [o for o in options if o not in names]:
            raise ValueError(
                f"Transformer: no slot or size {wrong[0]!r}.{nearest(wrong[0], names)} There are {names}."
            ) from error
        raise
    for block in trunk.blocks:
        initialise(block)
    return trunk
