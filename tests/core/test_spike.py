"""Spiking neurons: the fast form equals the equations, whatever the reset, the surrogate and the precision."""

import itertools
import warnings

import pytest
import torch
from torch import nn

from interlayer.core import aside
from interlayer.core.cost import bytes_kept, operations
from interlayer.core.spike import LIF, Atan, Clamp, Neuron, Sigmoid, Surrogate, Unrolled, sequence

SURROGATES = (Atan(), Atan(0.3), Clamp(), Clamp(2.5), Sigmoid(), Sigmoid(0.5))


@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
def test_a_slope_is_the_derivative_of_its_rise_which_goes_from_0_to_1(surrogate):
    v = torch.linspace(-3, 3, 402, dtype=torch.float64, requires_grad=True)
    rise = surrogate.rise(v)
    torch.testing.assert_close(surrogate.slope(v.detach()), torch.autograd.grad(rise.sum(), v)[0])
    rise = rise.detach()
    assert bool((rise.diff() >= 0).all()) and 0 <= float(rise.min()) < 0.5 < float(rise.max()) <= 1
    assert surrogate.slope(torch.zeros(())).item() == pytest.approx(surrogate.sharpness)
    torch.testing.assert_close(surrogate.spike(v), (v > 0).double(), rtol=0, atol=0)


def gradients(run, x, state):
    x, state = x.clone().requires_grad_(), state.clone().requires_grad_()
    spikes, last = run(x, state)
    weight = torch.linspace(-1, 1.3, spikes.numel(), dtype=x.dtype).view(x.shape)
    return spikes.detach(), last.detach(), torch.autograd.grad((spikes * weight).sum() + last.sin().sum(), (x, state))


@pytest.mark.parametrize(
    ("reset", "detach", "surrogate"), list(itertools.product(("soft", "hard"), (False, True), (Atan(), Clamp())))
)
def test_the_fast_form_has_values_and_gradients_of_the_equations(reset, detach, surrogate, monkeypatch):
    torch.manual_seed(0)
    neurons = LIF(
        decay=0.8, threshold=0.7, reset=reset, drop=0.9 if reset == "soft" else None, surrogate=surrogate, detach=detach
    )
    for length, shape, at_once in ((1, (3,), 1), (7, (2, 3), 1), (13, (4,), 24), (13, (), 1 << 16)):
        monkeypatch.setattr(sequence, "AT_ONCE", at_once)
        x, state = 1.5 * torch.randn(2, length, *shape).double(), torch.randn(2, *shape).double()
        wanted = gradients(lambda *given: Neuron.run(neurons, *given), x, state)
        found = gradients(neurons.run, x, state)
        assert 0 < float(found[0].mean()) < 1 or length == 1
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            neurons.run(x.float(), state.float()), Neuron.run(neurons, x.float(), state.float()), rtol=0, atol=0
        )


def test_the_equations_by_hand():
    x = torch.tensor([[[1.5], [0.25], [2.25], [0.0]]])
    soft, hard = LIF(decay=0.5), LIF(decay=0.5, reset="hard")
    spikes, potentials, last = soft.trace(x, soft.start(1))
    assert spikes.flatten().tolist() == [1, 0, 1, 0]
    assert potentials.flatten().tolist() == [1.5, 0.5, 2.5, 0.75] and last.item() == 0.75
    spikes, potentials, last = hard.trace(x, hard.start(1))
    assert spikes.flatten().tolist() == [1, 0, 1, 0]
    assert potentials.flatten().tolist() == [1.5, 0.25, 2.375, 0.0] and last.item() == 0


def test_a_gradient_through_the_potentials():
    x, neurons = torch.randn(2, 5, 3, dtype=torch.double, requires_grad=True), LIF(decay=1.0, surrogate=Clamp())
    _, potentials, _ = neurons.trace(x, neurons.start(2))
    found = torch.autograd.grad(potentials.square().sum(), x)[0]
    state, total = torch.zeros(2, 3, dtype=torch.double), 0.0
    for each in x.unbind(1):
        u = neurons.charge(each, state)
        total, state = total + u.square().sum(), neurons.discharge(u, neurons.fire(u))
    torch.testing.assert_close(found, torch.autograd.grad(total, x)[0])


def test_a_sequence_in_parts_goes_on_from_the_state():
    neurons, x = LIF(decay=0.9), torch.randn(3, 9, 4)
    whole, last = neurons.run(x, neurons.start(3))
    first, state = neurons.run(x[:, :4], neurons.start(3))
    second, end = neurons.run(x[:, 4:], state)
    assert torch.equal(torch.cat((first, second), 1), whole) and torch.equal(end, last)


def test_potentials_stay_in_single_precision():
    neurons, x = (
        LIF(decay=1.0),
        torch.full((1, 400, 2), 0.0078125, dtype=torch.bfloat16),
    )  # 1 / 128, lost beside 1 in bfloat16
    spikes, state = neurons.run(x, neurons.start(1))
    assert spikes.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert spikes.sum() == 6  # every 129 + 128 + 128 steps
    x.requires_grad_()
    neurons(x).float().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and bool(x.grad.isfinite().all())


def test_the_backward_pass_keeps_spikes_and_potentials_alone():
    neurons, x = LIF(), torch.randn(2, 50, 30, requires_grad=True)
    assert bytes_kept(neurons, lambda: neurons(x)) == 2 * x.numel() * 4


def test_compiled_in_one_graph_over_many_steps():
    neurons, x = nn.Sequential(nn.Linear(4, 5), LIF()), torch.randn(2, 200, 4)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler
        compiled = torch.compile(neurons, fullgraph=True, backend="aot_eager")
        compiled(x)
    grads = [torch.autograd.grad(run(x).square().sum(), neurons[0].weight)[0] for run in (neurons, compiled)]
    torch.testing.assert_close(*grads)


def test_an_unrolled_network_is_the_network_at_each_step():
    torch.manual_seed(0)
    neurons, a, b = LIF(steps=6), nn.Linear(4, 8), nn.Linear(8, 3)
    net, x = Unrolled(nn.Sequential(a, neurons, b), 6), 2 * torch.randn(5, 4)
    state, outs = neurons.start(5), []
    for _ in range(6):
        spike, state = neurons.step(a(x), state)
        outs.append(b(spike))
    torch.testing.assert_close(net(x), torch.stack(outs).mean(0))
    events = Unrolled(net.network, 6, static=False)
    torch.testing.assert_close(events(x.unsqueeze(1).expand(-1, 6, -1)), net(x))


def test_the_firing_rate_is_reported():
    neurons, x = LIF(decay=0.0), torch.tensor([[[2.0, 0.0]], [[2.0, 3.0]]])
    with aside.collect() as told:
        neurons(x)
    assert told.means() == {"firing rate": 0.75}


def test_operations_are_counted_by_the_spikes_that_there_are():
    linear, spikes = nn.Linear(6, 4), (torch.rand(3, 5, 6) < 0.3).float()
    assert operations(linear, spikes) == operations(linear, spikes[:, :, None].squeeze(2))
    assert operations(linear, spikes).accumulates == 4 * spikes.sum()
    assert operations(linear, spikes + 0.5).multiplies == 3 * 5 * 6 * 4
    image = torch.zeros(1, 2, 4, 4)
    image[0, 0, 0, 0] = image[0, 1, 2, 2] = 1  # a corner is seen by 4 positions of a 3x3 filter, an inner pixel by 9
    assert operations(nn.Conv2d(2, 5, 3, padding=1), image).accumulates == (4 + 9) * 5
    assert operations(nn.Conv2d(2, 4, 3, padding=1, groups=2), image).accumulates == (4 + 9) * 2

    class Scores(nn.Module):
        def forward(self, a, b):
            return a @ b

    a, b = torch.tensor([[[1.0, 0.0, 1.0]]]), torch.tensor([[[1.0], [1.0], [0.0]]])
    assert operations(Scores(), a, b).accumulates == 1
    found = operations(nn.Sequential(nn.Linear(6, 4), LIF(), nn.Linear(4, 2)), torch.randn(2, 7, 6))
    assert found.multiplies == 2 * 7 * 6 * 4 and found.accumulates <= 2 * 7 * 4 * 2
    assert found.picojoules == pytest.approx(4.6 * found.multiplies + 0.9 * found.accumulates)


def test_clear_errors():
    with pytest.raises(ValueError, match=r"decay 1\.5; expected 0 to 1"):
        LIF(decay=1.5)
    with pytest.raises(ValueError, match="reset 'none'; expected 'soft' or 'hard'"):
        LIF(reset="none")
    with pytest.raises(ValueError, match=r"drop 0\.5 with a hard reset"):
        LIF(reset="hard", drop=0.5)
    with pytest.raises(ValueError, match=r"steps 0; expected at least 1"):
        LIF(steps=0)
    with pytest.raises(ValueError, match=r"sharpness -1\.0; expected a positive number"):
        Atan(-1.0)
    with pytest.raises(ValueError, match=r"a batch that is a multiple of 4 steps"):
        LIF(steps=4)(torch.zeros(6, 3))
    with pytest.raises(ValueError, match=r"input \(2, 0, 3\); expected \[batch, time, ...\] with a step"):
        LIF().run(torch.zeros(2, 0, 3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"a state of \(2, 4\) for inputs \(2, 3\)"):
        LIF().run(torch.zeros(2, 5, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"neurons with steps \['3'\] in a network of 4 steps"):
        Unrolled(nn.Sequential(nn.Linear(2, 2), LIF(steps=3)), 4)
    with pytest.raises(TypeError, match="fire of its own, which the fast form of LIF would not use"):
        type("Noisy", (LIF,), {"fire": LIF.fire})
    with pytest.raises(ValueError, match=r"expected \[batch, 4 steps, ...\]"):
        Unrolled(LIF(steps=4), 4, static=False)(torch.zeros(2, 3, 5))


def test_surrogates_of_ones_own_are_known_by_name():
    class Tent(Surrogate):
        def rise(self, v):
            w = v.clamp(-1, 1)
            return 0.5 + w - 0.5 * w * w.abs()

        def slope(self, v):
            return (1 - v.abs()).clamp(min=0)

    neurons, x = LIF(surrogate=Tent()), torch.randn(2, 5, 3)
    found, wanted = (
        gradients(run, x, torch.zeros(2, 3)) for run in (neurons.run, lambda *given: Neuron.run(neurons, *given))
    )
    torch.testing.assert_close(found, wanted)
