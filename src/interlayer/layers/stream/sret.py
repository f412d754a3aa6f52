"""Sliced recursive Transformer: a block runs several times with the same weights, its attention in slices of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.config import configured
from interlayer.core.data import DataShape
from interlayer.core.example import Example
from interlayer.core.mixer import Attention
from interlayer.core.parts import FeedForward


class SlicedAttention(nn.Module):
    """Self-attention inside each of some groups of tokens: S^2 / groups scores in place of S^2.

    Args:
        width: Features D.
        heads: Attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)

    def forward(
        self, x: Float[Tensor, "B S D"], groups: int = 1, order: Tensor | None = None
    ) -> Float[Tensor, "B S D"]:
        """Neighbours make a group; with an ``order`` [S], those that it brings together, and all go back afterwards."""
        if x.shape[1] % groups:
            raise ValueError(
                f"SlicedRecursive: {x.shape[1]} tokens do not divide into {groups} groups; give a multiple, or other groups."
            )
        if groups == 1:
            return self.attention(x)
        if order is not None:
            x = x[:, order]
        x = self.attention(x.unflatten(1, (groups, -1)).flatten(0, 1)).unflatten(0, (-1, groups)).flatten(1, 2)
        return x if order is None else x[:, order.argsort()]


class Weighted(nn.Module):
    """``a x + b f(norm(x))`` with two learned numbers, 1 at initialisation."""

    def __init__(self, width: int, branch: nn.Module) -> None:
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(width, eps=1e-6), branch
        self.keep, self.add = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, *more: object) -> Tensor:
        """Add the branch."""
        return self.keep.to(x.dtype) * x + self.add.to(x.dtype) * self.branch(self.norm(x), *more)


class SlicedRecursive(nn.Module):
    """A Transformer block that runs R times with the same weights, each time on other groups of tokens.

    Paper: Shen et al., "Sliced Recursive Transformer", arXiv:2111.05297.

    Equations: one pass is ``z = a x + b attention(norm(x))``, ``y = c z + d mlp(norm(z))`` and then the non-linear
    projection ``e y + f mlp'(norm(y))``; the coefficients a to f are learned and 1 at initialisation. Attention in the first
    pass is inside ``groups[0]`` groups of neighbouring tokens; in pass r inside ``groups[r]`` groups after a permutation of
    the tokens, which is undone afterwards. As in the authors' code the permutation is random in training; in evaluation,
    where theirs is random too, it deals the tokens out to the groups in turn, so that outputs do not vary. Their code
    has a projection for each pass (``projections="own"``); with a shared one the parameters do not depend on R.

    One block and one projection have about 14 D^2 weights with the defaults. A pass costs as many multiply-adds for a
    token as it has weights, and 2 S D / groups for the scores and their use.

    Args:
        width: Features D.
        heads: Attention heads.
        recursions: R.
        groups: Groups of each pass; the last number holds for all later passes. (1,) is naive recursion.
        ratio: Hidden features of the MLP as a multiple of D.
        projection_ratio: The same for the projection.
        projections: ``shared`` by the passes, or each its ``own``.
        activation: Called without arguments.

    Shapes: [B, S, D] to [B, S, D]; S is a multiple of every number of groups.

    Raises:
        ValueError: Sizes below 1, unknown ``projections``, tokens that do not divide, another width.

    Examples:
        >>> import torch
        >>> block = SlicedRecursive(16, 2, recursions=3, groups=(4, 2))
        >>> block(torch.randn(2, 8, 16)).shape
        torch.Size([2, 8, 16])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        recursions: int = 2,
        groups: Sequence[int] = (8, 2),
        ratio: float = 4.0,
        projection_ratio: float = 1.0,
        projections: str = "shared",
        activation: Callable[[], nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        if recursions < 1 or not groups or min(groups) < 1:
            raise ValueError(f"SlicedRecursive: recursions {recursions} and groups {tuple(groups)} must be at least 1.")
        if projections not in ("shared", "own"):
            raise ValueError(f"SlicedRecursive: projections {projections!r} is not 'shared' or 'own'.")
        self.width = width
        self.groups = [groups[min(r, len(groups) - 1)] for r in range(recursions)]

        def mlp(times: float) -> nn.Module:
            return FeedForward(width, hidden=int(width * times), activation=activation)

        self.attend = Weighted(width, SlicedAttention(width, heads))
        self.mix = Weighted(width, mlp(ratio))
        count = recursions if projections == "own" else 1
        self.projections = nn.ModuleList(Weighted(width, mlp(projection_ratio)) for _ in range(count))

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """All passes."""
        if x.ndim != 3 or x.shape[-1] != self.width:
            raise ValueError(f"SlicedRecursive: input {tuple(x.shape)}; expected [batch, sequence, {self.width}].")
        for r, groups in enumerate(self.groups):
            order = self._order(x, groups) if r and groups > 1 else None
            x = self.mix(self.attend(x, groups, order))
            x = self.projections[r % len(self.projections)](x)
        return x

    def _order(self, x: Tensor, groups: int) -> Tensor | None:
        """Which token comes to which position: at random, or every groups-th token into one group."""
        count = x.shape[1]
        if self.training:
            return torch.randperm(count, device=x.device)
        if count % groups:
            return None  # the attention reports it
        return torch.arange(count, device=x.device).view(-1, groups).T.flatten()


def conv_stem(channels: int, width: int, stride: int) -> nn.Sequential:
    """3x3 convolutions of stride 2, each with a batch norm and a ReLU, that reduce the image by ``stride``.

    The first of several has half the channels. One of stride 1 if ``stride`` is 1.
    """
    count = max(stride.bit_length() - 1, 1)
    sizes = [channels, *([width // 2] if count > 1 else []), *[width] * (count - (count > 1))]
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Conv2d(i, o, 3, min(stride, 2), padding=1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers)


@configured
class SReT(nn.Module):
    """The paper's network: a convolutional stem, stages of sliced recursive blocks, and pooling convolutions between them.

    As in the authors' code, whose smallest network the defaults are: three stages with 64, 128 and 256 features, at an 8th,
    a 16th and a 32nd of the image's side, of 2, 5 and 3 blocks that run twice. Between stages a depthwise 3x3 convolution of
    stride 2 doubles the channels; the stem's output gets learned positions, the last stage's mean a norm and a linear head.
    Their stochastic depth is left out.

    Args:
        channels: Channels C of the image.
        image: Height and width in pixels, or one number; multiples of ``stem``.
        classes: Number of classes K.
        stem: By how much the stem reduces the image: 1, 2, 4 or 8.
        widths: Features of each stage, each a multiple of the one before.
        depths: Blocks of each stage, each run several times.
        heads: Attention heads of each stage.
        groups: Groups of the passes of each stage, as for ``SlicedRecursive``.
        block: Called with width, heads and ``groups=``; what a block is built by.
        **options: As for ``SlicedRecursive``: ``recursions``, ``ratio`` (3.6 in the paper), ``projections`` (``own`` in the
            paper), and so on.

    Shapes: [B, C, H, W] to [B, K].

    Raises:
        ValueError: Stages that differ in number, a stem of another stride, an image that it does not divide, positions
            that a stage's groups do not divide; an image of another shape.

    Examples:
        >>> import torch
        >>> net = SReT(1, 8, classes=10, stem=2, widths=(16, 32), depths=(2, 1), heads=(2, 4), groups=((4, 2), (1,)))
        >>> net(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    def __init__(
        self,
        channels: int = 3,
        image: int | tuple[int, int] = 224,
        *,
        classes: int = 1000,
        stem: int = 8,
        widths: Sequence[int] = (64, 128, 256),
        depths: Sequence[int] = (2, 5, 3),
        heads: Sequence[int] = (2, 4, 8),
        groups: Sequence[Sequence[int]] = ((8, 2), (4, 1), (1,)),
        block: Callable[..., nn.Module] = SlicedRecursive,
        **options: Any,
    ) -> None:
        super().__init__()
        size = (image, image) if isinstance(image, int) else tuple(image)
        if len({len(widths), len(depths), len(heads), len(groups)}) > 1:
            raise ValueError(
                f"SReT: widths {tuple(widths)}, depths {tuple(depths)}, heads {tuple(heads)} and groups {tuple(groups)}; "
                "expected as many of each, one for each stage."
            )
        if stem not in (1, 2, 4, 8) or size[0] % stem or size[1] % stem:
            raise ValueError(f"SReT: stem {stem} for an image of {size}; expected 1, 2, 4 or 8, and multiples of it.")
        self.shape = (channels, *size)
        self.stem = conv_stem(channels, widths[0], stem)
        height, width = size[0] // stem, size[1] // stem
        self.position = nn.Parameter(torch.empty(widths[0], height, width))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.stages, self.pools = nn.ModuleList(), nn.ModuleList()
        for stage, (features, depth, count, each) in enumerate(zip(widths, depths, heads, groups, strict=True)):
            if stage:
                self.pools.append(nn.Conv2d(widths[stage - 1], features, 3, 2, 1, groups=widths[stage - 1]))
                height, width = (height + 1) // 2, (width + 1) // 2
            if bad := [g for g in each if height * width % g]:
                raise ValueError(
                    f"SReT: {bad[0]} groups in stage {stage} do not divide its {height} x {width} positions; give others."
                )
            self.stages.append(nn.Sequential(*(block(features, count, groups=each, **options) for _ in range(depth))))
        self.norm, self.head = nn.LayerNorm(widths[-1], eps=1e-6), nn.Linear(widths[-1], classes)

    @classmethod
    def for_task(cls, shape: DataShape, **options: Any) -> Self:
        """A small net of two stages for a task of images and classes."""
        shape.require("SReT", "image", "classes")
        small = {"widths": (32, 64), "depths": (2, 2), "heads": (2, 4), "groups": ((4, 2), (1,))}
        options = {"stem": 2 if shape.height <= 16 else 4, **small, **options}
        return cls(shape.channels, (shape.height, shape.width), classes=shape.classes, **options)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        if tuple(image.shape[1:]) != self.shape:
            raise ValueError(f"SReT: image {tuple(image.shape)}; expected [batch, {', '.join(map(str, self.shape))}].")
        x = self.stem(image) + self.position
        for stage, blocks in enumerate(self.stages):
            if stage:
                x = self.pools[stage - 1](x)
            x = blocks(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])
        return self.head(self.norm(x.mean((2, 3))))


EXAMPLE = Example(
    make=lambda: SlicedRecursive(8, 2, recursions=3, groups=(3, 2)),
    inputs=lambda: (torch.randn(2, 6, 8),),
    odd=lambda: (torch.randn(3, 18, 8),),
    axis=1,
    modes={"own projections": lambda: SlicedRecursive(8, 2, groups=(1,), projections="own")},
    exceptions={"lengths": "one token does not divide into three groups"},
)
