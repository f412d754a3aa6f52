"""A stream of experiences as a task of studies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch

from interlayer.core.data import Batch, DataShape, Experience, answer, moved
from interlayer.core.kinds import NotBegun
from interlayer.core.pairing.seeds import seed_of
from interlayer.core.task import Budget, Subject, Task, TensorTask


class StreamTask(Task):
    """Learn experiences one after another, each with the same share of the steps, and know all of them at the end.

    The metric is the mean test accuracy over the experiences begun so far; ``forgetting`` is how much of each experience's best
    accuracy is gone (Chaudhry et al., arXiv:1801.10112). Each experience has the whole course of the learning rate. Rules hear
    ``begin``, ``end`` and, where the experience of a test input is known, ``at``; an arm without a rule is fine-tuned with the
    one head that it has.

    Args:
        name: Name in the report.
        stream: Experiences with different names and inputs of one shape.
        known: Whether a rule hears at test which experience an input belongs to.
        base: The usual backbone.
        about: One line on the data.

    Raises:
        ValueError: Fewer than two experiences, a name that comes twice, or inputs of several shapes.

    Examples:
        >>> from interlayer.core.datasets import split_digits
        >>> from interlayer.core.experiences import by_classes
        >>> task = StreamTask("mine", by_classes(split_digits(), [[0, 1], [2, 3]]))
        >>> task.shape.classes, task.metric
        (2, 'accuracy')
    """

    metric, higher, base = "accuracy", True, "convnet"

    def __init__(
        self, name: str, stream: Sequence[Experience], *, known: bool = True, base: str = "convnet", about: str = ""
    ) -> None:
        names = [e.name for e in stream]
        if len(set(names)) < max(len(names), 2):
            raise ValueError(f"task {name!r}: experiences {names}; expected at least two, each with a name of its own.")
        shapes = {tuple(e.train[0].shape[1:]) for e in stream}
        if len(shapes) > 1:
            raise ValueError(
                f"task {name!r}: inputs of shapes {sorted(shapes)}; expected one shape for all experiences."
            )
        self.name, self.stream, self.known, self.base = name, list(stream), known, base
        self.parts = [TensorTask(e.name, e.train, e.test) for e in stream]
        self.shape = DataShape(**{**vars(self.parts[0].shape), "classes": max(e.classes for e in stream)})
        self.about = about or f"{len(stream)} experiences: {', '.join(names)}."

    def batches(self, seed: int, batch_size: int, split: str = "train") -> Iterator[Batch]:
        """Of the first experience for ``train``; of all of them for ``validation``."""
        if split == "train":
            yield from self.parts[0].batches(seed, batch_size)
        else:
            for part in self.parts:
                yield from part.batches(seed, batch_size, split)

    def learn(self, subject: Subject, budget: Budget, seed: int) -> Iterator[float]:
        """One experience after another.

        Raises:
            ValueError: A budget in seconds, or with fewer steps than experiences.
        """
        count = len(self.stream)
        if budget.steps is None or budget.steps < count:
            raise ValueError(
                f"task {self.name!r}: a budget of {budget.steps or 0} steps; expected at least {count}, one for each experience. "
                "Set steps, not seconds."
            )
        ends = [budget.steps * (i + 1) // count for i in range(count)]
        for i, (experience, part) in enumerate(zip(self.stream, self.parts, strict=True)):
            first = ends[i - 1] if i else 0
            if budget.done >= ends[i]:
                continue
            if budget.done == first:
                subject.begin(experience)
            own = Budget(budget.batch_size, ends[i] - first, done=budget.done - first)
            data = part.batches(seed_of(seed, experience.name), budget.batch_size)
            for batch in islice(data, own.done, own.steps):
                spent = own.spent
                loss = subject.step(batch, own)
                budget.done, budget.spent = budget.done + 1, budget.spent + own.spent - spent
                if budget.done == ends[i]:
                    subject.end(experience)
                    for j in range(i + 1):
                        subject.notes[f"{i} {j}"] = self._accuracy(subject, j)
                yield loss

    def judge(self, subject: Subject, seed: int) -> dict[str, float]:
        """Accuracy over the experiences begun so far, and forgetting over those that have ended."""
        ended = {int(key.split()[0]) for key in subject.notes}
        now = [self._accuracy(subject, j) for j in range(min(len(ended) + 1, len(self.stream)))]
        best = [max(v for k, v in subject.notes.items() if k.endswith(f" {j}")) for j in sorted(ended)]
        lost = [b - n for b, n in zip(best, now, strict=False)]
        return {"accuracy": sum(now) / len(now), "forgetting": sum(lost) / len(lost) if lost else 0.0}

    @torch.no_grad()
    def _accuracy(self, subject: Subject, index: int) -> float:
        experience, hits = self.stream[index], 0
        mode = subject.model.training
        subject.model.eval()
        try:
            if self.known:
                subject.at(experience)
            for inputs, targets in self.parts[index].batches(0, subject.batch_size, "validation"):
                inputs, targets = moved((inputs, targets), subject.device)
                hits += int((answer(subject.predict(inputs)).argmax(-1) == targets).sum())
        except NotBegun:
            pass  # nothing to predict with: nothing is right
        subject.model.train(mode)
        return hits / len(experience.test[1])

    def trivial(self) -> dict[str, float]:
        """Always the most frequent class of an experience."""
        shares = [float(e.train[1].bincount().amax() / len(e.train[1])) for e in self.stream]
        return {"accuracy": sum(shares) / len(shares), "forgetting": 0.0}
