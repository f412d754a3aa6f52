"""Transformers with slots: causal language model, encoder and vision."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interlayer.catalog import nearest
from interlayer.core.config import configured
from interlayer.core.mixer import Cache, Context
from interlayer.core.parts import Patches
from interlayer.core.position import Learned
from interlayer.core.slots import factory, fill
from interlayer.core.stream import State

SIZES = {
    "nano": {"depth": 6, "width": 128, "heads": 4},
    "micro": {"depth": 8, "width": 256, "heads": 8},
    "small": {"depth": 12, "width": 768, "heads": 12},
}


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
        position: What tells places apart.
        depth_order: The slot ``depth``: in which order the blocks run.
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
        position: Any = "rotary",
        depth_order: Any = "sequential",
        linear: Any = "linear",
    ) -> None:
        super().__init__()
        self.width, self.length = width, length
        sizes = {"depth": depth, "width": width, "heads": heads, "length": length, "branches": 2}
        line = factory("linear", linear)
        inner = {"activation": factory("activation", activation)} if activation else {}
        self.stream = fill("stream", stream, norm=factory("norm", norm), kv_heads=kv_heads, **sizes)
        self.blocks = nn.ModuleList()
        for layer in range(0, 2 * depth, 2):
            attention = fill(
                "mixer", mixer, **sizes, kv_heads=kv_heads, causal=causal, linear=line, layer=layer,
                values=self.stream.value_layer(layer) == layer, norm=factory("norm", norm),
            )  # fmt: skip
            channels = fill("mlp", mlp, **sizes, hidden=hidden, linear=line, layer=layer, **inner)
            self.blocks.append(Block(attention, channels))
        self.position = fill("position", position, **sizes, head_width=width // heads)
        self.order = fill("depth", depth_order, causal=causal, **sizes)
        self.offers = getattr(self.blocks[0].mixer, "offers", None)
        if missing := self.stream.needs - (self.offers or frozenset()):
            raise ValueError(
                f"Transformer: stream {type(self.stream).__name__} needs a mixer that offers {sorted(missing)}; "
                f"{type(self.blocks[0].mixer).__name__} does not. Take mixer='attention' or another stream."
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

        def step(state: State, block: int) -> State:
            layer, here = 2 * block, cast(Block, self.blocks[block])
            context = Context(
                layer,
                self.position,
                cache,
                mask,
                lambda at, k, v: stream.share(state, at, k, v),
                stream.value_layer(layer),
            )
            inputs = stream.read(state, layer)
            mixed = here.mixer(inputs, context) if self.offers is not None else here.mixer(inputs)
            state = stream.write(state, layer, mixed)
            return stream.write(state, layer + 1, here.mlp(stream.read(state, layer + 1)))

        x = stream.finish(self.order(state, step))
        if cache is not None:
            cache.length += x.shape[1]
        return x


def _tokens(model: nn.Module, tokens: Tensor, vocab: int) -> None:
    if tokens.dtype not in (torch.int64, torch.int32) or tokens.ndim != 2:
        raise TypeError(
            f"{type(model).__name__}: got {tokens.dtype} of shape {tuple(tokens.shape)}; wanted int64 [batch, sequence] below {vocab}."
        )


def _initialise(model: nn.Module) -> None:
    """GPT-2's start: normal with 0.02, biases zero. What a stream set itself stays."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


@configured
class Transformer(nn.Module):
    """Causal language model with slots: logits of the next token at every place.

    Args:
        vocab: Number of token kinds V.
        length: Longest sequence.
        depth: Number of blocks.
        width: Features D.
        heads: Attention heads.
        **slots: See ``Trunk``: ``stream``, ``norm``, ``mixer``, ``mlp``, ``activation``, ``position``, ``depth_order``,
            ``linear``, ``kv_heads``, ``hidden``.

    Shapes: tokens [B, S] of int64 to logits [B, S, V].

    Raises:
        TypeError: Tokens that are not whole numbers in two dimensions.
        ValueError: Unknown slot or name; a pair that cannot work together; a sequence longer than ``length``.

    Examples:
        >>> import torch
        >>> model = Transformer(vocab=50, length=16, depth=2, width=32, heads=2, stream="rezero")
        >>> model(torch.zeros(1, 7, dtype=torch.long)).shape
        torch.Size([1, 7, 50])
    """

    def __init__(
        self, vocab: int = 256, length: int = 128, depth: int = 6, width: int = 128, heads: int = 4, **slots: Any
    ) -> None:
        super().__init__()
        self.vocab = vocab
        self.embed = nn.Embedding(vocab, width)
        self.head = nn.Linear(width, vocab, bias=False)
        _initialise(self)
        self.trunk = build_trunk(depth=depth, width=width, heads=heads, length=length, causal=True, **slots)
        self.head.weight = self.embed.weight

    def forward(
        self, tokens: Int[Tensor, "B S"], *, cache: Cache | None = None, mask: Bool[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B S V"]:
        """Logits of the next token; with a ``cache``, of the tokens that it has not seen."""
        _tokens(self, tokens, self.vocab)
        return self.head(self.trunk(self.embed(tokens), cache=cache, mask=mask))

    @torch.no_grad()
    def generate(
        self,
        tokens: Int[Tensor, "B S"],
        count: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "B T"]:
        """Append ``count`` tokens, the likeliest each time, or sampled at a ``temperature`` above 0."""
        cache, new, out = Cache(), tokens, [tokens]
        for _ in range(count):
            logits = self(new, cache=cache)[:, -1]
            if temperature > 0:
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            else:
                new = logits.argmax(-1, keepdim=True)
            out.append(new)
        return torch.cat(out, 1)


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
        _initialise(block)
    return trunk


@configured
class Encoder(nn.Module):
    """Bidirectional Transformer over tokens: logits for each place, or for the whole sequence.

    Args:
        vocab: Number of token kinds.
        classes: Classes C of the whole sequence; 0 gives logits [B, S, vocab] at each place.
        length: Longest sequence.
        depth: Number of blocks.
        width: Features D.
        heads: Attention heads.
        **slots: As for ``Transformer``.

    Shapes: tokens [B, S] to [B, C] or [B, S, vocab].

    Examples:
        >>> import torch
        >>> Encoder(vocab=50, classes=3, length=16, depth=2, width=32, heads=2)(torch.zeros(4, 9, dtype=torch.long)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        vocab: int = 256,
        classes: int = 0,
        length: int = 128,
        depth: int = 6,
        width: int = 128,
        heads: int = 4,
        **slots: Any,
    ) -> None:
        super().__init__()
        self.vocab, self.classes = vocab, classes
        self.embed = nn.Embedding(vocab, width)
        self.head = nn.Linear(width, classes or vocab)
        _initialise(self)
        self.trunk = build_trunk(depth=depth, width=width, heads=heads, length=length, causal=False, **slots)

    def forward(self, tokens: Int[Tensor, "B S"], *, mask: Bool[Tensor, "B S"] | None = None) -> Tensor:
        """Logits; ``mask`` is True at real tokens."""
        _tokens(self, tokens, self.vocab)
        x = self.trunk(self.embed(tokens), mask=mask)
        if not self.classes:
            return self.head(x)
        if mask is None:
            return self.head(x.mean(1))
        weight = mask.unsqueeze(-1).to(x.dtype)
        return self.head((x * weight).sum(1) / weight.sum(1).clamp(min=1))


@configured
class VisionTransformer(nn.Module):
    """Vision Transformer (Dosovitskiy et al., arXiv:2010.11929) with mean pooling and slots.

    Args:
        channels: Channels C of the image.
        image: Height and width in pixels, or one number.
        patch: Side of a patch in pixels; divides both.
        classes: Number of classes K.
        depth: Number of blocks.
        width: Features D.
        heads: Attention heads.
        **slots: As for ``Transformer``.

    Shapes: [B, C, H, W] to [B, K].

    Examples:
        >>> import torch
        >>> VisionTransformer(1, 8, patch=2, classes=10, depth=2, width=32, heads=2)(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    def __init__(
        self,
        channels: int = 3,
        image: int | tuple[int, int] = 32,
        *,
        patch: int = 4,
        classes: int = 10,
        depth: int = 6,
        width: int = 128,
        heads: int = 4,
        **slots: Any,
    ) -> None:
        super().__init__()
        self.patches = Patches(channels, image, patch, width)
        self.head = nn.Linear(width, classes)
        _initialise(self.head)
        slots = {"position": Learned, **slots}
        self.trunk = build_trunk(
            depth=depth, width=width, heads=heads, length=self.patches.count, causal=False, **slots
        )

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        return self.head(self.trunk(self.patches(image)).mean(1))
