"""Two senses as a task: a noisy image of a digit and a noisy sound of it, from which the clean image is restored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from interlayer.core.data import Batch, DataShape
from interlayer.core.datasets import split_digits
from interlayer.core.task import Task

RATE, SAMPLES, BINS = 8000, 512, 32
# Two resonances in Hz for each digit, spread over the range of spoken vowels.
FORMANTS = [(300 + 60 * d, 2300 - 150 * ((7 * d) % 10)) for d in range(10)]


def speak(digits: Tensor, generator: torch.Generator, noise: float) -> Tensor:
    """A synthesised sound for each digit, as log magnitudes in 32 bands: a buzz of random pitch through two resonances, in noise."""
    time = torch.arange(SAMPLES) / RATE
    pitch = 90 + 140 * torch.rand(len(digits), 1, 1, generator=generator)
    harmonic = pitch * torch.arange(1, 40)[:, None]  # [digits, harmonics, 1]
    centre = torch.tensor(FORMANTS, dtype=torch.float32)[digits]
    gain = sum((1 / (1 + ((harmonic - c[:, None, None]) / 120) ** 2) for c in centre.unbind(1)), torch.zeros(()))
    phase = 2 * math.pi * torch.rand(harmonic.shape, generator=generator)
    wave = (gain * (harmonic < RATE / 2) * torch.sin(2 * math.pi * harmonic * time + phase)).sum(1)
    wave = wave / wave.std(1, keepdim=True) + noise * torch.randn(wave.shape, generator=generator)
    spectrum = torch.fft.rfft(wave * torch.hann_window(SAMPLES), norm="ortho").abs()[:, 1:]
    return spectrum.unflatten(1, (BINS, -1)).mean(2).add(1e-3).log()


@cache
def senses(split: str, seed: int, noise: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy images, noisy sounds, clean images and digits; what is validated is drawn once."""
    train, held = split_digits()
    x, y = train if split == "train" else held
    generator = torch.Generator().manual_seed(seed if split == "train" else 10_000)
    clean = x.flatten(1)
    return clean + noise * torch.randn(clean.shape, generator=generator), speak(y, generator, noise), clean, y


class Audiovisual(Task):
    """Restore the image of a digit that is seen and heard through noise. A model gets image [B, 64] and sound [B, 32].

    The images are scikit-learn's 8x8 digits, standardised, with Gaussian noise; the sounds are synthesised, one timbre for each
    digit at random pitches, as log magnitudes in 32 bands. The noise of the training samples is drawn with each seed. The
    metric is the mean squared error.

    Args:
        noise: Standard deviation of the noise of both senses; the clean signals have one of 1.

    Examples:
        >>> (sight, sound), clean = next(Audiovisual().batches(0, 5))
        >>> sight.shape, sound.shape, clean.shape
        (torch.Size([5, 64]), torch.Size([5, 32]), torch.Size([5, 64]))
    """

    name, unit, base = "audiovisual", "squared error", "two-point(two_point=False)"
    shape = DataShape("vectors", "values", classes=64, senses=(64, BINS))

    def __init__(self, noise: float = 1.0) -> None:
        self.noise = noise
        counts = [len(y) for _, y in split_digits()]
        self.about = (
            f"scikit-learn's digits, seen and, synthesised, heard through noise; the clean image is restored: {counts[0]} for "
            f"training, {counts[1]} for validation."
        )

    def batches(self, seed: int, batch_size: int, split: str = "train") -> Iterator[Batch]:
        """Shuffled epochs without end, or the validation samples in order."""
        sight, sound, clean, _ = senses(split, seed if split == "train" else 0, self.noise)
        if split != "train":
            yield from zip(zip(sight.split(256), sound.split(256), strict=True), clean.split(256), strict=True)
            return
        order = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.randperm(len(clean), generator=order).split(batch_size):
                if len(rows) == min(batch_size, len(clean)):
                    yield (sight[rows], sound[rows]), clean[rows]


@cache
def audiovisual() -> Task:
    """The task with noise as strong as the signals."""
    return Audiovisual()
