"""What a task is: data with a fixed split, a loss, a way to learn and a judgement."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.core.data import Batch, DataShape, answer, count, moved
from interlayer.core.kinds import Finding, Simulator


@dataclass
class Budget:
    """How long a subject learns, and how much of that is used.

    Args:
        batch_size: Samples in a step.
        steps: Most steps.
        seconds: Most seconds of training, in place of steps.
        done: Steps taken.
        spent: Seconds of training.

    Raises:
        ValueError: Neither steps nor seconds, or both.
    """

    batch_size: int
    steps: int | None = None
    seconds: float | None = None
    done: int = 0
    spent: float = 0.0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError(f"Budget: steps {self.steps} and seconds {self.seconds}; expected one of them.")

    @property
    def share(self) -> float:
        """The share that is used, 0 to 1."""
        used, most = (self.done, self.steps) if self.seconds is None else (self.spent, self.seconds)
        return min(used / most, 1.0) if most else 1.0


class Subject(Protocol):
    """What learns and is judged: a model with the way it learns. ``compare`` makes one for each arm and seed.

    Attributes:
        model: The model.
        device: Where it lives, and its batches with it.
        batch_size: Samples in a batch when it is judged.
        notes: Numbers that a task keeps between learning and judging; a resumed run has them again.
    """

    model: nn.Module
    device: torch.device
    batch_size: int
    notes: dict[str, float]

    def begin(self, experience: Any) -> None:
        """Get ready to learn an experience of a stream."""

    def end(self, experience: Any) -> None:
        """Take note that an experience is over."""

    def at(self, experience: Any) -> None:
        """Predict for this experience from now on."""

    def step(self, batch: Batch, budget: Budget) -> float:
        """Learn from one batch, count it in the budget and give the loss before it."""

    def predict(self, inputs: Any) -> Any:
        """What the model returns for a batch's inputs."""


class Task(ABC):
    """What is learned. A task of your own gives ``shape`` and ``batches``, and others only if its loss is unusual.

    A task that is not learned batch by batch, or not judged by predictions, gives ``learn`` or ``judge`` of its own.

    Attributes:
        name: Name in the report.
        shape: What a model must know of the data.
        metric: The metric by which arms are compared; ``evaluate`` gives it.
        higher: Whether more of it is better.
        unit: What ``loss`` is measured in.
        base: The backbone that is usual for it.
        about: One line on the data for the report.
        learns: Whether subjects learn it; what does not learn is judged at once, and takes no learning rate.
    """

    name: str
    shape: DataShape
    metric: str = "loss"
    higher: bool = False
    unit: str = "nats"
    base: str = "mlp"
    about: str = ""
    learns: ClassVar[bool] = True

    @abstractmethod
    def batches(self, seed: int, batch_size: int, split: str = "train") -> Iterator[Batch]:
        """Batches of (inputs, targets): without end and in the seed's order for ``train``; once through for ``validation``."""

    @property
    def item(self) -> str:
        """What costs are counted per: token or sample."""
        return "token" if self.shape.outputs == "tokens" else "sample"

    def learn(self, subject: Subject, budget: Budget, seed: int) -> Iterator[float]:
        """Teach a subject until its budget is used up; yields the loss of each step.

        A run that was interrupted calls it again with a budget that is partly used: what was learned then is not learned again.

        Args:
            subject: What learns.
            budget: How long.
            seed: Of the order of the batches.
        """
        batches = self.batches(seed, budget.batch_size, "train")
        for _ in range(budget.done):
            next(batches)
        while budget.share < 1:
            yield subject.step(next(batches), budget)

    def judge(self, subject: Subject, seed: int) -> dict[str, float]:
        """Scores of a subject, ``metric`` among them; by default those of ``evaluate``.

        Args:
            subject: What is judged, in evaluation mode and without gradients.
            seed: Of whatever is drawn; all arms of a seed are judged on the same.
        """
        return self.evaluate(subject.predict, subject.batch_size, subject.device)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Mean cross-entropy, or mean squared error where values are predicted; a loss that the model gives comes first.

        Raises:
            ValueError: Outputs and targets do not fit, or there are no targets and the model gives no loss.
        """
        own = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if own is not None:
            return own
        if targets is None:
            raise ValueError(
                f"task {self.name!r}: a batch without targets, and the model returned {type(outputs).__name__} without a "
                "loss. Give targets, or a model that returns {'loss': ...}."
            )
        outputs = answer(outputs)
        if self.shape.outputs == "values":
            if outputs.shape != targets.shape:
                raise ValueError(
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
        loss, hits, total = 0.0, 0, 0
        for inputs, targets in self.batches(0, batch_size, "validation"):
            inputs, targets = moved((inputs, targets), device)
            outputs, size = predict(inputs), count((inputs, targets))
            loss += float(self.loss(outputs, targets)) * size
            total += size
            if self.shape.outputs == "classes":
                hits += int((answer(outputs).argmax(-1) == targets).sum())
        found = {"loss": loss / total}
        if self.shape.outputs == "classes":
            found["accuracy"] = hits / total
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
                    f"task {name!r}: {split} has {len(x)} inputs and {len(y)} targets; wanted as many, and some."
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


def shape_of(name: str, x: Tensor, y: Tensor | None) -> DataShape:
    """The shape of a user's tensors; without targets the model's loss is all that is known of its outputs."""
    whole = not x.is_floating_point()
    if whole and x.dim() == 2 and y is not None and y.dim() == 2 and not y.is_floating_point():
        return DataShape("tokens", "tokens", vocab=int(max(x.max(), y.max())) + 1, length=x.shape[1])
    kind = "tokens" if whole else {2: "vector", 3: "series", 4: "image"}.get(x.dim(), "")
    if not kind:
        raise ValueError(
            f"task {name!r}: inputs {tuple(x.shape)}; wanted [N, F], [N, S, F], [N, C, H, W] or integers [N, S]."
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


class ScenarioTask(Task):
    """A scenario that simulators run: an arm changes the simulator or the scenario, and is judged by what comes out.

    Args:
        name: Name in the report.
        simulator: The usual simulator, a slug of the catalogue.
        scenario: As the simulator takes it; options of an arm go over it.
        table: The table of the finding that counts.
        metrics: Its columns, the one that arms are compared by first; each is averaged over the rows.
        higher: Whether more of it is better.
        unit: Its unit.
        about: One line for the report.
    """

    learns = False
    shape = DataShape("vector", "values", classes=1, features=1)

    def __init__(
        self,
        name: str,
        simulator: str,
        scenario: Mapping[str, Any],
        *,
        table: str,
        metrics: Sequence[str],
        higher: bool = True,
        unit: str = "",
        about: str = "",
    ) -> None:
        self.name, self.base, self.scenario, self.table, self.metrics = name, simulator, scenario, table, tuple(metrics)
        self.metric, self.higher, self.unit, self.about = metrics[0], higher, unit, about

    def batches(self, seed: int, batch_size: int, split: str = "train") -> Iterator[Batch]:
        """There is nothing to learn from."""
        yield from ()

    def learn(self, subject: Subject, budget: Budget, seed: int) -> Iterator[float]:
        """Nothing is learned."""
        yield from ()

    def judge(self, subject: Subject, seed: int) -> dict[str, float]:
        """Means of the columns over a run of the subject's simulator.

        Raises:
            ValueError: The subject is no simulator, or its finding has no such table or column.
        """
        model = subject.model
        if not isinstance(model, Simulated):
            raise ValueError(
                f"task {self.name!r}: got a {type(model).__name__}; expected a simulator such as {self.base!r}."
            )
        found = model.run(self.scenario, seed).tables.get(self.table, {})
        if missing := [m for m in self.metrics if m not in found]:
            raise ValueError(
                f"task {self.name!r}: the run gave no {missing[0]!r} in a table {self.table!r}; expected "
                f"{', '.join(self.metrics)}. Take a simulator that measures them."
            )
        return {m: float(sum(found[m]) / len(found[m])) for m in self.metrics}


class Simulated(nn.Module):
    """A simulator as the subject of a study.

    Args:
        simulator: What runs.
        options: Keys of the scenario that an arm sets.
    """

    def __init__(self, simulator: Simulator, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.simulator, self.options = simulator, dict(options)

    def run(self, scenario: Mapping[str, Any], seed: int) -> Finding:
        """Run the scenario with the arm's options."""
        return self.simulator.run({**scenario, **self.options}, seed)

    def extra_repr(self) -> str:
        """The options tell arms apart."""
        return f"{type(self.simulator).__name__}, {self.options}"


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
                raise ValueError(f"task {name!r}: only {len(text)} bytes of {split} text; wanted more than {length}.")
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
