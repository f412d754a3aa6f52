import pytest
import torch
from torch import nn

from interlayer.core.data import DataShape
from interlayer.layers.mixing.two_point import MCC, TwoPoint, modulate, point


def test_transfer_function_at_its_telling_points():
    r = torch.tensor([0.0, 0.5, -1.0, -3.0, 1.0, 1.0, 0.0, 2.0])
    c = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, -2.0, 2.0, 9.0])
    # silent without anything; 0.25 + 1; 1 - 2; 9 - 6; 3 + 2; 3 - 4: silenced; context alone; at the ceiling
    assert modulate(r, c).tolist() == [0.0, 1.25, 0.0, 3.0, 5.0, 0.0, 2.0, 6.0]
    assert point(r, c).tolist() == [0.0, 0.5, 0.0, 0.0, 2.0, 0.0, 2.0, 6.0]


def test_context_acts_more_on_a_strong_drive():
    r = torch.tensor([0.1, 1.0], requires_grad=True)
    c = torch.zeros(2, requires_grad=True)
    modulate(r, c).sum().backward()
    torch.testing.assert_close(c.grad, 1 + r.detach())
    torch.testing.assert_close(r.grad, 2 * r.detach() + 2)


def test_layer_is_its_equation():
    torch.manual_seed(0)
    layer = TwoPoint(3, 2, local=4, universal=5)
    x, near, shared = torch.randn(6, 3), torch.randn(6, 4), torch.randn(6, 5)
    r = x @ layer.drive.weight.T + layer.drive.bias
    c = near @ layer.local.weight.T + shared @ layer.universal.weight.T
    torch.testing.assert_close(layer(x, near, shared), (r**2 + 2 * r + c * (1 + r.abs())).clamp(0, 6))


def test_network_by_hand():
    torch.manual_seed(0)
    net = MCC((3, 4), units=2, outputs=5, universal=3, depth=2)
    sight, sound = torch.randn(6, 3), torch.randn(6, 4)
    (a, b), (c, d) = net.layers
    shared = net.share[0](torch.cat((sight, sound), 1))
    first = [a(sight, b.drive(sound), shared), b(sound, a.drive(sight), shared)]
    shared = shared + net.share[1](torch.cat(first, 1))
    second = [c(first[0], d.drive(first[1]), shared), d(first[1], c.drive(first[0]), shared)]
    torch.testing.assert_close(net(sight, sound), net.read(torch.cat(second, 1)))
    torch.testing.assert_close(net.units(sight, sound)[0], torch.cat(first, 1))


def test_each_sense_hears_of_the_other_only_through_context():
    torch.manual_seed(0)
    net = MCC((3, 4), units=4, outputs=2, depth=1)
    sight, sound = torch.randn(6, 3), torch.randn(6, 4)
    before = net.units(sight, sound)[0][:, :4]
    assert not torch.allclose(net.units(sight, 2 * sound)[0][:, :4], before)
    nn.init.zeros_(net.layers[0][0].local.weight)
    nn.init.zeros_(net.layers[0][0].universal.weight)
    alone = net.units(sight, sound)[0][:, :4]
    assert torch.equal(net.units(sight, 2 * sound)[0][:, :4], alone)


def test_point_twin_has_the_same_weights():
    two, one = MCC((3, 4)), MCC((3, 4), two_point=False)
    assert {n: p.shape for n, p in two.named_parameters()} == {n: p.shape for n, p in one.named_parameters()}
    one.load_state_dict(two.state_dict())
    sight, sound = torch.randn(6, 3), torch.randn(6, 4)
    assert not torch.allclose(one(sight, sound), two(sight, sound))


def test_every_weight_of_the_network_learns():
    torch.manual_seed(0)
    net = MCC((3, 4), units=16, outputs=2)
    net(torch.randn(8, 3), torch.randn(8, 4)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match=r"local \(2, 3\); expected \[..., 4\]"):
        TwoPoint(3, 2, local=4, universal=1)(torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 1))
    with pytest.raises(ValueError, match="1 senses and depth 2"):
        MCC((3,))
    with pytest.raises(ValueError, match=r"senses of \[\(2, 3\), \(2, 5\)\]; expected last sizes \[3, 4\]"):
        MCC((3, 4))(torch.randn(2, 3), torch.randn(2, 5))


def test_for_task():
    shape = DataShape("vectors", "values", classes=6, senses=(5, 4))
    assert MCC.for_task(shape, units=8)(torch.randn(2, 5), torch.randn(2, 4)).shape == (2, 6)
    with pytest.raises(ValueError, match=r"takes several vectors, not image\. Take a task such as 'audiovisual'"):
        MCC.for_task(DataShape("image", "classes", classes=2))
