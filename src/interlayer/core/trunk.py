"""The stack of blocks that all Transformers share, with its slots."""

from __future__ import annotations

import inspect
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from interlayer.catalog import nearest
from interlayer.core.mixer import Cache, Context
from interlayer.core.slots import factory, fill, norms
from interlayer.core.stream import State


class Block(nn.Module):
    """One mixer and one MLP; the stream joins them."""

    mixer: nn.Module
    mlp: nn.Module

    def __init__(self, mixer: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.mixer, self.mlp = mixer, mlp


class Trunk(nn.Module):
    """The stack of blocks that all Transformers here share: [B, S, D] to [B, S, D].

    Args:
        depth: Number of blocks.
        width: Features D.
        heads: Attention heads.
        length: Longest sequence.
        causal: Whether a token sees only earlier ones.
        kv_heads: Key-value heads, if fewer.
        hidden: Inner features of the MLP.
        stream: How sublayers are joined.
        norm: What the stream normalises with.
        mixer: What mixes tokens.
        mlp: What mixes channels.
        activation: Inside the MLP; the MLP's own default unless told.
        position: The position encoding. Defaults to rotary, where the mixer rotates its queries and keys.
        order: In which order the blocks run.
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
        sizes = {"depth": depth, "width": width, "heads": heads, "length": length, "branches": 2}
        line = factory("linear", linear)
        inner = {"activation": factory("activation", activation)} if activation else {}
        make_norm = norms("Transformer", norm, "features")
        self.stream = fill("stream", stream, norm=make_norm, kv_heads=kv_heads, **sizes)
        self.blocks = nn.ModuleList()
        for layer in range(0, 2 * depth, 2):
            attention = fill(
                "mixer", mixer, **sizes, kv_heads=kv_heads, causal=causal, linear=line, layer=layer,
                values=self.stream.value_layer(layer) == layer, norm=make_norm,
            )  # fmt: skip
            channels = fill("mlp", mlp, **sizes, hidden=hidden, linear=line, layer=layer, **inner)
            self.blocks.append(Block(attention, channels))
        self.position = fill("position", "rotary" if position is None else position, **sizes, head_width=width // heads)
        self.order = fill("order", order, causal=causal, **sizes)
        self.offers = getattr(self.blocks[0].mixer, "offers", None)
        asked = [("stream", self.stream), *([] if position is None else [("position", self.position)])]
        for slot, part in asked:
            if missing := part.needs - (self.offers or frozenset()):
                raise ValueError(
                    f"Transformer: {slot} {type(part).__name__} needs a mixer that offers {sorted(missing)}; "
                    f"{type(self.blocks[0].mixer).__name__} does not. Take mixer='attention' or another {slot}."
                )

    def forward(self, x: Float[Tensor, "B S D"], *, cache: Cache | None = None, mask: Tensor | None = None) -> Tensor:
        """Run the blocks."""
        stream = self.stream
        start = cache.length if cache is not None else 0
        if start + x.shape[1] > self.length:
            raise ValueError(
                f"Transformer: {start + x.shape[1]} tokens, but the model was built for length={self.length}; "
                "shorten the input or build it longer."
            )
        if cache is not None and ("cache" not in (self.offers or ()) or not getattr(self.order, "caches", True)):
            raise ValueError(
                f"Transformer: {type(self.blocks[0].mixer).__name__} in {type(self.order).__name__} order cannot use a cache."
            )
        state = stream.start(self.position.embed(x, start))
        memory: dict[str, Any] = {}

        def step(state: State, block: int) -> State:
            layer, here = 2 * block, cast(Block, self.blocks[block])
            context = Context(
                layer,
                self.position,
                cache,
                mask,
                lambda at, k, v: stream.share(state, at, k, v),
                stream.value_layer(layer),
                memory,
            )
            inputs = stream.read(state, layer)
            mixed = here.mixer(inputs, context) if self.offers is not None else here.mixer(inputs)
            state = stream.write(state, layer, mixed)
            return stream.write(state, layer + 1, here.mlp(stream.read(state, layer + 1)))

        x = stream.finish(self.order(state, step))
        if cache is not None:
            cache.length += x.shape[1]
        return x


def initialise(model: nn.Module) -> None:
    """GPT-2's start: normal with 0.02, biases zero. What a stream set itself stays."""
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
