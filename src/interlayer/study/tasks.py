"""Tasks: real data with a fixed split, a loss and a judgement. The built-in ones need no network."""

from __future__ import annotations

import itertools
import math
import os
import random
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from interlayer.catalog import nearest
from interlayer.core.data import DataShape
from interlayer.core.extras import need
from interlayer.study.arms import is_path, load_object
from interlayer.study.spec import StudyError

Batch = tuple[Tensor, Tensor]


class Task(ABC):
    """What is learned. A task of your own gives ``shape`` and ``batches``, and others only if its loss is unusual.

    Attributes:
        name: Name in the report.
        shape: What a model must know of the data.
        metric: The metric by which arms are compared; ``evaluate`` gives it.
        higher: Whether more of it is better.
        unit: What ``loss`` is measured in.
        base: The backbone that is usual for it.
        about: One line on the data for the report.
    """

    name: str
    shape: DataShape
    metric: str = "loss"
    higher: bool = False
    unit: str = "nats"
    base: str = "mlp"
    about: str = ""

    @abstractmethod
    def batches(self, seed: int, batch_size: int, split: str = "train") -> Iterator[Batch]:
        """Batches of (inputs, targets): without end and in the seed's order for ``train``; once through for ``validation``."""

    @property
    def item(self) -> str:
        """What costs are counted per: token or sample."""
        return "token" if self.shape.outputs == "tokens" else "sample"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, or mean squared error where values are predicted."""
        if self.shape.outputs == "values":
            return F.mse_loss(outputs, targets)
        return F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1))

    def evaluate(
        self, predict: Callable[[Tensor], Tensor], batch_size: int, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """Loss over the validation split, and accuracy or bits per token with it."""
        loss, hits, count = 0.0, 0, 0
        for inputs, targets in self.batches(0, batch_size, "validation"):
            outputs, targets = predict(inputs.to(device)), targets.to(device)
            loss += float(self.loss(outputs, targets)) * len(targets)
            count += len(targets)
            if self.shape.outputs == "classes":
                hits += int((outputs.argmax(-1) == targets).sum())
        found = {"loss": loss / count}
        if self.shape.outputs == "classes":
            found["accuracy"] = hits / count
        if self.shape.outputs == "tokens":
            found["bits"] = found["loss"] / math.log(2)
        return found

    def trivial(self) -> dict[str, float]:
        """Scores of a predictor that ignores its inputs: the frequencies of the training targets, or their mean.

        A run that diverged counts as one. A task with targets of another structure gives scores of its own here.
        """
        batches = list(itertools.islice(self.batches(0, 64, "train"), 64))
        targets = torch.cat([targets for _, targets in batches])
        if self.shape.outputs == "values":
            answer = targets.float().mean(0)
        else:
            counts = torch.bincount(targets.flatten(), minlength=self.shape.classes or self.shape.vocab) + 1
            answer = (counts / counts.sum()).log()
        dims = 2 if self.shape.outputs == "tokens" else 1
        return self.evaluate(lambda x: answer.expand(*x.shape[:dims], *answer.shape), 64)


class TensorTask(Task):
    """A task whose data fits into memory as two pairs of tensors.

    Args:
        name: Name in the report.
        train: Inputs and targets to learn from.
        validation: Inputs and targets to be judged on.
        shape: Shape of the data; told from the tensors unless given.
        base: The usual backbone.
        about: One line on the data.

    Examples:
        >>> x, y = torch.randn(20, 3), torch.arange(20) % 2
        >>> TensorTask("mine", (x, y), (x, y)).shape.classes
        2
    """

    def __init__(
        self,
        name: str,
        train: Batch,
        validation: Batch,
        *,
        shape: DataShape | None = None,
        base: str = "",
        about: str = "",
    ) -> None:
        self.name, self.data = name, {"train": train, "validation": validation}
        for split, (x, y) in self.data.items():
            if len(x) != len(y) or not len(x):
                raise StudyError(
                    f"task {name!r}: {split} has {len(x)} inputs and {len(y)} targets; wanted as many, and some."
                )
            for what, t in (("inputs", x), ("targets", y)):
                if bad := int((~torch.isfinite(t)).sum()):
                    raise StudyError(
                        f"task {name!r}: {bad} of the {t.numel()} numbers in the {split} {what} are NaN or infinite; "
                        "leave those samples out or fill them in."
                    )
        self.shape = shape or _shape(name, *train)
        self.base = base or {"tokens": "encoder", "image": "convnet"}.get(self.shape.kind, "mlp")
        if self.shape.outputs == "tokens":
            self.base = "transformer"
        self.about = about or f"{len(train[0])} training and {len(validation[0])} validation samples."
        if self.shape.outputs == "classes":
            self.metric, self.higher = "accuracy", True
        if self.shape.outputs == "values":
            self.unit = "squared error"

    def batches(self, seed: int, batch_size: int, split: str = "train") -> Iterator[Batch]:
        """Shuffled epochs without end, or the validation samples in order."""
        x, y = self.data[split]
        if split != "train":
            yield from zip(x.split(256), y.split(256), strict=True)
            return
        order = torch.Generator().manual_seed(seed)
        size = min(batch_size, len(x))
        while True:
            for index in torch.randperm(len(x), generator=order).split(size):
                if len(index) == size:
                    yield x[index], y[index]


def _shape(name: str, x: Tensor, y: Tensor) -> DataShape:
    """The shape of a user's tensors."""
    whole = not x.is_floating_point()
    if whole and x.dim() == 2 and y.dim() == 2 and not y.is_floating_point():
        return DataShape("tokens", "tokens", vocab=int(max(x.max(), y.max())) + 1, length=x.shape[1])
    kind = "tokens" if whole else {2: "vector", 3: "series", 4: "image"}.get(x.dim(), "")
    if not kind:
        raise StudyError(
            f"task {name!r}: inputs {tuple(x.shape)}; wanted [N, F], [N, S, F], [N, C, H, W] or integers [N, S]."
        )
    sizes: dict[str, int] = {
        "tokens": lambda: {"vocab": int(x.max()) + 1, "length": x.shape[1]},
        "vector": lambda: {"features": x.shape[1]},
        "series": lambda: {"length": x.shape[1], "features": x.shape[2]},
        "image": lambda: {"channels": x.shape[1], "height": x.shape[2], "width": x.shape[3]},
    }[kind]()
    if y.is_floating_point():
        return DataShape(kind, "values", classes=y.shape[1] if y.dim() > 1 else 1, **sizes)
    return DataShape(kind, "classes", classes=int(y.max()) + 1, **sizes)


class TextTask(Task):
    """Causal language modelling of bytes: predict each next byte of windows of ``length``.

    Args:
        name: Name in the report.
        train: Text to learn from.
        validation: Text to be judged on; the first ``windows`` windows of it count.
        length: Bytes in a window.
        windows: Most validation windows.
        about: One line on the data.
    """

    base = "transformer"
    unit = "nats per byte"
    windows: ClassVar[int] = 128

    def __init__(self, name: str, train: bytes, validation: bytes, *, length: int = 128, about: str = "") -> None:
        self.name = name
        self.shape = DataShape("tokens", "tokens", vocab=256, length=length)
        for split, text in (("training", train), ("validation", validation)):
            if len(text) <= length:
                raise StudyError(f"task {name!r}: only {len(text)} bytes of {split} text; wanted more than {length}.")
        self.text = {
            s: torch.frombuffer(bytearray(t), dtype=torch.uint8)
            for s, t in (("train", train), ("validation", validation))
        }
        self.about = about or f"{len(train):,} bytes of training and {len(validation):,} of validation text."

    def batches(self, seed: int, batch_size: int, split: str = "train") -> Iterator[Batch]:
        """Random windows without end, or evenly spread validation windows."""
        text, length = self.text[split], self.shape.length
        offsets = torch.arange(length + 1)

        def cut(starts: Tensor) -> Batch:
            window = text[starts[:, None] + offsets].long()
            return window[:, :-1], window[:, 1:]

        last = len(text) - length - 1
        if split != "train":
            count = min(self.windows, last // length + 1)
            yield from map(cut, torch.linspace(0, last, count).long().split(16))
            return
        order = torch.Generator().manual_seed(seed)
        while True:
            yield cut(torch.randint(last + 1, (batch_size,), generator=order))


@cache
def digits() -> Task:
    """8x8 handwritten digits of scikit-learn; every fifth is for validation."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    x = (x - x.mean()) / x.std()
    y = torch.tensor(data.target, dtype=torch.long)
    held = torch.arange(len(x)) % 5 == 4
    about = f"scikit-learn's handwritten digits, 8x8 pixels: {int((~held).sum())} for training, {int(held.sum())} for validation."
    return TensorTask("digits", (x[~held], y[~held]), (x[held], y[held]), base="mlp", about=about)


@cache
def stdlib_bytes() -> Task:
    """The top-level modules of Python's standard library as bytes; every tenth file is for validation.

    At most 4 MB are read (in the order of the file names, which takes nearly all of it in Python 3.11).
    """
    texts: dict[bool, list[bytes]] = {False: [], True: []}
    read = 0
    files = sorted(
        p for p in Path(sysconfig.get_path("stdlib")).glob("*.py") if not p.name.startswith("_sysconfigdata")
    )
    for i, path in enumerate(files):
        text = path.read_bytes()
        if read + len(text) > 4_000_000:
            break
        read += len(text)
        texts[i % 10 == 9].append(text)
    train, held = b"".join(texts[False]), b"".join(texts[True])
    about = (
        f"Bytes of Python's own standard library: {len(texts[False])} files ({len(train) / 1e6:.1f} MB) for training, "
        f"{len(texts[True])} other files for validation ({TextTask.windows} windows of 128 bytes spread over them)."
    )
    return TextTask("stdlib-bytes", train, held, about=about)


PHOTOS = (
    *("astronaut", "brick", "camera", "cat", "cell", "coffee", "coins", "clock", "grass", "gravel"),
    *("hubble_deep_field", "immunohistochemistry", "moon", "rocket"),
)


@cache
def photos() -> Task:
    """Which of 16 photographs a 32x32 grey patch comes from; validation patches lie in the right quarter of each.

    Fourteen photographs come inside scikit-image, two inside scikit-learn; none is downloaded.
    """
    bundled = need("skimage.data", "images", "task 'photos'")
    from sklearn.datasets import load_sample_images

    pictures = [getattr(bundled, name)() for name in PHOTOS] + list(load_sample_images().images)
    place = np.random.default_rng(0)
    found: dict[str, list[np.ndarray[Any, Any]]] = {"train": [], "validation": []}
    side, counts = 32, {"train": 200, "validation": 50}
    for picture in pictures:
        grey = picture if picture.ndim == 2 else picture[..., :3] @ np.array([0.299, 0.587, 0.114])
        border = grey.shape[1] * 3 // 4
        for split, region in (("train", grey[:, :border]), ("validation", grey[:, border:])):
            for _ in range(counts[split]):
                top, left = (int(place.integers(n - side + 1)) for n in region.shape)
                found[split].append(np.asarray(region[top : top + side, left : left + side], dtype=np.float32))
    x = {s: torch.from_numpy(np.stack(p)).unsqueeze(1) / 255 for s, p in found.items()}
    mean, std = x["train"].mean(), x["train"].std()
    y = {s: torch.arange(len(pictures)).repeat_interleave(n) for s, n in counts.items()}
    about = (
        f"Which of {len(pictures)} photographs (scikit-image, scikit-learn) a grey 32x32 patch is from: "
        f"{len(y['train'])} patches for training, {len(y['validation'])} from another part of each picture for validation."
    )
    train, held = (((x[s] - mean) / std, y[s]) for s in ("train", "validation"))
    return TensorTask("photos", train, held, base="convnet", about=about)


@cache
def series() -> Task:
    """Forecast the next 4 values of five measured series from 24; the last fifth of each series is for validation.

    Monthly carbon dioxide on Mauna Loa and sea temperature off Peru, yearly sunspots and Nile flow, and quarterly
    growth of the United States' economy, from statsmodels; each is standardised by its training part.
    """
    sets = need("statsmodels.datasets", "series", "task 'series'")
    carbon = sets.co2.load_pandas().data["co2"].resample("MS").mean().interpolate()
    columns = [
        carbon.diff(12).dropna(),
        sets.elnino.load_pandas().data.drop(columns="YEAR").stack(),
        sets.sunspots.load_pandas().data["SUNACTIVITY"],
        sets.nile.load_pandas().data["volume"],
        np.log(sets.macrodata.load_pandas().data["realgdp"]).diff().dropna(),
    ]
    past, ahead = 24, 4
    pairs: dict[str, list[np.ndarray[Any, Any]]] = {"train": [], "validation": []}
    for column in columns:
        values = np.asarray(column, dtype=np.float32)
        border = len(values) * 4 // 5
        values = (values - values[:border].mean()) / values[:border].std()
        for start in range(len(values) - past - ahead + 1):
            window = values[start : start + past + ahead]
            if start + past + ahead <= border:
                pairs["train"].append(window)
            elif start + past >= border:
                pairs["validation"].append(window)
    whole = {s: torch.from_numpy(np.stack(w)) for s, w in pairs.items()}
    train, held = (
        (w[:, :past, None].contiguous(), w[:, past:].contiguous()) for w in (whole["train"], whole["validation"])
    )
    about = (
        f"Forecast 4 steps from 24 of five series (CO2, El Niño, sunspots, Nile, GDP growth; statsmodels): "
        f"{len(train[0])} windows for training; {len(held[0])}, all later in time, for validation."
    )
    return TensorTask("series", train, held, base="mlp", about=about)


@cache
def mnist1d() -> Task:
    """MNIST-1D (Greydanus and Kobak, arXiv:2011.14439): 40 samples of a shifted, scaled and noisy digit profile.

    Made once by the authors' package with their settings (4000 training and 1000 test samples) and kept as a file in the
    user's cache folder. A linear model reaches about 32%, an MLP about 68% and a ConvNet about 94%, so that there is room
    between good and better, which 8x8 digits lack.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "interlayer"
    path = folder / "mnist1d-0.0.2.safetensors"
    if not path.is_file():
        from mnist1d.data import get_dataset_args, make_dataset

        before = random.getstate(), np.random.get_state()
        made = make_dataset(get_dataset_args())
        random.setstate(before[0])
        np.random.set_state(before[1])
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        save_file({k: torch.from_numpy(np.ascontiguousarray(made[k])) for k in ("x", "y", "x_test", "y_test")}, part)
        part.replace(path)
    data = load_file(path)
    train, held = ((data[x].float().unsqueeze(-1), data[y].long()) for x, y in (("x", "y"), ("x_test", "y_test")))
    about = f"MNIST-1D, 40 samples of a distorted digit profile: {len(train[0])} for training, {len(held[0])} for validation."
    return TensorTask("mnist1d", train, held, base="mlp", about=about)


BUILTIN: dict[str, Callable[[], Task]] = {
    "digits": digits,
    "mnist1d": mnist1d,
    "stdlib-bytes": stdlib_bytes,
    "photos": photos,
    "series": series,
}


def load(name: str) -> Task:
    """The task that a study names.

    Args:
        name: ``digits``, ``mnist1d``, ``stdlib-bytes``, ``photos``, ``series``; ``package.module:function`` that gives a ``Task`` or
            ``((train inputs, targets), (validation inputs, targets))``; ``file:PATH`` (its bytes; the last tenth is for
            validation); ``hf:NAME[:CONFIG][:COLUMN]`` (a text column of a Hugging Face data set, or a saved folder).

    Raises:
        StudyError: Nothing of that name, or what it gives is no task.
    """
    if name in BUILTIN:
        return BUILTIN[name]()
    if name.startswith("file:"):
        path = Path(name[5:]).expanduser()
        if not path.is_file():
            raise StudyError(f"task {name!r}: there is no file {path}.")
        text = path.read_bytes()
        border = len(text) * 9 // 10
        return TextTask(name, text[:border], text[border:])
    if name.startswith("hf:"):
        return _hugging_face(name)
    if is_path(name):
        given = load_object(name)()
        if isinstance(given, Task):
            return given
        try:
            (x, y), (v, w) = given
            return TensorTask(name, (x, y), (v, w))
        except (TypeError, AttributeError) as error:
            wanted = "a Task or ((inputs, targets), (validation inputs, targets)) of tensors"
            raise StudyError(f"task {name!r} gave a {type(given).__name__}; wanted {wanted}.") from error
    raise StudyError(
        f"task: there is no task {name!r}.{nearest(name, BUILTIN)} There are {', '.join(BUILTIN)}, and your own as "
        "package.module:function, file:PATH or hf:NAME."
    )


def _hugging_face(name: str) -> Task:
    datasets = need("datasets", "hf", f"task {name!r}")
    where, *rest = name[3:].split(":")
    folder = Path(where).expanduser()
    saved = folder.is_dir() and ((folder / "dataset_dict.json").exists() or (folder / "state.json").exists())
    if saved:
        data, config = datasets.load_from_disk(str(folder)), ""
    else:
        config = rest[0] if len(rest) > 1 else ""
        data = datasets.load_dataset(where, config or None)
    column = rest[-1] if rest else "text"
    splits = dict(data) if hasattr(data, "keys") else {"train": data}
    train = splits.get("train") or next(iter(splits.values()))
    held = splits.get("validation") or splits.get("test")
    if column not in train.column_names:
        raise StudyError(
            f"task {name!r}: no column {column!r}.{nearest(column, train.column_names)} There are {train.column_names}."
        )
    text = _text(train, column)
    if held is not None:
        return TextTask(name, text, _text(held, column))
    border = len(text) * 9 // 10
    return TextTask(name, text[:border], text[border:])


def _text(rows: Iterable[Any], column: str, most: int = 20_000_000) -> bytes:
    """A column's texts as bytes, one after the other, up to ``most``."""
    parts: list[bytes] = []
    size = 0
    for row in rows:
        part = str(row[column]).encode() + b"\n"
        parts.append(part)
        size += len(part)
        if size > most:
            break
    return b"".join(parts)
