"""What a task is: data with a fixed split, a loss and a judgement."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from interlayer.core.data import DataShape, answer
from interlayer.study.spec import StudyError

Batch = tuple[Any, Tensor]  # inputs (a tensor, or keyword arguments of the model) and targets


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

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Mean cross-entropy, or mean squared error where values are predicted; a loss that the model gives comes first."""
        own = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if own is not None:
            return own
        outputs = answer(outputs)
        if self.shape.outputs == "values":
            if outputs.shape != targets.shape:
                raise StudyError(
                    f"task {self.name!r}: outputs {tuple(outputs.shape)} for targets {tuple(targets.shape)}; wanted equal shapes."
                )
            return F.mse_loss(outputs, targets)
        return F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1))

    def evaluate(
        self, predict: Callable[[Any], Any], batch_size: int, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """Loss over the validation split, and accuracy or bits per token with it.

        Args:
            predict: From a batch's inputs to what the model returns.
            batch_size: Samples in a batch, where the task chooses it.
            device: Where the batches go.
        """
        loss, hits, count = 0.0, 0, 0
        for inputs, targets in self.batches(0, batch_size, "validation"):
            inputs, targets = moved((inputs, targets), device)
            outputs = predict(inputs)
            loss += float(self.loss(outputs, targets)) * len(targets)
            count += len(targets)
            if self.shape.outputs == "classes":
                hits += int((answer(outputs).argmax(-1) == targets).sum())
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
            guess = targets.float().mean(0)
        else:
            counted = targets[targets >= 0]  # -100 says that there is nothing to predict
            counts = torch.bincount(counted, minlength=self.shape.classes or self.shape.vocab) + 1
            guess = (counts / counts.sum()).log()
        dims = 2 if self.shape.outputs == "tokens" else 1

        def predict(inputs: Any) -> Tensor:
            x = next(v for v in inputs.values() if isinstance(v, Tensor)) if isinstance(inputs, Mapping) else inputs
            return guess.expand(*x.shape[:dims], *guess.shape)

        return self.evaluate(predict, 64)


def moved(data: Any, device: torch.device | str) -> Any:
    """Tensors in nested tuples, lists and mappings on a device."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, data)


class TensorTask(Task):
    """A task whose data fits into memory as two pairs of tensors.

    Args:
        name: Name in the report.
        train: Inputs and targets to learn from.
        validation: Inputs and targets to be judged on.
        shape: Shape of the data; read from the tensors by default.
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
        self.shape = shape or shape_of(name, *train)
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


def shape_of(name: str, x: Tensor, y: Tensor) -> DataShape:
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
