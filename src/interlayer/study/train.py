"""One run: train one arm with one seed on a budget, evaluate it on the way, and count what it costs."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from interlayer import catalog
from interlayer.core import cost, recipe
from interlayer.core.auxiliary import extra_loss
from interlayer.core.data import run
from interlayer.core.kinds import Rule
from interlayer.core.options import checked
from interlayer.core.pairing import Paired, Streams, clip_gradients, paired
from interlayer.core.schedule import progress
from interlayer.study.arms import Arm
from interlayer.study.spec import StudyError, StudySpec
from interlayer.study.task import Task, moved

CHECKPOINT = 30.0  # seconds of training between two checkpoints


class Diverged(RuntimeError):
    """The training loss is no longer a finite number."""


@dataclass
class Record:
    """What a run leaves behind; all of it is JSON.

    Attributes:
        metrics: Last evaluation.
        curve: Every evaluation, with ``step`` and ``seconds`` of training before it.
        train: ``[step, mean training loss since the last point]``, at most some 200 points.
        cost: parameters, flops (per item), step_time (s), peak_memory and kept (bytes).
        steps: Steps taken.
        seconds: Time in training steps.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    train: list[list[float]] = field(default_factory=list)
    cost: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0

    def data(self) -> dict[str, Any]:
        """As JSON-able fields."""
        return asdict(self)


Emit = Callable[[dict[str, Any]], None]


def device_of(spec: StudySpec) -> torch.device:
    """The device that a study's runs use here."""
    wanted = spec.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise StudyError("device: the study wants cuda, but torch sees no CUDA device here.")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def build(arm: Arm, task: Task, seed: int) -> Paired[nn.Module]:
    """The arm's model on the CPU, with the noise of the seed that all arms share."""

    def materialise(model: nn.Module) -> None:
        if any(is_lazy(p) for p in model.parameters()):
            run(model, next(task.batches(0, 2, "train"))[0])

    return paired(lambda: arm.build(task.shape), seed, materialise=materialise, plan=arm.plan)


def check(arm: Arm, task: Task, spec: StudySpec) -> Paired[nn.Module]:
    """Build the arm on the CPU and take it through two samples, so that what cannot work is reported before training."""
    built = build(arm, task, 0)
    model = copy.deepcopy(built.model)
    inputs, targets = next(task.batches(0, 2, "train"))
    if not all(torch.isfinite(t).all() for t in _tensors([inputs])):
        raise StudyError(
            f"task {task.name!r}: its inputs hold NaN or infinite numbers; leave those samples out or fill them in."
        )
    if arm.rule:
        _rule(arm, model, task, arm.training.get("lr")).step((inputs, targets))
        return built
    loss = task.loss(run(model, inputs), targets)
    if loss.dim():
        raise StudyError(f"arm {arm.name!r}: the task's loss has shape {tuple(loss.shape)}; wanted one number.")
    if not any(p.requires_grad for p in model.parameters()):
        raise StudyError(f"arm {arm.name!r}: the model has no parameter to train.")
    if arm.transform:
        _transform(arm, model, [(inputs, targets)], plan_only=True)
    return built


def train(
    arm: Arm,
    task: Task,
    spec: StudySpec,
    seed: int,
    *,
    lr: float | None = None,
    emit: Emit = lambda _: None,
    record: Record | None = None,
    checkpoint: Path | None = None,
    keep: Path | None = None,
) -> Record:
    """Train and judge one arm with one seed.

    All arms of a seed start from the same noise, see the same batches in the same order and draw the same random numbers in
    the modules that they share; the same seed gives the same numbers.

    Args:
        arm: What is trained.
        task: What it learns.
        spec: Budget and settings.
        seed: Of the initial weights, the batches and every random choice while training.
        lr: Peak learning rate; a rule without one of its own takes none.
        emit: Called with each step and evaluation.
        record: Filled on the way, so that a run which fails leaves its curve.
        checkpoint: File that a long run writes now and then, and goes on from if it is there: the numbers are the same to the
            last bit as without the interruption. It is deleted at the end.
        keep: Folder where the trained model is saved.

    Raises:
        Diverged: The loss is not finite.
    """
    record = record if record is not None else Record()
    device = device_of(spec)
    model = build(arm, task, seed).model.to(device)
    torch.manual_seed(seed)
    loop = _Loop(arm, model, task, spec, device, lr)
    batches = task.batches(seed, spec.batch_size, "train")
    noise = Streams(model, seed)
    marks = [(i + 1) / spec.evaluations for i in range(spec.evaluations)]
    times: list[float] = []
    recent: list[float] = []
    limit = spec.budget
    every = max(1, int(limit.get("steps", 0)) // 200)
    if checkpoint and checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        loop.load(state["loop"])
        vars(record).update(state["record"])
        marks, recent, times = marks[len(record.curve) :], state["recent"], state["times"]
        for _ in range(record.steps):
            next(batches)
    saved = record.seconds
    while marks:
        share = record.steps / limit["steps"] if "steps" in limit else record.seconds / limit["seconds"]
        if share < marks[0] - 1e-9:
            inputs, targets = moved(next(batches), device)
            begin = time.perf_counter()
            with noise.step(record.steps):
                loss = loop.step(inputs, targets, share)
            times.append(time.perf_counter() - begin)
            record.steps += 1
            record.seconds += times[-1]
            recent.append(loss)
            if record.steps % every == 0 or not math.isfinite(loss):
                record.train.append([record.steps, sum(recent) / len(recent) if math.isfinite(loss) else math.nan])
                recent.clear()
            if not math.isfinite(loss):
                raise Diverged(f"training loss is {loss} at step {record.steps} (learning rate {loop.lr:.3g}).")
            left = (
                (limit["steps"] - record.steps) * cost.median_time(times[-20:], 0)
                if "steps" in limit
                else limit["seconds"] - record.seconds
            )
            if checkpoint and record.seconds - saved >= CHECKPOINT:
                _save({"loop": loop.state(), "record": record.data(), "recent": recent, "times": times}, checkpoint)
                saved = record.seconds
            emit({"what": "step", "step": record.steps, "share": share, "loss": loss, "left": max(left, 0.0)})
            continue
        marks.pop(0)
        if not marks and arm.transform:
            loop.model = _transform(arm, model, _first(task, seed, spec, device))
        found = loop.evaluate()
        record.curve.append({"step": record.steps, "seconds": record.seconds, **found})
        record.metrics = found
        emit({"what": "eval", "step": record.steps, "value": found[task.metric], "last": not marks})
        if not all(math.isfinite(v) for v in found.values()):
            raise Diverged(f"validation gives {found} at step {record.steps}.")
    if keep:
        recipe.save(loop.model, keep)
    record.cost = loop.cost(*moved(next(task.batches(seed, spec.batch_size, "train")), device))
    record.cost["step_time"] = cost.median_time(times)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return record


def _save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; a write that fails or is cut off leaves the earlier one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    torch.save(state, part)
    part.replace(path)


class _Loop:
    """The training step of an arm, by gradient or by its rule."""

    def __init__(
        self, arm: Arm, model: nn.Module, task: Task, spec: StudySpec, device: torch.device, lr: float | None
    ) -> None:
        own = {**spec.model_dump(include={"weight_decay", "warmup", "schedule"}), **arm.training}
        self.model, self.task, self.spec, self.device = model, task, spec, device
        self.lr = lr or own.get("lr") or spec.rates[0]
        self.warmup, self.schedule = own["warmup"], own["schedule"]
        self.rule = _rule(arm, model, task, lr) if arm.rule else None
        weights = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in weights if p.dim() > 1], "weight_decay": own["weight_decay"]},
            {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.weights = weights
        self.optimizer = (
            None if self.rule else torch.optim.AdamW([g for g in groups if g["params"]], lr=self.lr, betas=(0.9, 0.95))
        )

    def state(self) -> dict[str, Any]:
        """All that training changes: parameters, buffers (those outside of ``state_dict`` too), moments, the rule's own state."""
        found = {"model": {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}}
        if self.rule:
            return {**found, "rule": self.rule.state_dict()}
        assert self.optimizer is not None
        return {**found, "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        if self.rule:
            self.rule.load_state_dict(state["rule"])
        elif self.optimizer:
            self.optimizer.load_state_dict(state["optimizer"])
        there = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        with torch.no_grad():
            for name, value in state["model"].items():
                there[name].copy_(value)

    def rate(self, share: float, step: float) -> float:
        """Learning rate at a share of the budget: a linear rise, then half a cosine down to a tenth (or constant)."""
        if share < self.warmup:
            return self.lr * max(share, step) / self.warmup
        if self.schedule == "constant":
            return self.lr
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * (share - self.warmup) / (1 - self.warmup)))

    def step(self, inputs: Any, targets: Tensor, share: float) -> float:
        """Learn from one batch; the loss before it."""
        self.model.train()
        progress(self.model, min(share, 1.0))
        if self.rule:
            return float(self.rule.step((inputs, targets))["loss"])
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(share, 1 / self.spec.budget["steps"] if "steps" in self.spec.budget else 0.001)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.task.loss(run(self.model, inputs), targets)
        value, more = float(loss.detach()), extra_loss(self.model)
        (loss if more is None else loss + more).backward()
        clip_gradients(self.weights, self.spec.clip)
        if math.isfinite(value):
            self.optimizer.step()
        return value

    def evaluate(self) -> dict[str, float]:
        """The task's judgement, without a trace in the model or in the random numbers."""
        self.model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            predict = self.rule.predict if self.rule else partial(run, self.model)
            return self.task.evaluate(predict, self.spec.batch_size, self.device)

    def cost(self, inputs: Any, targets: Tensor) -> dict[str, float]:
        """Count on one more step, of which nothing is kept (the run is over)."""
        items = targets.numel() if self.task.item == "token" else len(targets)
        given: tuple[Any, ...] = () if isinstance(inputs, Mapping) else (inputs,)
        named = inputs if isinstance(inputs, Mapping) else {}
        found = {
            "parameters": float(cost.parameters(self.model)),
            "flops": cost.flops(self.model, *given, **named) / items,
        }
        self.model.train()
        if self.optimizer:
            self.optimizer.zero_grad(set_to_none=True)
            found["kept"] = float(cost.bytes_kept(self.model, lambda: self.task.loss(run(self.model, inputs), targets)))
            states = list(_tensors(self.optimizer.state))
        else:
            assert self.rule is not None
            states = list(_tensors(self.rule.state_dict()))
        alive = itertools.chain(self.model.parameters(), self.model.buffers(), states, _tensors([inputs, targets]))
        found["peak_memory"] = float(cost.peak_bytes(lambda: self.step(inputs, targets, 1.0), alive, self.device))
        return found


def _tensors(data: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts and lists."""
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, Mapping | list | tuple):
        for value in data.values() if isinstance(data, Mapping) else data:
            yield from _tensors(value)


def takes_lr(arm: Arm) -> bool:
    """Whether an arm is trained with a learning rate: all are, but for rules that have none."""
    return arm.rule is None or "lr" in inspect.signature(catalog.get(arm.rule[0]).resolve()).parameters


def _rule(arm: Arm, model: nn.Module, task: Task, lr: float | None) -> Rule:
    assert arm.rule is not None
    slug, options = arm.rule
    make = catalog.get(slug).resolve()
    names = inspect.signature(make).parameters
    if arm.training.get("lr") is not None and "lr" not in names:
        raise StudyError(f"arm {arm.name!r}: the rule {slug!r} takes no learning rate `lr`.")
    known = {"lr": lr, "classes": task.shape.classes or None}
    options = {**{k: v for k, v in known.items() if v is not None and k in names}, **options}
    return make(model, **options)


def _transform(arm: Arm, model: nn.Module, data: list[tuple[Any, Tensor]], plan_only: bool = False) -> nn.Module:
    assert arm.transform is not None
    slug, options = arm.transform
    make = catalog.get(slug).resolve()
    plan = make(**checked(make, options, f"arm {arm.name!r}: {slug}")).plan(copy.deepcopy(model), data)
    return model if plan_only else plan.apply()


def _first(task: Task, seed: int, spec: StudySpec, device: torch.device) -> list[tuple[Any, Tensor]]:
    """Eight training batches for a transform to calibrate on."""
    return moved(list(itertools.islice(task.batches(seed, spec.batch_size, "train"), 8)), device)
