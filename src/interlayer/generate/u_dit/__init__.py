"""U-DiT: a U-shaped diffusion transformer whose self-attention works on down-sampled tokens, none of which is lost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from interlayer.core.conditioning import AdaLNBlock, AdaLNHead, Condition, check, xavier
from interlayer.core.config import configured
from interlayer.core.data import DataShape, run
from interlayer.core.example import Example
from interlayer.core.fit import fit
from interlayer.core.slots import choose
from interlayer.generate.tasks import DiffusionTask, digit_images
from interlayer.generate.u_dit.parts import (
    FFNS,
    Double,
    DownSampledAttention,
    Halve,
    RepFeedForward,
    conv,
)

# The authors' three models, for latents of 4 channels and 32 x 32; the last is for small images.
SIZES: dict[str, dict[str, Any]] = {
    "S": {"width": 96, "heads": 4, "depth": (2, 5, 8, 5, 2)},
    "B": {"width": 192, "heads": 8, "depth": (2, 5, 8, 5, 2)},
    "L": {"width": 384, "heads": 16, "depth": (2, 5, 8, 5, 2)},
    "nano": {"width": 16, "heads": 2, "depth": (1, 1, 1, 1, 1)},
}


@configured
class UDiT(nn.Module):
    r"""A U-Net of diffusion-transformer blocks whose attention down-samples queries, keys and values but keeps every token.

    From `U-DiTs: Downsample Tokens in U-Shaped Diffusion Transformers <https://arxiv.org/abs/2405.02730>`_. Three levels of
    resolution with D, 2 D and 4 D features; the decoder's upper level has 2 D as well. Each block is two pairs of attention and
    feed-forward layers with adaLN-Zero conditioning, and each level embeds time and class for itself, and
    drops classes in training for itself (the decoder uses the second level's). The attention of a feature map x is

    $$y = \mathrm{merge}(\mathrm{softmax}(\tau \hat q \hat k^\top) v), \qquad q, k, v = W\,\mathrm{split}(x + K * x)$$

    with a depthwise 5 x 5 kernel K, unit vectors $\hat q$ and $\hat k$ that are rotated by row and column, a learned $\tau$, and
    ``split`` dealing the pixels into four groups that attend each within itself: a quarter of the pairs of pixels.

    The feed-forward layers hold more weights than they need (``ffn="rep"``); ``folded()`` gives a new model without the surplus, and
    evaluation mode changes no weight. (In the authors' code, YuchuanTian/U-DiT, each call of ``eval()`` folds into the live weights
    again.) Published costs are those of the folded model.

    The authors train with AdamW at 1e-4 without decay, batches of 256, random flips, a running mean of the weights (0.9999) and
    ``Diffusion(variance="learned")``, and sample with 250 steps of ``Ancestral``.

    Args:
        channels: Channels C of the image.
        image: Height and width in pixels, or one number; multiples of 4 ``down``.
        classes: Number of classes K.
        size: ``S``, ``B`` or ``L`` of the paper, or ``nano``; the next three override it.
        width: Features D of the first level, even.
        heads: Attention heads of every level.
        depth: Blocks of the five stages: two down, the middle, two up.
        ratio: Hidden features of the feed-forward layers for each of their inputs.
        down: Down-sampling factor of the attention; 1 gives a plain U-shaped transformer.
        cosine: See ``DownSampledAttention``.
        rotary: See ``DownSampledAttention``.
        attention: What mixes tokens, called as ``DownSampledAttention`` is.
        ffn: ``rep``, ``depthwise`` (its folded form), ``plain`` (no convolution), or a class of your own (``width=, hidden=``).
        learned_variance: Whether to give 2 C channels, the second half for ``Diffusion(variance="learned")``.
        dropout: Share of the classes that are dropped in training, for guidance.

    Shapes: images [B, C, H, W], times [B] and classes [B] (K: no class) to [B, C or 2 C, H, W].

    Raises:
        ValueError: An unknown size or ``ffn``, an image that ``down`` does not fit, or inputs of another shape.

    Examples:
        >>> model = UDiT(1, 16, classes=10, size="nano", learned_variance=False)
        >>> model(torch.randn(3, 1, 16, 16), torch.tensor([0, 10, 999]), torch.tensor([1, 2, 10])).shape
        torch.Size([3, 1, 16, 16])
    """

    config: dict[str, Any]

    def __init__(
        self,
        channels: int = 4,
        image: int | tuple[int, int] = 32,
        *,
        classes: int = 1000,
        size: str = "S",
        width: int | None = None,
        heads: int | None = None,
        depth: tuple[int, ...] | None = None,
        ratio: float = 2,
        down: int = 2,
        cosine: bool = True,
        rotary: bool = True,
        attention: Callable[..., nn.Module] = DownSampledAttention,
        ffn: Any = "rep",
        learned_variance: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        rows, columns = (image, image) if isinstance(image, int) else image
        if size not in SIZES:
            raise ValueError(f"UDiT: size {size!r}; expected one of {list(SIZES)}.")
        if down < 1 or rows % (4 * down) or columns % (4 * down):
            raise ValueError(
                f"UDiT: image {rows} x {columns} with down={down}; expected multiples of {4 * max(down, 1)}."
            )
        given: dict[str, Any] = {"width": width, "heads": heads, "depth": depth}
        sizes = SIZES[size] | {k: v for k, v in given.items() if v is not None}
        d, heads, depth = sizes["width"], sizes["heads"], sizes["depth"]
        if len(depth) != 5:
            raise ValueError(f"UDiT: depth {depth}; expected the blocks of five stages.")
        self.shape, self.classes = (channels, rows, columns), classes

        def stage(blocks: int, width: int, halvings: int) -> nn.ModuleList:
            grid = (rows >> halvings, columns >> halvings)
            pairs = []
            for _ in range(2 * blocks):
                mixer = attention(width, heads, grid, down=down, cosine=cosine, rotary=rotary)
                mlp = choose("UDiT: ffn", ffn, FFNS, width=width, hidden=int(ratio * width))
                xavier(mixer, mlp)
                pairs.append(AdaLNBlock(width, mixer, mlp))
            return nn.ModuleList(pairs)

        self.embed = nn.Conv2d(channels, d, 3, padding=1)
        self.encoder1, self.down1 = stage(depth[0], d, 0), Halve(d)
        self.encoder2, self.down2 = stage(depth[1], 2 * d, 1), Halve(2 * d)
        self.middle, self.up2 = stage(depth[2], 4 * d, 2), Double(4 * d)
        self.reduce2, self.decoder2 = nn.Linear(4 * d, 2 * d), stage(depth[3], 2 * d, 1)
        self.up1 = Double(2 * d)
        self.reduce1, self.decoder1 = nn.Linear(2 * d, 2 * d), stage(depth[4], 2 * d, 0)
        self.output = nn.Conv2d(2 * d, 2 * d, 3, padding=1)
        xavier(self.down1, self.down2, self.up1, self.up2, self.reduce1, self.reduce2, self.output)
        nn.init.xavier_uniform_(self.embed.weight.detach().flatten(1))
        nn.init.zeros_(self.embed.bias)  # type: ignore[arg-type]
        needed = (depth[0], True, depth[2])  # a stage without blocks needs no condition; the head needs the second
        self.conditions = nn.ModuleList(
            Condition(classes, f * d, dropout=dropout) if n else nn.Identity()
            for n, f in zip(needed, (1, 2, 4), strict=True)
        )
        self.head = AdaLNHead(2 * d, nn.Conv2d(2 * d, channels * (1 + learned_variance), 3, padding=1))

    @classmethod
    def for_task(cls, shape: DataShape, **options: Any) -> Self:
        """A U-DiT for a task of noised images; by default ``nano``."""
        shape.require("UDiT", "image", "noise")
        options = {"size": "nano", "classes": shape.classes, "learned_variance": False, **options}
        return cls(shape.channels, (shape.height, shape.width), **options)

    def forward(
        self, x: Float[Tensor, "B C H W"], t: Num[Tensor, " B"], y: Int[Tensor, " B"]
    ) -> Float[Tensor, "B E H W"]:
        """What the process wants to know of the noised images."""
        check("UDiT", self.shape, self.classes, x, t, y)
        c1, c2, c3 = (condition(t, y) if isinstance(condition, Condition) else x for condition in self.conditions)
        first = _through(self.encoder1, self.embed(x).movedim(1, -1), c1)
        second = _through(self.encoder2, self.down1(first), c2)
        x = _through(self.middle, self.down2(second), c3)
        x = _through(self.decoder2, self.reduce2(self.join(self.up2(x), second)), c2)
        x = _through(self.decoder1, self.reduce1(self.join(self.up1(x), first)), c2)
        return self.head(conv(self.output, x), c2)

    def join(self, x: Tensor, skipped: Tensor) -> Tensor:
        """What comes from below, and what the encoder had at this resolution."""
        return torch.cat((x, skipped), -1)

    def folded(self) -> Self:
        """A new model that computes the same with folded feed-forward layers; nothing of this one changes."""
        model = copy.deepcopy(self)
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, RepFeedForward):
                    setattr(module, name, child.folded())
                    model.config = model.config | {"ffn": "depthwise"}
        return model


def _through(stage: nn.ModuleList, x: Tensor, c: Tensor) -> Tensor:
    for block in stage:
        x = block(x, c)
    return x


def _awake(**options: Any) -> UDiT:
    """A small model whose blocks and last layer don't begin at zero, so that contracts see all of it."""
    model = UDiT(1, 8, classes=3, width=8, heads=2, depth=(1, 0, 0, 0, 0), **options)
    for parameter in model.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.2)
    return model


def _train() -> tuple[float, float]:
    """Squared error of the noise in held-out digits after 6 steps, and that of predicting none."""
    data = digit_images()
    task = DiffusionTask("digits", data["train"], data["validation"])
    model = UDiT.for_task(task.shape, width=8, depth=(1, 0, 0, 0, 1))
    fit(model, task.batches(0, 16), lambda m, batch: task.loss(run(m, batch[0]), batch[1]), steps=6, lr=3e-3)
    return task.error(partial(run, model.eval())), task.error(lambda inputs: torch.zeros_like(inputs["x"]))


EXAMPLE = Example(
    make=partial(_awake, ffn="depthwise"),
    inputs=lambda: (torch.randn(2, 1, 8, 8), torch.tensor([5.0, 700.0]), torch.tensor([0, 3])),
    wrong=lambda: (torch.randn(2, 1, 8, 9), torch.tensor([5.0, 700.0]), torch.tensor([0, 3])),
    train=_train,
    modes={"unfolded, other attention": partial(_awake, down=1, cosine=False, rotary=False)},
)
