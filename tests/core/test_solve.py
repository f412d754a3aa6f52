"""Solvers: closed forms, orders, implicit and adjoint gradients against those through the steps, memory, errors."""

import math

import pytest
import torch
from torch import nn

from interlayer.core import aside, extras
from interlayer.core.cost import bytes_kept
from interlayer.core.solve import TABLEAUS, Solver, SolverError, fixed_point, odeint

FIGURES = [
    [2.13245854, 0.24741423, 0.56380889, 1.25975407],
    [4.87696236, 0.38980002, 0.35491212, 1.44254083],
    [8.98784335, 0.63814613, 1.25952578, 3.86740542],
]


class Field(nn.Module):
    """A small slope that depends on the time."""

    def __init__(self, width=4, hidden=8):
        super().__init__()
        self.first, self.second = nn.Linear(width + 1, hidden), nn.Linear(hidden, width)

    def forward(self, t, y, *more):
        out = self.second(torch.tanh(self.first(torch.cat((y, t.expand(*y.shape[:-1], 1)), -1))))
        return out + sum(more) if more else out


def setting(batch=3, dtype=torch.double):
    torch.manual_seed(0)
    return Field().to(dtype), torch.randn(batch, 4, dtype=dtype, requires_grad=True)


def uneven(value):
    return (value * torch.linspace(-1, 1.3, value.numel(), dtype=value.dtype).view(value.shape)).sum()


@pytest.mark.parametrize("method", TABLEAUS)
def test_fixed_steps_converge_with_their_order(method):
    """``dy/dt = y cos t``, whose solution is exp(sin t)."""
    errors = []
    for steps in (8, 16):
        solver = Solver(steps=steps, method=method)
        found = odeint(lambda t, y: y * torch.cos(t), torch.ones(1, dtype=torch.double), (0.0, 2.0), solver=solver)
        errors.append(abs(found.value[-1].item() - math.exp(math.sin(2))))
        assert found.evaluations == steps * len(TABLEAUS[method].b) and found.residual == 0
    assert math.log2(errors[0] / errors[1]) == pytest.approx(TABLEAUS[method].order, abs=0.6)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2"])
def test_adaptive_steps_keep_the_tolerance_forwards_and_backwards_in_time(method):
    y = torch.ones(2, dtype=torch.double)
    for times in ((0.0, 0.5, 2.0), (2.0, 1.0, 0.0)):
        start = math.exp(math.sin(times[0]))
        found = odeint(lambda t, y: y * torch.cos(t), start * y, times, solver=Solver(tolerance=1e-5, method=method))
        wanted = torch.tensor(times, dtype=torch.double).sin().exp().unsqueeze(1).expand(-1, 2)
        torch.testing.assert_close(found.value, wanted, rtol=1e-3, atol=1e-3)
        assert 0 < found.residual <= 1


@pytest.mark.parametrize("solver", [{"steps": 24}, {"tolerance": 1e-10}])
def test_adjoint_gradients_equal_those_through_the_steps(solver):
    """For the state, three times, an input and all parameters, in float64."""
    field, y = setting()
    times = torch.tensor([0.0, 0.3, 1.0], dtype=torch.double, requires_grad=True)
    push = torch.randn(4, dtype=torch.double, requires_grad=True)
    found = []
    for adjoint in (True, False):
        value = odeint(field, y, times, push, solver=Solver(**solver, adjoint=adjoint)).value
        found.append([value, *torch.autograd.grad(uneven(value), [y, times, push, *field.parameters()])])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solver", [Solver(steps=8), Solver(tolerance=1e-8)])
def test_gradients_reach_parameters_that_functional_call_puts_in(solver):
    field, y = setting()
    other = {name: (p.detach() * 1.1).requires_grad_() for name, p in field.named_parameters()}

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.field = field

        def forward(self, y):
            return odeint(self.field, y, (0.0, 1.0), solver=solver).value[-1]

    value = torch.func.functional_call(Block(), {f"field.{n}": p for n, p in other.items()}, (y,))
    found = torch.autograd.grad(uneven(value), list(other.values()))
    with torch.no_grad():
        for p in field.parameters():
            p.mul_(1.1)
    wanted = torch.autograd.grad(uneven(Block()(y)), list(field.parameters()))
    torch.testing.assert_close(found, wanted)


def test_figures_of_torchdiffeq():
    """odeint_adjoint of torchdiffeq 0.2.5 (dopri5, tolerances 1e-9), on the same field: values, gradients of state and bias."""
    field, y = setting(batch=1)
    with torch.no_grad():
        for i, p in enumerate(field.parameters()):
            p.copy_((torch.sin(torch.arange(p.numel(), dtype=p.dtype) * 0.7 + i) / 2).view(p.shape))
        y.copy_(torch.tensor([[0.5, -1.0, 0.25, 2.0]]))
    value = odeint(field, y, (0.0, 2.0), solver=Solver(tolerance=1e-9)).value[-1]
    dy, bias = torch.autograd.grad(value.square().sum(), [y, field.second.bias])
    torch.testing.assert_close(
        torch.stack((value[0], dy[0], bias)), torch.tensor(FIGURES, dtype=value.dtype), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("solver", [{"steps": None, "tolerance": 1e-3}, {"steps": 4}])
def test_the_adjoint_keeps_as_much_however_many_steps(solver):
    field, y = setting(dtype=torch.float32)
    kept = {}
    for times in ((0.0, 1.0), (0.0, 40.0)):
        for adjoint in (True, False):
            chosen = Solver(
                **{**solver, "adjoint": adjoint, **({"steps": int(4 * times[1])} if solver["steps"] else {})}
            )
            kept[adjoint, times] = bytes_kept(field, lambda t=times, s=chosen: odeint(field, y, t, solver=s).value)
    assert kept[True, (0.0, 40.0)] == kept[True, (0.0, 1.0)]
    assert kept[False, (0.0, 40.0)] > 2 * kept[False, (0.0, 1.0)]


def test_evaluations_and_residual_are_reported():
    field, y = setting()
    calls = []
    hook = field.register_forward_hook(lambda *_: calls.append(1))
    with aside.collect() as told:
        found = odeint(field, y, (0.0, 1.0), solver=Solver(tolerance=1e-6))
        odeint(field, y, (0.0, 1.0), solver=Solver(steps=2))
        point = fixed_point(lambda z, x: torch.tanh(z / 2 + x), y.detach(), y)
    hook.remove()
    assert [v.item() for v in told.metrics["evaluations"]] == [found.evaluations, 8, point.evaluations]
    assert found.evaluations + 8 == len(calls) and found.residual <= 1 and point.residual <= 1e-4
    assert told.metrics["residual"][-1].item() == pytest.approx(point.residual)


def test_low_precision_is_solved_in_single_precision():
    field, y = setting(dtype=torch.float32)
    wanted = odeint(field, y, (0.0, 1.0), solver=Solver(steps=4)).value[-1]
    with torch.autocast("cpu", torch.bfloat16):
        value = odeint(field, y, (0.0, 1.0), solver=Solver(steps=4)).value[-1]
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, wanted, rtol=0.02, atol=0.02)
    grad = torch.autograd.grad(value.square().sum(), list(field.parameters()))
    assert all(g.dtype == torch.float32 and g.abs().sum() > 0 for g in grad)
    half = odeint(field.bfloat16(), y.bfloat16(), (0.0, 1.0), solver=Solver(steps=4)).value[-1]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), wanted, rtol=0.05, atol=0.05)


def test_errors_of_odeint():
    y = torch.ones(2)
    for times, match in (((0.0,), "1 times; expected at least two"), ((0.0, 1.0, 0.5), "not strictly in order")):
        with pytest.raises(ValueError, match=match):
            odeint(lambda t, y: -y, y, times, solver=Solver(steps=1))
    with pytest.raises(
        ValueError, match=r"tolerance 1e-09 cannot be met in torch.float32, whose rounding error is 1.2e-07"
    ):
        odeint(lambda t, y: -y, y, (0.0, 1.0), solver=Solver(tolerance=1e-9))
    with pytest.raises(
        SolverError, match=r"no step is small enough for tolerance 1e-06 at t = 1 of 2, with an error of"
    ):
        odeint(lambda t, y: y * y, y.double(), (0.0, 2.0), solver=Solver(tolerance=1e-6))
    with pytest.raises(SolverError, match=r"5 steps ended at t = .* of 9, with an error of .* Raise limit="):
        odeint(lambda t, y: -y, y, (0.0, 9.0), solver=Solver(tolerance=1e-6, limit=5))
    with pytest.raises(SolverError, match="error of nan"):
        odeint(lambda t, y: y * math.nan, y, (0.0, 1.0))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 2, "tolerance": 1e-3}, r"tolerance=0.001 and limit=None have no effect on steps=2"),
        ({"steps": 2, "method": "dopri5"}, r"'dopri5'; expected one of \['euler', .* for fixed steps"),
        ({"method": "rk4"}, r"'rk4'; expected one of \['dopri5', .* for adaptive steps"),
        ({"steps": 0}, "steps 0; expected a positive number"),
        ({"tolerance": -1.0}, "tolerance -1.0; expected a positive number"),
    ],
)
def test_errors_of_a_solver(options, match):
    with pytest.raises(ValueError, match=match):
        Solver(**options)


def test_adaptive_steps_say_what_they_need(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(extras, "import_module", missing)
    with pytest.raises(
        ImportError, match=r"odeint with adaptive steps needs 'torchdiffeq': pip install \"interlayer\[ode\]\""
    ):
        odeint(lambda t, y: -y, torch.ones(2), (0.0, 1.0))
    assert odeint(lambda t, y: -y, torch.ones(2), (0.0, 1.0), solver=Solver(steps=1)).evaluations == 4


class Cell(nn.Module):
    """A map that contracts."""

    def __init__(self, width=6):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, dtype=torch.double) / 4)

    def forward(self, z, x):
        return torch.tanh(z @ self.weight + x)


def unrolled(cell, x):
    z = torch.zeros_like(x)
    for _ in range(150):
        z = cell(z, x)
    return z


@pytest.mark.parametrize("method", ["anderson", "broyden", "iteration"])
def test_fixed_points_and_implicit_gradients_equal_the_unrolled_iteration(method):
    torch.manual_seed(0)
    cell, x = Cell(), torch.randn(3, 6, dtype=torch.double, requires_grad=True)
    found = fixed_point(cell, torch.zeros_like(x), x, method=method, tolerance=1e-12)
    pairs = [[z, *torch.autograd.grad(uneven(z), [x, cell.weight])] for z in (found.value, unrolled(cell, x))]
    torch.testing.assert_close(*pairs, rtol=1e-9, atol=1e-10)
    assert found.residual <= 1e-12


def test_anderson_and_broyden_need_fewer_evaluations_than_iteration():
    torch.manual_seed(0)
    cell, x = Cell(), torch.randn(3, 6, dtype=torch.double)
    counts = {
        m: fixed_point(cell, torch.zeros_like(x), x, method=m, tolerance=1e-9).evaluations
        for m in ("anderson", "broyden", "iteration")
    }
    assert max(counts["anderson"], counts["broyden"]) < 0.6 * counts["iteration"]


def test_broyden_finds_a_point_that_iterating_moves_away_from():
    """``z = 3 - 2 z`` has the solution 1, and a slope of -2 there."""
    with pytest.raises(
        SolverError, match=r"100 evaluations by iteration left z with a relative residual of .*; expected 0.0001"
    ):
        fixed_point(lambda z: 3 - 2 * z, torch.zeros(2, 3, dtype=torch.double), method="iteration")
    for method in ("anderson", "broyden"):
        found = fixed_point(lambda z: 3 - 2 * z, torch.zeros(2, 3, dtype=torch.double), method=method)
        torch.testing.assert_close(found.value, torch.ones(2, 3, dtype=torch.double), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["anderson", "broyden", "iteration"])
def test_the_solution_of_an_item_does_not_depend_on_its_batch(method):
    torch.manual_seed(0)
    cell, x = (
        Cell(),
        torch.randn(4, 6, dtype=torch.double) * torch.tensor([[0.1], [1.0], [3.0], [0.0]], dtype=torch.double),
    )
    whole = fixed_point(cell, torch.zeros_like(x), x, method=method).value
    alone = torch.cat([fixed_point(cell, torch.zeros_like(r), r, method=method).value for r in x.split(1)])
    torch.testing.assert_close(whole, alone, rtol=1e-10, atol=1e-12)


def test_errors_of_fixed_point():
    z = torch.ones(2, 3)
    with pytest.raises(
        SolverError, match=r"3 evaluations by anderson left z with a relative residual of .*; expected 1e-06 in"
    ):
        fixed_point(lambda z: torch.cos(30 * z) + 0.1, z, tolerance=1e-6, limit=3)
    with pytest.raises(
        ValueError, match=r"tolerance 0.0001 cannot be met in torch.bfloat16, whose rounding error is 0.0078"
    ):
        fixed_point(torch.cos, z.bfloat16())
    with pytest.raises(SolverError, match="left the gradient with a relative residual"):
        x = torch.ones(2, 3, requires_grad=True)
        fixed_point(lambda z, x: 1.5 * z - x * 0.5, z, x, method="iteration").value.sum().backward()
    with pytest.raises(ValueError, match="method 'newton'; expected one of"):
        fixed_point(torch.cos, z, method="newton")
    with pytest.raises(ValueError, match="tolerance 0 and limit 5; expected positive"):
        fixed_point(torch.cos, z, tolerance=0, limit=5)
    with pytest.raises(ValueError, match=r"f gives \(2, 2\) for \(2, 3\)"):
        fixed_point(lambda z: z[:, :2], z)


def test_a_function_that_would_lose_gradients_is_refused():
    weight, y = torch.ones(3, requires_grad=True), torch.ones(2, 3)
    with pytest.raises(ValueError, match="f captures tensors that require gradients"):
        odeint(lambda t, y: -weight * y, y, (0.0, 1.0), solver=Solver(steps=2))
    with pytest.raises(ValueError, match="f captures tensors that require gradients"):
        fixed_point(lambda z: torch.cos(weight * z), y)
    found = odeint(lambda t, y: -weight * y, y, (0.0, 1.0), solver=Solver(steps=2, adjoint=False)).value[-1]
    given = odeint(lambda t, y, w: -w * y, y, (0.0, 1.0), weight, solver=Solver(steps=2)).value[-1]
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), weight) for v in (found, given)), rtol=0.02, atol=0)
