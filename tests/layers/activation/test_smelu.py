import pytest
import torch

from interlayer.layers.activation.smelu import BLENDS, RESCU, SmeLU


def pieces(x, alpha, beta, left, right, offset):
    """The generalised SmeLU as the paper writes it: a x^2 + b x + c between the joints."""
    span = alpha + beta
    a = (right - left) / (2 * span)
    b = (alpha * right + beta * left) / span
    c = offset + (alpha**2 * (right + left) + 2 * alpha * beta * left) / (2 * span)
    end = offset + span * (left + right) / 2
    middle = a * x**2 + b * x + c
    return torch.where(
        x <= -alpha, offset + left * (x + alpha), torch.where(x >= beta, end + right * (x - beta), middle)
    )


@pytest.mark.parametrize(
    "given",
    [(1.0, 1.0, 0.0, 1.0, 0.0), (0.5, 0.5, 0.0, 1.0, 0.0), (1.5, 0.7, 0.1, 1.2, -0.2), (-0.2, 1.0, -0.3, 2.0, 0.4)],
)
def test_generalised_smelu_is_the_papers_parabola(given):
    alpha, beta, left, right, offset = given
    x = torch.linspace(-4, 4, 1001, dtype=torch.float64, requires_grad=True)
    ours = SmeLU(beta, alpha=alpha, left=left, right=right, offset=offset)(x)
    theirs = pieces(x, *given)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs)))


def test_smelu_in_the_papers_own_form():
    x, beta = torch.linspace(-2, 2, 401), 0.8
    wanted = torch.where(x <= -beta, 0.0, torch.where(x >= beta, x, (x + beta) ** 2 / (4 * beta)))
    torch.testing.assert_close(SmeLU(beta)(x), wanted)


@pytest.mark.parametrize("blend", BLENDS)
def test_value_and_gradient_are_continuous_at_the_joints_and_monotone(blend):
    unit = RESCU(alpha=1.5, beta=0.5, left=0.1, right=0.9, offset=-1.0, blend=blend).double()
    for joint, value, slope in ((-1.5, -1.0, 0.1), (0.5, 0.0, 0.9)):
        x = torch.tensor([joint - 1e-9, joint, joint + 1e-9], dtype=torch.float64, requires_grad=True)
        y = unit(x)
        (slopes,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(y, torch.full_like(y, value), rtol=0, atol=1e-8)
        torch.testing.assert_close(slopes, torch.full_like(y, slope), rtol=0, atol=1e-8)
    x = torch.linspace(-3, 3, 500, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(unit(x).sum(), x)
    assert (slopes.diff() >= -1e-12).all() and slopes[0] == 0.1
    assert slopes[-1] == pytest.approx(0.9)


@pytest.mark.parametrize("blend", BLENDS)
def test_rescu_is_the_integral_of_its_gradient(blend):
    unit = RESCU(alpha=1.0, beta=2.0, left=-0.2, right=1.0, offset=0.3, blend=blend)
    x = torch.linspace(-1.0, 2.5, 20001, dtype=torch.float64, requires_grad=True)
    y = unit(x)
    (slopes,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(0.3 + torch.trapezoid(slopes, x.detach()), y[-1].detach(), rtol=1e-6, atol=1e-6)


def test_it_tends_to_relu():
    x = torch.linspace(-1, 1, 100)
    torch.testing.assert_close(SmeLU(1e-4)(x), torch.relu(x), rtol=0, atol=1e-4)


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match=r"SmeLU: joints at -0.0 and 0.0"):
        SmeLU(0.0)
    with pytest.raises(ValueError, match="blend 'sine' is not one of"):
        RESCU(blend="sine")
