"""What learns and is judged in one run: an arm's model of one seed, with the way it is trained."""

from __future__ import annotations

import copy
import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from interlayer.core import aside, cost, recipe
from interlayer.core.data import Batch, count, moved, run
from interlayer.core.fit import descend, fusible
from interlayer.core.kinds import Plan, Rule
from interlayer.core.options import checked
from interlayer.core.pairing import Paired, Streams, clip_gradients, paired
from interlayer.core.schedule import progress
from interlayer.core.slots import parameters
from interlayer.core.task import Budget, Task
from interlayer.study.arms import Arm, Use, resolve
from interlayer.study.spec import StudyError

CALIBRATION = 8  # training batches that a transform gets
LATENCY = (1, 64)  # batch sizes at which the forward pass is timed


def build(arm: Arm, task: Task, seed: int) -> Paired[nn.Module]:
    """The arm's model on the CPU, with the noise of the seed that all arms share."""

    def materialise(model: nn.Module) -> None:
        if any(is_lazy(p) for p in model.parameters()):
            run(model, next(task.batches(0, 2, "train"))[0])

    return paired(lambda: arm.build(task.shape), seed, materialise=materialise, plan=arm.plan)


class Learner:
    """A model and the way it learns: by gradient with AdamW, or by the arm's rule.

    Args:
        arm: What is trained.
        model: Its model, on the device.
        task: What it learns.
        batch_size: Samples in a batch when it is judged.
        seed: Of the random numbers in training.
        lr: Peak learning rate; a rule without one of its own takes none.
    """

    def __init__(
        self, arm: Arm, model: nn.Module, task: Task, batch_size: int, seed: int = 0, lr: float | None = None
    ) -> None:
        self.arm, self.model, self.task, self.batch_size, self.seed = arm, model, task, batch_size, seed
        self.device = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0)).device
        self.training = arm.training
        self.lr = lr or self.training.lr
        self.noise = Streams(model, seed)
        self.times: list[float] = []
        self.asides: dict[str, float] = {}
        self.notes: dict[str, float] = {}
        self.rule = _rule(arm, model, task, lr) if arm.rule else None
        weights = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in weights if p.dim() > 1], "weight_decay": self.training.weight_decay},
            {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        own = groups and not self.rule and self.lr is not None
        # One kernel for all tensors: a small model learns a sixth sooner.
        fused = fusible(weights)
        self.optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95), fused=fused) if own else None  # type: ignore[arg-type]
        self.followed: set[int] = set()  # optimizers of the rule whose gradients are clipped

    def begin(self, experience: Any) -> None:
        """An experience of a stream begins."""
        if self.rule:
            self.rule.begin(experience)

    def end(self, experience: Any) -> None:
        """An experience is over."""
        if self.rule:
            self.rule.end(experience)

    def at(self, experience: Any) -> None:
        """Predict for this experience from now on."""
        if self.rule:
            self.rule.at(experience)

    def step(self, batch: Batch, budget: Budget) -> float:
        """Learn from one batch at the budget's share and count it there; the loss before it."""
        batch = moved(batch, self.device)
        begin = time.perf_counter()
        with self.noise.step(budget.done):
            loss = self._step(batch, budget)
        self.times.append(time.perf_counter() - begin)
        budget.done += 1
        budget.spent += self.times[-1]
        return loss

    def _step(self, batch: Batch, budget: Budget) -> float:
        self.model.train()
        factor = self.training.rate(budget.share, 1 / budget.steps if budget.steps else 0.001)
        for optimizer in self._optimizers():
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        if self.rule:
            progress(self.model, budget.share)
            with aside.collect() as told:
                loss = float(self.rule.step(batch)["loss"])
        else:
            assert self.optimizer is not None
            inputs, targets = batch
            loss, told = descend(
                self.model, self.optimizer, lambda: self.task.loss(run(self.model, inputs), targets),
                share=budget.share, clip=self.training.clip,
            )  # fmt: skip
        self.asides = told.means()
        return loss

    def _optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        if not self.rule:
            return (self.optimizer,) if self.optimizer else ()
        found = self.rule.optimizers()
        for optimizer in found:
            if id(optimizer) not in self.followed:
                optimizer.register_step_pre_hook(self._clip)
                self.followed.add(id(optimizer))
        return found

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        clip_gradients((p for group in optimizer.param_groups for p in group["params"]), self.training.clip)

    def predict(self, inputs: Any) -> Any:
        """What the model returns for a batch's inputs, read as its rule wants it."""
        return self.rule.predict(inputs) if self.rule else run(self.model, inputs)

    def judge(self) -> dict[str, float]:
        """The task's judgement, without a trace in the model or in the random numbers."""
        self.model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(self.seed)
            return self.task.judge(self, self.seed)

    def transform(self, others: Sequence[nn.Module] = ()) -> None:
        """Apply the arm's transforms, one after the other.

        Args:
            others: Further trained models, for transforms that merge.
        """
        if self.arm.transforms:
            batches = itertools.islice(self.task.batches(self.seed, self.batch_size, "train"), CALIBRATION)
            data = moved(list(batches), self.device)
            for use in self.arm.transforms:
                merges = resolve(use).merges
                self.model = transform(self.arm, use, self.model, data, others[:merges]).apply()

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers, those outside of ``state_dict`` too."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Put in what ``tensors`` gave."""
        there = self.tensors()
        for name, value in tensors.items():
            there[name].copy_(value)

    def state(self) -> dict[str, Any]:
        """All that training changes: the model's tensors, moments, the rule's own state."""
        found = {"model": self.tensors(), "notes": self.notes}
        if self.rule:
            return {**found, "rule": self.rule.state_dict()}
        return {**found, "optimizer": self.optimizer.state_dict() if self.optimizer else None}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self.notes = dict(state["notes"])
        if self.rule:
            self.rule.load_state_dict(state["rule"])
        elif self.optimizer:
            self.optimizer.load_state_dict(state["optimizer"])
        self.fill(state["model"])

    def cost(self, batch: Batch | None, delivered: bool) -> dict[str, float]:
        """What the model costs, counted on one more step of which nothing is kept (the run is over).

        Args:
            batch: A training batch; None for only what needs none.
            delivered: Whether to measure what it costs in use too: bytes on disk, and the time of a forward pass.
        """
        known = {"parameters": float(cost.parameters(self.model))}
        if self.times:
            known["step_time"] = cost.median_time(self.times)
        if batch is None:
            return known
        inputs, targets = batch = moved(batch, self.device)
        items = targets.numel() if self.task.item == "token" and isinstance(targets, Tensor) else count(batch)
        found = {
            **known,
            "flops": cost.flops(_Called(self.model), inputs) / items,
        }
        if delivered:
            found |= self._delivered(inputs)
        if not self.times:
            return found
        self.model.train()
        if self.optimizer:
            self.optimizer.zero_grad(set_to_none=True)
            found["kept"] = float(cost.bytes_kept(self.model, lambda: self.task.loss(run(self.model, inputs), targets)))
            states = tensors_in(self.optimizer.state)
        else:
            assert self.rule is not None
            states = tensors_in(self.rule.state_dict())
        alive = itertools.chain(self.tensors().values(), states, tensors_in(batch))
        over = Budget(self.batch_size, steps=1)
        found["peak_memory"] = float(cost.peak_bytes(lambda: self._step(batch, over), alive, self.device))
        return found

    def _delivered(self, inputs: Any) -> dict[str, float]:
        self.model.eval()
        found = {f"latency_{size}": cost.latency(_Called(self.model), sized(inputs, size)) for size in LATENCY}
        with tempfile.TemporaryDirectory() as folder:
            recipe.save(self.model, Path(folder) / "model")
            found["disk"] = float(sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()))
        return found


class _Called(nn.Module):
    """A model that takes a batch's inputs as one argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Any:
        return run(self.model, inputs)


def sized(inputs: Any, size: int) -> Any:
    """A batch's inputs with another number of samples, repeated or cut.

    Examples:
        >>> sized({"x": torch.arange(3)}, 5)
        {'x': tensor([0, 1, 2, 0, 1])}
    """

    def cut(leaf: Any) -> Any:
        return (
            leaf[torch.arange(size, device=leaf.device) % len(leaf)]
            if isinstance(leaf, Tensor) and leaf.dim()
            else leaf
        )

    return tree_map(cut, inputs)


def tensors_in(data: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts and lists."""
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, Mapping | list | tuple):
        for value in data.values() if isinstance(data, Mapping) else data:
            yield from tensors_in(value)


def takes_lr(arm: Arm) -> bool:
    """Whether an arm is trained with a learning rate: all are, but for rules that have none."""
    return arm.rule is None or "lr" in parameters(resolve(arm.rule))[0]


def _rule(arm: Arm, model: nn.Module, task: Task, lr: float | None) -> Rule:
    assert arm.rule is not None
    make, options = resolve(arm.rule), arm.rule[1]
    names = parameters(make)[0]
    if arm.training.lr is not None and "lr" not in names:
        raise StudyError(f"arm {arm.name!r}: the rule {make.__name__} takes no learning rate `lr`.")
    known = {"lr": lr, "classes": task.shape.classes or None}
    options = {**{k: v for k, v in known.items() if v is not None and k in names}, **options}
    return make(model, **options)


def transform(arm: Arm, use: Use, model: nn.Module, data: list[Batch], others: Sequence[nn.Module]) -> Plan:
    """The plan of one of the arm's transforms."""
    make = resolve(use)
    return make(**checked(make, use[1], f"arm {arm.name!r}: {make.__name__}")).plan(
        copy.deepcopy(model), data, others=others
    )
