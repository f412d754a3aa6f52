"""Networks as data: the handwritten digits as neural fields, and classifiers of digits that were trained for more or less long."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.core import datasets
from interlayer.core.fields import Layout, grid
from interlayer.core.nano import nano
from interlayer.core.task import Task, TensorTask
from interlayer.transform.merge.weight_space_nets.space import WeightSpace

OMEGA = 6.0  # of the fields' sines
FIELDS = (2, 8, 8, 1)
CLASSIFIERS = (16, 10, 10, 10)


class Stack(nn.Module):
    """Weights of many networks of one shape, each initialised for itself or all alike.

    Args:
        count: Networks N.
        layout: Their layers and the deviation of their initial weights.
        alike: Whether all begin with the same weights.
    """

    def __init__(self, count: int, layout: Layout, *, alike: bool = False) -> None:
        super().__init__()
        parts = []
        for (o, i), (w, b) in zip(layout.shapes, layout.spread(), strict=True):
            for n, deviation in ((o * i, w), (o, b)):
                top = math.sqrt(3) * deviation
                parts.append(torch.empty(1 if alike else count, n).uniform_(-top, top).expand(count, n))
        self.flat = nn.Parameter(torch.cat(parts, 1))


def _descend(stack: Stack, loss: Callable[[Tensor, int], Tensor], steps: int, lr: float | Tensor) -> None:
    """Adam on all networks at once; ``loss`` gives one value for each. Rates may differ by network."""
    flat = stack.flat
    m = v = torch.zeros_like(flat)
    for step in range(1, steps + 1):
        (slope,) = torch.autograd.grad(loss(flat, step).sum(), flat)
        m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope.square()
        with torch.no_grad():
            flat -= lr * m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)


def sine(h: Tensor) -> Tensor:
    """Activation of the fields."""
    return torch.sin(OMEGA * h)


@cache
def fields(*, count: int = 1797, steps: int = 300) -> tuple[WeightSpace, Tensor, Tensor]:
    """The first digits of scikit-learn's as SIRENs from pixel to intensity, all from the same initial weights: [N, P], and labels [N].

    Trained once, on all pixels, and kept in the user's cache.
    """
    images, labels = (t[:count] for t in datasets.digits())
    space, points = WeightSpace(FIELDS), grid(8, 8)
    wanted = images.flatten(1) / 8 - 1

    def train(stack: nn.Module) -> None:
        def loss(flat: Tensor, step: int) -> Tensor:
            return (space.run(flat, points, sine).squeeze(-1) - wanted).square().mean(1)

        _descend(cast(Stack, stack), loss, steps, 2e-3)

    layout = Layout(2, 1, width=FIELDS[1], depth=2, activation="sine", omega=OMEGA)
    stack = nano(
        lambda: Stack(count, layout, alike=True), train, task="digit-fields", kind="siren", steps=steps, omega=OMEGA
    )
    return space, cast(Stack, stack).flat.detach(), labels


class Zoo(NamedTuple):
    """Classifiers of 4 x 4 digits: their space, weights [N, P], and accuracies on held-out digits [N]."""

    space: WeightSpace
    flat: Tensor
    accuracy: Tensor


def small_digits() -> datasets.Split:
    """The digits at 4 x 4 pixels, flat and standardised; every fifth is held out."""
    images, labels = datasets.digits()
    x = F.avg_pool2d(images, 2).flatten(1)
    x = (x - x.mean()) / x.std()
    held = torch.arange(len(x)) % 5 == 4
    return datasets.Split((x[~held], labels[~held]), (x[held], labels[held]))


@cache
def zoo(*, count: int = 600, steps: int = 800) -> Zoo:
    """Classifiers, each from its own initial weights and trained at its own rate for its own number of steps.

    Trained once and kept in the user's cache.
    """
    space = WeightSpace(CLASSIFIERS)
    (x, y), (held, labels) = small_digits()

    def train(stack: nn.Module) -> None:
        rates = 10 ** torch.empty(count, 1).uniform_(-3.0, -1.6)
        stops = torch.randint(steps // 20, steps + 1, (count, 1))
        rows = torch.randint(len(x), (steps + 1, 32))

        def loss(flat: Tensor, step: int) -> Tensor:
            out = space.run(flat, x[rows[step]])
            each = F.cross_entropy(out.transpose(1, 2), y[rows[step]].expand(count, -1), reduction="none").mean(1)
            return each * (step <= stops.squeeze(1))

        _descend(cast(Stack, stack), loss, steps, rates)

    layout = Layout(CLASSIFIERS[0], CLASSIFIERS[-1], width=CLASSIFIERS[1], depth=len(CLASSIFIERS) - 2)
    stack = nano(lambda: Stack(count, layout), train, task="digit-classifiers", kind="mlp", count=count, steps=steps)
    flat = cast(Stack, stack).flat.detach()
    return Zoo(space, flat, (space.run(flat, held).argmax(-1) == labels).float().mean(1))


@cache
def digit_fields() -> Task:
    """Which digit a neural field shows, from its weights alone; the hidden neurons of each field are in a random order.

    The usual base is an MLP on the flat weights.
    """
    space, flat, labels = fields()
    flat = space.shuffled(flat, torch.Generator().manual_seed(0))
    held = torch.arange(len(flat)) % 5 == 4
    mean, deviation = space.statistics(flat[~held])
    flat = (flat - mean) / deviation
    about = (
        f"scikit-learn's digits as neural fields of widths {FIELDS}, hidden neurons in random order, standardised: weights of "
        f"{int((~held).sum())} fields for training, {int(held.sum())} for validation."
    )
    return TensorTask("digit-fields", (flat[~held], labels[~held]), (flat[held], labels[held]), base="mlp", about=about)


@cache
def fogged() -> datasets.Split:
    """The 4 x 4 digits at half the contrast behind a fog that grows from left to right: the domain to adapt to."""
    fog = 2 * torch.linspace(0, 1, 4).repeat(4)
    (x, y), (held, labels) = small_digits()
    return datasets.Split((0.5 * x + fog, y), (0.5 * held + fog, labels))
