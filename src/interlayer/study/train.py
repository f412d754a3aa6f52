"""One run: one arm learns with one seed on a budget, is judged on the way, and what it costs is counted."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from interlayer.core import cost, nano, recipe
from interlayer.core.data import run
from interlayer.core.pairing import Paired
from interlayer.core.task import Budget, Task
from interlayer.study.arms import Arm, resolve
from interlayer.study.spec import StudyError
from interlayer.study.subject import Learner, build, tensors_in, transform

CHECKPOINT = 30.0  # seconds of training between two checkpoints
OTHERS = 10_000  # what is added to a seed for the next model that a transform merges

Emit = Callable[[dict[str, Any]], None]


FAR = 10  # times the first training loss; a run that ends above it has diverged


class Diverged(RuntimeError):
    """The loss is no longer a finite number, or ends far above where it began."""


@dataclass
class Record:
    """What a run leaves behind; all of it is JSON.

    Attributes:
        metrics: Last judgement.
        curve: Every judgement, with ``step`` and ``seconds`` of training before it.
        train: ``[step, mean training loss since the last point]``, at most some 200 points.
        asides: What layers reported beside their output, by name, as ``train``.
        cost: parameters and step_time (s); of the first seed also flops (per item), peak_memory and kept (bytes), and where
            wanted disk (bytes) and latency_N (s).
        steps: Steps taken.
        seconds: Time in training steps.
        judged: Time in judgements.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    train: list[list[float]] = field(default_factory=list)
    asides: dict[str, list[list[float]]] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    judged: float = 0.0

    def data(self) -> dict[str, Any]:
        """As JSON-able fields."""
        return asdict(self)


@dataclass(frozen=True)
class Job:
    """What all runs of a study share.

    Args:
        batch_size: Samples in a step.
        steps: Budget of each run, or
        seconds: its budget in seconds of training.
        evaluations: How often a run is judged, the last time at its end.
        device: Where the models live, as torch names it.
        bases: Folder of the models that are trained once for each seed.
        delivered: Whether to measure what a model costs in use: bytes on disk, time of a forward pass.
    """

    batch_size: int = 16
    steps: int | None = None
    seconds: float | None = None
    evaluations: int = 1
    device: str = "cpu"
    bases: Path | None = None
    delivered: bool = False

    def budget(self, record: Record) -> Budget:
        """The budget, as far as a record has not used it."""
        return Budget(self.batch_size, self.steps, self.seconds, record.steps, record.seconds)


def check(arm: Arm, task: Task, job: Job) -> Paired[nn.Module]:
    """Build the arm on the CPU and take it through two samples, so that what cannot work is reported before training."""
    built = build(arm, task, 0)
    model = copy.deepcopy(built.model)
    if not task.learns:
        return built
    inputs, targets = batch = next(task.batches(0, 2, "train"))
    if not all(torch.isfinite(t).all() for t in tensors_in(inputs)):
        raise StudyError(
            f"task {task.name!r}: its inputs hold NaN or infinite numbers; leave those samples out or fill them in."
        )
    if arm.rule:
        Learner(arm, model, task, 2, lr=arm.training.lr).step(batch, Budget(2, steps=1))
        return built
    loss = task.loss(run(model, inputs), targets)
    if loss.dim():
        raise StudyError(f"arm {arm.name!r}: the task's loss has shape {tuple(loss.shape)}; expected one number.")
    if job.steps != 0 and not any(p.requires_grad for p in model.parameters()):
        raise StudyError(f"arm {arm.name!r}: the model has no parameter to train.")
    for use in arm.transforms:
        merges = resolve(use).merges
        if merges and not arm.trained:
            raise StudyError(
                f"arm {arm.name!r}: {use[0]!r} merges trained models; give the study the base 'trained:...', so that there "
                "are several."
            )
        if use is arm.transforms[0]:  # the next one needs what this one makes
            transform(arm, use, model, [batch], [build(arm, task, OTHERS * (i + 1)).model for i in range(merges)])
    return built


def train(
    arm: Arm,
    task: Task,
    job: Job,
    seed: int,
    *,
    lr: float | None = None,
    emit: Emit = lambda _: None,
    record: Record | None = None,
    checkpoint: Path | None = None,
    keep: Path | None = None,
    measure: bool = True,
) -> Record:
    """Train and judge one arm with one seed.

    All arms of a seed start from the same noise, see the same batches in the same order and draw the same random numbers in
    the modules that they share; the same seed gives the same numbers.

    Args:
        arm: What is trained.
        task: What it learns.
        job: Budget and place.
        seed: Of the initial weights, the batches and every random choice while training.
        lr: Peak learning rate; a rule without one of its own takes none.
        emit: Called with each step and judgement.
        record: Filled on the way, so that a run which fails leaves its curve.
        checkpoint: File that a long run writes now and then, and goes on from if it is there: the numbers are the same to the
            last bit as without the interruption. It is deleted at the end.
        keep: Folder where the trained model is saved.
        measure: Whether to count all costs, which are the same for every seed; otherwise only parameters and step time.

    Raises:
        Diverged: The loss is not finite, or ends ten times above that of the first steps.
    """
    record = record if record is not None else Record()
    learner = _learner(arm, task, job, seed, lr)
    if arm.trained:
        _teach_once(learner, job, lr, emit, record, checkpoint)
        others = [
            _other(arm, task, job, seed + OTHERS * (i + 1), lr)
            for i in range(max((resolve(use).merges for use in arm.transforms), default=0))
        ]
    else:
        _teach(learner, job, emit, record, checkpoint)
        others = []
    learner.transform(others)
    _judge(learner, record, emit, last=True)
    if keep:
        recipe.save(learner.model, keep)
    if task.learns:
        record.cost = learner.cost(
            next(task.batches(seed, job.batch_size, "train")) if measure else None, job.delivered
        )
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return record


def _learner(arm: Arm, task: Task, job: Job, seed: int, lr: float | None) -> Learner:
    model = build(arm, task, seed).model.to(job.device)
    torch.manual_seed(seed)
    return Learner(arm, model, task, job.batch_size, seed, lr)


def _teach(learner: Learner, job: Job, emit: Emit, record: Record, checkpoint: Path | None) -> None:
    """Let the learner learn until its budget is used up."""
    marks = [(i + 1) / job.evaluations for i in range(job.evaluations - 1)]
    recent: list[float] = []
    every = max(1, (job.steps or 0) // 200)
    if checkpoint and checkpoint.is_file():
        state = torch.load(checkpoint, map_location=job.device, weights_only=True)
        learner.load(state["learner"])
        vars(record).update(state["record"])
        recent, learner.times = state["recent"], state["times"]
    saved = record.seconds
    budget = job.budget(record)
    marks = marks[len(record.curve) :]

    def look() -> None:
        if marks and budget.share >= marks[0] - 1e-9:
            marks.pop(0)
            _judge(learner, record, emit, last=False)

    look()  # a run that was cut off just before
    for loss in learner.task.learn(learner, budget, learner.seed):
        record.steps, record.seconds = budget.done, budget.spent
        recent.append(loss)
        if record.steps % every == 0 or not math.isfinite(loss):
            record.train.append([record.steps, sum(recent) / len(recent) if math.isfinite(loss) else math.nan])
            recent.clear()
            for name, value in learner.asides.items():
                record.asides.setdefault(name, []).append([record.steps, value])
        if not math.isfinite(loss):
            raise Diverged(f"training loss is {loss} at step {record.steps} (learning rate {learner.lr or 0:.3g}).")
        if checkpoint and record.seconds - saved >= CHECKPOINT:
            saved = record.seconds
            _save(
                {"learner": learner.state(), "record": record.data(), "recent": recent, "times": learner.times},
                checkpoint,
            )
        left = (
            (job.steps - budget.done) * cost.median_time(learner.times[-20:], 0)
            if job.steps
            else (job.seconds or 0.0) - budget.spent
        )
        emit({"what": "step", "step": record.steps, "share": budget.share, "loss": loss, "left": max(left, 0.0)})
        look()


def _teach_once(
    learner: Learner, job: Job, lr: float | None, emit: Emit, record: Record, checkpoint: Path | None
) -> None:
    """Take the weights that the arm's base has after training with this seed; train it if nobody has yet."""
    assert job.bases is not None
    path = job.bases / f"seed-{learner.seed}-lr-{lr}.safetensors"
    if path.is_file():
        learner.fill(load_file(path, device=str(learner.device)))
        return
    _teach(learner, job, emit, record, checkpoint)
    nano.keep(path, learner.tensors())


def _other(arm: Arm, task: Task, job: Job, seed: int, lr: float | None) -> nn.Module:
    """The base, trained with another seed."""
    learner = _learner(replace(arm, transforms=()), task, job, seed, lr)
    _teach_once(learner, job, lr, lambda _: None, Record(), None)
    return learner.model


def _judge(learner: Learner, record: Record, emit: Emit, *, last: bool) -> None:
    begin = time.perf_counter()
    found = learner.judge()
    record.judged += time.perf_counter() - begin
    record.curve.append({"step": record.steps, "seconds": record.seconds, **found})
    record.metrics = found
    emit({"what": "eval", "step": record.steps, "value": found[learner.task.metric], "last": last})
    if not all(math.isfinite(v) for v in found.values()):
        raise Diverged(f"validation gives {found} at step {record.steps}.")
    loss, first = found.get("loss", 0.0), record.train[0][1] if record.train else math.inf
    if (
        last and loss > FAR * abs(first) and not learner.arm.transforms
    ):  # what a transform does to a model counts as it is
        raise Diverged(f"the loss is {loss:.4g} at the end, and was {first:.4g} in the first steps.")


def _save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; a write that fails or is cut off leaves the earlier one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    torch.save(state, part)
    part.replace(path)
