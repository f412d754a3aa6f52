"""Plain parts of backbones: MLPs, patches, a bridge, and a norm that does nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Linear = Callable[..., nn.Module]


def plain_linear(inputs: int, outputs: int, bias: bool = True) -> nn.Module:
    """``torch.nn.Linear`` with the argument names of the slot."""
    return nn.Linear(inputs, outputs, bias=bias)


class Same(nn.Module):
    """Fills a norm slot where no norm is wanted."""

    def __init__(self, width: int = 0) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x


class LastLayer(nn.Module):
    """The plain bridge of an encoder-decoder: every decoder layer reads the encoder's last states."""

    def __init__(self, *, decoder_layers: int) -> None:
        super().__init__()
        self.decoder_layers = decoder_layers

    def forward(self, states: Float[Tensor, "B L R D"]) -> Float[Tensor, "B M R D"]:
        """Repeat the last states, without copying, for each decoder layer."""
        return states[:, -1:].expand(-1, self.decoder_layers, -1, -1)


class FeedForward(nn.Module):
    """``W2 act(W1 x + b1) + b2``, the channel mixer of a Transformer block.

    Args:
        width: Features D.
        hidden: Hidden features. Defaults to 4 D.
        activation: Called without arguments.
        linear: Called with ``inputs=, outputs=``.
    """

    def __init__(
        self,
        width: int,
        *,
        hidden: int | None = None,
        activation: Callable[[], nn.Module] = nn.GELU,
        linear: Linear = plain_linear,
    ) -> None:
        super().__init__()
        hidden = hidden or 4 * width
        self.up = linear(inputs=width, outputs=hidden)
        self.act = activation()
        self.down = linear(inputs=hidden, outputs=width)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Mix the features of each position."""
        return self.down(self.act(self.up(x)))


class GLU(nn.Module):
    """Gated linear unit ``W2 (act(W1 x) * W3 x)``, without biases; with SiLU it is SwiGLU (Shazeer, arXiv:2002.05202).

    Args:
        width: Features D.
        hidden: Hidden features. Defaults to 8/3 D, rounded up to a multiple of 8, for as many parameters as the MLP.
        activation: Called without arguments.
        linear: Called with ``inputs=, outputs=, bias=``.
    """

    def __init__(
        self,
        width: int,
        *,
        hidden: int | None = None,
        activation: Callable[[], nn.Module] = nn.SiLU,
        linear: Linear = plain_linear,
    ) -> None:
        super().__init__()
        hidden = hidden or -(-8 * width // 24) * 8
        self.gate = linear(inputs=width, outputs=hidden, bias=False)
        self.up = linear(inputs=width, outputs=hidden, bias=False)
        self.down = linear(inputs=hidden, outputs=width, bias=False)
        self.act = activation()

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Mix the features of each position."""
        return self.down(self.act(self.gate(x)) * self.up(x))


def same_padding_shortcut(x: Tensor, stride: int, channels: int) -> Tensor:
    """Parameter-free shortcut between convolutional stages: subsample, then pad channels with zeros (option A)."""
    x = x[:, :, ::stride, ::stride]
    more = channels - x.shape[1]
    return F.pad(x, (0, 0, 0, 0, more // 2, more - more // 2)) if more else x


class Patches(nn.Module):
    """Cut an image into patches and embed each: [B, C, H, W] to [B, N, D], N = H W / patch^2.

    Args:
        channels: Channels C.
        image: Height and width in pixels, or one number.
        patch: Side of a patch; divides both.
        width: Features D.
    """

    def __init__(self, channels: int, image: int | tuple[int, int], patch: int, width: int) -> None:
        super().__init__()
        self.shape = (channels, *((image, image) if isinstance(image, int) else tuple(image)))
        if self.shape[1] % patch or self.shape[2] % patch:
            raise ValueError(
                f"Patches: patch {patch} does not divide the image {self.shape[1:]}; give a common divisor."
            )
        self.grid = (self.shape[1] // patch, self.shape[2] // patch)
        self.count = self.grid[0] * self.grid[1]
        self.embed = nn.Conv2d(channels, width, patch, patch)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """Embedded patches, row by row."""
        if tuple(image.shape[1:]) != self.shape:
            raise ValueError(
                f"Patches: image {tuple(image.shape)}; expected [batch, {', '.join(map(str, self.shape))}]."
            )
        return self.embed(image).flatten(2).transpose(1, 2)
