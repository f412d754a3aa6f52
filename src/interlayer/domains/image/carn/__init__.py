"""CARN: light super-resolution whose residual blocks cascade, and its mobile variant."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.config import configured
from interlayer.core.data import DataShape
from interlayer.core.datasets import photograph
from interlayer.core.degraded import Pairs, eight_bit, enlarge, luma, shrink, to_tensor
from interlayer.core.example import Example
from interlayer.core.fit import descend

DIV2K = (0.4488, 0.4371, 0.4040)  # mean RGB of the training images
STAGES = {2: (2,), 3: (3,), 4: (2, 2), 8: (2, 2, 2)}
CASCADES = ("both", "local", "global", "none")


class Residual(nn.Module):
    """``relu(x + body(x))``: two 3x3 convolutions, or the efficient form, two group convolutions and one of 1x1.

    Args:
        width: Channels C.
        groups: Groups G of the efficient form, which takes 1/G + 1/18 of the multiply-adds; None for the plain one.

    Shapes: [B, C, H, W] to the same.
    """

    def __init__(self, width: int, groups: int | None = None) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(width, width, 3, padding=1, groups=groups or 1) for _ in range(2)]
        point = [] if groups is None else [nn.ReLU(), nn.Conv2d(width, width, 1)]
        self.body = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], *point)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Add the branch."""
        return F.relu(x + self.body(x))


class Cascade(nn.Module):
    """Run blocks one after the other; each but the first reads a 1x1 fusion of the input and all block outputs so far.

    ``o_i = relu(W_i [x, B_1, ..., B_i])`` with ``B_i = block_i(o_{i-1})`` and ``o_0 = x``; the last fusion is the output.

    Args:
        blocks: One module for all steps (recursive), or one for each.
        width: Channels C.
        steps: How many blocks run.
        fuse: Whether to fuse; without it the blocks are a plain chain.

    Shapes: [B, C, H, W] to the same.
    """

    def __init__(self, blocks: Sequence[nn.Module], width: int, steps: int, *, fuse: bool = True) -> None:
        super().__init__()
        self.blocks, self.steps = nn.ModuleList(blocks), steps
        self.fusions = nn.ModuleList(nn.Conv2d(width * (i + 2), width, 1) for i in range(steps if fuse else 0))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Run and fuse."""
        seen = [x]
        for i in range(self.steps):
            block = self.blocks[i % len(self.blocks)](x)
            seen.append(block)
            x = self.fuse(i, seen) if self.fusions else block
        return x

    def fuse(self, step: int, seen: list[Tensor]) -> Tensor:
        """The input of the next block from the cascade's input and all block outputs so far."""
        return F.relu(self.fusions[step](torch.cat(seen, 1)))


@configured
class CARN(nn.Module):
    """Residual blocks in cascades, and a cascade of these: every level sees all features below it at the cost of 1x1 fusions.

    Paper: Ahn, Kang and Sohn, "Fast, Accurate, and Lightweight Super-Resolution with Cascading Residual Network",
    arXiv:1803.08664; code nmhkahn/CARN-pytorch.

    Equation: with the 3x3 entry ``H_0``, ``B_i = cascade_i(H_{i-1})`` and ``H_i = relu(W_i [H_0, B_1, ..., B_i])``, i = 1 to 3; each
    ``cascade_i`` is the same over three residual blocks (see ``Cascade``). Then come a 3x3 convolution, ReLU and pixel shuffle for
    the scale (twice by 2 for 4) and a 3x3 exit. One body serves all scales, each with its own upsampler. The mean colour is
    subtracted before and added after.

    ``CARN.mobile()`` is CARN-M: efficient blocks of 4 groups, one block for all three steps of a cascade (recursive), and
    group convolutions in the upsamplers. Initialisation is torch's default and there is no self-ensemble, as in the authors'
    code.

    Cost for an image of N low-resolution pixels at the published size: 1.59M parameters and 0.97M N (x2), 1.16M N (x3) or 1.58M N
    (x4) multiply-adds; see ``benchmarks/carn.py``. ``fit`` is the paper's training. A step uses one upsampler, so
    DistributedDataParallel needs ``find_unused_parameters=True`` where several scales are built.

    Args:
        width: Channels C, 64 in the paper.
        scales: The factors that are built, of 2, 3, 4 and 8.
        groups: Groups G of efficient blocks and upsamplers; None for plain residual blocks.
        recursive: Whether the three blocks of a cascade are one.
        cascade: ``both``, or for the paper's ablation ``local`` (fusion inside of blocks only), ``global`` or ``none``.
        mean: Mean of each channel; its length is the number of channels. Defaults to DIV2K's mean colour.

    Shapes: [B, channels, H, W] and a scale s of ``scales`` (may be left out if there is one) to [B, channels, s H, s W].

    Raises:
        ValueError: Unknown scale or cascade, groups that do not divide the width, an image of another shape.

    Examples:
        >>> import torch
        >>> CARN.mobile(width=16)(torch.rand(1, 3, 8, 10), scale=3).shape
        torch.Size([1, 3, 24, 30])
    """

    mean: Tensor

    def __init__(
        self,
        *,
        width: int = 64,
        scales: Sequence[int] = (2, 3, 4),
        groups: int | None = None,
        recursive: bool = False,
        cascade: str = "both",
        mean: Sequence[float] = DIV2K,
    ) -> None:
        super().__init__()
        if not scales or any(s not in STAGES for s in scales):
            raise ValueError(f"CARN: scales {tuple(scales)}; expected some of {tuple(STAGES)}.")
        if cascade not in CASCADES:
            raise ValueError(f"CARN: cascade {cascade!r} is not one of {CASCADES}.")
        if groups is not None and (groups < 1 or width % groups):
            raise ValueError(f"CARN: width {width} is not a multiple of groups {groups}. Change one of them.")
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.entry = nn.Conv2d(len(mean), width, 3, padding=1)

        def local() -> Cascade:
            blocks = [Residual(width, groups) for _ in range(1 if recursive else 3)]
            return Cascade(blocks, width, 3, fuse=cascade in ("both", "local"))

        self.body = Cascade([local() for _ in range(3)], width, 3, fuse=cascade in ("both", "global"))
        self.upsample = nn.ModuleDict({str(s): _upsampler(width, s, groups or 1) for s in scales})
        self.exit = nn.Conv2d(width, len(mean), 3, padding=1)

    @classmethod
    def mobile(cls, **options: Any) -> Self:
        """CARN-M."""
        return cls(**{"groups": 4, "recursive": True, **options})

    @classmethod
    def for_task(cls, shape: DataShape, **options: Any) -> Self:
        """A narrow network for a task of images to images; it has the task's scales."""
        shape.require("CARN", "image", "image")
        mean = DIV2K if shape.channels == 3 else (0.5,) * shape.channels
        return cls(**{"width": 16, "scales": shape.scales, "mean": mean, **options})

    def forward(self, image: Float[Tensor, "B C H W"], scale: int | None = None) -> Float[Tensor, "B C sH sW"]:
        """The image, ``scale`` times as large."""
        channels = self.entry.in_channels
        if image.ndim != 4 or image.shape[1] != channels or 0 in image.shape:
            raise ValueError(
                f"CARN: image {tuple(image.shape)}; expected [batch, {channels}, height, width] with at least one image and pixel."
            )
        built = list(self.upsample)
        name = built[0] if scale is None and len(built) == 1 else str(scale)
        if name not in built:
            raise ValueError(f"CARN: scale {scale}; this network has {', '.join(built)}. Pass one of them as `scale`.")
        features = self.body(self.entry(image - self.mean))
        return self.exit(self.upsample[name](features)) + self.mean


def _upsampler(width: int, scale: int, groups: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for factor in STAGES[scale]:
        parts += [nn.Conv2d(width, factor**2 * width, 3, padding=1, groups=groups), nn.ReLU(), nn.PixelShuffle(factor)]
    return nn.Sequential(*parts)


def published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the authors' checkpoints, under the names here: ``CARN.mobile().load_state_dict(published(theirs))``.

    Args:
        state: What ``torch.load("carn_m.pth", map_location="cpu", weights_only=True)`` gives; ``carn.pth`` has the same names.

    Examples:
        >>> list(published({"b2.b1.body.0.bias": torch.zeros(1), "b2.c3.body.0.bias": torch.ones(1)}))
        ['body.blocks.1.blocks.0.body.0.bias', 'body.blocks.1.fusions.2.bias']
    """
    found = {}
    for name, value in state.items():
        if "_mean." in name:
            continue
        name = re.sub(r"c([123])\.body\.0", lambda m: f"fusions.{int(m[1]) - 1}", name)
        name = re.sub(r"b([123])\.", lambda m: f"blocks.{int(m[1]) - 1}.", name)
        name = re.sub(r"^(blocks|fusions)", r"body.\1", name)
        found[re.sub(r"upsample\.up(\d)\.body", r"upsample.\1", name)] = value
    return found


def fit(
    model: nn.Module,
    pairs: Mapping[int, Pairs],
    *,
    steps: int = 600_000,
    batch: int = 64,
    patch: int = 64,
    lr: float = 1e-4,
    halve: int = 400_000,
    clip: float = 10.0,
    seed: int = 0,
) -> list[float]:
    """Train on all scales at once: every step takes patches of one scale, drawn at random.

    The paper's recipe: L1 loss, Adam, learning rate halved every ``halve`` steps, gradient norm clipped as in the authors' code,
    patches flipped and turned at random.

    Args:
        model: Called with low-resolution patches and ``scale``; trained in place.
        pairs: Training pairs for each scale.
        steps: How many.
        batch: Patches in a step.
        patch: Side of a low-resolution patch in pixels.
        lr: Learning rate at first.
        halve: Steps after which the learning rate is halved, again and again.
        clip: Largest norm of the gradient.
        seed: Decides scales and patches.

    Returns:
        The loss of every step.
    """
    generator, scales = torch.Generator().manual_seed(seed), list(pairs)
    optimiser = torch.optim.Adam(model.parameters(), lr, fused=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, halve, 0.5)
    weight = next(model.parameters())
    losses = []
    model.train()
    for step in range(steps):
        scale = scales[int(torch.randint(len(scales), (), generator=generator))]
        small, large = (t.to(weight) for t in pairs[scale].patches(batch, patch, generator))

        def loss(small: Tensor = small, large: Tensor = large, scale: int = scale) -> Tensor:
            return F.l1_loss(model(small, scale=scale), large)

        losses.append(descend(model, optimiser, loss, share=step / steps, clip=clip)[0])
        schedule.step()
    return losses


def _train() -> tuple[float, float]:
    """Losses on a photograph of grass after training on one of gravel: of a narrow CARN, and of bicubic interpolation."""
    gravel, grass = (luma(to_tensor(photograph(name))) for name in ("gravel", "grass"))
    model = CARN(width=16, scales=(2,), mean=(0.45,))
    pairs = Pairs([gravel], lambda image: eight_bit(shrink(image, 2)), scale=2)
    fit(model, {2: pairs}, steps=150, batch=4, patch=12, lr=7e-3, halve=50)
    small, large = eight_bit(shrink(grass, 2))[..., :64, :64], grass[..., :128, :128]
    with torch.no_grad():
        return F.l1_loss(model.eval()(small), large).item(), F.l1_loss(enlarge(small, 2), large).item()


EXAMPLE = Example(
    make=lambda: CARN(width=4, scales=(2,)),
    inputs=lambda: (torch.rand(2, 3, 6, 5),),
    odd=lambda: (torch.rand(3, 3, 1, 7),),
    axis=3,
    modes={
        "mobile, three times, fusion inside of blocks": lambda: CARN.mobile(
            width=4, scales=(3,), groups=2, cascade="local"
        ),
    },
    wrong=lambda: (torch.rand(2, 1, 6, 5),),
    train=_train,
)
