"""Super-resolution of photographs as a task: images to larger images, several scales at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interlayer.core.data import Batch, DataShape, answer, moved
from interlayer.core.datasets import photographs
from interlayer.core.degraded import Pairs, eight_bit, enlarge, modcrop, psnr, shrink, to_tensor
from interlayer.core.task import Task


def low_resolution(image: Tensor, scale: int) -> Tensor:
    """What the field trains and tests with: bicubic down-scaling, then 8 bits."""
    return eight_bit(shrink(image, scale))


class SuperResolution(Task):
    """Enlarge photographs. Every training batch is of one scale, drawn at random; a model gets ``image=`` and ``scale=``.

    The loss is the mean absolute error. The metric ``psnr`` is measured as the field does: luma of 8-bit images, without a
    border of ``scale`` pixels, the mean over crops and then over scales; ``psnr x2`` and so on are reported beside it. The
    trivial predictor is bicubic interpolation.

    Args:
        name: Name in the report.
        train: Photographs to learn from, each [1, C, H, W] from 0 to 1.
        validation: Other photographs to be judged on: ``crops`` squares of each, along its diagonal.
        scales: Factors.
        patch: Side of a low-resolution training patch in pixels.
        side: Side of a validation crop in high resolution, made a multiple of all scales.
        crops: Crops of each photograph.
        about: One line on the data.

    Raises:
        ValueError: No scale, or a validation photograph that is smaller than a crop.

    Examples:
        >>> photos = [torch.rand(1, 3, 40, 50), torch.rand(1, 3, 30, 30)]
        >>> task = SuperResolution("mine", photos[:1], photos[1:], scales=(2,), patch=8, side=24)
        >>> inputs, targets = next(task.batches(0, 5))
        >>> inputs["image"].shape, inputs["scale"], targets.shape
        (torch.Size([5, 3, 8, 8]), 2, torch.Size([5, 3, 16, 16]))
    """

    metric, higher, unit, base = "psnr", True, "mean absolute error", "carn"

    def __init__(
        self,
        name: str,
        train: Sequence[Tensor],
        validation: Sequence[Tensor],
        *,
        scales: Sequence[int] = (2, 3, 4),
        patch: int = 12,
        side: int = 96,
        crops: int = 4,
        about: str = "",
    ) -> None:
        if not scales:
            raise ValueError(f"task {name!r}: no scale; expected at least one, such as (2, 3, 4).")
        self.name, self.patch, self.about = name, patch, about
        self.pairs = {s: Pairs(train, lambda x, s=s: low_resolution(x, s), scale=s) for s in scales}
        step = math.lcm(*scales)
        side = max(side // step, 1) * step
        self.held: dict[int, tuple[Tensor, Tensor]] = {}
        for s in scales:
            parts: list[tuple[Tensor, Tensor]] = []
            for photograph in validation:
                large = modcrop(photograph, step)
                if min(large.shape[2:]) < side:
                    raise ValueError(
                        f"task {name!r}: a validation photograph {tuple(photograph.shape)} is smaller than a crop of {side}. "
                        "Leave it out, or pass a smaller `side`."
                    )
                small = low_resolution(large, s)
                for i in range(crops):
                    top, left = (((n - side) // step * i // max(crops - 1, 1)) * step for n in large.shape[2:])
                    parts.append((_square(small, top // s, left // s, side // s), _square(large, top, left, side)))
            self.held[s] = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])
        self.shape = DataShape(
            "image", "image", channels=train[0].shape[1], height=patch, width=patch, scales=tuple(scales)
        )

    def batches(self, seed: int, batch_size: int, split: str = "train") -> Iterator[Batch]:
        """Patches of a random scale without end, or the validation crops, one batch for each scale."""
        if split != "train":
            for scale, (small, large) in self.held.items():
                yield {"image": small, "scale": scale}, large
            return
        generator, scales = torch.Generator().manual_seed(seed), list(self.pairs)
        while True:
            scale = scales[int(torch.randint(len(scales), (), generator=generator))]
            small, large = self.pairs[scale].patches(batch_size, self.patch, generator)
            yield {"image": small, "scale": scale}, large

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Mean absolute error."""
        outputs = answer(outputs)
        if outputs.shape != targets.shape:
            raise ValueError(
                f"task {self.name!r}: outputs {tuple(outputs.shape)} for targets {tuple(targets.shape)}; expected equal shapes."
            )
        return F.l1_loss(outputs, targets)

    def evaluate(
        self, predict: Callable[[Any], Any], batch_size: int, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """Loss and PSNR over the validation crops; see ``Task.evaluate``."""
        losses, found = [], {}
        for inputs, targets in self.batches(0, batch_size, "validation"):
            inputs, targets = moved((inputs, targets), device)
            outputs = answer(predict(inputs)).float()
            losses.append(float(self.loss(outputs, targets)))
            scale = inputs["scale"]
            y = targets.shape[1] == 3
            finite = bool(torch.isfinite(outputs).all())
            each = psnr(eight_bit(outputs), targets, border=scale, y=y).mean() if finite else math.nan
            found[f"psnr x{scale}"] = float(each)
        return {"loss": sum(losses) / len(losses), "psnr": sum(found.values()) / len(found), **found}

    def trivial(self) -> dict[str, float]:
        """Scores of bicubic interpolation."""
        return self.evaluate(lambda inputs: enlarge(inputs["image"], inputs["scale"]), 64)


def _square(image: Tensor, top: int, left: int, side: int) -> Tensor:
    return image[..., top : top + side, left : left + side]


HELD = ("astronaut", "camera", "cat", "coffee")


@cache
def super_resolution() -> SuperResolution:
    """Enlarge photographs 2, 3 and 4 times; four whole photographs are for validation."""
    split: dict[bool, list[Tensor]] = {False: [], True: []}
    for name, picture in photographs().items():
        split[name in HELD].append(to_tensor(picture))
    about = (
        f"Photographs (scikit-image, scikit-learn) to be enlarged 2, 3 and 4 times from bicubic down-scaling: {len(split[False])} for "
        f"training; {', '.join(HELD)} for validation."
    )
    return SuperResolution("super-resolution", split[False], split[True], about=about)
