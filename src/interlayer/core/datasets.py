"""Real data that comes with the dependencies: loaded once, never downloaded, with a fixed split into training and held-out parts.

Tensors are shared by all callers; change a copy.
"""

from __future__ import annotations

import random
import subprocess
import sys
import sysconfig
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from interlayer.core import nano
from interlayer.core.extras import need
from interlayer.core.speech import WORDS

# What scikit-image and scikit-learn bring without a download.
PHOTOGRAPHS = (
    *("astronaut", "brick", "camera", "cat", "cell", "coffee", "coins", "clock", "grass", "gravel"),
    *("hubble_deep_field", "immunohistochemistry", "moon", "rocket", "china", "flower"),
)


class Split(NamedTuple):
    """Inputs and targets for training, and those held out."""

    train: tuple[Tensor, Tensor]
    held: tuple[Tensor, Tensor]


@cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits: images [1797, 1, 8, 8] of 0 to 16, and labels.

    Examples:
        >>> images, labels = digits()
        >>> images.shape, images.max().item(), labels[:3].tolist()
        (torch.Size([1797, 1, 8, 8]), 16.0, [0, 1, 2])
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1), torch.tensor(data.target, dtype=torch.long)


def drawn(pair: tuple[Tensor, Tensor], size: int = 64, count: int = 20) -> tuple[tuple[Tensor, Tensor], ...]:
    """Batches of inputs and targets, drawn by torch's generator, none twice."""
    x, y = pair
    return tuple((x[rows], y[rows]) for rows in torch.randperm(len(y))[: count * size].view(count, size))


def digit_batches(size: int = 64, *, centred: bool = False) -> tuple[tuple[Tensor, Tensor], ...]:
    """Twenty batches of digits between 0 and 1, or -1 and 1 if centred: what examples of rules learn from.

    Examples:
        >>> images, labels = digit_batches()[0]
        >>> images.shape, images.max().item()
        (torch.Size([64, 1, 8, 8]), 1.0)
    """
    images, labels = digits()
    return drawn((images / 8 - 1 if centred else images / 16, labels), size)


@cache
def split_digits() -> Split:
    """The digits, standardised; every fifth is held out."""
    x, y = digits()
    x = x / 16
    x = (x - x.mean()) / x.std()
    held = torch.arange(len(x)) % 5 == 4
    return Split((x[~held], y[~held]), (x[held], y[held]))


@cache
def digit_events(steps: int = 12, threshold: float = 0.2) -> Split:
    """What an event camera sees of the digits while it makes three saccades, [N, T, 2 x 10 x 10] of 0 and 1; every fifth is held out.

    As N-MNIST was recorded (Orchard et al., doi:10.3389/fnins.2015.00437), but computed: the camera moves along the sides of a triangle,
    and a pixel that has become brighter (or darker) than at its last event by ``threshold`` in log intensity reports it, in its own
    channel.
    """
    images, labels = digits()
    corners = torch.tensor([[0.0, 0.0], [2.0, 1.0], [0.0, 2.0], [0.0, 0.0]])  # pixels
    place = torch.arange(1, steps + 1) * 3 / steps
    side = place.ceil().long() - 1
    path = torch.lerp(corners[side], corners[side + 1], (place - side).unsqueeze(1))
    grid = F.affine_grid(torch.eye(2, 3).unsqueeze(0), [1, 1, 10, 10], align_corners=True)
    wide = F.pad(images / 16, (1, 1, 1, 1))

    def seen(shift: Tensor) -> Tensor:
        moved = F.grid_sample(wide, (grid + shift * 2 / 9).expand(len(wide), -1, -1, -1), align_corners=True)
        return (moved.flatten(1) + 0.1).log()

    last, events = seen(torch.zeros(2)), []
    for shift in path:
        change = seen(shift) - last
        fired = torch.stack((change > threshold, change < -threshold), 1)
        last = last + change * fired.any(1)
        events.append(fired.flatten(1).float())
    x = torch.stack(events, 1)
    held = torch.arange(len(x)) % 5 == 4
    return Split((x[~held], labels[~held]), (x[held], labels[held]))


def modules() -> list[Path]:
    """The top-level modules of Python's standard library, by name, without those that describe this build of Python."""
    files = Path(sysconfig.get_path("stdlib")).glob("*.py")
    return sorted(p for p in files if not p.name.startswith("_sysconfigdata"))


@cache
def stdlib_bytes() -> tuple[list[bytes], list[bytes]]:
    """Those modules as bytes, for training and, every tenth file, held out.

    At most 4 MB are read (in the order of the file names, which takes nearly all of it in Python 3.11).
    """
    texts: dict[bool, list[bytes]] = {False: [], True: []}
    read = 0
    for i, path in enumerate(modules()):
        text = path.read_bytes()
        if read + len(text) > 4_000_000:
            break
        read += len(text)
        texts[i % 10 == 9].append(text)
    return texts[False], texts[True]


@cache
def photograph(name: str) -> np.ndarray[Any, Any]:
    """One of ``PHOTOGRAPHS``: [H, W] or [H, W, 3], 0 to 255.

    Raises:
        ValueError: There is none of that name.
        ImportError: It comes with scikit-image, which is not installed.
    """
    if name not in PHOTOGRAPHS:
        raise ValueError(f"datasets.photograph: there is no {name!r}; expected one of {', '.join(PHOTOGRAPHS)}.")
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        return load_sample_image(f"{name}.jpg")
    return getattr(need("skimage.data", "images", "datasets.photograph"), name)()


def photographs() -> dict[str, np.ndarray[Any, Any]]:
    """All of them by name."""
    return {name: photograph(name) for name in PHOTOGRAPHS}


@cache
def photos() -> Split:
    """Which photograph a grey 32x32 patch comes from: 200 patches of each for training, 50 held out from its right quarter."""
    place = np.random.default_rng(0)
    found: dict[str, list[np.ndarray[Any, Any]]] = {"train": [], "held": []}
    side, counts = 32, {"train": 200, "held": 50}
    for name in PHOTOGRAPHS:
        picture = photograph(name)
        grey = picture if picture.ndim == 2 else picture[..., :3] @ np.array([0.299, 0.587, 0.114])
        border = grey.shape[1] * 3 // 4
        for split, region in (("train", grey[:, :border]), ("held", grey[:, border:])):
            for _ in range(counts[split]):
                top, left = (int(place.integers(n - side + 1)) for n in region.shape)
                found[split].append(np.asarray(region[top : top + side, left : left + side], dtype=np.float32))
    x = {s: torch.from_numpy(np.stack(p)).unsqueeze(1) / 255 for s, p in found.items()}
    mean, std = x["train"].mean(), x["train"].std()
    y = {s: torch.arange(len(PHOTOGRAPHS)).repeat_interleave(n) for s, n in counts.items()}
    train, held = (((x[s] - mean) / std, y[s]) for s in counts)
    return Split(train, held)


@cache
def series() -> Split:
    """The next 4 values of five measured series from 24, [N, 24, 1] to [N, 4]; the last fifth of each series is held out.

    Monthly carbon dioxide on Mauna Loa and sea temperature off Peru, yearly sunspots and Nile flow, and quarterly
    growth of the United States' economy, from statsmodels; each is standardised by its training part.

    Raises:
        ImportError: statsmodels is not installed.
    """
    sets = need("statsmodels.datasets", "series", "datasets.series")
    carbon = sets.co2.load_pandas().data["co2"].resample("MS").mean().interpolate()
    columns = [
        carbon.diff(12).dropna(),
        sets.elnino.load_pandas().data.drop(columns="YEAR").stack(),
        sets.sunspots.load_pandas().data["SUNACTIVITY"],
        sets.nile.load_pandas().data["volume"],
        np.log(sets.macrodata.load_pandas().data["realgdp"]).diff().dropna(),
    ]
    past, ahead = 24, 4
    pairs: dict[str, list[np.ndarray[Any, Any]]] = {"train": [], "held": []}
    for column in columns:
        values = np.asarray(column, dtype=np.float32)
        border = len(values) * 4 // 5
        values = (values - values[:border].mean()) / values[:border].std()
        for start in range(len(values) - past - ahead + 1):
            window = values[start : start + past + ahead]
            if start + past + ahead <= border:
                pairs["train"].append(window)
            elif start + past >= border:
                pairs["held"].append(window)
    whole = (torch.from_numpy(np.stack(windows)) for windows in pairs.values())
    train, held = ((w[:, :past, None].contiguous(), w[:, past:].contiguous()) for w in whole)
    return Split(train, held)


@cache
def mnist1d() -> Split:
    """MNIST-1D (Greydanus and Kobak, arXiv:2011.14439): 40 samples of a shifted, scaled and noisy digit profile, [N, 40, 1].

    Made once by the authors' package with their settings (4000 training and 1000 test samples) and kept as a file in the
    user's cache folder. A linear model reaches about 32%, an MLP about 68% and a ConvNet about 94%, so that there is room
    between good and better, which 8x8 digits lack.
    """
    path = nano.cache() / "mnist1d-0.0.2.safetensors"
    if not path.is_file():
        from mnist1d.data import get_dataset_args, make_dataset

        before = random.getstate(), np.random.get_state()
        made = make_dataset(get_dataset_args())
        random.setstate(before[0])
        np.random.set_state(before[1])
        nano.keep(path, {k: torch.from_numpy(np.ascontiguousarray(made[k])) for k in ("x", "y", "x_test", "y_test")})
    data = load_file(path)
    train, held = ((data[x].float().unsqueeze(-1), data[y].long()) for x, y in (("x", "y"), ("x_test", "y_test")))
    return Split(train, held)


@cache
def speech() -> Split:
    """Ten spoken words (yes, no, up, down, ...) of one second at 16 kHz, [N, 16000]; three of eleven voices are held out.

    Synthesised once by eSpeak NG, in a process of its own, and kept as a file in the user's cache folder.

    Raises:
        ImportError: The ``audio`` extra is not installed.
    """
    loader = need("espeakng_loader", "audio", "datasets.speech")
    path = nano.cache() / f"speech-{version(loader.__name__)}.safetensors"
    if not path.is_file():
        subprocess.run([sys.executable, "-m", "interlayer.core.speech", str(path)], check=True)
    data = load_file(path)
    labels = {split: torch.arange(len(WORDS)).repeat_interleave(len(x) // len(WORDS)) for split, x in data.items()}
    return Split((data["train"], labels["train"]), (data["held"], labels["held"]))
