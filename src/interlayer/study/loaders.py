"""A task from your own DataLoaders, or from anything else that gives batches."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interlayer.core.data import Batch, DataShape
from interlayer.core.pairing.seeds import kept, seed_all, seed_of
from interlayer.core.task import Task, shape_of
from interlayer.study.spec import StudyError

LOOKED_AT = 64  # batches of each split that the number of classes and the like are read from


class LoaderTask(Task):
    """A task whose batches come from two loaders.

    A batch is (inputs, targets); (first input, second input, ..., targets) for a model of several inputs; a mapping
    (Hugging Face), whose items are the model's keyword arguments; or a graph with ``y`` (PyTorch Geometric). A model that
    returns a loss is trained with that; where there are no targets (a mapping without ``labels``, a tensor alone) it must.
    Each epoch reads the training loader once; its order and whatever
    it draws from torch's, NumPy's and Python's global generators, such as augmentation, follow the seed, alike for all arms.

    Args:
        name: Name in the report.
        train: A ``DataLoader``, a list of batches, any other object that can be iterated more than once, or a function that
            returns an iterator.
        validation: The same, to be judged on.
        shape: Shape of the data; read from the first batches by default.
        about: One line on the data.

    Raises:
        StudyError: A loader is empty or can be read only once, or its batches have another form.

    Examples:
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> task = LoaderTask("mine", [(x, y)], [(x, y)])
        >>> task.shape.features, task.shape.classes, task.metric
        (3, 2, 'accuracy')
    """

    def __init__(
        self,
        name: str,
        train: Iterable[Any] | Callable[[], Iterator[Any]],
        validation: Iterable[Any] | Callable[[], Iterator[Any]],
        *,
        shape: DataShape | None = None,
        about: str = "",
    ) -> None:
        self.name, self.sources = name, {"train": train, "validation": validation}
        for split, source in self.sources.items():
            if isinstance(source, Iterator):
                raise StudyError(
                    f"task {name!r}: {split} is a {type(source).__name__}, which can be read only once; give a DataLoader, a "
                    "list, or the function that makes it."
                )
            if not callable(source) and not isinstance(source, Iterable):
                raise StudyError(
                    f"task {name!r}: {split} is a {type(source).__name__}; expected a DataLoader or other iterable."
                )
        seen = [b for split in self.sources for b in itertools.islice(self._epoch(0, split), LOOKED_AT)]
        self.shape = shape or _shape(name, seen)
        self.base = {"tokens": "transformer" if self.shape.outputs == "tokens" else "encoder", "image": "convnet"}.get(
            self.shape.kind, "mlp"
        )
        self.about = about or ", ".join(f"{split}: {_size(source)}" for split, source in self.sources.items()) + "."
        if self.shape.outputs == "classes":
            self.metric, self.higher = "accuracy", True
        if self.shape.outputs == "values":
            self.unit = "squared error"

    def batches(self, seed: int, batch_size: int, split: str = "train") -> Iterator[Batch]:
        """The loader's batches, epoch after epoch for ``train``; their size is the loader's."""
        if split != "train":
            yield from self._epoch(0, split)
            return
        for epoch in itertools.count():
            yield from self._epoch(seed_of(seed, epoch), split)

    def _epoch(self, seed: int, split: str) -> Iterator[Batch]:
        source = self.sources[split]
        for owner in (source, getattr(source, "sampler", None)):
            if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
                generator.manual_seed(seed)
        with _seeded(seed):
            batches = source() if callable(source) else iter(source)
        for number in itertools.count():
            with _seeded(seed_of(seed, number)):
                batch = next(batches, None)
            if batch is None:
                break
            yield self._parts(batch, split)
        if not number:
            raise StudyError(f"task {self.name!r}: the {split} loader gave no batch.")

    def _parts(self, batch: Any, split: str) -> Batch:
        if isinstance(batch, Mapping):
            return dict(batch), batch.get("labels")
        if isinstance(batch, Tensor):
            return batch, None
        if hasattr(batch, "num_graphs") and isinstance(batch.y, Tensor):
            return batch, batch.y
        if isinstance(batch, tuple | list) and batch and isinstance(batch[-1], Tensor):
            *inputs, targets = batch
            if len(inputs) > 1:
                return tuple(inputs), targets
            return (inputs[0], targets) if inputs else (targets, None)
        size = f" of {len(batch)}" if hasattr(batch, "__len__") else ""
        raise StudyError(
            f"task {self.name!r}: a {split} batch is a {type(batch).__name__}{size}; expected (inputs, targets), (several inputs, "
            "targets), a mapping of the model's keyword arguments, or a graph with y."
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """All global generators at one seed, and back where they were."""
    before = random.getstate(), np.random.get_state()
    with kept():
        seed_all(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def _shape(name: str, batches: list[Batch]) -> DataShape:
    """The shape that fits all the batches."""
    inputs = [_main(x) for x, _ in batches]
    if any(x is None for x in inputs):
        raise StudyError(
            f"task {name!r}: the inputs hold no tensor from which their shape could be read; pass shape=DataShape(...)."
        )
    found = [shape_of(name, x, y) for x, (_, y) in zip(inputs, batches, strict=True)]  # type: ignore[arg-type]
    largest = {k: max(getattr(s, k) for s in found) for k in ("classes", "vocab", "length")}
    return DataShape(**{**vars(found[0]), **largest})


def _main(inputs: Any) -> Tensor | None:
    """The tensor that says what kind of data it is."""
    if hasattr(inputs, "num_graphs"):
        inputs = inputs.x
    if type(inputs) is tuple:
        inputs = inputs[0]
    if isinstance(inputs, Mapping):
        inputs = next(
            (inputs[k] for k in ("input_ids", "pixel_values", "input_values") if k in inputs),
            next(iter(inputs.values()), None),
        )
    return inputs if isinstance(inputs, Tensor) else None


def _size(source: Any) -> str:
    return f"{len(source)} batches" if hasattr(source, "__len__") else "batches of a stream"
