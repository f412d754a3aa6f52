"""Ordinary differential equations: fixed steps here, adaptive ones by torchdiffeq, adjoint gradients over both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp

from interlayer.core import aside
from interlayer.core.extras import need
from interlayer.core.solve.common import Explicit, Solved, SolverError
from interlayer.core.solve.tableau import TABLEAUS, combine
from interlayer.core.traced import traced

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2")  # names of torchdiffeq
State = tuple[Tensor, ...]
Slope = Callable[[Tensor, State], State]


@dataclass(frozen=True)
class Solver:
    """How ``odeint`` solves: in fixed ``steps``, or in steps that it adapts to a ``tolerance``.

    Fixed steps are compiled, exported and traced like any layer, and examples of a batch do not touch each other. Adaptive ones
    (``pip install "interlayer[ode]"``) take as many steps as the whole batch needs: an output depends on the rest of
    its batch, by less than the tolerance.

    Args:
        steps: Equal steps between two times. Defaults to adaptive ones.
        tolerance: Error that a step may have, relative to the state and absolute. Defaults to 1e-3 without ``steps``.
        method: ``euler``, ``midpoint``, ``kutta``, ``rk4`` (default), ``bogacki-shampine`` or ``dormand-prince`` for fixed steps;
            ``dopri5`` (default), ``dopri8``, ``bosh3``, ``adaptive_heun`` or ``fehlberg2`` for adaptive ones.
        limit: Most adaptive steps, rejected ones included. Defaults to 1000.
        adjoint: Whether gradients come from the adjoint equation, which is solved backwards in time in memory that does not grow
            with the steps, and are exact up to the error of the solver. Otherwise they go through the steps: exact
            for what was computed, with every step kept.

    Raises:
        ValueError: Both or an option without effect, an unknown method, or sizes that are not positive.
    """

    steps: int | None = None
    tolerance: float | None = None
    method: str | None = None
    limit: int | None = None
    adjoint: bool = True

    def __post_init__(self) -> None:
        if self.steps is not None and not (self.tolerance is None and self.limit is None):
            raise ValueError(
                f"Solver: tolerance={self.tolerance} and limit={self.limit} have no effect on steps={self.steps}. "
                "Leave out steps, or these."
            )
        known = ADAPTIVE if self.steps is None else (*TABLEAUS,)
        if self.method is not None and self.method not in known:
            kind = "adaptive steps" if self.steps is None else "fixed steps"
            raise ValueError(f"Solver: method {self.method!r}; expected one of {list(known)} for {kind}.")
        for name in ("steps", "tolerance", "limit"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"Solver: {name} {value}; expected a positive number.")

    @property
    def error(self) -> float:
        """The tolerance of adaptive steps."""
        return 1e-3 if self.tolerance is None else self.tolerance


def odeint(
    f: Callable[..., Tensor],
    y: Float[Tensor, "..."],
    times: Sequence[float] | Float[Tensor, " T"],
    *inputs: Tensor,
    solver: Solver = Solver(),
) -> Solved:
    """Solve ``dy/dt = f(t, y, *inputs)`` from ``y`` at the first time.

    Gradients reach ``y``, the times where they are a tensor, ``inputs``, and the parameters of ``f`` if it is a module. With the
    adjoint, a function that captures others is refused: give them as ``inputs``. States in bfloat16 or float16 are solved in
    float32. Cost: stages x steps evaluations of f; the adjoint's backward pass as many again, each with its gradient, and memory
    for the states at ``times`` alone.

    Args:
        f: Slope; t is a scalar tensor.
        y: State at the first time.
        times: In order, up or down.
        *inputs: Further arguments of f.
        solver: How.

    Returns:
        The states at all times, [T, ...].

    Raises:
        ValueError: Times that are fewer than two or not in order, a tolerance below what the dtype holds, a function that
            captures tensors with gradients.
        SolverError: The tolerance cannot be met, or the steps were not enough; says how far it came, and the error.
        ImportError: Adaptive steps without torchdiffeq.

    Examples:
        >>> found = odeint(lambda t, y: -y, torch.ones(1), (0.0, 1.0), solver=Solver(steps=10))
        >>> round(found.value[-1].item(), 4), found.evaluations
        (0.3679, 40)
    """
    if not (isinstance(times, Tensor) and torch.compiler.is_compiling()):
        _check(times, solver, torch.promote_types(y.dtype, torch.float32))
    solve = _solve if solver.steps is not None else torch.compiler.disable(_solve)
    value, count, residual = solve(
        Explicit(f, inputs, y), y, times if isinstance(times, Tensor) else tuple(times), solver
    )
    aside.metric("evaluations", torch.tensor(float(count)))
    if solver.steps is None:
        aside.metric("residual", torch.tensor(residual))
    return Solved(value, count, residual)


def _solve(explicit: Explicit, y: Tensor, times: Any, solver: Solver) -> tuple[Tensor, int, float]:
    problem, start = _Problem(explicit, solver), y.to(explicit.exact)
    if solver.adjoint:
        explicit.closed(_time(times[0], start), start)
    moving = isinstance(times, Tensor) and times.requires_grad and torch.is_grad_enabled()
    if solver.adjoint and (explicit.wants(start) or moving):
        value = _Adjoint.apply(problem, times, start, *explicit.tensors)
    else:
        value = problem.forward(times, start, None)
    if solver.steps is None:
        return value.to(y.dtype), problem.evaluations, problem.residual
    return value.to(y.dtype), len(TABLEAUS[solver.method or "rk4"].b) * solver.steps * (len(times) - 1), 0.0


class _Problem:
    """An equation and its solver."""

    def __init__(self, explicit: Explicit, solver: Solver) -> None:
        self.explicit, self.solver = explicit, solver
        self.evaluations, self.residual = 0, 0.0

    def forward(self, times: Any, start: Tensor, tensors: State | None) -> Tensor:
        """The states at all times."""

        def slope(t: Tensor, state: State) -> State:
            return (self.explicit(tensors, t, *state),)

        states = self.solve(slope, (start,), times, 1, note=True)
        return torch.stack([s[0] for s in states])

    def solve(self, slope: Slope, state: State, times: Any, controlled: int, note: bool = False) -> list[State]:
        """Tuples of states at all times; the errors of the first ``controlled`` tensors set adaptive steps."""
        if self.solver.steps is not None:
            return _fixed(self.solver, slope, state, times)
        if not state[0].numel():
            return [state] * len(times)  # an empty batch: nothing to integrate
        return self.adapted(slope, state, times, controlled, note)

    def adapted(self, slope: Slope, state: State, times: Any, controlled: int, note: bool) -> list[State]:
        """Adaptive steps, by torchdiffeq."""
        library = need("torchdiffeq", "ode", "odeint with adaptive steps")
        if not isinstance(times, Tensor):
            times = torch.stack([torch.as_tensor(t, dtype=torch.float64, device=state[0].device) for t in times])
        watched = _Watched(self.solver, slope, controlled, float(times[-1].detach()))
        single, error = len(state) == 1, self.solver.error  # a single tensor need not be joined
        found = library.odeint(
            watched, state[0] if single else state, times, rtol=error, atol=error, method=self.solver.method or "dopri5",
            options={"norm": watched.norm},
        )  # fmt: skip
        if note:
            self.evaluations, self.residual = watched.evaluations, watched.worst
        return [(y,) for y in found] if single else list(zip(*found, strict=True))

    def backward(self, times: Any, values: Tensor, grads: Tensor, tensors: State, moved: bool) -> list[Any]:
        """Gradients of the times (where ``moved``), of the first state and of the tensors.

        ``da/dt = -a' df/dy`` and ``dg/dt = -a' df/dw`` run backwards in time beside the state, from one time to the one
        before; there the state is taken from the forward pass, and the gradient of the output added to ``a``. The steps are set by
        the state and ``a``: ``g`` is an integral that nothing depends on (Kidger et al., arXiv:2009.09457).
        """

        plain = not traced()  # then autograd itself is enough, and faster than torch.func
        if plain:
            tensors = self.explicit.tensors
        weights = None if plain and self.explicit.own() else tensors

        def slope(t: Tensor, state: State) -> State:
            y, a, *_ = state
            if not plain:
                out, pull = vjp(lambda y, *w: self.explicit(w, t, y), y, *tensors)
                return (out, *pull(-a))
            with torch.enable_grad():
                y = y.detach().requires_grad_()
                out = self.explicit(weights, t, y)
            return (out, *torch.autograd.grad(out, (y, *tensors), -a, allow_unused=True, materialize_grads=True))

        def along(i: int, a: Tensor) -> Tensor:
            return (self.explicit(weights, _time(times[i], values), values[i]) * a).sum()

        a, sums, shifts = grads[-1], tuple(map(torch.zeros_like, tensors)), []
        for i in range(len(times) - 1, 0, -1):
            if moved:
                shifts.append(along(i, grads[i]))
            _, a, *rest = self.solve(slope, (values[i], a, *sums), (times[i], times[i - 1]), 2)[-1]
            sums = tuple(rest)
            if i == 1 and moved:
                shifts.append(-along(0, a))
            a = a + grads[i - 1]
        return [torch.stack(shifts[::-1]) if moved else None, a, *sums]


class _Adjoint(torch.autograd.Function):
    """The solution with the gradient of the adjoint equation (Pontryagin et al., 1962)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(problem: _Problem, times: Any, start: Tensor, *tensors: Tensor) -> Tensor:
        """Solve; autograd records nothing here."""
        return problem.forward(times, start, tensors if traced() else None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the states at the output times."""
        problem, times, _, *tensors = inputs
        moving = isinstance(times, Tensor)
        ctx.problem, ctx.times, ctx.count = problem, None if moving else times, len(tensors)
        ctx.save_for_backward(output, *tensors, *([times] if moving else []))

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Any, ...]:
        """Solve the adjoint equation."""
        values, *saved = ctx.saved_tensors
        tensors, times = tuple(saved[: ctx.count]), saved[-1] if ctx.times is None else ctx.times
        return None, *ctx.problem.backward(times, values, grads, tensors, ctx.needs_input_grad[1])


def _time(t: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(t, dtype=like.dtype, device=like.device)


def _fixed(solver: Solver, slope: Slope, state: State, times: Sequence[Any] | Tensor) -> list[State]:
    tableau, states = TABLEAUS[solver.method or "rk4"], [state]
    assert solver.steps is not None
    for begin, end in pairwise(times):
        size = (end - begin) / solver.steps
        for i in range(solver.steps):
            slopes = [slope(_time(begin + i * size, state[0]), state)]
            for row, c in zip(tableau.a, tableau.c[1:], strict=True):
                slopes.append(slope(_time(begin + (i + c) * size, state[0]), _moved(state, size, row, slopes)))
            state = _moved(state, size, tableau.b, slopes)
        states.append(state)
    return states


def _moved(state: State, size: Any, weights: tuple[float, ...], slopes: list[State]) -> State:
    return tuple(y + size * combine(weights, ks) for y, ks in zip(state, zip(*slopes, strict=True), strict=True))


class _Watched:
    """A slope as torchdiffeq calls it; counts the steps, keeps the errors, and ends a solution that gets nowhere."""

    def __init__(self, solver: Solver, slope: Slope, controlled: int, end: float) -> None:
        self.solver, self.slope, self.controlled, self.end = solver, slope, controlled, end
        self.limit, self.tries, self.error, self.worst, self.evaluations = solver.limit or 1000, 0, 0.0, 0.0, 0

    def __call__(self, t: Tensor, state: State | Tensor) -> State | Tensor:
        self.evaluations += 1
        return self.slope(t, (state,))[0] if isinstance(state, Tensor) else self.slope(t, state)

    def norm(self, errors: State | Tensor) -> Tensor:
        """Error of a step as a share of the tolerance; torchdiffeq takes the step if it is at most 1."""
        parts = (errors,) if isinstance(errors, Tensor) else errors[: self.controlled]
        found = max((e.square().mean().sqrt() for e in parts), key=lambda e: e.item())
        self.error = found.item()
        return found

    def callback_step(self, t: Tensor, state: State | Tensor, size: Tensor) -> None:
        """Called before each step."""
        stuck = not bool(t + size > t) or math.isnan(self.error)
        if stuck or self.tries == self.limit:
            where = f"at t = {t.item():.6g} of {self.end:g}, with an error of {self.error:.3g} times the tolerance"
            if stuck:
                raise SolverError(
                    f"odeint: no step is small enough for tolerance {self.solver.error:g} {where}. The slope "
                    "may be discontinuous or not finite; otherwise raise the tolerance, or use float64."
                )
            raise SolverError(
                f"odeint: {self.limit} steps ended {where}. Raise limit= or the tolerance; a stiff equation needs a smoother f."
            )
        self.tries += 1

    def callback_accept_step(self, t: Tensor, state: State | Tensor, size: Tensor) -> None:
        """Called after each step that is taken."""
        self.worst = max(self.worst, self.error)


def _check(times: Sequence[float] | Tensor, solver: Solver, dtype: torch.dtype) -> None:
    if len(times) < 2 or (isinstance(times, Tensor) and times.ndim != 1):
        raise ValueError(f"odeint: {len(times)} times; expected at least two, in one dimension.")
    at = times.tolist() if isinstance(times, Tensor) else times
    steps = [b - a for a, b in pairwise(at)]
    if not (all(s > 0 for s in steps) or all(s < 0 for s in steps)):
        raise ValueError("odeint: times are not strictly in order; expected them to rise or fall throughout.")
    least = torch.finfo(dtype).eps
    if solver.steps is None and solver.error < least:
        raise ValueError(
            f"odeint: tolerance {solver.error:g} cannot be met in {dtype}, whose rounding error is {least:.2g}. Raise it, or "
            "use float64."
        )
