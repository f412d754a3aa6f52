"""Positions as a bias of the scores, from convolution, or from the causal mask alone."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.core.position import Position


class RelativeBias(Position):
    """A learned bias of the scores for each head and bucket of distances (T5; Raffel et al., arXiv:1910.10683, section 2.1).

    Half of the buckets hold single distances, the other half grow logarithmically up to ``farthest``. A causal model has
    all buckets for the past; an encoder has half of them for each direction. All layers share the table.

    Args:
        heads: Query heads.
        causal: Whether there are only distances to the past.
        buckets: Number of buckets.
        farthest: Distance from which on everything falls into one bucket.

    Raises:
        ValueError: A number of buckets that is not a multiple of 4, or too small a ``farthest``.

    Examples:
        >>> RelativeBias(heads=2, causal=True).bucket(torch.tensor([0, -1, -15, -16, -200])).tolist()
        [0, 1, 15, 16, 31]
    """

    needs: ClassVar[frozenset[str]] = frozenset({"bias"})

    def __init__(self, heads: int, *, causal: bool = False, buckets: int = 32, farthest: int = 128) -> None:
        super().__init__()
        if buckets < 4 or buckets % 4 or farthest <= buckets // 2:
            raise ValueError(
                f"RelativeBias: {buckets} buckets up to {farthest}; expected a multiple of 4, and farther than half of it."
            )
        self.causal, self.buckets, self.farthest = causal, buckets, farthest
        self.table = nn.Parameter(torch.randn(buckets, heads) * 0.02)

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of ``key - query``."""
        count = self.buckets if self.causal else self.buckets // 2
        exact, far = count // 2, (-distance).clamp(min=0) if self.causal else distance.abs()
        ratio = (far.clamp(min=1).float() / exact).log() / math.log(self.farthest / exact)
        grown = (exact + (ratio * (count - exact)).long()).clamp(max=count - 1)
        bucket = torch.where(far < exact, far, grown)
        return bucket if self.causal else bucket + count * (distance > 0)

    def bias(self, new: int, total: int) -> Tensor:
        index = torch.arange(total, device=self.table.device)
        return self.table[self.bucket(index - index[total - new :, None])].permute(2, 0, 1)


class Alibi(Position):
    """Scores fall linearly with the distance, at a fixed slope for each head (ALiBi; Press et al., arXiv:2108.12409, section 3).

    ``score_ij - 2^(-8 h / H) |i - j|`` for head h of H. Where H is no power of two, the remaining heads take every other
    slope of twice the next smaller power, as in the authors' code.

    Args:
        heads: Query heads.

    Examples:
        >>> Alibi(heads=2).bias(1, 3)[0].tolist()
        [[-0.125, -0.0625, -0.0]]
    """

    needs: ClassVar[frozenset[str]] = frozenset({"bias"})
    slopes: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        power = 2 ** int(math.log2(heads))
        slopes = 2 ** (-8 / power * torch.arange(1, power + 1))
        between = 2 ** (-4 / power * torch.arange(1, 2 * power, 2))
        self.register_buffer("slopes", torch.cat((slopes, between))[:heads], persistent=False)

    def bias(self, new: int, total: int) -> Tensor:
        index = torch.arange(total, device=self.slopes.device)
        return -self.slopes[:, None, None] * (index - index[total - new :, None]).abs()


class Conditional(Position):
    """A depthwise convolution with zero padding tells positions apart (conditional encoding; Chu et al., arXiv:2102.10882).

    ``x + conv(x)`` over the grid of patches, or along a text, where it reaches back only if the model is causal. The paper
    applies it after the first block; here it acts on the embedded input.

    Args:
        width: Features D.
        grid: Shape of the positions, one or two sides.
        causal: Whether a token sees only earlier ones.
        kernel: Side of the kernel, odd.

    Raises:
        ValueError: An even kernel.

    Examples:
        >>> from interlayer.models import VisionTransformer
        >>> model = VisionTransformer(1, 6, patch=2, classes=3, depth=2, width=8, heads=2, position="conditional")
        >>> model(torch.zeros(1, 1, 6, 6)).shape
        torch.Size([1, 3])
    """

    caches: ClassVar[bool] = False
    masks: ClassVar[bool] = False

    def __init__(self, width: int, *, grid: tuple[int, ...], causal: bool = False, kernel: int = 3) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"Conditional: kernel {kernel} is even; give an odd one.")
        self.grid = grid
        self.conv = (nn.Conv1d if len(grid) == 1 else nn.Conv2d)(width, width, kernel, groups=width)
        side = (kernel - 1, 0) if causal else (kernel // 2, kernel // 2)
        self.pad = side * len(grid)

    def embed(self, x_BSD: Tensor, offset: int = 0) -> Tensor:
        rows = x_BSD.transpose(1, 2)
        if len(self.grid) == 2:
            rows = rows.unflatten(2, self.grid)
        return x_BSD + self.conv(F.pad(rows, self.pad)).flatten(2).transpose(1, 2)


class Implicit(Position):
    """None: the causal mask alone tells the order (Lin et al., arXiv:2106.04554, section 5.1).

    Args:
        causal: Whether a token sees only earlier ones.

    Raises:
        ValueError: A model that is not causal: it would be blind to the order.

    Examples:
        >>> from interlayer.models import Transformer
        >>> model = Transformer(vocab=11, length=9, depth=2, width=8, heads=2, position="implicit")
        >>> model(torch.zeros(1, 9, dtype=torch.long)).shape
        torch.Size([1, 9, 11])
    """

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        if not causal:
            raise ValueError(
                "Implicit: without a causal mask nothing tells the order of the tokens. Use it in a causal model, or take "
                "position='sinusoidal'; position='none' is a model that is meant to be blind to the order."
            )
