"""Tasks whose data fit into memory: pairs of tensors, and text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from interlayer.core.data import Batch, DataShape
from interlayer.core.task.base import Task


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
                raise ValueError(
                    f"task {name!r}: {split} has {len(x)} inputs and {len(y)} targets; expected as many, and some."
                )
            for what, t in (("inputs", x), ("targets", y)):
                if bad := int((~torch.isfinite(t)).sum()):
                    raise ValueError(
                        f"task {name!r}: {bad} of the {t.numel()} numbers in the {split} {what} are NaN or infinite; "
                        "leave those samples out or fill them in."
                    )
        self.shape = shape or shape_of(name, *train)
        self.base = base or {"tokens": "encoder", "image": "convnet"}.get(self.shape.kind, "mlp")
        if self.shape.outputs == "tokens":
            self.base = base or "transformer"
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


def shape_of(name: str, x: Tensor, y: Tensor | None) -> DataShape:
    """The shape of a user's tensors; without targets the model's loss is all that is known of its outputs."""
    whole = not x.is_floating_point()
    if whole and x.dim() == 2 and y is not None and y.dim() == 2 and not y.is_floating_point():
        return DataShape("tokens", "tokens", vocab=int(max(x.max(), y.max())) + 1, length=x.shape[1])
    kind = "tokens" if whole else {2: "vector", 3: "series", 4: "image"}.get(x.dim(), "")
    if not kind:
        raise ValueError(
            f"task {name!r}: inputs {tuple(x.shape)}; expected [N, F], [N, S, F], [N, C, H, W] or integers [N, S]."
        )
    sizes: dict[str, Any] = {
        "tokens": lambda: {"vocab": int(x.max()) + 1, "length": x.shape[1]},
        "vector": lambda: {"features": x.shape[1]},
        "series": lambda: {"length": x.shape[1], "features": x.shape[2]},
        "image": lambda: {"channels": x.shape[1], "height": x.shape[2], "width": x.shape[3]},
    }[kind]()
    if y is None:
        return DataShape(kind, "values", **sizes)
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
        about: One line on the data.

    Attributes:
        windows: Most validation windows.
    """

    base = "transformer"
    unit = "nats per byte"
    windows: ClassVar[int] = 128

    def __init__(self, name: str, train: bytes, validation: bytes, *, length: int = 128, about: str = "") -> None:
        self.name = name
        self.shape = DataShape("tokens", "tokens", vocab=256, length=length)
        for split, text in (("training", train), ("validation", validation)):
            if len(text) <= length:
                raise ValueError(f"task {name!r}: only {len(text)} bytes of {split} text; expected more than {length}.")
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
