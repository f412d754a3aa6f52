"""Sliced recursive Transformer: a block runs several times with the same weights, its attention in slices of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.config import configured
from interlayer.core.data import DataShape
from interlayer.core.example import Example
from interlayer.core.mixer import Attention
from interlayer.core.parts import FeedForward, Patches


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
    """``a x + b f(norm(x))`` with two learned numbers that start at 1."""

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
    projection ``e y + f mlp'(norm(y))``; the coefficients a to f are learned and start at 1. Attention in the first pass
    is inside ``groups[0]`` groups of neighbouring tokens; in pass r inside ``groups[r]`` groups after a permutation of
    the tokens, which is undone behind it. As in the authors' code the permutation is random in training; in evaluation,
    where theirs is random too, it deals the tokens out to the groups in turn, so that outputs do not vary. Their code
    has a projection for each pass (``projections="own"``); shared, the parameters do not depend on R.

    Weights of one block, and one projection: 14 D^2 or so with the defaults. A pass costs as much multiply-adds for a
    token as it has weights, and 2 S D / groups for the scores and their use.

    Args:
        width: Features D.
        heads: Attention heads.
        recursions: R.
        groups: Groups of each pass; the last number counts for all later passes. (1,) is naive recursion.
        ratio: Inner features of the MLP for each feature.
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
            raise ValueError(f"SlicedRecursive: input {tuple(x.shape)}; wanted [batch, sequence, {self.width}].")
        for r, groups in enumerate(self.groups):
            order = self._order(x, groups) if r and groups > 1 else None
            x = self.mix(self.attend(x, groups, order))
            x = self.projections[r % len(self.projections)](x)
        return x

    def _order(self, x: Tensor, groups: int) -> Tensor | None:
        """Which token comes to which place: at random, or every groups-th token into one group."""
        count = x.shape[1]
        if self.training:
            return torch.randperm(count, device=x.device)
        if count % groups:
            return None  # the attention says what is wrong
        return torch.arange(count, device=x.device).view(-1, groups).T.flatten()


@configured
class SReT(nn.Module):
    """A vision Transformer of sliced recursive blocks, with learned places and the mean over the tokens.

    Args:
        channels: Channels C of the image.
        image: Height and width in pixels, or one number.
        patch: Side of a patch in pixels.
        classes: Number of classes K.
        depth: Number of blocks, each run several times.
        width: Features D.
        heads: Attention heads.
        block: What a block is built by.
        **options: As for ``SlicedRecursive``.

    Shapes: [B, C, H, W] to [B, K].

    Examples:
        >>> import torch
        >>> SReT(1, 8, patch=2, classes=10, depth=2, width=16, heads=2, groups=(4, 2))(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    def __init__(
        self,
        channels: int = 3,
        image: int | tuple[int, int] = 32,
        *,
        patch: int = 4,
        classes: int = 10,
        depth: int = 4,
        width: int = 64,
        heads: int = 4,
        block: Callable[..., nn.Module] = SlicedRecursive,
        **options: Any,
    ) -> None:
        super().__init__()
        self.patches = Patches(channels, image, patch, width)
        self.place = nn.Parameter(torch.randn(self.patches.count, width) * 0.02)
        self.blocks = nn.Sequential(*(block(width, heads, **options) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    @classmethod
    def for_task(cls, shape: DataShape, **options: Any) -> Self:
        """A net for a task of images and classes."""
        shape.require("SReT", "image", "classes")
        options = {"patch": 2 if shape.height <= 16 else 4, **options}
        return cls(shape.channels, (shape.height, shape.width), classes=shape.classes, **options)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        return self.head(self.norm(self.blocks(self.patches(image) + self.place)).mean(1))


EXAMPLE = Example(
    make=lambda: SlicedRecursive(8, 2, recursions=3, groups=(3, 2)),
    inputs=lambda: (torch.randn(2, 6, 8),),
    odd=lambda: (torch.randn(3, 18, 8),),
    axis=1,
    exceptions={"lengths": "one token does not divide into three groups"},
)
