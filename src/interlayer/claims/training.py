"""One plain training run, as most claims need it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.claims.harness import Scale
from interlayer.core.fit import fit
from interlayer.core.pairing import paired
from interlayer.study import Task, tasks

M = TypeVar("M", bound=nn.Module)


@cache
def task(name: str) -> Task:
    """A built-in task, loaded once; on the CPU, also where models are only built on ``meta``."""
    with torch.device("cpu"):
        return tasks.load(name)


def digits(split: str = "train") -> tuple[Tensor, Tensor]:
    """All images and labels of a split of the task ``digits``."""
    x, y = task("digits").data[split]  # type: ignore[attr-defined]
    return x, y


def mlp(width: int, hidden: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """A plain network for digits with ``hidden`` layers of one width."""
    more = [m for _ in range(hidden - 1) for m in (nn.Linear(width, width), activation())]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), activation(), *more, nn.Linear(width, 10))


def stage(inputs: int, outputs: int, stride: int = 1, *, kernel: int = 3, bias: bool = True) -> list[nn.Module]:
    """A convolution, batch norm and ReLU, for plain convolutional nets."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def built(build: Callable[[], M], seed: int) -> M:
    """A model with the initial noise that all arms of the seed share."""
    return paired(build, seed).model


def batches(name: str, seed: int, size: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``steps`` training batches in the seed's order: the same for every arm."""
    return islice(task(name).batches(seed, size), steps)


def train(
    model: nn.Module,
    name: str,
    *,
    seed: int,
    steps: int,
    lr: float,
    batch: int = 64,
    warmup: int = 0,
    watch: Callable[[int, float], bool] | None = None,
    cut: int | None = None,
) -> list[float]:
    """Train on a task with AdamW, without weight decay; see ``core.fit.fit``.

    Args:
        model: Trained in place.
        name: Task.
        seed: Order of the batches.
        steps: How many.
        lr: Learning rate.
        batch: Items in a batch.
        warmup: Steps until the learning rate is reached.
        watch: Called with (step, loss); True ends the run.
        cut: Length to which sequences are cut, for speed.

    Returns:
        The loss at every step; training ends where it is not finite.
    """

    def loss(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        x, y = (t[:, :cut] for t in pair) if cut else pair
        return task(name).loss(model(x), y)

    return fit(
        model, batches(name, seed, batch, steps), loss, steps=steps, lr=lr, seed=seed, warmup=warmup, watch=watch
    )


def classify(
    model: M, data: tuple[Tensor, Tensor], *, seed: int, steps: int, lr: float, size: int = 64, **options: Any
) -> M:
    """Train by cross-entropy on rows of labelled data, drawn with replacement, and give the model in evaluation mode.

    Args:
        model: Trained in place.
        data: Inputs and labels.
        seed: Of the rows, and of draws in training.
        steps: How many.
        lr: Learning rate.
        size: Rows in a batch.
        **options: Of ``core.fit.fit``.
    """
    (x, y), draw = data, torch.Generator().manual_seed(seed)
    rows = (torch.randint(len(x), (size,), generator=draw) for _ in range(steps))
    fit(model, rows, lambda m, at: F.cross_entropy(m(x[at]), y[at]), steps=steps, lr=lr, seed=seed, **options)
    return model.eval()


@torch.no_grad()
def judge(
    model: nn.Module, name: str, *, batch: int = 256, most: int | None = None, cut: int | None = None
) -> dict[str, float]:
    """Loss, and accuracy where there are classes, over (the first ``most`` batches of) the validation split."""
    model.eval()
    total, right, count = 0.0, 0, 0
    for x, y in islice(task(name).batches(0, batch, "validation"), most):
        if cut:
            x, y = x[:, :cut], y[:, :cut]
        out = model(x)
        total += float(task(name).loss(out, y)) * len(y)
        if out.ndim == 2:
            right += int((out.argmax(-1) == y).sum())
        count += len(y)
    model.train()
    loss = total / count
    return {"loss": loss if math.isfinite(loss) else math.inf, "accuracy": right / count}


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the inputs whose label a model predicts. Its mode is left alone."""
    return float((model(x).argmax(-1) == y).float().mean())


@torch.no_grad()
def divergence(
    model: nn.Module, whole: nn.Module, name: str, *, batch: int = 64, most: int | None = None, cut: int | None = None
) -> float:
    """Mean Kullback-Leibler divergence of a model's predictions on the validation split from those of another, in nats; see ``judge``."""
    found = list[Tensor]()
    for x, _ in islice(task(name).batches(0, batch, "validation"), most):
        p, q = (m.eval()(x[:, :cut]).flatten(0, -2).log_softmax(-1) for m in (whole, model))
        found.append(F.kl_div(q, p, log_target=True, reduction="none").sum(-1))
    return float(torch.cat(found).mean())


def language(model: nn.Module, seed: int, scale: Scale, *, lr: float = 2e-3) -> float:
    """Train a language model on the bytes of the standard library for ``scale.steps``, and give its validation loss.

    Batches of 16 texts of ``scale.length``, warm-up over a tenth of the steps; judged on ``scale.judged`` batches of 64.
    """
    warmup, cut = scale.steps // 10, scale.length
    train(model, "stdlib-bytes", seed=seed, steps=scale.steps, lr=lr, batch=16, warmup=warmup, cut=cut)
    return judge(model, "stdlib-bytes", batch=64, most=scale.judged, cut=cut)["loss"]


def calibration_texts(seed: int, scale: Scale) -> list[Tensor]:
    """What language models are calibrated on: ``scale.calibration`` batches of 16 texts of ``scale.length``, without targets."""
    return [x[:, : scale.length] for x, _ in batches("stdlib-bytes", seed + 700, 16, scale.calibration)]


def small_language(seed: int, *, depth: int = 2, width: int = 64, length: int = 64, steps: int = 400) -> nn.Module:
    """A small language model of the bytes of the standard library, trained once and kept in the user's cache (``core.nano``).

    Args:
        seed: Of its weights and batches.
        depth: Blocks.
        width: Features; a head for each 16.
        length: Longest text.
        steps: Training steps, of 16 texts each.
    """
    from interlayer.core.nano import nano
    from interlayer.models import Transformer

    return nano(
        lambda: Transformer(256, length, depth, width, width // 16),
        lambda model: train(
            model, "stdlib-bytes", seed=seed, steps=steps, lr=3e-3, batch=16, warmup=steps // 10, cut=length
        ),
        task="stdlib-bytes", kind="transformer", seed=seed, steps=steps, length=length,
    )  # fmt: skip
