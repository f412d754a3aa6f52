"""What a task is, and what it does with a subject: a budget, a way to learn, a loss and a judgement."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from interlayer.core.data import Batch, DataShape, answer, count, moved


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
                    f"task {self.name!r}: outputs {tuple(outputs.shape)} for targets {tuple(targets.shape)}; expected equal shapes."
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

        def predict(inputs: Any) -> Tensor:
            tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
            x = tensors[-1 if self.shape.kind == "seq2seq" else 0]
            lead = [len(x)]
            if self.shape.outputs == "tokens":  # integers [B, S], or numbers [B, ..., S, F]
                lead.append(x.shape[-2 if x.is_floating_point() else 1])
            return guess.expand(*lead, *guess.shape)

        return self.evaluate(predict, 64)
