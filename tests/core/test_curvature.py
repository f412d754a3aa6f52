import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian

from interlayer.core.curvature import Curvature, curvature, outputs, products

MOVES = {"0": lambda w: [0.1 * w, 0.02 * torch.ones_like(w)], "2": lambda w: [-0.1 * w, 0.05 * w.abs()]}


@pytest.fixture
def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), torch.randn(5, 3).double()


def naive(net, x, loss):
    """The whole Hessian of the loss, multiplied from both sides."""
    start = {n: p.detach() for n, p in net.named_parameters()}
    exact = net(x).detach()

    def value(weights):
        out = functional_call(net, start | weights, x)
        if loss == "square":
            return (out - exact).square().mean()
        p, q = exact.log_softmax(-1), out.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean()

    whole = hessian(value)({f"{n}.weight": start[f"{n}.weight"] for n in MOVES})
    moved = [(f"{n}.weight", d) for n, move in MOVES.items() for d in move(start[f"{n}.weight"])]
    return torch.stack([
        torch.stack([torch.einsum("ab,abcd,cd", d, whole[m][n], e) for n, e in moved]) for m, d in moved
    ])  # fmt: skip


@pytest.mark.parametrize("loss", ["divergence", "square"])
def test_products_are_those_with_the_whole_hessian(small, loss):
    net, x = small
    before = [p.clone() for p in net.parameters()]
    found = products(net, [x], MOVES, loss)
    torch.testing.assert_close(found, naive(net, x, loss), rtol=2e-3, atol=1e-7)
    halves = products(net, list(x[:4].split(2)), MOVES, loss)
    torch.testing.assert_close(halves, products(net, [x[:4]], MOVES, loss), rtol=1e-6, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_the_loss_of_a_choice_is_the_form_and_rises_are_its_differences(small):
    net, x = small
    curve = curvature(net, [x], MOVES)
    assert curve.pairs.shape == (2, 2, 2, 2)
    flat = products(net, [x], MOVES, "divergence")
    for a, b in itertools.product(range(2), repeat=2):
        form = flat[a, a] + flat[2 + b, 2 + b] + 2 * flat[a, 2 + b]
        assert curve.loss((a, b)) == pytest.approx(float(form) / 2)
        rises = curve.rises((a, b))
        for k in range(2):
            assert float(rises[0, k]) == pytest.approx(curve.loss((k, b)) - curve.loss((a, b)), abs=1e-9)
            assert float(rises[1, k]) == pytest.approx(curve.loss((a, k)) - curve.loss((a, b)), abs=1e-9)


def test_positions_count_once_each_and_low_precision_is_measured_in_32_bits():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 6)), torch.randn(2, 3, 4)
    move = {"0": lambda w: [0.1 * w]}
    flat = products(net, [x.flatten(0, 1)], move, "divergence")
    torch.testing.assert_close(products(net, [x], move, "divergence"), flat)
    half = products(net.bfloat16(), [x.bfloat16()], move, "divergence")
    torch.testing.assert_close(half, flat, rtol=0.05, atol=0)
    assert Curvature(flat.view(1, 1, 1, 1)).loss((0,)) > 0 and net[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("net", "batch", "says"),
    [
        (nn.Sequential(nn.Flatten(0)), torch.ones(2, 2), r"shape \(4,\) or is not finite"),
        (nn.Identity(), torch.full((2, 2), torch.inf), "not finite"),
        (nn.Linear(2, 2), torch.ones(2, 3), "does not run on a batch"),
    ],
)
def test_outputs_that_cannot_be_measured_are_refused(net, batch, says):
    with pytest.raises(ValueError, match=says):
        outputs(net, batch)
