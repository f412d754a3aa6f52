"""Contracts of learning rules."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from interlayer.core.data import Experience
from interlayer.core.example import Example
from interlayer.core.kinds import NotBegun, Rule
from interlayer.testing.common import hooks, make, require, same, seeded


def _pair(example: Example, seed: int = 0) -> tuple[Rule, list[Any]]:
    """The rule, ready to learn its first experience if it learns a stream, and batches."""
    rule = make(example.make, seed)
    require(isinstance(rule, Rule), f"make() gave {type(rule).__name__}; expected a Rule")
    if example.experiences:
        with seeded(seed):
            rule.begin(_stream(example)[0])
    batches = list(make(example.inputs, 100))
    require(len(batches) >= 4, f"inputs() gave {len(batches)} batches; expected at least 4")
    return rule, batches


def _steps(rule: Rule, batches: Sequence[Any], first: int = 0) -> list[float]:
    """Losses; each step has a seed of its own, so that a resumed run can meet the same draws."""
    losses = []
    for at, batch in enumerate(batches, first):
        with seeded(1000 + at):
            metrics = rule.step(batch)
        require(
            "loss" in metrics and math.isfinite(metrics["loss"]), f"step {at} gave {metrics}; expected a finite 'loss'"
        )
        losses.append(float(metrics["loss"]))
    return losses


def learns(example: Example) -> None:
    """The loss of the last quarter of the steps is below that of the first."""
    rule, batches = _pair(example)
    losses = _steps(rule, batches)
    part = len(losses) // 4
    start, end = sum(losses[:part]) / part, sum(losses[-part:]) / part
    require(end < start, f"the loss went from {start:.4g} to {end:.4g}")


def resumes(example: Example) -> None:
    """A run that stops, goes through ``state_dict`` and starts again ends with the same bits."""
    rule, batches = _pair(example)
    half = len(batches) // 2
    _steps(rule, batches[:half])
    weights, state = copy.deepcopy(rule.model.state_dict()), copy.deepcopy(rule.state_dict())
    _storable(state, "state_dict")
    _steps(rule, batches[half:], half)
    other, _ = _pair(example, seed=1)
    other.model.load_state_dict(weights)
    other.load_state_dict(state)
    _steps(other, batches[half:], half)
    same(list(rule.model.state_dict().values()), list(other.model.state_dict().values()), "weights of the resumed run")
    same(rule.state_dict(), other.state_dict(), "state of the resumed run")


def _storable(value: Any, where: str) -> None:
    """Require tensors, numbers, strings and containers of them: what can be stored without pickle."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            require(isinstance(key, str | int), f"{where} has the key {key!r}")
            _storable(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _storable(item, f"{where}[{i}]")
    else:
        require(value is None or isinstance(value, Tensor | int | float | str), f"{where} is a {type(value).__name__}")


def leaves_no_hooks(example: Example) -> None:
    """After a step there is no hook on any module or parameter."""
    rule, batches = _pair(example)
    _steps(rule, batches[:2])
    require(not hooks(rule.model), f"hooks are left: {hooks(rule.model)[:3]}")


def seed(example: Example) -> None:
    """The same seed gives the same losses and weights."""
    runs = []
    for _ in range(2):
        rule, batches = _pair(example)
        losses = _steps(rule, batches[:3])
        runs.append((losses, list(rule.model.state_dict().values())))
    require(runs[0][0] == runs[1][0], "the losses of the same seed differ")
    same(runs[0][1], runs[1][1], "the weights of the same seed")


def schedule(example: Example) -> None:
    """A rule with optimizers follows the loop's learning rate: at zero, no weight that they hold moves."""
    rule, batches = _pair(example)
    _steps(rule, batches[:1])  # some rules make their optimizer from the first batch
    for optimizer in rule.optimizers():
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    held = [p for optimizer in rule.optimizers() for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in held]
    _steps(rule, batches[1:2], 1)
    same(before, [p.detach() for p in held], "weights after a step at a learning rate of zero")


def _stream(example: Example) -> list[Experience]:
    found = list(make(example.experiences, 100)) if example.experiences else []
    require(not found or len(found) > 1, f"experiences() gave {len(found)}; expected at least 2")
    return found


def _learn(rule: Rule, experience: Experience, seed: int) -> None:
    """Four steps on an experience that was begun, and its end."""
    inputs, targets = experience.train
    with seeded(seed):
        for rows in torch.randperm(len(targets))[: 4 * min(16, len(targets) // 4)].chunk(4):
            rule.step((inputs[rows], targets[rows]))
        rule.end(experience)


def _known(rule: Rule, experience: Experience) -> Tensor:
    """What the rule predicts for an experience that is known to it."""
    rule.at(experience)
    return rule.predict(experience.test[0])


def begins(example: Example) -> None:
    """Experiences are learned one after another, and each is predicted with enough outputs, or not at all before it was begun."""
    stream = _stream(example)
    if not stream:
        own = [
            name for name in ("begin", "end", "at") if getattr(type(example.make()), name) is not getattr(Rule, name)
        ]
        require(not own, f"the rule has {own}, but its example no experiences")
        return
    rule, _ = _pair(example)
    for i, experience in enumerate(stream):
        if i:
            for later in stream[i:]:
                try:
                    early = _known(rule, later)
                except NotBegun:
                    continue
                require(early.shape[1] >= later.classes, f"{later.name!r} is predicted with {early.shape[1]} outputs")
            rule.begin(experience)
        _learn(rule, experience, i)
        for earlier in stream[: i + 1]:
            shape = tuple(_known(rule, earlier).shape)
            wanted = (len(earlier.test[1]), earlier.classes)
            require(
                shape[:1] == wanted[:1] and shape[1] >= wanted[1],
                f"after {i + 1} experiences the prediction of {earlier.name!r} is {shape}; expected {wanted}",
            )


def remembers(example: Example) -> None:
    """Unless the example says that it forgets: later experiences leave every bit that is predicted for earlier ones."""
    stream = _stream(example)
    if not stream or example.forgets:
        return
    rule, _ = _pair(example)
    learned: dict[str, Tensor] = {}
    for i, experience in enumerate(stream):
        if i:
            rule.begin(experience)
        _learn(rule, experience, i)
        learned[experience.name] = _known(rule, experience)
        for earlier in stream[:i]:
            same(_known(rule, earlier), learned[earlier.name], f"{earlier.name!r} after learning {experience.name!r}")


def resumes_stream(example: Example) -> None:
    """A run that stops before the last experience and goes on in a new rule ends with the same bits, old predictions included."""
    stream = _stream(example)
    if not stream:
        return
    rule, _ = _pair(example)
    for i, experience in enumerate(stream[:-1]):
        if i:
            rule.begin(experience)
        _learn(rule, experience, i)
    weights, state = copy.deepcopy(rule.model.state_dict()), copy.deepcopy(rule.state_dict())
    _storable(state, "state_dict")
    other = make(example.make, 1)
    other.model.load_state_dict(weights)
    other.load_state_dict(state)
    for each in (rule, other):
        with seeded(2):
            each.begin(stream[-1])
        _learn(each, stream[-1], 3)
    for experience in stream:
        same(
            _known(rule, experience),
            _known(other, experience),
            f"predictions of {experience.name!r} after the resumption",
        )
    same(rule.state_dict(), other.state_dict(), "state of the resumed stream")


RULE: dict[str, Callable[[Example], None]] = {
    "learns": learns,
    "resumes": resumes,
    "hooks": leaves_no_hooks,
    "seed": seed,
    "schedule": schedule,
    "begins": begins,
    "remembers": remembers,
    "resumes_stream": resumes_stream,
}
