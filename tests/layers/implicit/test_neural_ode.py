"""Neural ODEs: the equations, the authors' numbers, contracts of adaptive steps, densities, irregular series."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from interlayer.core import aside
from interlayer.core.cost import bytes_kept, parameters
from interlayer.core.data import DataShape
from interlayer.core.solve import Solver
from interlayer.layers.implicit.neural_ode import CNF, EXAMPLE, ConvField, DenseField, LatentODE, NeuralODE, ODENet
from interlayer.layers.implicit.neural_ode.flow import PlanarField
from interlayer.testing import hold

FIXED = Solver(steps=8)


@torch.no_grad()
def filled(module):
    """Known weights in double precision."""
    module.double()
    for i, p in enumerate(module.parameters()):
        p.copy_((torch.sin(torch.arange(p.numel(), dtype=p.dtype) * 0.7 + i) / 2).view(p.shape))
    return module


def test_many_midpoint_steps_are_the_equation():
    block, x = NeuralODE(filled(DenseField(3)), solver=Solver(tolerance=1e-8)), torch.randn(2, 3, dtype=torch.double)
    h, f, n = x, block.field, 400
    with torch.no_grad():
        for i in range(n):
            t = torch.full((2, 1), (i + 0.5) / n, dtype=torch.double)
            half = h + f.second(torch.tanh(f.first(torch.cat((h, t - 0.5 / n), 1)))) / (2 * n)
            h = h + f.second(torch.tanh(f.first(torch.cat((half, t), 1)))) / n
    torch.testing.assert_close(block(x), h, rtol=1e-5, atol=1e-5)


def test_the_way_back_in_time_gives_the_input():
    field, x = filled(DenseField(3)), torch.randn(2, 3, dtype=torch.double)
    there = NeuralODE(field, solver=Solver(steps=16))
    back = NeuralODE(field, times=(1.0, 0.0), solver=Solver(steps=16))
    torch.testing.assert_close(back(there(x)), x, rtol=1e-6, atol=1e-6)


def test_numbers_of_the_authors_image_block():
    """torchdiffeq's examples/odenet_mnist.py at commit 657943a (ODEfunc, adjoint, dopri5 at 1e-8): outputs and gradients."""
    block = NeuralODE(filled(ConvField(4)), solver=Solver(tolerance=1e-6))
    x = torch.sin(torch.arange(72, dtype=torch.double) * 0.3).view(2, 4, 3, 3).requires_grad_()
    y = block(x)
    dx, dw = torch.autograd.grad(y.square().sum(), [x, block.field.norms[1].weight])
    wanted = [
        -0.56093931,
        -0.08581755,
        0.16486034,
        -0.28765924,
        -0.07522725,
        0.30939919,
        0.92521647,
        0.95147908,
        0.42907275,
    ]
    grads = [0.78527178, 1.42018965, 1.94711551, 2.06117651, 2.41765941, 2.7009468, 2.82068929, 2.66857337, 2.13330222]
    torch.testing.assert_close(y[0, 0].flatten(), torch.tensor(wanted, dtype=y.dtype), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dx[1, 3].flatten(), torch.tensor(grads, dtype=y.dtype), rtol=2e-3, atol=2e-3)
    weights = [1.24454979, 0.99859433, 0.0, 0.46180111]
    torch.testing.assert_close(dw, torch.tensor(weights, dtype=y.dtype), rtol=4e-3, atol=2e-3)


def test_the_authors_net_has_as_many_parameters():
    """208266, with a stem of 64 channels; the residual one with six blocks has 576778."""
    net = ODENet(1, 10, solver=FIXED)
    assert parameters(net) == 208266 and net(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    small = ODENet.for_task(DataShape("image", "classes", classes=7, channels=2, height=8, width=8), tolerance=0.1)
    assert small(torch.zeros(2, 2, 8, 8)).shape == (2, 7) and small.block.solver == Solver(tolerance=0.1)


ADAPTIVE = dataclasses.replace(
    EXAMPLE,
    make=lambda: NeuralODE(DenseField(4), times=(0.0, 2.0), solver=Solver(tolerance=1e-3)),
    inputs=lambda: (20 * torch.rand(()) * torch.randn(3, 4),),
    control="data",
    batch="coupled",
    modes={},
)
TIGHT = dataclasses.replace(
    EXAMPLE, make=lambda: NeuralODE(DenseField(4), solver=Solver(tolerance=1e-9)), modes={},
    twin=lambda m: NeuralODE(m.field, solver=Solver(tolerance=1e-9, adjoint=False)),
)  # fmt: skip


@pytest.mark.parametrize("contract", ["compile", "export", "odd", "state_dict", "batch", "wrong"])
def test_contracts_of_adaptive_steps(contract):
    assert hold(contract, "layer", ADAPTIVE) == "kept"


def test_the_adjoint_gradient_of_adaptive_steps_is_that_through_the_solver():
    assert hold("gradient", "layer", TIGHT) == "kept"


def test_memory_is_flat_in_the_steps_and_evaluations_grow_with_precision():
    torch.manual_seed(0)
    field, x = DenseField(8), torch.randn(4, 8, requires_grad=True)
    kept = [bytes_kept(field, lambda n=n: NeuralODE(field, solver=Solver(steps=n))(x)) for n in (2, 32)]
    assert kept[0] == kept[1]
    counts = []
    for tolerance in (1e-2, 1e-4, 1e-6):
        with aside.collect() as told, torch.no_grad():
            NeuralODE(field, times=(0.0, 10.0), solver=Solver(tolerance=tolerance))(x)
        counts.append(told.means()["evaluations"])
    assert counts[0] < counts[1] < counts[2]


def test_errors():
    with pytest.raises(ValueError, match=r"times \(1.0, 1.0\); expected two different ones"):
        NeuralODE(DenseField(2), times=(1.0, 1.0))
    for layer, x, match in (
        (NeuralODE(DenseField(2), solver=FIXED), torch.zeros(2, 3), r"DenseField: state \(2, 3\); expected \[..., 2\]"),
        (
            NeuralODE(ConvField(2), solver=FIXED),
            torch.zeros(2, 3, 4, 4),
            r"ConvField: state .*; expected \[batch, 2, height",
        ),
        (
            ODENet(solver=FIXED),
            torch.zeros(2, 1, 3, 3),
            r"ODENet: image .*; expected \[batch, 1, height, width\] of at least 4",
        ),
        (CNF(2, solver=FIXED), torch.zeros(2, 3), r"CNF: points \(2, 3\); expected \[batch, 2\]"),
    ):
        with pytest.raises(ValueError, match=match):
            layer(x)
    with pytest.raises(ValueError, match="trace 'approximate'; expected"):
        CNF(2, trace="approximate")
    model, x = LatentODE(2, solver=FIXED), torch.zeros(2, 3, 2)
    with pytest.raises(ValueError, match=r"series \(2, 3, 2\) at times \(2, 4\)"):
        model(x, torch.zeros(2, 4), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="time -1; expected times from 0 on"):
        model(x, torch.zeros(2, 3), torch.full((2, 1), -1.0))


def test_numbers_of_the_authors_flow():
    """torchdiffeq's examples/cnf.py at commit 657943a (width 3, hidden 5; adjoint at 1e-9): z, change of log p, a gradient."""
    flow = CNF(2, field=filled(PlanarField(2, units=3, hidden=5)), solver=Solver(steps=8))
    x = torch.cos(torch.arange(8, dtype=torch.double) * 0.9).view(4, 2)
    z, change = flow.to_normal(x)
    wanted = [0.96866757, 0.66585001, -0.37077576, -0.9642115, -0.9085641, -0.22134114, 0.6702984, 1.07562519]
    torch.testing.assert_close(z.flatten(), torch.tensor(wanted, dtype=z.dtype), rtol=1e-6, atol=1e-7)
    wanted = [-0.0204532, 0.02161721, 0.0044215, -0.00817139]
    torch.testing.assert_close(change, torch.tensor(wanted, dtype=z.dtype), rtol=1e-5, atol=1e-7)
    (grad,) = torch.autograd.grad(z.square().sum() + change.sum(), [flow.flow.field.write[0].bias])
    wanted = [0.00208752, -0.04625689, -0.07636327, -0.08899797, -0.03793606]
    torch.testing.assert_close(grad, torch.tensor(wanted, dtype=z.dtype), rtol=1e-4, atol=1e-7)


def test_the_density_is_the_jacobians_determinant_and_sums_to_one():
    torch.manual_seed(0)
    flow = CNF(2, field=DenseField(2, hidden=16), solver=Solver(steps=6)).double()
    with torch.no_grad():
        flow.flow.field.second.weight.mul_(3)
    x = torch.randn(3, 2, dtype=torch.double)
    change = flow.to_normal(x)[1]
    jacobians = [torch.autograd.functional.jacobian(lambda p: flow.to_normal(p.unsqueeze(0))[0][0], p) for p in x]
    torch.testing.assert_close(-change, torch.stack([j.det().abs().log() for j in jacobians]), rtol=1e-5, atol=1e-6)
    side = torch.linspace(-9, 9, 61, dtype=torch.double)
    with torch.no_grad():
        total = flow(torch.cartesian_prod(side, side)).exp().sum() * (side[1] - side[0]) ** 2
        points = flow.sample(4000)
        mean = (flow(torch.cartesian_prod(side, side)).exp().unsqueeze(1) * torch.cartesian_prod(side, side)).sum(
            0
        ) * 0.09
    assert total.item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(points.mean(0), mean, rtol=0, atol=0.1)


def test_hutchinsons_trace_is_right_on_average():
    torch.manual_seed(0)
    field, x = DenseField(3, hidden=8).double(), torch.randn(1, 3, dtype=torch.double)
    exact = CNF(3, field=field, solver=Solver(steps=2))(x)
    found = CNF(3, field=field, trace="hutchinson", solver=Solver(steps=2))(x.expand(4000, -1))
    assert found.std() > 0.01
    assert abs(found.mean() - exact).item() < 4 * found.std().item() / 4000**0.5


def test_a_flow_compiles_with_gradients_through_its_steps():
    torch.manual_seed(0)
    field, x = DenseField(2, hidden=4), torch.randn(3, 2)
    flow = CNF(2, field=field, solver=Solver(steps=1, method="euler", adjoint=False))
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager", dynamic=False)
    found = [torch.autograd.grad(f(x).sum(), list(flow.parameters())) for f in (flow, compiled)]
    torch.testing.assert_close(*found)
    with torch.autocast("cpu", torch.bfloat16):
        low = flow(x)
    torch.testing.assert_close(low, flow(x), rtol=0.02, atol=0.02)


def test_numbers_of_the_authors_latent_model():
    """torchdiffeq's examples/latent_ode.py at commit 657943a: its RNN, slope, decoder, likelihood and divergence; no gaps there."""
    model = filled(LatentODE(2, latent=3, hidden=5, memory=4, solver=Solver(tolerance=1e-8)))
    with torch.no_grad():
        model.reader.weight_ih_l0[:, 2] = 0
    x = torch.sin(torch.arange(20, dtype=torch.double) * 0.4).view(2, 5, 2)
    times = torch.tensor([[0.0, 0.2, 0.5, 0.9, 1.4]], dtype=torch.double).expand(2, -1)
    mean, log_variance = model.encode(x, times)
    wanted = [[-0.42916125, -0.53240426, 0.49239187], [-0.24713605, -0.62461271, 0.48412841]]
    torch.testing.assert_close(mean, torch.tensor(wanted, dtype=x.dtype), rtol=1e-6, atol=1e-7)
    wanted = [[-0.19652396, 1.12234386, -0.21389303], [-0.08874347, 0.92750095, 0.04549717]]
    torch.testing.assert_close(log_variance, torch.tensor(wanted, dtype=x.dtype), rtol=1e-6, atol=1e-7)
    predicted = model(x, times, times[:, [1, 4]]).flatten()
    wanted = [0.55943422, -0.02613261, 0.60572885, -0.00116511, 0.56499922, -0.03362396, 0.58860931, 0.00752886]
    torch.testing.assert_close(predicted, torch.tensor(wanted, dtype=x.dtype), rtol=1e-5, atol=1e-6)
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", torch.zeros_like)  # the initial state at its mean, as in the figures
        bound = model.elbo(x, times)
    torch.testing.assert_close(bound, torch.tensor([-16.22404128, -45.79849745], dtype=x.dtype), rtol=1e-5, atol=1e-5)


def test_each_series_has_its_own_times_and_length():
    torch.manual_seed(0)
    model = LatentODE(2, solver=Solver(tolerance=1e-9, adjoint=False)).double()
    x, times = torch.randn(3, 6, 2, dtype=torch.double), torch.rand(3, 6, dtype=torch.double).sort(1).values
    wanted = 3 * torch.rand(3, 4, dtype=torch.double)
    lengths = torch.tensor([6, 2, 4])
    whole = model(x, times, wanted, lengths)
    for i, n in enumerate(lengths):
        alone = model(x[i : i + 1, :n], times[i : i + 1, :n], wanted[i : i + 1])
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-6, atol=1e-6)
    torch.manual_seed(1)
    bound = model.elbo(x, times, lengths)
    torch.manual_seed(1)
    changed = model.elbo(torch.where(torch.arange(6)[:, None] < lengths[:, None, None], x, 9.0), times, lengths)
    torch.testing.assert_close(bound, changed)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(bound.sum(), list(model.parameters())))
    zero = model(x, times, torch.zeros(3, 2, dtype=torch.double), lengths)
    torch.testing.assert_close(zero[:, 0], model.decode(model.encode(x, times, lengths)[0]))


def test_any_module_of_time_and_state_is_a_field():
    class Turn(nn.Module):
        def forward(self, t, h):
            return torch.stack((-h[:, 1], h[:, 0]), 1)

    turned = NeuralODE(Turn(), times=(0.0, math.pi / 2), solver=Solver(steps=20))(torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(turned, torch.tensor([[0.0, 1.0]]), rtol=0, atol=1e-5)
