"""A photograph as a function of coordinates: what fits into few bytes, judged after its numbers are rounded to 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interlayer.core.data import Batch, DataShape, answer, moved
from interlayer.core.datasets import photograph
from interlayer.core.degraded import psnr, to_tensor
from interlayer.core.fields import BITS, dequantize, grid, quantize, stored_bytes
from interlayer.core.task import Subject, Task


class Photograph(Task):
    """Store an image in the weights of a network from coordinates in [-1, 1]^2 to values from 0 to 1. A sample is a pixel.

    The metric is the peak signal-to-noise ratio of the whole image, in dB, after every parameter was rounded to 8 bits, as it is
    stored; ``bytes`` beside it is the size of these numbers. There is nothing to generalise to: it is the image itself that is
    judged. Give large batches, such as ``--batch-size 1024``.

    Args:
        name: Name in the report.
        image: [1, C, H, W] from 0 to 1.
        about: One line on the data.

    Examples:
        >>> task = Photograph("mine", torch.rand(1, 3, 20, 30))
        >>> x, y = next(task.batches(0, 5))
        >>> x.shape, y.shape
        (torch.Size([5, 2]), torch.Size([5, 3]))
    """

    metric, higher, unit, base = "psnr", True, "squared error", "field"

    def __init__(self, name: str, image: Tensor, about: str = "") -> None:
        _, channels, *self.size = image.shape
        self.name, self.about = name, about
        self.x, self.y = grid(*self.size), image[0].flatten(1).T.contiguous()
        self.shape = DataShape("vector", "values", classes=channels, features=2)

    def batches(self, seed: int, batch_size: int, split: str = "train") -> Iterator[Batch]:
        """Random pixels without end, or all of them row by row."""
        if split != "train":
            yield from zip(self.x.split(4096), self.y.split(4096), strict=True)
            return
        generator = torch.Generator().manual_seed(seed)
        while True:
            rows = torch.randint(len(self.x), (batch_size,), generator=generator)
            yield self.x[rows], self.y[rows]

    def judge(self, subject: Subject, seed: int) -> dict[str, float]:
        """Scores of the image as it comes back from its bytes."""
        parameters = list(subject.model.parameters())
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p.copy_(dequantize(*quantize(p.cpu().float(), BITS)))
            found = self.evaluate(subject.predict, subject.batch_size, subject.device)
            for p, before in zip(parameters, kept, strict=True):
                p.copy_(before)
        return {**found, "bytes": float(stored_bytes([p.numel() for p in parameters]))}

    def evaluate(
        self, predict: Callable[[Any], Any], batch_size: int, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """Squared error and PSNR of the whole image; see ``Task.evaluate``."""
        parts = [answer(predict(moved(x, device))).cpu().float() for x, _ in self.batches(0, batch_size, "validation")]
        given = torch.cat(parts)
        if not given.isfinite().all():
            return {"loss": float("nan"), "psnr": float("nan")}
        pictures = (values.T.unflatten(1, self.size)[None] for values in (given.clamp(0, 1), self.y))
        return {"loss": float(F.mse_loss(given, self.y)), "psnr": float(psnr(*pictures))}


@cache
def china() -> Photograph:
    """scikit-learn's photograph of a temple: its middle square in grey, 64 pixels wide."""
    picture = to_tensor(photograph("china")).mean(1, keepdim=True)
    side = min(picture.shape[2:])
    top, left = ((n - side) // 2 for n in picture.shape[2:])
    square = picture[..., top : top + side, left : left + side]
    about = "scikit-learn's photograph of a temple as a function of coordinates: 64x64 grey pixels, to be stored in few bytes."
    return Photograph("photograph", F.interpolate(square, size=(64, 64), mode="area"), about)
