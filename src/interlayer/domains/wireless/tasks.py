"""Images that are sent to a receiver which has a similar one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from interlayer.core import datasets
from interlayer.core.channel import Channel
from interlayer.core.data import Batch, DataShape, answer, moved
from interlayer.core.degraded import decode, encode, luma, ms_ssim, psnr, to_tensor
from interlayer.core.task import Task

SNRS = (-5.0, 0.0, 5.0)  # at which models are judged, in dB; they learn on all between
GRID = 16  # images have sides of multiples of it


class Transmission(Task):
    """Send images over a noisy channel to a receiver that has the same scene from a little aside.

    A model gets ``image=``, ``snr=`` and ``side=`` and gives the image. The side image is the same photograph ``shift`` pixels to the right
    and a little darker, as from the second camera of a stereo pair (a flat scene). The loss is the squared error; ``psnr`` is the mean
    over validation crops and over SNRs of -5, 0 and 5 dB, with ``psnr at -5 dB`` and so on beside it, and MS-SSIM at
    three scales. The trivial
    predictor is the mean brightness of the training photographs.

    Args:
        name: Name in the report.
        train: Photographs to learn from, each [1, C, H, W] from 0 to 1.
        validation: Others, to be judged on.
        shift: Pixels between the two images.
        patch: Side of a training patch.
        side: Side of a validation crop, at least 48; both multiples of 16.
        crops: Crops of each photograph, along its diagonal.
        about: One line on the data.

    Raises:
        ValueError: Sides that are no multiples of 16, or a photograph that is too small.

    Examples:
        >>> task = Transmission("mine", [torch.rand(1, 1, 64, 80)], [torch.rand(1, 1, 64, 80)], patch=16, side=48, crops=2)
        >>> inputs, image = next(task.batches(0, 5))
        >>> sorted(inputs), image.shape, bool((-5 <= inputs["snr"]).all())
        (['image', 'side', 'snr'], torch.Size([5, 1, 16, 16]), True)
    """

    metric, higher, unit, base = "psnr", True, "squared error", "djscc-side-info"

    def __init__(
        self,
        name: str,
        train: Sequence[Tensor],
        validation: Sequence[Tensor],
        *,
        shift: int = 4,
        patch: int = 32,
        side: int = 64,
        crops: int = 4,
        about: str = "",
    ) -> None:
        if patch % GRID or side % GRID or patch < GRID or side < 44:
            raise ValueError(
                f"task {name!r}: patch {patch}, side {side}; expected multiples of {GRID}, the side at least 48."
            )
        small = [p.shape for p in train if min(p.shape[2], p.shape[3] - shift) < patch]
        if small := small + [p.shape for p in validation if min(p.shape[2], p.shape[3] - shift) < side]:
            raise ValueError(
                f"task {name!r}: a photograph {tuple(small[0])} is too small for patches of {patch}, crops of {side} and a shift "
                f"of {shift}. Leave it out, or take smaller ones."
            )
        self.name, self.about, self.train, self.shift, self.patch = name, about, list(train), shift, patch
        pairs = [self._pair(p, *_corner(p, side + shift, i, crops), side) for p in validation for i in range(crops)]
        self.held = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])
        self.mean = float(torch.stack([p.mean() for p in train]).mean())
        self.shape = DataShape("image", "image", channels=train[0].shape[1], height=patch, width=patch)

    def _pair(self, photograph: Tensor, top: int, left: int, side: int) -> tuple[Tensor, Tensor]:
        rows = photograph[..., top : top + side, :]
        first, second = rows[..., left : left + side], rows[..., left + self.shift : left + self.shift + side]
        return first, 0.9 * second

    def batches(self, seed: int, batch_size: int, split: str = "train") -> Iterator[Batch]:
        """Random patches at random SNRs without end, or the validation crops, one batch for each SNR."""
        if split != "train":
            image, side = self.held
            for snr in SNRS:
                yield {"image": image, "snr": torch.full((len(image),), snr), "side": side}, image
            return
        draw = torch.Generator().manual_seed(seed)

        def below(n: int) -> int:
            return int(torch.randint(n, (), generator=draw))

        while True:
            pairs = []
            for _ in range(batch_size):
                p = self.train[below(len(self.train))]
                top, left = below(p.shape[2] - self.patch + 1), below(p.shape[3] - self.patch - self.shift + 1)
                pairs.append(self._pair(p, top, left, self.patch))
            image, side = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            snrs = SNRS[0] + (SNRS[-1] - SNRS[0]) * torch.rand(batch_size, generator=draw)
            yield {"image": image, "snr": snrs, "side": side}, image

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Mean squared error."""
        outputs = answer(outputs)
        if outputs.shape != targets.shape:
            raise ValueError(
                f"task {self.name!r}: outputs {tuple(outputs.shape)} for images {tuple(targets.shape)}; expected equal shapes."
            )
        return F.mse_loss(outputs, targets)

    def evaluate(
        self, predict: Callable[[Any], Any], batch_size: int, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """Loss, PSNR and MS-SSIM over the validation crops; see ``Task.evaluate``."""
        found: dict[str, list[Tensor]] = {}
        for inputs, targets in self.batches(0, batch_size, "validation"):
            inputs, targets = moved((inputs, targets), device)
            outputs = answer(predict(inputs)).float().clamp(0, 1)
            if not bool(outputs.isfinite().all()):
                outputs = torch.full_like(outputs, math.nan)
            at = f"psnr at {float(inputs['snr'][0]):g} dB"
            finite = bool(outputs.isfinite().all())
            worst = torch.full((len(targets),), math.nan)
            found.setdefault("loss", []).append((outputs - targets).square().mean((1, 2, 3)))
            found.setdefault(at, []).append(psnr(outputs, targets) if finite else worst)
            found.setdefault("ms-ssim", []).append(ms_ssim(outputs, targets, scales=3) if finite else worst)
        means = {name: float(torch.cat(values).mean()) for name, values in found.items()}
        each = [v for name, v in means.items() if name.startswith("psnr at")]
        return means | {"psnr": sum(each) / len(each)}

    def trivial(self) -> dict[str, float]:
        """Scores of the mean brightness."""
        return self.evaluate(lambda inputs: torch.full_like(inputs["image"], self.mean), 64)


def _corner(photograph: Tensor, side: int, i: int, crops: int) -> tuple[int, int]:
    top, left = ((n - side) * i // max(crops - 1, 1) for n in photograph.shape[2:])
    return max(top, 0), max(left, 0)


def digital(
    image: Float[Tensor, "1 C H W"], symbols: int, snr: float, channel: Channel | None = None
) -> Float[Tensor, "1 C H W"]:
    """The best JPEG whose bits a code at capacity could carry: the usual bound for separate coding.

    The file's headers do not count. Where no quality fits, the receiver knows the mean brightness alone.

    Args:
        image: One image from 0 to 1.
        symbols: Complex symbols that may be sent.
        snr: In dB.
        channel: Whose capacity counts. Defaults to AWGN.

    Examples:
        >>> image = torch.rand(1, 1, 64, 64)
        >>> digital(image, 10, 0.0).std() == 0, digital(image, 10_000, 10.0).std() > 0.1
        (tensor(True), tensor(True))
    """
    bits = symbols * (Channel() if channel is None else channel).capacity(snr)
    low, high, best = 1, 95, None
    while low <= high:  # sizes rise with quality
        quality = (low + high) // 2
        data = encode(image, quality)
        if 8 * _scan(data) <= bits:
            low, best = quality + 1, data
        else:
            high = quality - 1
    return torch.full_like(image, float(image.mean())) if best is None else decode(best).to(image)


def _scan(data: bytes) -> int:
    """Bytes of the coded image in a JPEG file, without tables and markers."""
    begin = data.index(b"\xff\xda")
    return len(data) - begin - 2 - int.from_bytes(data[begin + 2 : begin + 4], "big") - 2


@cache
def photographs_sent(*, photographs: tuple[str, ...] = (), shift: int = 4) -> Transmission:
    """Grey photographs that ship with scikit-image and scikit-learn: most to learn from, four to be judged on.

    Args:
        photographs: Which; the last is judged on. Defaults to all.
        shift: Pixels between the two images.
    """
    names = photographs or tuple(n for n in datasets.PHOTOGRAPHS if n not in HELD) + HELD
    held = names[-len(HELD) :] if not photographs else names[-1:]
    grey = {n: _grey(n) for n in names}
    about = "Grey photographs over AWGN at -5 to 5 dB, with the same scene a few pixels aside at the receiver."
    return Transmission(
        "transmission", [grey[n] for n in names if n not in held], [grey[n] for n in held], shift=shift, about=about
    )


HELD = ("astronaut", "camera", "cat", "coffee")


def _grey(name: str) -> Tensor:
    """A photograph in grey at half its size, so that a patch shows more than a texture."""
    image = to_tensor(datasets.photograph(name))
    image = luma(image) if image.shape[1] == 3 else image
    return F.avg_pool2d(image, 2)
