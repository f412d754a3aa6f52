"""Transformers with slots: causal language model, encoder and vision."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interlayer.core.config import configured
from interlayer.core.mixer import Cache
from interlayer.core.parts import Patches
from interlayer.core.position import Learned
from interlayer.core.trunk import build_trunk, initialise

SIZES = {
    "nano": {"depth": 6, "width": 128, "heads": 4},
    "micro": {"depth": 8, "width": 256, "heads": 8},
    "small": {"depth": 12, "width": 768, "heads": 12},
}


def _tokens(model: nn.Module, tokens: Tensor, vocab: int) -> None:
    if tokens.dtype not in (torch.int64, torch.int32) or tokens.ndim != 2:
        raise TypeError(
            f"{type(model).__name__}: got {tokens.dtype} of shape {tuple(tokens.shape)}; expected int64 [batch, sequence] below {vocab}."
        )


@configured
class Transformer(nn.Module):
    """Causal language model with slots: logits of the next token at every position.

    Args:
        vocab: Number of token kinds V.
        length: Longest sequence.
        depth: Number of blocks.
        width: Features D.
        heads: Attention heads.
        **slots: See ``Trunk``: ``stream``, ``norm``, ``mixer``, ``mlp``, ``activation``, ``position``, ``order``,
            ``linear``, ``kv_heads``, ``hidden``.

    Shapes: tokens [B, S] of int64 to logits [B, S, V].

    Raises:
        TypeError: Tokens that are not integers in two dimensions.
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
        initialise(self)
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


@configured
class Encoder(nn.Module):
    """Bidirectional Transformer over tokens: logits for each position, or for the whole sequence.

    Args:
        vocab: Number of token kinds.
        classes: Classes C of the whole sequence; 0 gives logits [B, S, vocab] at each position.
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
        initialise(self)
        self.trunk = build_trunk(depth=depth, width=width, heads=heads, length=length, causal=False, **slots)

    def forward(self, tokens: Int[Tensor, "B S"], *, mask: Bool[Tensor, "B S"] | None = None) -> Tensor:
        """Logits; ``mask`` is True at real tokens."""
        _tokens(self, tokens, self.vocab)

        def answer(x: Tensor) -> Tensor:
            if not self.classes:
                return self.head(x)
            if mask is None:
                return self.head(x.mean(1))
            weight = mask.unsqueeze(-1).to(x.dtype)
            return self.head((x * weight).sum(1) / weight.sum(1).clamp(min=1))

        return answer(self.trunk(self.embed(tokens), mask=mask, answer=answer if self.classes else None))


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
        initialise(self.head)
        slots = {"position": Learned, **slots}
        sizes = {
            "depth": depth,
            "width": width,
            "heads": heads,
            "length": self.patches.count,
            "grid": self.patches.grid,
        }
        self.trunk = build_trunk(**sizes, scale=1.0, causal=False, **slots)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        return self.answer(self.trunk(self.patches(image), answer=self.answer))

    def answer(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B K"]:
        """Logits of the trunk's output."""
        return self.head(x.mean(1))
