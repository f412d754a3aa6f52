"""The built-in tasks, real data that needs no network; and the task that a study names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interlayer import catalog
from interlayer.catalog import nearest
from interlayer.core import datasets
from interlayer.core.data import Batch
from interlayer.core.experiences import StreamTask, by_classes, rotated
from interlayer.core.extras import need
from interlayer.core.online import corruptions
from interlayer.core.task import Task, TensorTask, TextTask
from interlayer.study.loaders import LoaderTask
from interlayer.study.objects import Objects, is_path, load_object, shown
from interlayer.study.spec import StudyError


def _counted(name: str, split: Iterable[tuple[Tensor, Tensor]], base: str, about: str) -> Task:
    """A task whose description ends with the sizes of its two parts."""
    train, held = split
    about = f"{about}: {len(train[0])} for training, {len(held[0])} for validation."
    return TensorTask(name, train, held, base=base, about=about)


@cache
def digits() -> Task:
    """8x8 handwritten digits of scikit-learn; every fifth is for validation."""
    return _counted("digits", datasets.split_digits(), "mlp", "scikit-learn's handwritten digits, 8x8 pixels")


@cache
def digit_cells() -> Task:
    """The digits for a network whose cells are searched: its plain form trains weights and mixture together."""
    base = "supernet(width=4, layers=3, nodes=2)"
    return _counted("digit-cells", datasets.split_digits(), base, "The digits, from a supernet of cells")


@cache
def stdlib_bytes() -> Task:
    """The top-level modules of Python's standard library as bytes, at most 4 MB; every tenth file is for validation."""
    files, others = datasets.stdlib_bytes()
    train, held = b"".join(files), b"".join(others)
    about = (
        f"Bytes of Python's own standard library: {len(files)} files ({len(train) / 1e6:.1f} MB) for training, "
        f"{len(others)} other files for validation ({TextTask.windows} windows of 128 bytes spread over them)."
    )
    return TextTask("stdlib-bytes", train, held, about=about)


@cache
def photos() -> Task:
    """Which of 16 photographs a 32x32 grey patch comes from; validation patches lie in the right quarter of each.

    Fourteen photographs come inside scikit-image, two inside scikit-learn; none is downloaded.
    """
    train, held = datasets.photos()
    about = (
        f"Which of {len(datasets.PHOTOGRAPHS)} photographs (scikit-image, scikit-learn) a grey 32x32 patch is from: "
        f"{len(train[0])} patches for training, {len(held[0])} from another part of each picture for validation."
    )
    return TensorTask("photos", train, held, base="convnet", about=about)


@cache
def series() -> Task:
    """Forecast the next 4 values of five measured series from 24; the last fifth of each series is for validation."""
    train, held = datasets.series()
    about = (
        f"Forecast 4 steps from 24 of five series (CO2, El Niño, sunspots, Nile, GDP growth; statsmodels): "
        f"{len(train[0])} windows for training; {len(held[0])}, all later in time, for validation."
    )
    return TensorTask("series", train, held, base="mlp", about=about)


@cache
def mnist1d() -> Task:
    """MNIST-1D: which digit 40 samples of a shifted, scaled and noisy profile show."""
    return _counted("mnist1d", datasets.mnist1d(), "mlp", "MNIST-1D, 40 samples of a distorted digit profile")


@cache
def digits_stream() -> Task:
    """Ten experiences of two digits each: the upright ones, then the same turned by a right angle."""
    digits = datasets.split_digits()
    turned = rotated(digits, [90])[0]
    pairs = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    upright = by_classes(digits, pairs, name="digits")
    stream = [*upright, *by_classes(datasets.Split(turned.train, turned.test), pairs, name="turned digits")]
    return StreamTask(
        "digits-stream", stream, about="Ten experiences of two digits each, five upright and five turned by 90 degrees."
    )


class _Corrupted(TensorTask):
    """Each validation batch has one corruption, so that a rule which adapts to batches can follow it."""

    def batches(self, seed: int, batch_size: int, split: str = "train") -> Iterator[Batch]:
        """As those of ``TensorTask``; validation batches of 70, a fifth of a corruption's images."""
        if split == "train":
            yield from super().batches(seed, batch_size)
        else:
            yield from zip(*(t.split(70) for t in self.data[split]), strict=True)


@cache
def corrupted_digits() -> Task:
    """Learn the clean 8x8 digits, and be judged on those held out under five corruptions of level 4, a batch of each after another."""
    images, labels = datasets.digits()
    train, _ = datasets.split_digits()
    clean, held = images / 16, torch.arange(len(labels)) % 5 == 4
    kinds = ("shot-noise", "impulse-noise", "speckle-noise", "contrast", "brightness")
    found = corruptions(
        clean[held][:350], labels[held][:350], kinds, level=4, then=lambda x: (x - clean.mean()) / clean.std()
    )
    judged = torch.cat([s.inputs for s in found]), torch.cat([s.labels for s in found])
    about = (
        f"scikit-learn's digits: {len(train[0])} clean ones for training, {len(judged[1])} under {', '.join(kinds)}."
    )
    return _Corrupted("corrupted-digits", train, judged, base="convnet", about=about)


@cache
def sequential_digits() -> Task:
    """The 8x8 digits pixel by pixel, in one random order for all: which digit was shown is asked after the last pixel."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    split = ((x.flatten(1)[:, order, None], y) for x, y in datasets.split_digits())
    about = "scikit-learn's digits as series of 64 pixels in a fixed random order"
    return _counted("sequential-digits", split, "lowrank-passthrough(transition='full')", about)


@cache
def digit_events() -> Task:
    """The 8x8 digits as an event camera sees them during three saccades: which digit it was is asked afterwards."""
    split = datasets.digit_events()
    steps = split.train[0].shape[1]
    about = f"scikit-learn's digits as events of brighter and darker pixels in {steps} steps of a moving camera"
    return _counted("digit-events", split, "lowrank-passthrough(transition='full')", about)


def load(name: str, given: Objects | None = None) -> Task:
    """The task that a study names.

    Args:
        name: A task of the catalogue, such as ``digits``; ``package.module:function`` that gives a ``Task`` or
            ``((train inputs, targets), (validation inputs, targets))``; ``file:PATH`` (its bytes; the last tenth is for
            validation); ``hf:NAME[:CONFIG][:COLUMN]`` (a text column of a Hugging Face data set, or a saved folder).
        given: Objects that stand behind names: a ``Task``, a pair of loaders or of (inputs, targets), or a function that
            gives one of these.

    Raises:
        StudyError: Nothing of that name, or what it gives is no task.
    """
    thing = (given or Objects()).get_or_text(name)
    if thing is not name:
        return _of(shown(name), thing)
    known = catalog.tasks()
    if name in known:
        module, _, function = known[name].partition(":")
        return getattr(import_module(f"interlayer.{module}"), function)()
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
        return _of(name, load_object(name))
    raise StudyError(
        f"task: there is no task {name!r}.{nearest(name, known)} There are {', '.join(known)}, and your own as "
        "package.module:function, file:PATH or hf:NAME."
    )


def _of(name: str, thing: Any) -> Task:
    """A task from what a user gave."""
    if callable(thing) and not isinstance(thing, Task):
        thing = thing()
    if isinstance(thing, Task):
        return thing
    if not isinstance(thing, tuple | list) or len(thing) != 2:
        got = f"{type(thing).__name__} of {len(thing)}" if isinstance(thing, tuple | list) else type(thing).__name__
        raise StudyError(
            f"task {name!r}: got a {got}; expected a Task, (training loader, validation loader), or ((inputs, targets), "
            "(validation inputs, targets)) of tensors or arrays."
        )
    if all(isinstance(part, tuple) and len(part) == 2 and all(isinstance(t, ARRAYS) for t in part) for part in thing):
        (x, y), (v, w) = thing
        return TensorTask(name, (_tensor(x), _tensor(y)), (_tensor(v), _tensor(w)))
    return LoaderTask(name, *thing)


ARRAYS = (Tensor, np.ndarray)


def _tensor(array: Tensor | np.ndarray[Any, Any]) -> Tensor:
    found = torch.as_tensor(array)
    return found.float() if found.is_floating_point() else found.long()


def _hugging_face(name: str) -> Task:
    library = need("datasets", "hf", f"task {name!r}")
    where, *rest = name[3:].split(":")
    folder = Path(where).expanduser()
    saved = folder.is_dir() and ((folder / "dataset_dict.json").exists() or (folder / "state.json").exists())
    if saved:
        data, config = library.load_from_disk(str(folder)), ""
    else:
        config = rest[0] if len(rest) > 1 else ""
        data = library.load_dataset(where, config or None)
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
