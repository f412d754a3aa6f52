"""Transformer from one sequence to another, with slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interlayer.core.config import configured
from interlayer.core.mixer import Attention
from interlayer.core.position import Sinusoidal
from interlayer.core.slots import factory, fill, norms
from interlayer.core.stream import QKV


class Layer(nn.Module):
    """Self-attention, attention to the source where it decodes, and an MLP, each after a norm and added to its input."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        decodes: bool,
        norm: Callable[..., nn.Module],
        mlp: Any,
        linear: Any,
        **inner: Any,
    ) -> None:
        super().__init__()
        self.attend = Attention(width, heads, causal=decodes, linear=linear)
        self.cross = Attention(width, heads, linear=linear) if decodes else None
        self.mlp = fill("mlp", mlp, width=width, linear=linear, **inner)
        self.norms = nn.ModuleList(norm(width=width) for _ in range(3 if decodes else 2))

    def forward(
        self, x: Float[Tensor, "B S D"], memory: Float[Tensor, "B R D"] | None = None
    ) -> Float[Tensor, "B S D"]:
        """Mix the tokens, read the ``memory`` if there is one, mix the channels."""
        x = x + self.attend(self.norms[0](x))
        if self.cross is not None and memory is not None:
            x = x + self.cross(QKV(self.norms[1](x), memory, memory))
        return x + self.mlp(self.norms[-1](x))


@configured
class EncoderDecoder(nn.Module):
    """Encoder-decoder Transformer (Vaswani et al., arXiv:1706.03762) with pre-norm, sinusoidal positions and slots.

    Weights are normal with variance 1 / D at initialisation.

    The slot ``bridge`` says what each decoder layer reads of the source: a part from the states of all encoder layers, each
    after the encoder's final norm, to one set of states for each decoder layer. ``last``, the plain one, gives all of them the
    last layer's.

    Args:
        vocab: Number of token kinds V, of source and target.
        source: Longest source.
        length: Longest target.
        depth: Number of layers of the encoder, and of the decoder.
        width: Features D.
        heads: Attention heads.
        bridge: Called with those of ``width=, encoder_layers=, decoder_layers=`` that it names.
        norm: Every norm.
        mlp: What mixes channels.
        activation: The activation of the MLP. Defaults to the MLP's own.
        linear: Every linear map of the layers.

    Shapes: source tokens [B, R] and target tokens so far [B, S], both int64, to logits of the next [B, S, V].

    Raises:
        TypeError: Tokens that are not integers in two dimensions.
        ValueError: Unknown slot or name; a sequence that is too long.

    Examples:
        >>> model = EncoderDecoder(vocab=20, source=9, length=8, depth=2, width=16, heads=2, bridge="enc-dec-bridge(start='random')")
        >>> source, target = torch.zeros(3, 9, dtype=torch.long), torch.ones(3, 5, dtype=torch.long)
        >>> model(source, target).shape, model.generate(source, 4).shape
        (torch.Size([3, 5, 20]), torch.Size([3, 4]))
    """

    def __init__(
        self,
        vocab: int = 256,
        source: int = 128,
        length: int = 128,
        depth: int = 3,
        width: int = 64,
        heads: int = 4,
        *,
        bridge: Any = "last",
        norm: Any = "layernorm",
        mlp: Any = "mlp",
        activation: Any = None,
        linear: Any = "linear",
    ) -> None:
        super().__init__()
        self.vocab = vocab
        self.embed, self.head = nn.Embedding(vocab, width), nn.Linear(width, vocab, bias=False)
        self.positions = nn.ModuleList(Sinusoidal(width, n, scale=width**-0.5) for n in (source, length))
        make = norms("EncoderDecoder", norm, "features")
        inner = {"activation": factory("activation", activation)} if activation else {}
        parts = {"norm": make, "mlp": mlp, "linear": factory("linear", linear), **inner}
        self.encoder, self.decoder = (
            nn.ModuleList(Layer(width, heads, decodes=decodes, **parts) for _ in range(depth))
            for decodes in (False, True)
        )
        self.norms = nn.ModuleList((make(width=width), make(width=width)))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=width**-0.5)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.head.weight = self.embed.weight
        self.bridge = fill("bridge", bridge, width=width, encoder_layers=depth, decoder_layers=depth)

    def forward(self, source: Int[Tensor, "B R"], target: Int[Tensor, "B S"]) -> Float[Tensor, "B S V"]:
        """Logits of the token after each of the target's."""
        return self.decode(self.encode(source), target)

    def encode(self, source: Int[Tensor, "B R"]) -> Float[Tensor, "B M R D"]:
        """What each decoder layer reads of a source."""
        x, states = self._embedded(source, 0), []
        for layer in self.encoder:
            x = layer(x)
            states.append(x)
        return self.bridge(self.norms[0](torch.stack(states, 1)))

    def decode(self, memory: Float[Tensor, "B M R D"], target: Int[Tensor, "B S"]) -> Float[Tensor, "B S V"]:
        """Logits of the token after each of the target's, given what ``encode`` returned."""
        x = self._embedded(target, 1)
        for layer, read in zip(self.decoder, memory.unbind(1), strict=True):
            x = layer(x, read)
        return self.head(self.norms[1](x))

    @torch.no_grad()
    def generate(self, source: Int[Tensor, "B R"], count: int, *, start: int = 0) -> Int[Tensor, "B T"]:
        """``count`` tokens after the token ``start``, the likeliest each time."""
        memory, target = self.encode(source), source.new_full((len(source), 1), start)
        for _ in range(count):
            target = torch.cat([target, self.decode(memory, target)[:, -1:].argmax(-1)], 1)
        return target[:, 1:]

    def _embedded(self, tokens: Tensor, end: int) -> Tensor:
        which, position = ("source", "target")[end], self.positions[end]
        if tokens.dtype not in (torch.int64, torch.int32) or tokens.ndim != 2:
            raise TypeError(
                f"EncoderDecoder: {which} of {tokens.dtype} {tuple(tokens.shape)}; expected int64 [batch, sequence] below {self.vocab}."
            )
        assert isinstance(position, Sinusoidal)
        if tokens.shape[1] > len(position.table):
            raise ValueError(
                f"EncoderDecoder: {which} of {tokens.shape[1]} tokens, but the model was built for {len(position.table)}. "
                f"Shorten it, or build the model with a larger {('source', 'length')[end]}."
            )
        return position.embed(self.embed(tokens))
