"""Parts of U-DiT: attention over groups of pixels, feed-forward layers that fold, and changes of resolution."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.mixer import Attention, Context, attend
from interlayer.core.parts import FeedForward
from interlayer.core.position import AxialRotary


def split(x: Float[Tensor, "B H W D"], factor: int) -> Float[Tensor, "G N D"]:
    """Deal the pixels into ``factor``^2 groups, one for each place in a ``factor`` x ``factor`` tile: G = B factor^2 sets of tokens.

    Examples:
        >>> x = torch.arange(16).view(1, 4, 4, 1)
        >>> split(x, 2)[..., 0].tolist()
        [[0, 2, 8, 10], [1, 3, 9, 11], [4, 6, 12, 14], [5, 7, 13, 15]]
        >>> torch.equal(merge(split(x, 2), 2, 4, 4), x)
        True
    """
    count, rows, columns, width = x.shape
    tiles = x.reshape(count, rows // factor, factor, columns // factor, factor, width).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(count * factor**2, rows // factor * (columns // factor), width)


def merge(groups: Float[Tensor, "G N D"], factor: int, rows: int, columns: int) -> Float[Tensor, "B H W D"]:
    """The inverse of ``split``."""
    count, width = groups.shape[0] // factor**2, groups.shape[-1]
    tiles = groups.reshape(count, factor, factor, rows // factor, columns // factor, width)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(count, rows, columns, width)


def conv(layer: nn.Conv2d, x: Float[Tensor, "B H W D"]) -> Float[Tensor, "B H W E"]:
    """Apply a convolution to features that come last."""
    return layer(x.movedim(-1, 1)).movedim(1, -1)


def depthwise(width: int, kernel: int) -> nn.Conv2d:
    """One odd kernel for each feature; the size stays."""
    return nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)


class DownSampledAttention(Attention):
    """Self-attention within each of ``down``^2 groups of pixels: [B, H, W, D] to [B, H, W, D].

    A depthwise convolution with a shortcut lets each pixel see its neighbours; then ``split`` gives ``down``^2 times fewer tokens
    in as many groups, and queries, keys and values come from these. Every pixel is in one group, so the number of tokens stays the
    same, while scores cost ``down``^2 times less: (H W)^2 / down^2 pairs.

    Args:
        width: Features D.
        heads: Attention heads.
        grid: Height and width, multiples of ``down``.
        down: Down-sampling factor of each side; 1 is plain attention over all pixels, without the convolution.
        kernel: Side of the depthwise kernel, odd.
        cosine: Whether scores are the cosines of queries and keys times a learned factor of each head: 10 at initialisation, at
            most 100.
        rotary: Whether queries and keys are rotated by row and column of the token.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        grid: tuple[int, int],
        *,
        down: int = 2,
        kernel: int = 5,
        cosine: bool = True,
        rotary: bool = True,
    ) -> None:
        super().__init__(width, heads)
        self.down = down
        self.sampler = depthwise(width, kernel) if down > 1 else None
        self.position = AxialRotary((grid[0] // down, grid[1] // down), width // heads) if rotary else None
        self.log_scale = nn.Parameter(torch.full((heads, 1, 1), 10.0).log()) if cosine else None

    def forward(self, x: Float[Tensor, "B H W D"], context: Context | None = None) -> Float[Tensor, "B H W D"]:  # type: ignore[override]
        """Let every token read from those of its group."""
        rows, columns = x.shape[1:3]
        if self.sampler is not None:
            x = x + conv(self.sampler, x)
        mixed = super().forward(split(x, self.down), Context(position=self.position))
        return merge(mixed, self.down, rows, columns)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """What each head reads."""
        if self.log_scale is None:
            return super().mix(q, k, v, mask)
        factor = self.log_scale.clamp(max=4.6052).exp()  # log 100, as the authors round it
        return attend(F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1), v, causal=False, mask=mask, scale=1.0)


class DepthwiseFeedForward(nn.Module):
    """``W2 (K * gelu(W1 x))`` with a depthwise 5 x 5 kernel K between the linear maps: [B, H, W, D] to [B, H, W, D].

    Args:
        width: Features D.
        hidden: Hidden features.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.conv, self.down = nn.Linear(width, hidden), depthwise(hidden, 5), nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "B H W D"]) -> Float[Tensor, "B H W D"]:
        """Mix the features of each pixel and its neighbours."""
        return self.down(conv(self.conv, F.gelu(self.up(x))))


class RepFeedForward(nn.Module):
    """``DepthwiseFeedForward`` made of more weights: each linear map is a product of two, the kernel is 5x5 + 3x3 + 1x1 + identity.

    Nothing stands between these, so that each pass puts the weights together first, which costs less than all branches and has the
    same gradients. ``folded()`` gives the layer with the finished weights.

    Args:
        width: Features D.
        hidden: Hidden features, even.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.into, self.up = nn.Linear(width, hidden // 2), nn.Linear(hidden // 2, hidden)
        self.conv5, self.conv3, self.conv1 = (depthwise(hidden, kernel) for kernel in (5, 3, 1))
        self.down, self.out = nn.Linear(hidden, hidden // 2), nn.Linear(hidden // 2, width)

    def forward(self, x: Float[Tensor, "B H W D"]) -> Float[Tensor, "B H W D"]:
        """Mix the features of each pixel and its neighbours."""
        x = F.gelu(F.linear(x, *_product(self.into, self.up)))
        kernel, bias = self.kernel()
        x = F.conv2d(x.movedim(-1, 1), kernel, bias, padding=2, groups=len(kernel)).movedim(1, -1)
        return F.linear(x, *_product(self.down, self.out))

    def kernel(self) -> tuple[Tensor, Tensor]:
        """The sum of the three kernels and the identity, and its bias."""
        biases = [conv.bias for conv in (self.conv5, self.conv3, self.conv1) if conv.bias is not None]
        small, point = F.pad(self.conv3.weight, [1] * 4), F.pad(self.conv1.weight + 1, [2] * 4)  # 1: the identity
        return self.conv5.weight + small + point, torch.stack(biases).sum(0)

    @torch.no_grad()
    def folded(self) -> DepthwiseFeedForward:
        """The same function with fewer weights, all of them new."""
        plain = DepthwiseFeedForward(self.into.in_features, self.up.out_features)
        weights = (*_product(self.into, self.up), *self.kernel(), *_product(self.down, self.out))
        for owner, name, value in zip(
            (plain.up, plain.up, plain.conv, plain.conv, plain.down, plain.down),
            ("weight", "bias") * 3,
            weights,
            strict=True,
        ):
            setattr(owner, name, nn.Parameter(value))
        return plain.train(self.training)


def _product(first: nn.Linear, second: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of two linear maps, one after the other."""
    return second.weight @ first.weight, second.weight @ first.bias + second.bias


class Halve(nn.Module):
    """Half the resolution, twice the features: a 3 x 3 convolution, then the four pixels of each tile as one (pixel unshuffle).

    Args:
        width: Features D, even.

    Shapes: [B, H, W, D] to [B, H / 2, W / 2, 2 D].
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width // 2, 3, padding=1, bias=False)

    def forward(self, x: Float[Tensor, "B H W D"]) -> Tensor:
        """Resample."""
        count, rows, columns, width = x.shape
        tiles = conv(self.conv, x).reshape(count, rows // 2, 2, columns // 2, 2, width // 2)
        return tiles.permute(0, 1, 3, 5, 2, 4).reshape(count, rows // 2, columns // 2, 2 * width)


class Double(nn.Module):
    """Twice the resolution, half the features: the reverse of ``Halve``, by a 3 x 3 convolution and pixel shuffle.

    Args:
        width: Features D, even.

    Shapes: [B, H, W, D] to [B, 2 H, 2 W, D / 2].
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)

    def forward(self, x: Float[Tensor, "B H W D"]) -> Tensor:
        """Resample."""
        count, rows, columns, width = x.shape
        tiles = conv(self.conv, x).reshape(count, rows, columns, width // 2, 2, 2)
        return tiles.permute(0, 1, 4, 2, 5, 3).reshape(count, 2 * rows, 2 * columns, width // 2)


FFNS: dict[str, Callable[..., nn.Module]] = {
    "rep": RepFeedForward,
    "depthwise": DepthwiseFeedForward,
    "plain": partial(FeedForward, activation=partial(nn.GELU, approximate="tanh")),
}
