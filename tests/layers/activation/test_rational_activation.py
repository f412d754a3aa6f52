"""Rational units against the equation, the published initialisation, torch's own functions and the algebra of residuals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer.core.select import replace
from interlayer.layers.activation.rational_activation import (
    CHUNK,
    TARGETS,
    Quotient,
    Rational,
    figure,
    fit,
    joint,
    rational_naive,
)
from interlayer.models import MLP, Transformer


def test_hand_computed():
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, -2.0])
    x = torch.tensor([0.0, 2.0, -1.0])
    # (1 + 4 + 12) / (1 + |-2 - 8|) and (1 - 2 + 3) / (1 + |1 - 2|)
    wanted = torch.tensor([1.0, 17 / 11, 1.0])
    torch.testing.assert_close(rational_naive(x, a, b), wanted)
    torch.testing.assert_close(Quotient.apply(x, a, b), wanted)


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (3, 5, 7), (CHUNK + 13,), (2, CHUNK)])
@pytest.mark.parametrize("degrees", [(5, 4), (1, 1), (2, 5), (7, 6)])
def test_fast_path_equals_the_equation_with_every_gradient(shape, degrees):
    leaves = [torch.randn(s, dtype=torch.float64) for s in (shape, degrees[0] + 1, degrees[1])]
    dy, found = torch.randn(shape, dtype=torch.float64), []
    for f in (Quotient.apply, rational_naive):
        given = [t.clone().requires_grad_() for t in leaves]
        y = f(*given)
        y.backward(dy)
        found.append([y.detach(), *(t.grad for t in given)])
    for ours, twin in zip(*found, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-9, atol=1e-9)


def test_second_derivative_and_gradient_of_each_example():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    a = torch.randn(6, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Quotient.apply, (x, a, b))
    assert torch.autograd.gradgradcheck(Quotient.apply, (x, a, b))
    each = torch.func.vmap(torch.func.grad(lambda x, a: Quotient.apply(x, a, b), argnums=1), (0, None))(x, a)
    wanted = torch.func.vmap(torch.func.grad(lambda x, a: rational_naive(x, a, b), argnums=1), (0, None))(x, a)
    torch.testing.assert_close(each, wanted)


@pytest.mark.parametrize(
    ("like", "error"),
    [("identity", 1e-6), ("relu", 0.035), ("leaky-relu", 0.035), ("tanh", 1e-4), ("sigmoid", 1e-4), ("silu", 1e-4), ("gelu", 0.0025)],
)  # fmt: skip
def test_start_is_near_to_its_target(like, error):
    x = torch.linspace(-3, 3, 501)
    assert (Rational(like=like)(x) - TARGETS[like](x)).abs().max() < error


def test_start_agrees_with_the_published_table():
    # Version B, 5/4, of the authors' library; theirs stopped a little before the optimum.
    a, b = fit("leaky-relu", (5, 4))
    assert a == pytest.approx([0.033558, 0.505006, 1.65347, 2.01005, 0.93192, 0.152426], rel=0.02)
    assert b == pytest.approx([0, 3.980248, 0, 0.301834], rel=0.02)
    a, b = fit("tanh", (5, 4))
    assert a == pytest.approx([0, 0.99999425, 0, 0.10770864, 0, 0.00087112], abs=1e-5)
    assert b == pytest.approx([0, 0.44101418, 0, 0.014581], abs=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of torch's forward mode
def test_forward_mode():
    torch.manual_seed(0)
    given = torch.randn(4, 3).double(), torch.randn(6).double(), torch.randn(4).double()
    lines = tuple(torch.randn_like(t) for t in given)
    for f, wanted in (
        (Quotient.apply, rational_naive),
        (lambda x, *_: Quotient.apply(x, *given[1:]), lambda x, *_: rational_naive(x, *given[1:])),
    ):
        torch.testing.assert_close(torch.func.jvp(f, given, lines), torch.func.jvp(wanted, given, lines))
    unit, x = Rational().double(), given[0]
    curvature = torch.func.jvp(torch.func.grad(lambda x: unit(x).sum()), (x,), (lines[0],))[1]
    (slope,) = torch.autograd.grad(unit(x.requires_grad_()).sum(), x, create_graph=True)
    torch.testing.assert_close(curvature, torch.autograd.grad(slope, x, lines[0])[0])


def test_start_from_a_function_and_it_is_computed_once():
    assert (Rational(like=F.mish)(torch.tensor([-1.0, 2.0])) - F.mish(torch.tensor([-1.0, 2.0]))).abs().max() < 3e-3
    assert fit("relu", (5, 4)) is fit("relu", (5, 4))


def test_no_pole_wherever_the_coefficients_go():
    unit = Rational().double()
    with torch.no_grad():
        unit.denominator.copy_(torch.tensor([-5.0, 3.0, -4.0, 0.5]))  # the polynomial has roots
        unit.numerator.copy_(torch.tensor([1.0, 0, 0, 0, 0, 0]))
    y = unit(torch.linspace(-20, 20, 9999, dtype=torch.float64))
    assert y.max() <= 1 and y.min() > 0


@pytest.mark.parametrize("sign", [1, -1])
def test_residual_around_a_unit_is_a_unit(sign):
    unit = Rational(like="relu").double()
    with torch.no_grad():
        unit.denominator.copy_(sign * torch.tensor([0.5, 1.0, 0.2, 0.3]))
        unit.denominator[0] = 0.0
    x = torch.linspace(-9, 9, 101, dtype=torch.float64)
    torch.testing.assert_close(unit.residual()(x), x + unit(x), rtol=1e-12, atol=1e-12)
    again = unit.residual().residual()  # so a product of identical residual layers stays one
    torch.testing.assert_close(again(x), 2 * x + unit(x), rtol=1e-12, atol=1e-12)


def test_residual_is_refused_where_it_would_be_another_function():
    with pytest.raises(ValueError, match="expected m > n"):
        Rational(degrees=(4, 4)).residual()
    unit = Rational()
    with torch.no_grad():
        unit.denominator.copy_(torch.tensor([1.0, 0.0, 0.0, 0.1]))
    with pytest.raises(ValueError, match="changes sign"):
        unit.residual()


def test_joint_is_one_unit_in_every_layer_and_gets_the_sum_of_their_gradients():
    torch.manual_seed(0)
    net = MLP(6, 3, depth=3, width=8, activation=joint(like="silu"))
    units = [m for m in net.modules() if isinstance(m, Rational)]
    assert len(units) == 1
    apart = MLP(6, 3, depth=3, width=8, activation="rational-activation(like='silu')")
    apart.load_state_dict(net.state_dict())
    for each in (net, apart):
        each(torch.randn(4, 6, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    summed = sum(m.numerator.grad for m in apart.modules() if isinstance(m, Rational))
    torch.testing.assert_close(units[0].numerator.grad, summed, rtol=1e-4, atol=1e-4)


def test_swapped_into_a_trained_model():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()).eval()
    x = torch.randn(32, 4)
    new = replace(net, at=nn.ReLU, with_="rational-activation(like='relu')").apply()
    assert isinstance(new[1], Rational) and new[1] is not new[3]
    assert (new(x) - net(x)).abs().max() < 0.15
    one = replace(net, at=nn.ReLU, with_=joint(like="relu")).apply()
    assert one[1] is one[3]
    assert (
        Transformer(vocab=9, depth=1, width=8, heads=2, activation="rational-activation")(
            torch.zeros(1, 3, dtype=torch.long)
        )
        .isfinite()
        .all()
    )


def test_figure_has_a_panel_for_each_unit():
    model = MLP(6, 3, depth=2, width=8, activation="rational-activation")
    with torch.no_grad():
        model.blocks[1][1].numerator.mul_(3.0)  # it has learned
    drawn = figure(model)
    assert [a.get_title() for a in drawn.axes] == ["blocks.0.1", "blocks.1.1"]
    for panel, scale in zip(drawn.axes, (1.0, 3.0), strict=True):
        learned, initial = (torch.as_tensor(line.get_ydata()) for line in panel.lines)
        x = torch.as_tensor(panel.lines[0].get_xdata())
        torch.testing.assert_close(initial, Rational().double()(x).detach())
        torch.testing.assert_close(learned, scale * initial, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="no rational unit"):
        figure(nn.Linear(2, 2))


def test_errors():
    with pytest.raises(ValueError, match="like='rely' is not one of"):
        Rational(like="rely")
    with pytest.raises(ValueError, match="at least 1"):
        Rational(degrees=(5, 0))
    with pytest.raises(TypeError, match="expected floating point"):
        Rational()(torch.ones(2, dtype=torch.long))
