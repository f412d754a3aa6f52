import pytest
import torch
from torch import nn

from interlayer import replace
from interlayer.layers.activation.helu import HeLU


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_value_is_relus_and_gradient_has_its_own_threshold(dtype):
    x = torch.tensor([-3.0, -0.25, -0.125, -0.0, 0.0, 0.5, 7.0], dtype=dtype, requires_grad=True)
    y = HeLU(0.25)(x)
    assert torch.equal(y, torch.relu(x))
    (slope,) = torch.autograd.grad(y, x, torch.full_like(y, 3.0))
    assert slope.tolist() == [0, 0, 3, 3, 3, 3, 3]  # at -alpha itself it is 0


def test_without_hysteresis_only_zero_itself_differs_from_relu():
    x = torch.linspace(-1, 1, 101, requires_grad=True)
    (a,), (b,) = (torch.autograd.grad(f(x).sum(), x) for f in (HeLU(0.0), torch.relu))
    assert torch.equal(a, b)


def test_dead_units_close_to_zero_come_back():
    torch.manual_seed(0)
    x, y = torch.rand(64, 4), torch.rand(64, 1) + 1
    alive = {}
    for name, act in (("relu", nn.ReLU()), ("helu", HeLU(0.5))):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(4, 16), act, nn.Linear(16, 1))
        nn.init.uniform_(net[0].weight, -0.01, 0.0)  # every unit is off for every input
        nn.init.zeros_(net[0].bias)
        nn.init.constant_(net[2].weight, 0.1)
        optimiser = torch.optim.SGD(net.parameters(), 0.05)
        for _ in range(50):
            optimiser.zero_grad()
            (net(x) - y).square().mean().backward()
            optimiser.step()
        alive[name] = int((net[:2](x) > 0).any(0).sum())
    assert alive == {"relu": 0, "helu": 16}


def test_inference_is_relu_and_nothing_is_hidden():
    x = torch.tensor([float("nan"), float("inf"), -float("inf")])
    with torch.no_grad():
        assert torch.equal(HeLU()(x).isnan(), torch.tensor([True, False, False]))
    assert HeLU()(x.requires_grad_()).isnan().tolist() == [True, False, False]
    assert HeLU()(torch.ones(2)).requires_grad is False


def test_it_takes_relus_place_in_any_model():
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    new = replace(net, at=nn.ReLU, with_="helu(alpha=0.2)").apply()
    assert new[1].alpha == 0.2
    x = torch.randn(4, 3)
    assert torch.equal(new(x), net(x))


def test_negative_alpha_is_refused():
    with pytest.raises(ValueError, match=r"alpha -0.1 is negative"):
        HeLU(-0.1)
