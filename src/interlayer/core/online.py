"""Adaptation at test time: streams of shifted data, a base for rules that adapt on unlabelled batches, and the loop that judges them.

A stream is a list of ``Shift``: data with a name, in the order in which they arrive. ``adapt_online`` gives a rule one batch after
another, without labels, and counts which of its answers are wrong. A rule keeps one copy of the tensors that it moves, so its
state does not grow with the stream, and ``reset`` brings back the source model.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from interlayer.core import aside, taps
from interlayer.core.data import answer, run
from interlayer.core.degraded import KINDS, corrupt
from interlayer.core.kinds import Rule
from interlayer.core.pairing.seeds import seed_of


@dataclass(frozen=True, eq=False)
class Shift:
    """Data of one kind that arrive together; the labels are for judging alone.

    Args:
        name: What they are called in results.
        inputs: The inputs, one item for each label.
        labels: Integers.

    Raises:
        ValueError: No data, or not as many labels as inputs.
    """

    name: str
    inputs: Tensor
    labels: Int[Tensor, " N"]

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels) or not len(self.labels):
            raise ValueError(
                f"Shift {self.name!r}: {len(self.inputs)} inputs and {len(self.labels)} labels; expected as many, and some."
            )


def corruptions(
    images: Float[Tensor, "N C H W"],
    labels: Int[Tensor, " N"],
    kinds: Sequence[str] = KINDS,
    *,
    level: int = 5,
    seed: int = 0,
    table: Literal["imagenet", "cifar"] = "imagenet",
    then: Callable[[Tensor], Tensor] = lambda x: x,
) -> list[Shift]:
    """The same images under one corruption after another (``core.degraded.corrupt``), each in an order of its own.

    Args:
        images: Clean images from 0 to 1.
        labels: Their classes.
        kinds: The corruptions, in the order of the stream.
        level: 1 (weak) to 5 (strong).
        seed: Of the noise and of the order of the images.
        table: See ``corrupt``.
        then: What the model's inputs need after it, such as standardisation.

    Raises:
        ValueError: No kind, or what ``corrupt`` refuses.

    Examples:
        >>> stream = corruptions(torch.rand(6, 1, 8, 8), torch.arange(6), ["contrast", "shot-noise"], level=3)
        >>> [(s.name, tuple(s.inputs.shape)) for s in stream]
        [('contrast', (6, 1, 8, 8)), ('shot-noise', (6, 1, 8, 8))]
    """
    if not kinds:
        raise ValueError(f"corruptions: no kind; expected some of {', '.join(KINDS)}.")
    found = []
    for kind in kinds:
        own = seed_of(seed, kind)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(own)).to(labels.device)
        found.append(Shift(kind, then(corrupt(images[order], kind, level, own, table=table)), labels[order]))
    return found


def entropy(logits: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """Entropy of each prediction in nats.

    >>> round(float(entropy(torch.zeros(1, 4))) / float(torch.tensor(4.0).log()), 6)
    1.0
    """
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """While this is open, BatchNorm normalises by the batch; its running statistics are neither read nor moved.

    >>> norm = nn.BatchNorm1d(1).eval()
    >>> with batch_statistics(norm):
    ...     norm(torch.tensor([[1.0], [3.0]])).flatten().round().tolist()
    [-1.0, 1.0]
    >>> norm.training, norm.track_running_stats, norm.running_mean.tolist()
    (False, True, [0.0])
    """
    norms = [(m, m.training, m.track_running_stats) for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        for norm, _, _ in norms:
            norm.training, norm.track_running_stats = True, False
        yield
    finally:
        for norm, training, tracks in norms:
            norm.training, norm.track_running_stats = training, tracks


class Adapter(Rule):
    """A rule that adapts a trained model while it is in use, from unlabelled batches.

    ``adapt(inputs)`` moves the model and answers; ``predict(inputs)`` does so too and takes the move back; ``answer(inputs)`` only
    answers. ``reset()`` brings back the source model. ``step(batch)`` trains the source model on labelled data, as any model is
    trained, so that a study can train and judge the same arm.

    A subclass says in ``moves`` which tensors adapting changes and in ``respond`` how it adapts and answers. Memory: one copy of
    those tensors, and the moments of the optimiser for what ``trained`` names.

    Args:
        model: A trained classifier; its outputs, or their ``logits``, are [B, K]. Of one that ``torch.compile`` gave, the module
            itself adapts and runs without compilation; the weights are the same.
        rate: Learning rate of Adam for ``trained`` while adapting.
        lr: Learning rate of Adam for training the source in ``step``.

    Raises:
        ValueError: A rate below 0.
    """

    statistics: ClassVar[bool] = True
    """Whether BatchNorm takes the statistics of each batch while adapting and answering."""

    def __init__(self, model: nn.Module, *, rate: float = 1e-3, lr: float = 1e-3) -> None:
        if rate < 0 or lr < 0:
            raise ValueError(f"{type(self).__name__}: rate {rate}, lr {lr}; expected at least 0 of each.")
        self.model = getattr(model, "_orig_mod", model)  # hooks that come and go would compile a compiled model again
        self.rate, self.lr = rate, lr
        self.source: dict[str, Tensor] = {}
        self.optimiser: torch.optim.Adam | None = None
        self.teacher: torch.optim.Adam | None = None

    def moves(self) -> dict[str, Tensor]:
        """All tensors that adapting changes, by name."""
        return self.trained()

    def trained(self) -> dict[str, Tensor]:
        """Those of them that ``lower`` changes."""
        return {}

    @abstractmethod
    def respond(self, inputs: Any) -> Float[Tensor, "B K"]:
        """Adapt to a batch and answer it; called by ``adapt`` with gradients switched on for ``trained`` alone."""

    def run(self, inputs: Any) -> Float[Tensor, "B K"]:
        """The logits of the model as it stands."""
        return answer(run(self.model, inputs))

    def lower(self, loss: Tensor) -> None:
        """One step of Adam on ``trained``. Where the loss is not finite, nothing moves."""
        tensors = list(self.trained().values())
        if self.optimiser is None:
            self.optimiser = torch.optim.Adam(tensors, lr=self.rate)
        for tensor, slope in zip(tensors, torch.autograd.grad(loss, tensors), strict=True):
            tensor.grad = slope
        if loss.isfinite():
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Evaluation mode with the rule's statistics; only ``trained`` needs gradients. Everything is put back."""
        needs = [(p, p.requires_grad) for p in self.model.parameters()]
        try:
            with taps.eval_mode(self.model), batch_statistics(self.model) if self.statistics else nullcontext():
                self.model.requires_grad_(False)
                for tensor in self.trained().values():
                    tensor.requires_grad_(True)
                yield
        finally:
            for p, need in needs:
                p.requires_grad_(need)

    def adapt(self, inputs: Any) -> Float[Tensor, "B K"]:
        """Adapt to one unlabelled batch and answer it, in evaluation mode."""
        self._keep()
        with self._in_use(), torch.enable_grad():
            return self.respond(inputs).detach()

    def answer(self, inputs: Any) -> Float[Tensor, "B K"]:
        """The answer of the model as it stands; nothing moves."""
        with self._in_use(), torch.no_grad():
            return self.run(inputs)

    def predict(self, inputs: Any) -> Float[Tensor, "B K"]:
        """What ``adapt`` would answer; nothing moves."""
        self._keep()
        there = {name: tensor.detach().clone() for name, tensor in self.moves().items()}
        moments = copy.deepcopy(self.optimiser.state_dict()) if self.optimiser else None
        logits = self.adapt(inputs)
        self._put(there)
        if moments is None:
            self.optimiser = None
        elif self.optimiser:
            self.optimiser.load_state_dict(moments)
        return logits

    def reset(self) -> None:
        """Bring back the source model, and forget the optimiser's moments."""
        self._put(self.source)
        self.optimiser = None

    def _keep(self) -> None:
        if not self.source:
            self.source = {name: tensor.detach().clone() for name, tensor in self.moves().items()}

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, tensor in self.moves().items() if values else ():
            tensor.copy_(values[name])

    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """That of ``step``; adapting has a rate of its own."""
        return (self.teacher,) if self.teacher else ()

    def step(self, batch: tuple[Any, Tensor]) -> dict[str, float]:
        """Train the source model on one labelled batch: cross-entropy, auxiliary losses and Adam. What was adapted is taken back."""
        self.reset()
        self.source = {}
        if self.teacher is None:
            self.teacher = torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], lr=self.lr)
        inputs, labels = batch
        with torch.enable_grad(), aside.collect() as told:
            logits = answer(run(self.model.train(), inputs))
            loss = F.cross_entropy(logits, labels)
            self.teacher.zero_grad(set_to_none=True)
            (loss if told.loss is None else loss + told.loss).backward()
        if loss.isfinite():
            self.teacher.step()
        return {"loss": float(loss.detach()), "accuracy": float((logits.argmax(1) == labels).float().mean())}

    def state_dict(self) -> dict[str, Any]:
        """The source of what has moved, the tensors that the model does not hold, and the optimisers' states."""
        held = {id(t) for t in self.model.parameters()}
        return {
            "source": dict(self.source),
            "own": {name: t.detach().clone() for name, t in self.moves().items() if id(t) not in held},
            "adapting": self.optimiser.state_dict() if self.optimiser else None,
            "training": self.teacher.state_dict() if self.teacher else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave; the model's own weights are loaded by the caller."""
        self.source, there = {k: v.clone() for k, v in state["source"].items()}, self.moves()
        with torch.no_grad():
            for name, value in state["own"].items():
                there[name].copy_(value)
        self.optimiser = self.teacher = None
        if state["adapting"] is not None:
            self.optimiser = torch.optim.Adam(list(self.trained().values()), lr=self.rate)
            self.optimiser.load_state_dict(state["adapting"])
        if state["training"] is not None:
            self.teacher = torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], lr=self.lr)
            self.teacher.load_state_dict(state["training"])


@dataclass(frozen=True)
class Adapted:
    """Which answers along a stream were wrong.

    Attributes:
        wrong: For each shift, in order of arrival, whether each answer was wrong.

    Examples:
        >>> found = Adapted({"noise": torch.tensor([True, False]), "blur": torch.tensor([False, False])})
        >>> found.errors, found.error
        ({'noise': 0.5, 'blur': 0.0}, 0.25)
    """

    wrong: Mapping[str, Bool[Tensor, " N"]]

    @property
    def errors(self) -> dict[str, float]:
        """Online error of each shift."""
        return {name: float(wrong.float().mean()) for name, wrong in self.wrong.items()}

    @property
    def error(self) -> float:
        """Their mean."""
        return sum(self.errors.values()) / len(self.wrong)


def adapt_online(
    rule: Adapter,
    stream: Iterable[Shift],
    *,
    batch: int = 64,
    reset: Literal["never", "shift", "batch"] = "never",
    judge: Literal["at", "before"] = "at",
) -> Adapted:
    """Give a rule one batch after another, each once and without its labels, and count wrong answers.

    Time and memory are those of the rule for one batch; nothing is kept of earlier ones but what the rule moved.

    Args:
        rule: Bound to a trained model, on whose device it runs. Reset before the first batch.
        stream: Shifts with different names, in order of arrival.
        batch: Items in a batch; the last batch of a shift may be smaller.
        reset: When the source model comes back: never (continual), at each shift (as corruption benchmarks do), or at each batch
            (episodic).
        judge: ``at``: the answer that the rule gives as it adapts to the batch. ``before``: that of the model as it stands when the
            batch arrives, which shows what earlier batches taught.

    Raises:
        ValueError: An empty stream, a name that comes twice, ``batch`` below 1, or an unknown ``reset`` or ``judge``.
    """
    if batch < 1 or reset not in ("never", "shift", "batch") or judge not in ("at", "before"):
        raise ValueError(
            f"adapt_online: batch {batch}, reset {reset!r}, judge {judge!r}; expected at least 1, one of never, shift and batch, "
            "and one of at and before."
        )
    device = next(rule.model.parameters()).device
    wrong: dict[str, Tensor] = {}
    rule.reset()
    for shift in stream:
        if shift.name in wrong:
            raise ValueError(f"adapt_online: two shifts {shift.name!r}; expected a name of its own for each.")
        if reset == "shift":
            rule.reset()
        misses = []
        for inputs, labels in zip(shift.inputs.split(batch), shift.labels.split(batch), strict=True):
            if reset == "batch":
                rule.reset()
            inputs = inputs.to(device)
            before = rule.answer(inputs) if judge == "before" else None
            given = rule.adapt(inputs)
            misses.append((given if before is None else before).argmax(1) != labels.to(device))
        wrong[shift.name] = torch.cat(misses).cpu()
    if not wrong:
        raise ValueError("adapt_online: an empty stream; expected at least one Shift.")
    return Adapted(wrong)
