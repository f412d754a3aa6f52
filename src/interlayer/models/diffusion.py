"""The isotropic diffusion transformer, for images with a time and a class."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from interlayer.core.conditioning import AdaLNBlock, AdaLNHead, Condition, check, xavier
from interlayer.core.config import configured
from interlayer.core.mixer import Attention
from interlayer.core.parts import Patches
from interlayer.core.position import AxialSinusoidal
from interlayer.core.slots import factory, fill

# Table 1 of the paper.
SIZES = {
    "S": {"depth": 12, "width": 384, "heads": 6},
    "B": {"depth": 12, "width": 768, "heads": 12},
    "L": {"depth": 24, "width": 1024, "heads": 16},
    "XL": {"depth": 28, "width": 1152, "heads": 16},
}


@configured
class DiT(nn.Module):
    """Diffusion transformer (Peebles and Xie, arXiv:2212.09748): a Vision Transformer with adaLN-Zero blocks.

    Args:
        channels: Channels C of the image.
        image: Height and width in pixels, or one number.
        patch: Side of a patch in pixels; divides both.
        classes: Number of classes K.
        depth: Number of blocks.
        width: Features D, a multiple of 4.
        heads: Attention heads.
        learned_variance: Whether to give 2 C channels, the second half for ``Diffusion(variance="learned")``.
        dropout: Share of the classes that are dropped in training, for guidance.
        mlp: What mixes the features of each patch.
        activation: Inside the MLP.
        linear: Every linear map of the MLP.

    Shapes: images [B, C, H, W], times [B] and classes [B] (K: no class) to [B, C or 2 C, H, W].

    Raises:
        ValueError: Inputs of another shape.

    Examples:
        >>> import torch
        >>> model = DiT(1, 8, patch=2, classes=10, depth=2, width=32, heads=2)
        >>> model(torch.randn(3, 1, 8, 8), torch.tensor([0, 10, 999]), torch.tensor([1, 2, 10])).shape
        torch.Size([3, 2, 8, 8])
    """

    def __init__(
        self,
        channels: int = 4,
        image: int | tuple[int, int] = 32,
        *,
        patch: int = 2,
        classes: int = 1000,
        depth: int = 12,
        width: int = 384,
        heads: int = 6,
        learned_variance: bool = True,
        dropout: float = 0.1,
        mlp: Any = "mlp",
        activation: Any = "gelu(approximate='tanh')",
        linear: Any = "linear",
    ) -> None:
        super().__init__()
        self.classes, self.patch = classes, patch
        parts = {"activation": factory("activation", activation), "linear": factory("linear", linear)}
        self.patches = Patches(channels, image, patch, width)
        self.position = AxialSinusoidal(width, self.patches.grid)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            mixer, channel_mlp = Attention(width, heads), fill("mlp", mlp, width=width, **parts)
            xavier(mixer, channel_mlp)
            self.blocks.append(AdaLNBlock(width, mixer, channel_mlp))
        nn.init.xavier_uniform_(self.patches.embed.weight.detach().flatten(1))
        nn.init.zeros_(self.patches.embed.bias)  # type: ignore[arg-type]
        self.condition = Condition(classes, width, dropout=dropout)
        self.head = AdaLNHead(width, nn.Linear(width, patch**2 * channels * (1 + learned_variance)))

    def forward(
        self, x: Float[Tensor, "B C H W"], t: Num[Tensor, " B"], y: Int[Tensor, " B"]
    ) -> Float[Tensor, "B E H W"]:
        """What the process wants to know of the noised images."""
        check("DiT", self.patches.shape, self.classes, x, t, y)
        c = self.condition(t, y)
        h = self.position.embed(self.patches(x))
        for block in self.blocks:
            h = block(h, c)
        (rows, columns), p = self.patches.grid, self.patch
        out = self.head(h, c).unflatten(1, (rows, columns)).unflatten(-1, (p, p, -1))  # [B, rows, columns, p, p, E]
        return out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
