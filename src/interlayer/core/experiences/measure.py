"""Run a rule over a stream, and what it knows after each experience: accuracy, transfer and forgetting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from interlayer.core.data import Experience, moved
from interlayer.core.kinds import NotBegun, Rule
from interlayer.core.pairing.seeds import kept, seed_all, seed_of
from interlayer.core.schedule import progress
from interlayer.core.task import TensorTask


@dataclass(frozen=True)
class Learned:
    """Test accuracies along a stream of T experiences, and the usual numbers made of them.

    Attributes:
        names: The experiences.
        accuracy: ``R[i, j]``, the accuracy on experience j after learning experience i; NaN where the rule has nothing yet
            to predict j with.
        before: ``b[j]``, the accuracy on experience j before anything was learned; NaN likewise.

    Examples:
        >>> found = Learned(["a", "b"], torch.tensor([[0.9, 0.4], [0.7, 0.8]]), torch.tensor([0.5, 0.3]))
        >>> [round(v, 2) for v in (found.average, found.backward, found.forward, found.forgetting)]
        [0.75, -0.2, 0.1, 0.2]
    """

    names: Sequence[str]
    accuracy: Float[Tensor, "T T"]
    before: Float[Tensor, " T"]

    @property
    def average(self) -> float:
        """``1/T sum_j R[T, j]``: ACC of Lopez-Paz and Ranzato (arXiv:1706.08840)."""
        return float(self.accuracy[-1].mean())

    @property
    def backward(self) -> float:
        """``1/(T-1) sum_(j<T) R[T, j] - R[j, j]``: their BWT, what later experiences added to earlier ones. NaN for one experience."""
        return float((self.accuracy[-1] - self.accuracy.diagonal())[:-1].mean())

    @property
    def forward(self) -> float:
        """``1/(T-1) sum_(j>1) R[j-1, j] - b[j]``: their FWT, what earlier experiences added to those not yet learned.

        They take b from a network with random weights; here it is the rule's before the stream.
        """
        return float((self.accuracy.diagonal(1) - self.before[1:]).mean())

    @property
    def forgetting(self) -> float:
        """``1/(T-1) sum_(j<T) max_(j<=i<T) R[i, j] - R[T, j]`` (Chaudhry et al., arXiv:1801.10112)."""
        earlier = self.accuracy[:-1, :-1]
        later = torch.ones_like(earlier, dtype=torch.bool).tril()
        best = earlier.masked_fill(~later, -torch.inf).amax(0) if len(earlier) else earlier.mean(0)
        return float((best - self.accuracy[-1, :-1]).mean())


def run_stream(
    rule: Rule,
    stream: Sequence[Experience],
    *,
    steps: int,
    batch: int = 32,
    seed: int = 0,
    known: bool = True,
    rate: Callable[[float], float] = lambda share: 1.0,
    watch: Callable[[Experience], object] | None = None,
) -> Learned:
    """Learn the experiences of a stream in order, and test on all of them after each.

    Args:
        rule: Bound to its model, on whose device it learns.
        stream: Experiences with different names.
        steps: Training steps for each experience.
        batch: Samples in a batch, drawn in shuffled epochs.
        seed: Of the batches and of everything that the rule draws.
        known: Whether the rule knows at test which experience an input belongs to (task-incremental). Otherwise it has to
            answer for all alike (class- and domain-incremental).
        rate: The learning rate at a share of an experience's steps, as a part of its peak, such as ``schedule.stepped``.
        watch: Called after each experience was learned.

    Raises:
        ValueError: The stream is empty, two experiences share a name, or ``steps`` or ``batch`` is below 1.
    """
    names = [e.name for e in stream]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"run_stream: experiences {names}; expected at least one, and a name of its own for each.")
    if steps < 1 or batch < 1:
        raise ValueError(f"run_stream: steps {steps}, batch {batch}; expected at least 1 of each.")
    device = next(rule.model.parameters()).device
    stream = [replace(e, train=moved(e.train, device), test=moved(e.test, device)) for e in stream]
    with kept():
        before = _accuracies(rule, stream, known)
        rows = []
        for experience in stream:
            seed_all(seed_of(seed, experience.name))
            rule.begin(experience)
            order = seed_of(seed, experience.name, "order")
            data = TensorTask(experience.name, experience.train, experience.test).batches(order, batch)
            for step, each in enumerate(islice(data, steps)):
                seed_all(seed_of(seed, experience.name, step))
                progress(rule.model, step / steps)
                for group in (g for optimizer in rule.optimizers() for g in optimizer.param_groups):
                    group["lr"] = group.setdefault("initial_lr", group["lr"]) * rate(step / steps)
                rule.step(each)
            rule.end(experience)
            rows.append(_accuracies(rule, stream, known))
            if known:
                rule.at(experience)
            if watch:
                watch(experience)
    return Learned(names, torch.stack(rows), before)


def _accuracies(rule: Rule, stream: Sequence[Experience], known: bool) -> Tensor:
    return torch.tensor([_accuracy(rule, e, known) for e in stream], dtype=torch.float64)


def _accuracy(rule: Rule, experience: Experience, known: bool) -> float:
    """Accuracy on the test data; NaN if the rule has no parts for the experience yet."""
    try:
        if known:
            rule.at(experience)
        inputs, targets = experience.test
        right = [
            (rule.predict(x).argmax(1) == y).sum() for x, y in zip(inputs.split(256), targets.split(256), strict=True)
        ]
    except NotBegun:
        return float("nan")
    return float(torch.stack(right).sum()) / len(targets)
