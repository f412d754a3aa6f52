"""MLP-Mixer: image classification with nothing but MLPs, across patches and across channels."""

from __future__ import annotations

from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.config import configured
from interlayer.core.data import DataShape
from interlayer.core.example import Example
from interlayer.core.parts import FeedForward, Patches
from interlayer.core.slots import factory, fill

# Table 1 of the paper; the patch side is part of a model's name there (S/32, S/16, B/32, ...) and free here.
SIZES = {
    "nano": {"depth": 4, "width": 64, "token_hidden": 32, "hidden": 256},
    "S": {"depth": 8, "width": 512, "token_hidden": 256, "hidden": 2048},
    "B": {"depth": 12, "width": 768, "token_hidden": 384, "hidden": 3072},
    "L": {"depth": 24, "width": 1024, "token_hidden": 512, "hidden": 4096},
    "H": {"depth": 32, "width": 1280, "token_hidden": 640, "hidden": 5120},
}


class TokenMixing(nn.Module):
    """The same MLP across the S positions of every channel: [B, S, D] to [B, S, D].

    Args:
        length: Positions S.
        hidden: Hidden features.
        activation: Called without arguments.
        linear: Called with ``inputs=, outputs=``.
    """

    def __init__(self, length: int, hidden: int, **parts: Any) -> None:
        super().__init__()
        self.mlp = FeedForward(length, hidden=hidden, **parts)

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """Mix positions."""
        return self.mlp(x.transpose(1, 2)).transpose(1, 2)


@configured
class MLPMixer(nn.Module):
    """Alternate an MLP over the patches of each channel with an MLP over the channels of each patch.

    Paper: Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision", arXiv:2105.01601.

    Equation (1): ``U_{*,i} = X_{*,i} + W2 gelu(W1 LayerNorm(X)_{*,i})`` for every channel i, then
    ``Y_{j,*} = U_{j,*} + W4 gelu(W3 LayerNorm(U)_{j,*})`` for every patch j; a norm, the mean over patches and a linear
    head that is zero at initialisation, as in the authors' code. There is no position embedding: W1 and W2 depend on the position.

    Cost for an image of N patches: N D (token_hidden + hidden) multiply-adds in a block, linear in N.

    Args:
        channels: Channels C of the image.
        image: Height and width in pixels, or one number.
        patch: Side of a patch in pixels; divides both.
        classes: Number of classes K.
        size: ``nano``, or ``S``, ``B``, ``L``, ``H`` of the paper's table 1; the four numbers below override it.
        depth: Number of blocks.
        width: Channels D of a patch.
        token_hidden: Hidden features of the MLP over patches.
        hidden: Hidden features of the MLP over channels.
        stream: How sublayers are joined.
        norm: What the stream normalises with.
        activation: Inside the MLPs.
        linear: Every linear map of the MLPs.

    Shapes: [B, C, H, W] to [B, K].

    Raises:
        ValueError: Unknown size, a patch that does not divide the image, an image of another shape.

    Examples:
        >>> import torch
        >>> MLPMixer(1, 8, patch=2, classes=10, size="nano")(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    def __init__(
        self,
        channels: int = 3,
        image: int | tuple[int, int] = 224,
        *,
        patch: int = 16,
        classes: int = 1000,
        size: str = "B",
        depth: int | None = None,
        width: int | None = None,
        token_hidden: int | None = None,
        hidden: int | None = None,
        stream: Any = "pre-norm",
        norm: Any = "layernorm",
        activation: Any = "gelu",
        linear: Any = "linear",
    ) -> None:
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"MLPMixer: size {size!r} is not one of {list(SIZES)}.")
        given = {"depth": depth, "width": width, "token_hidden": token_hidden, "hidden": hidden}
        sizes = SIZES[size] | {k: v for k, v in given.items() if v is not None}
        depth, width = sizes["depth"], sizes["width"]
        parts = {"activation": factory("activation", activation), "linear": factory("linear", linear)}
        self.patches = Patches(channels, image, patch, width)
        self.stream = fill("stream", stream, depth=depth, width=width, branches=2, norm=factory("norm", norm))
        if self.stream.needs:
            raise ValueError(f"MLPMixer: stream {type(self.stream).__name__} needs attention; a Mixer has none.")
        self.layers = nn.ModuleList()
        for _ in range(depth):
            self.layers.append(TokenMixing(self.patches.count, sizes["token_hidden"], **parts))
            self.layers.append(FeedForward(width, hidden=sizes["hidden"], **parts))
        self.head = nn.Linear(width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def for_task(cls, shape: DataShape, **options: Any) -> Self:
        """A Mixer for a task of images and classes; by default ``nano`` with small patches."""
        shape.require("MLPMixer", "image", "classes")
        options = {"size": "nano", "patch": 2 if shape.height <= 16 else 4, **options}
        return cls(shape.channels, (shape.height, shape.width), classes=shape.classes, **options)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        state = self.stream.start(self.patches(image))
        for number, layer in enumerate(self.layers):
            state = self.stream.write(state, number, layer(self.stream.read(state, number)))
        return self.head(self.stream.finish(state).mean(1))


EXAMPLE = Example(
    make=lambda: MLPMixer(1, 8, patch=2, classes=10, size="nano", depth=2, width=16),
    inputs=lambda: (torch.randn(2, 1, 8, 8),),
    wrong=lambda: (torch.randn(2, 1, 8, 9),),
)
