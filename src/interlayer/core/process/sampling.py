"""Samples from a trained model: solvers as data, the loop that they share, guidance and hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from interlayer.core import solve, taps
from interlayer.core.data import answer
from interlayer.core.process.paths import Diffusion, Model, Prediction, Process
from interlayer.core.solve.tableau import TABLEAUS, combine


@dataclass
class Step:
    """A step that a sampler took, as hooks see it. A hook that sets ``x`` changes what comes next.

    Attributes:
        index: Number of the step, from 0.
        t: Time before it.
        s: Time after it.
        x: The items after it.
        predicted: What the model said before it, at its last call; None if the solver never asked.
    """

    index: int
    t: Tensor
    s: Tensor
    x: Tensor
    predicted: Prediction | None


Predict = Callable[[Tensor, Tensor], Prediction]
Hook = Callable[[Step], None]


class Solver(Protocol):
    """How to go from time ``t`` to ``s``: ``predict(x, t)`` asks the model, ``draw()`` gives standard normal noise like ``x``."""

    def step(
        self, process: Process, predict: Predict, x: Tensor, t: Tensor, s: Tensor, draw: Callable[[], Tensor]
    ) -> Tensor:
        """The items at time ``s``."""
        ...


@dataclass(frozen=True)
class Ancestral:
    """DDPM's sampler (arXiv:2006.11239, algorithm 2): the posterior's mean, and noise of the process's ``variance``."""

    def step(
        self, process: Process, predict: Predict, x: Tensor, t: Tensor, s: Tensor, draw: Callable[[], Tensor]
    ) -> Tensor:
        """One step; the last one, to clean data, adds no noise."""
        if not isinstance(process, Diffusion):
            raise ValueError(f"Ancestral: takes a Diffusion; got {type(process).__name__}. Take DDIM(eta=1) or Euler.")
        predicted = predict(x, t)
        mean, small, added = process.posterior(x, predicted.x0, t, s)
        if s <= process.end:
            return mean
        return mean + process.step_variance(predicted, small, added).sqrt() * draw()


@dataclass(frozen=True)
class DDIM:
    """Song et al.'s sampler (arXiv:2010.02502, equation 12), for any path.

    Args:
        eta: Share of DDPM's noise; 0 draws none.
    """

    eta: float = 0.0

    def step(
        self, process: Process, predict: Predict, x: Tensor, t: Tensor, s: Tensor, draw: Callable[[], Tensor]
    ) -> Tensor:
        """One step to the same noise, at the new time's scales."""
        predicted = predict(x, t)
        alpha, sigma = process.broadcast(s, x)
        if not self.eta or s <= process.end:
            return alpha * predicted.x0 + sigma * predicted.noise
        variance = self.eta**2 * process.posterior(x, predicted.x0, t, s)[1]
        return (
            alpha * predicted.x0
            + (sigma**2 - variance).clamp_min(0).sqrt() * predicted.noise
            + variance.sqrt() * draw()
        )


def _velocity(solver: Solver, process: Process, predicted: Prediction) -> Tensor:
    if not process.straight:
        raise ValueError(f"{type(solver).__name__}: {type(process).__name__} has no constant velocity. Take DDIM.")
    return predicted.noise - predicted.x0


@dataclass(frozen=True)
class Euler:
    """Euler's method along a flow's velocity: order 1, one call of the model a step."""

    def step(
        self, process: Process, predict: Predict, x: Tensor, t: Tensor, s: Tensor, draw: Callable[[], Tensor]
    ) -> Tensor:
        """One step."""
        change = process.broadcast(s, x)[1] - process.broadcast(t, x)[1]
        return x + change * _velocity(self, process, predict(x, t))


@dataclass(frozen=True)
class Heun:
    """Heun's method along a flow's velocity: order 2, two calls of the model a step."""

    def step(
        self, process: Process, predict: Predict, x: Tensor, t: Tensor, s: Tensor, draw: Callable[[], Tensor]
    ) -> Tensor:
        """One step with the mean of the velocities at both ends."""
        change = process.broadcast(s, x)[1] - process.broadcast(t, x)[1]
        first = _velocity(self, process, predict(x, t))
        second = _velocity(self, process, predict(x + change * first, s))
        return x + change * (first + second) / 2


@dataclass(frozen=True)
class RungeKutta:
    """An explicit Runge-Kutta method along a flow's velocity, with as many calls of the model a step as it has stages.

    Needs a noise scale that is linear in time, as that of ``Flow``.

    Args:
        method: ``midpoint`` (order 2, two calls), ``kutta`` (order 3, three calls), ``rk4`` (order 4, four calls), or another
            name in ``core.solve.tableau``.

    Raises:
        ValueError: An unknown method.
    """

    method: str = "midpoint"

    def __post_init__(self) -> None:
        if self.method not in TABLEAUS:
            raise ValueError(f"RungeKutta: method {self.method!r}; expected one of {list(TABLEAUS)}.")

    def step(
        self, process: Process, predict: Predict, x: Tensor, t: Tensor, s: Tensor, draw: Callable[[], Tensor]
    ) -> Tensor:
        """One step."""
        tableau, slopes = TABLEAUS[self.method], list[Tensor]()
        change = process.broadcast(s, x)[1] - process.broadcast(t, x)[1]
        for row, c in zip(((), *tableau.a), tableau.c, strict=True):
            inside = x + change * combine(row, slopes) if row else x
            slopes.append(_velocity(self, process, predict(inside, t + c * (s - t))))
        return x + change * combine(tableau.b, slopes)


@dataclass(frozen=True)
class Adaptive:
    """Steps within a step, as many as a tolerance asks for, along a flow's velocity (``core.solve.odeint``, by torchdiffeq).

    Args:
        tolerance: Error that an inner step may have, relative and absolute.
    """

    tolerance: float = 1e-3

    def step(
        self, process: Process, predict: Predict, x: Tensor, t: Tensor, s: Tensor, draw: Callable[[], Tensor]
    ) -> Tensor:
        """One step, whatever it costs."""
        rate = (process.broadcast(s, x)[1] - process.broadcast(t, x)[1]) / (s - t).to(x)

        def slope(time: Tensor, y: Tensor) -> Tensor:
            return rate * _velocity(self, process, predict(y, time.to(t.dtype)))

        how = solve.Solver(tolerance=self.tolerance, adjoint=False)
        return solve.odeint(slope, x, (float(t), float(s)), solver=how).value[-1]


class Guided(nn.Module):
    """Classifier-free guidance (Ho and Salimans, arXiv:2207.12598): ``free + scale (conditional - free)``.

    Both are computed in one batch. A learned variance is that of the conditional output. (DiT's published figures guide the first
    three of four channels alone; here all are guided.)

    Args:
        model: Called as ``model(x, t, *conditions)``.
        scale: 1 gives the conditional model.
        *null: What stands for "no condition", one for each condition: a number such as the index of the null class, or a tensor.

    Examples:
        >>> model = lambda x, t, y: x * y.view(-1, 1)
        >>> Guided(model, 3.0, 0)(torch.ones(1, 2), torch.zeros(1), torch.tensor([2]))
        tensor([[6., 6.]])
    """

    def __init__(self, model: Model, scale: float, *null: Any) -> None:
        super().__init__()
        self.model, self.scale, self.null = model, scale, null

    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        """The guided output."""
        if len(conditions) != len(self.null):
            raise ValueError(
                f"Guided: {len(conditions)} conditions for {len(self.null)} null values; give one for each."
            )
        free = [torch.as_tensor(n).to(c).expand_as(c) for c, n in zip(conditions, self.null, strict=True)]
        both = [torch.cat(pair) for pair in zip(conditions, free, strict=True)]
        with_, without = answer(self.model(torch.cat((x, x)), torch.cat((t, t)), *both)).chunk(2)
        count = x.shape[1]
        guided = without[:, :count] + self.scale * (with_[:, :count] - without[:, :count])
        return torch.cat((guided, with_[:, count:]), 1)


@torch.no_grad()
def integrate(
    model: Model,
    process: Process,
    solver: Solver,
    x: Tensor,
    times: Tensor,
    *conditions: Any,
    clip: float | None = None,
    generator: torch.Generator | None = None,
    hooks: Sequence[Hook] = (),
) -> Tensor:
    """Follow a model from ``times[0]`` to ``times[-1]``; rising times lead from data to noise (inversion).

    Args:
        model: Called as ``model(x, t, *conditions)`` with one time for each item. A module is in evaluation mode meanwhile; each
            of its parts gets its own mode back.
        process: What the model was trained with.
        solver: How a step is made.
        x: Items at the first time.
        times: Where to stop.
        *conditions: Further arguments of the model, such as classes.
        clip: Bound on the size of the clean item that the model predicts; the noise follows from it.
        generator: Of a solver's noise.
        hooks: Called after each step, in order.
    """
    last: Prediction | None = None

    def predict(x: Tensor, t: Tensor) -> Prediction:
        nonlocal last
        found = process.read(x, answer(model(x, t.expand(len(x)), *conditions)), t)
        if clip is not None:
            alpha, sigma = process.broadcast(t, x)
            x0 = found.x0.clamp(-clip, clip)
            found = found._replace(x0=x0, noise=(x - alpha * x0) / sigma)
        last = found
        return found

    def draw() -> Tensor:
        return torch.randn(x.shape, generator=generator).to(x)

    with taps.eval_mode(model) if isinstance(model, nn.Module) else nullcontext():
        for index, (t, s) in enumerate(zip(times[:-1].to(x.device), times[1:].to(x.device), strict=True)):
            x = solver.step(process, predict, x, t, s, draw)
            for hook in hooks:
                seen = Step(index, t, s, x, last)
                hook(seen)
                x = seen.x
    return x


def sample(
    model: Model,
    process: Process,
    solver: Solver,
    shape: Sequence[int],
    *conditions: Any,
    seed: int,
    steps: int = 50,
    clip: float | None = None,
    hooks: Sequence[Hook] = (),
    device: torch.device | str = "cpu",
) -> Tensor:
    """New items from noise.

    Args:
        model: See ``integrate``.
        process: What the model was trained with.
        solver: How a step is made.
        shape: Of the items, the batch first.
        *conditions: See ``integrate``.
        seed: Of the noise; the same seed gives the same items.
        steps: How many.
        clip: See ``integrate``.
        hooks: See ``integrate``.
        device: Where the model is.

    Examples:
        >>> from interlayer.core.process import Flow
        >>> to_two = lambda x, t: x - 2  # the velocity of a flow whose data are all 2, at t = T
        >>> sample(to_two, Flow(), Euler(), (3, 1), seed=0, steps=1).flatten().round().tolist()
        [2.0, 2.0, 2.0]
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tuple(shape), generator=generator).to(device)
    times = process.times(steps)
    return integrate(model, process, solver, x, times, *conditions, clip=clip, generator=generator, hooks=hooks)
