"""Parts of networks that hear a time and a class: embeddings, and norms whose scale, shift and gate they set (adaLN)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor, nn


class TimeEmbedding(nn.Module):
    """A time as sines and cosines of ``frequencies`` periods between 2 pi and 20000 pi, through an MLP with SiLU.

    Args:
        width: Features D.
        frequencies: Sines and cosines in all, even.

    Shapes: [B], integers or real numbers, to [B, D].
    """

    def __init__(self, width: int, *, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.first, self.second = nn.Linear(frequencies, width), nn.Linear(width, width)
        for layer in (self.first, self.second):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, t: Num[Tensor, " B"]) -> Float[Tensor, "B D"]:
        """Embed the times."""
        half, exact = self.frequencies // 2, torch.promote_types(t.dtype, torch.float32)
        frequency = 10000.0 ** (-torch.arange(half, device=t.device) / half)
        angle = t[:, None].to(exact) * frequency
        waves = torch.cat((angle.cos(), angle.sin()), -1).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(waves)))


class ClassEmbedding(nn.Module):
    """One vector for each class, and one for "no class", which takes the place of some classes in training.

    Args:
        classes: Number of classes K; the index K stands for none.
        width: Features D.
        dropout: Share of the items that get none in training, for classifier-free guidance.

    Shapes: [B] of int64 from 0 to K to [B, D].
    """

    def __init__(self, classes: int, width: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout, self.none = dropout, classes
        self.table = nn.Embedding(classes + 1, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, y: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
        """Embed the classes."""
        if self.training and self.dropout > 0:
            y = torch.where(torch.rand(len(y), device=y.device) < self.dropout, self.none, y)
        return self.table(y)


class Condition(nn.Module):
    """The sum of a time's and a class's embedding: [B] and [B] to [B, D].

    Args:
        classes: Number of classes.
        width: Features D.
        dropout: See ``ClassEmbedding``.
    """

    def __init__(self, classes: int, width: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.time, self.label = TimeEmbedding(width), ClassEmbedding(classes, width, dropout=dropout)

    def forward(self, t: Num[Tensor, " B"], y: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
        """Embed both."""
        return self.time(t) + self.label(y)


class Modulation(nn.Module):
    """``parts`` vectors for each item from its condition, zero at initialisation: a linear map of its SiLU.

    Args:
        width: Features D.
        parts: How many vectors.

    Shapes: [B, D] to ``parts`` tensors that broadcast to [B, ..., D].
    """

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, c: Float[Tensor, "B D"], axes: int) -> tuple[Tensor, ...]:
        """The vectors, with ``axes`` axes of positions."""
        made = self.linear(F.silu(c))
        return made.reshape(made.shape[0], *[1] * axes, made.shape[1]).chunk(self.parts, -1)


class AdaLNBlock(nn.Module):
    """A mixer and an MLP whose norms and gates the condition sets (adaLN-Zero, Peebles and Xie, arXiv:2212.09748, section 3.2).

    ``x + gate f(norm(x) (1 + scale) + shift)`` for each; the gates are zero at initialisation, so that the block is the identity.

    Args:
        width: Features D.
        mixer: Mixes positions.
        mlp: Mixes features.

    Shapes: [B, ..., D] and a condition [B, D] to [B, ..., D].
    """

    def __init__(self, width: int, mixer: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mixer, self.mlp, self.modulation = mixer, mlp, Modulation(width, 6)

    def forward(self, x: Float[Tensor, "B *S D"], c: Float[Tensor, "B D"]) -> Float[Tensor, "B *S D"]:
        """Run both."""
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(c, x.ndim - 2)
        x = x + gate * self.mixer(self.norm(x) * (1 + scale) + shift)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class AdaLNHead(nn.Module):
    """A norm that the condition scales and shifts, and a last layer that is zero at initialisation.

    Args:
        width: Features D.
        out: The last layer, with a weight and a bias.
    """

    def __init__(self, width: int, out: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation, self.out = Modulation(width, 2), out
        self.channels_first = isinstance(out, nn.Conv2d)  # asked here: a packed layer is none
        for p in out.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Float[Tensor, "B *S D"], c: Float[Tensor, "B D"]) -> Tensor:
        """The normed features through the last layer, which gets [B, D, H, W] if it is a convolution."""
        shift, scale = self.modulation(c, x.ndim - 2)
        x = self.norm(x) * (1 + scale) + shift
        return self.out(x.movedim(-1, 1)) if self.channels_first else self.out(x)


def xavier(*parts: nn.Module) -> None:
    """Initialise linear maps and convolutions in ``parts`` uniformly after Glorot and Bengio, their biases with zero."""
    for module in (m for part in parts for m in part.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check(who: str, shape: tuple[int, ...], classes: int, x: Tensor, t: Tensor, y: Tensor) -> None:
    """Raise if images, times and classes don't fit a model or each other.

    Args:
        who: Name of the model.
        shape: Channels, height and width that it was built for.
        classes: Number of classes K.
        x: Should be [B, *shape].
        t: Should be [B].
        y: Should be integers [B] from 0 to K.

    Raises:
        ValueError: A wrong shape.
        TypeError: Classes that are not integers.
    """
    if x.ndim != 4 or tuple(x.shape[1:]) != shape:
        raise ValueError(f"{who}: images {tuple(x.shape)}; expected [batch, {', '.join(map(str, shape))}].")
    if t.shape != x.shape[:1] or y.shape != x.shape[:1]:
        raise ValueError(
            f"{who}: times {tuple(t.shape)} and classes {tuple(y.shape)} for {x.shape[0]} images; expected one of each an image."
        )
    if y.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{who}: classes of {y.dtype}; expected integers from 0 to {classes} ({classes}: no class).")
