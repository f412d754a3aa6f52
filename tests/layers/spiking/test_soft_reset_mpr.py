"""Soft reset and rectifier: the authors' numbers, what is lost, the network, the events."""

import pytest
import torch

from interlayer.core.cost import operations
from interlayer.core.data import DataShape
from interlayer.core.datasets import digit_events
from interlayer.core.example import Example
from interlayer.core.spike import Neuron, Unrolled
from interlayer.layers.spiking.soft_reset_mpr import Rectified, SoftResetMPR, SpikingNet, rectify
from interlayer.testing import hold


def test_numbers_of_the_authors_neurons():
    """yfguo91/Re-Loss, models/spike_layer.py at commit 0937f36, on these inputs: spikes, last potentials, gradients."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3, requires_grad=True)
    layer, weight = SoftResetMPR(), torch.linspace(-1, 1.3, x.numel()).view(x.shape)
    spikes, last = layer.run(x, layer.start(2))
    assert spikes.flatten().nonzero().flatten().tolist() == [8, 14, 18, 19, 23, 29, 32, 35]
    torch.testing.assert_close(last[1], torch.tensor([-1.661533, -2.572215, 0.944217]), rtol=0, atol=2e-6)
    grad = torch.autograd.grad((spikes * weight).sum() + last.sin().sum(), x)[0]
    wanted = [[0.344931, 0.266357, 0.122250], [-0.090613, 0.352939, 0.632167], [-0.090613, 0.601786, 0.783182]]
    torch.testing.assert_close(grad[1, :3], torch.tensor(wanted), rtol=0, atol=2e-6)
    torch.testing.assert_close(grad[1, 5], torch.tensor([-0.090613, -0.842237, 0.586378]), rtol=0, atol=2e-6)


def test_numbers_of_the_authors_rectifier():
    u = torch.tensor([-7.0, -1.0, -0.1, 0.1, 0.3, 0.5, 0.8, 1.2, 8.0])
    wanted = [-1.0, -0.259921, -0.032280, 0.039493, 0.203336, 0.5, 0.895680, 1.062659, 2.0]
    torch.testing.assert_close(rectify(u), torch.tensor(wanted), rtol=0, atol=2e-6)


def test_the_rectifier_moves_every_potential_towards_its_spike_and_none_across_the_threshold():
    u = torch.linspace(-9, 9, 3001, dtype=torch.float64)
    moved, spike = rectify(u), (u > 0.5).double()
    assert bool((moved.diff() > 0).all()) and torch.equal((moved > 0.5).double(), spike)
    gap, before = (moved - spike).abs(), (u - spike).abs()
    still = torch.isin(u, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert bool((gap <= before + 1e-12).all()) and bool((gap < before)[~still & (before > 1e-9)].all())
    for x in (torch.randn(2, 9, 4), 3 * torch.randn(2, 9, 4)):
        before, after = SoftResetMPR().lost(x)
        assert after < before


def test_spikes_are_those_without_the_rectifier():
    x = torch.randn(3, 20, 7)
    for reset in ("soft", "hard"):
        assert torch.equal(SoftResetMPR(reset=reset)(x), SoftResetMPR(reset=reset, rectify=False)(x))


def test_the_gradient_is_that_of_the_clamped_rectified_potential():
    v = torch.linspace(-2, 2, 801, dtype=torch.float64, requires_grad=True)
    for sharpness in (1.0, 3.0, 7.0):
        surrogate = Rectified(sharpness)
        wanted = torch.autograd.grad(surrogate.rise(v).sum(), v)[0]
        torch.testing.assert_close(surrogate.slope(v.detach()), wanted, rtol=1e-6, atol=1e-9)


def test_a_soft_reset_loses_nothing_and_a_hard_one_what_exceeds_the_spike():
    x = torch.rand(1, 64, 200, dtype=torch.float64)
    for reset, kept in (("soft", True), ("hard", False)):
        layer = SoftResetMPR(reset=reset)
        spikes, last = layer.run(x, layer.start(1))
        lost = x.sum(1) - spikes.sum(1) - last
        assert bool((lost.abs() < 1e-9).all()) == kept


def test_a_network_of_images_vectors_and_events():
    torch.manual_seed(0)
    for shape, x in (
        (DataShape("image", "classes", classes=3, channels=1, height=8, width=8), torch.randn(4, 1, 8, 8)),
        (DataShape("vector", "classes", classes=3, features=5), torch.randn(4, 5)),
        (DataShape("series", "classes", classes=3, length=6, features=5), torch.randn(4, 6, 5).gt(0.5).float()),
    ):
        net = SpikingNet.for_task(shape, width=4, depth=2)
        assert net(x).shape == (4, 3)
        net(x).sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    found = operations(net, x)
    assert not found.multiplies  # every layer of a network of events sees spikes
    other = SpikingNet.for_task(shape, width=4, reset="hard", rectify=False)
    assert {m.hard for m in other.modules() if isinstance(m, SoftResetMPR)} == {True}
    with pytest.raises(ValueError, match="takes images, vectors or series, not tokens"):
        SpikingNet.for_task(DataShape("tokens", "classes", classes=2, vocab=5, length=3))
    with pytest.raises(ValueError, match=r"input \(4, 5\); expected \[batch, 6, 5\]"):
        net(torch.randn(4, 5))
    with pytest.raises(ValueError, match="depth 0; expected"):
        SpikingNet((5,), 2, depth=0)


@pytest.mark.parametrize(
    "contract", ["autocast", "compile", "export", "per_example", "state_dict", "deepcopy", "batch"]
)
def test_the_network_keeps_the_contracts_of_layers(contract):
    example = Example(make=lambda: SpikingNet((2, 6, 6), 3, width=4), inputs=lambda: (torch.randn(2, 2, 6, 6),))
    assert hold(contract, "layer", example) == "kept"


def test_the_network_is_its_layers_at_each_step():
    torch.manual_seed(0)
    net, x = SpikingNet((5,), 3, width=4, steps=5).eval(), torch.randn(2, 5)
    states, outs = {}, []
    for _ in range(5):
        h = x
        for i, layer in enumerate(net.network):
            if isinstance(layer, Neuron):
                h, states[i] = layer.step(h, states.get(i, layer.start(2)))
            else:
                h = layer(h)
        outs.append(h)
    torch.testing.assert_close(net(x), torch.stack(outs).mean(0))
    assert isinstance(net, Unrolled)


def test_events_are_brighter_or_darker_pixels_of_a_moving_digit():
    (x, y), (held, labels) = digit_events()
    assert x.shape == (1438, 12, 200) and held.shape == (359, 12, 200) and len(y) == 1438 and len(labels) == 359
    assert set(x.unique().tolist()) == {0.0, 1.0}
    brighter, darker = x.unflatten(2, (2, 100)).unbind(2)
    assert not bool((brighter * darker).any())
    assert 0.05 < float(x.mean()) < 0.3 and bool(
        (x.mean((0, 2)) > 0.02).all()
    )  # sparse, at every step of all three saccades
    assert float(brighter.mean()) == pytest.approx(
        float(darker.mean()), rel=0.2
    )  # the camera comes back to where it started
