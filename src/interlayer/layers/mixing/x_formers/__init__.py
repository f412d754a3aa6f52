"""X-formers: a part for every leaf of the tree of Transformer variants, and a Transformer that takes any of them by name."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from interlayer import catalog
from interlayer.core.config import configured
from interlayer.core.data import DataShape
from interlayer.core.example import Example
from interlayer.core.parts import Patches
from interlayer.core.trunk import build_trunk, initialise

# The survey's root (Vaswani et al., arXiv:1706.03762); a leaf replaces part of it.
VANILLA: dict[str, Any] = {"stream": "post-norm", "position": "sinusoidal", "activation": "relu"}


@configured
class XFormer(nn.Module):
    """The vanilla Transformer with the parts of one leaf of the survey's tree, for text or images.

    Paper: Lin et al., "A Survey of Transformers", arXiv:2106.04554. The root is Vaswani et al., arXiv:1706.03762: sinusoids, post-norm,
    ReLU.

    The leaves are data (``catalog.taxonomy()``, ``interlayer list --taxonomy``): each names the slots that it fills. Every part
    can also be named in a slot of any backbone, such as ``Transformer(mixer="performer")``. Where the survey lists many methods
    under a leaf, one stands for it.

    Args:
        leaf: Name of the leaf, such as ``"module/attention/linearised/feature map"``, or its last parts.
        vocab: Kinds of tokens, for text.
        channels: Channels of the image, for images.
        image: Height and width in pixels, for images.
        patch: Side of a patch, in pixels.
        classes: Number of classes; 0 gives logits of the next token at every position, by a causal model.
        length: Longest text.
        depth: Number of blocks.
        width: Features D.
        heads: Attention heads.
        **slots: Further slots, as for ``Transformer``; they override the leaf's.

    Shapes: tokens [B, S] to [B, S, vocab] or [B, classes]; images [B, C, H, W] to [B, classes].

    Raises:
        ValueError: Unknown leaf; neither text nor images; a leaf that has no causal form in a causal model, or only a causal one
            in another.

    Examples:
        >>> import torch
        >>> model = XFormer("query prototypes", vocab=50, classes=3, length=32, depth=2, width=32, heads=2)
        >>> model(torch.zeros(4, 20, dtype=torch.long)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        leaf: str = "module/attention/linearised/feature map",
        *,
        vocab: int = 0,
        channels: int = 0,
        image: tuple[int, int] = (0, 0),
        patch: int = 4,
        classes: int = 0,
        length: int = 128,
        depth: int = 4,
        width: int = 128,
        heads: int = 4,
        **slots: Any,
    ) -> None:
        super().__init__()
        self.leaf = find(leaf)
        if bool(vocab) == bool(channels) or (channels and not classes):
            raise ValueError(
                f"XFormer: vocab {vocab}, channels {channels}, classes {classes}; expected text, or images and classes."
            )
        self.vocab, self.classes = vocab, classes
        self.embed: nn.Module
        grid: tuple[int, ...] = (length,)
        if vocab:
            self.embed = nn.Embedding(
                vocab, width
            )  # of variance 1 beside the sinusoids, as in Vaswani et al., section 3.4
        else:
            self.embed = Patches(channels, (image[0], image[1]), patch, width)
            length, grid = self.embed.count, self.embed.grid
        self.head = nn.Linear(width, classes or vocab)
        initialise(self.head)
        sizes = {"depth": depth, "width": width, "heads": heads, "length": length, "grid": grid, "causal": not classes}
        sizes["scale"] = 1.0
        self.trunk = build_trunk(**sizes, **{**VANILLA, **self.leaf.use, **slots})

    @classmethod
    def for_task(cls, shape: DataShape, **options: Any) -> Self:
        """An X-former for a task of text, or of images and classes."""
        if shape.kind == "tokens":
            return cls(**{"vocab": shape.vocab, "classes": shape.classes, "length": shape.length, **options})
        shape.require("XFormer", "image", "classes")
        options = {"patch": 2 if shape.height <= 16 else 4, **options}
        return cls(channels=shape.channels, image=(shape.height, shape.width), classes=shape.classes, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        if self.vocab and (x.ndim != 2 or x.is_floating_point()):
            raise TypeError(
                f"XFormer: got {x.dtype} of shape {tuple(x.shape)}; expected int64 [batch, sequence] below {self.vocab}."
            )
        return self.answer(self.trunk(self.embed(x), answer=self.answer if self.classes else None))

    def answer(self, x: Tensor) -> Tensor:
        """Logits of the trunk's output."""
        return self.head(x.mean(1) if self.classes else x)


def find(name: str) -> catalog.Leaf:
    """The leaf of that name; its last parts are enough where they identify it.

    Raises:
        ValueError: No such leaf, or several.
    """
    leaves = catalog.taxonomy()
    fits = [leaf for leaf in leaves.values() if leaf.name == name or leaf.name.endswith(f"/{name}")]
    if len(fits) != 1:
        which = f"several are: {[f.name for f in fits]}." if fits else f"none is.{catalog.nearest(name, leaves)}"
        raise ValueError(
            f"XFormer: expected one leaf called {name!r}, but {which} `interlayer list --taxonomy` shows all."
        )
    return fits[0]


EXAMPLE = Example(
    make=lambda: XFormer(channels=1, image=(8, 8), patch=2, classes=10, depth=1, width=16, heads=2),
    inputs=lambda: (torch.randn(2, 1, 8, 8),),
    wrong=lambda: (torch.randn(2, 1, 8, 7),),
)
