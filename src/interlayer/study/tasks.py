"""The built-in tasks, real data that needs no network; and the task that a study names."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from interlayer import catalog
from interlayer.catalog import nearest
from interlayer.core import nano
from interlayer.core.datasets import photographs
from interlayer.core.extras import need
from interlayer.core.task import Task, TensorTask, TextTask
from interlayer.study.loaders import LoaderTask
from interlayer.study.objects import Objects, is_path, load_object, shown
from interlayer.study.spec import StudyError


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


@cache
def photos() -> Task:
    """Which of 16 photographs a 32x32 grey patch comes from; validation patches lie in the right quarter of each.

    Fourteen photographs come inside scikit-image, two inside scikit-learn; none is downloaded.
    """
    pictures = list(photographs().values())
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
    about = f"MNIST-1D, 40 samples of a distorted digit profile: {len(train[0])} for training, {len(held[0])} for validation."
    return TensorTask("mnist1d", train, held, base="mlp", about=about)


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
            f"task {name!r}: got a {got}; wanted a Task, (training loader, validation loader), or ((inputs, targets), "
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
