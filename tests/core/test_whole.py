"""Models that take whole steps, in loops that know nothing of it."""

import copy

import pytest
import torch
from torch import nn

from interlayer.core.process import Euler, Flow, RungeKutta, integrate
from interlayer.core.process.whole import WholeStep, arguments, whole


class Velocity(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(3, 3).double(), 0

    def forward(self, x, t, *, twice=False):
        self.calls += 1
        out = torch.sin(self.linear(x) + t.double().view(-1, 1) / 300)
        return (out, None) if twice else out


def stepped(model, method, steps=6):
    new = copy.deepcopy(model)
    hook = WholeStep(Flow().times(steps).tolist(), 1000.0, method, arguments(model))
    new.register_forward_hook(hook, with_kwargs=True)
    return new


@pytest.mark.parametrize(("method", "calls"), [("euler", 1), ("midpoint", 2), ("kutta", 3), ("rk4", 4)])
def test_eulers_loop_takes_the_methods_steps(method, calls):
    torch.manual_seed(0)
    model, x, times = Velocity(), torch.randn(5, 3).double(), Flow().times(6)
    wanted = integrate(model, Flow(), RungeKutta(method), x, times)
    new = stepped(model, method)
    assert whole(new) and not whole(model)
    for other in (new, copy.deepcopy(new), lambda x, t: new(t=t, x=x, twice=True)):
        torch.testing.assert_close(integrate(other, Flow(), Euler(), x, times), wanted)
    assert new.calls - model.calls == 12 * calls


def test_times_between_those_of_the_schedule_and_low_precision():
    """The nearest time of the schedule says how large a step is; times that were rounded to 8 bits are still found."""
    model, x = Velocity(), torch.randn(4, 3).double()
    new, t = stepped(model, "midpoint", 4), torch.tensor([1000.0, 620.0, 130.0, 100.0])
    size = torch.tensor([-250.0, -250.0, -250.0, 0.0])
    inside = x + size.view(-1, 1) / 2000 * model(x, t)
    torch.testing.assert_close(new(x, t), model(inside, t + size / 2))
    exact = torch.tensor([750.0])
    torch.testing.assert_close(new(x[:1], exact.bfloat16()), new(x[:1], exact.bfloat16().float()))


def test_errors():
    with pytest.raises(ValueError, match=r"which takes \(input\); expected a trained model of items and times"):
        arguments(nn.Linear(1, 1))
    model = Velocity()
    model.linear = nn.Linear(3, 6).double()
    with pytest.raises(ValueError, match=r"gives \(2, 6\) for \(2, 3\); expected a velocity of the same shape"):
        stepped(model, "midpoint")(torch.zeros(2, 3).double(), torch.ones(2))
