import pytest
import torch
from torch import nn

from interlayer.core.paths import barrier, blend, estimate_statistics, interpolate, layers, mean_loss


def mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(*widths[:2]), nn.ReLU(), nn.Linear(*widths[1:]))


def test_interpolation_ends_middle_and_barrier():
    a, b = mlp(4, 6, 3, seed=0), mlp(4, 6, 3, seed=1)
    x = torch.randn(10, 4)
    assert torch.allclose(interpolate(a, b, 0.0)(x), a(x)) and torch.allclose(interpolate(a, b, 1.0)(x), b(x))
    assert torch.allclose(interpolate(a, b, 0.25)[0].bias, 0.75 * a[0].bias + 0.25 * b[0].bias)

    def parabola(model):  # of the weight of b
        w = (model[0].bias - a[0].bias).norm() / (b[0].bias - a[0].bias).norm()
        return 1 - (2 * w.item() - 1) ** 2

    assert barrier(a, b, parabola, points=11) == pytest.approx(1.0, abs=1e-5)
    assert barrier(a, b, lambda m: -parabola(m)) == pytest.approx(0.0, abs=1e-5)


def test_batch_statistics_are_those_of_the_data():
    model = nn.Sequential(nn.BatchNorm1d(3))
    data = [torch.randn(50, 3) * 2 + 1 for _ in range(4)]
    estimate_statistics(model.eval(), data)
    assert torch.allclose(model[0].running_mean, torch.cat(data).mean(0), atol=1e-5)
    assert torch.allclose(model[0].running_var, torch.stack([d.var(0) for d in data]).mean(0), atol=1e-5)
    assert not model.training and model[0].momentum == 0.1


def test_barrier_subtracts_the_mean_of_both_ends():
    a, b = (nn.Linear(1, 1, bias=False) for _ in range(2))
    with torch.no_grad():
        a.weight.fill_(0.0), b.weight.fill_(1.0)
    assert barrier(a, b, lambda m: 1 + 4 * m.weight.item()) == pytest.approx(2.0)
    assert barrier(b, a, lambda m: 1 + 4 * m.weight.item()) == pytest.approx(2.0)
    bump = barrier(a, b, lambda m: m.weight.item() + 10 * (0.4 < m.weight.item() < 0.6), points=3)
    assert bump == pytest.approx(0.5 + 10 - 0.5)


def test_a_blend_is_the_weighted_mean_and_keeps_integers():
    nets = [nn.BatchNorm1d(2) for _ in range(3)]
    for n, net in enumerate(nets):
        net.weight.data.fill_(10.0**n)
        net.num_batches_tracked.fill_(n + 5)
    out = blend(nets[1], [net.state_dict() for net in nets], (0.5, 0.25, 0.25))
    assert out.weight.tolist() == [28.0, 28.0] and out.num_batches_tracked == 6
    assert nets[1].weight.tolist() == [10.0, 10.0]
    with pytest.raises(ValueError, match="3 states and 2 weights; expected one weight for each"):
        blend(nets[0], [net.state_dict() for net in nets], (0.5, 0.5))


def test_a_blend_of_some_tensors_leaves_the_others_alone():
    a, b = mlp(4, 6, 3, seed=0), mlp(4, 6, 3, seed=1)
    out = blend(a, (a.state_dict(), b.state_dict()), (0.5, 0.5), names=layers(a)["2"])
    assert torch.equal(out[0].weight, a[0].weight) and torch.allclose(out[2].bias, (a[2].bias + b[2].bias) / 2)
    with pytest.raises(ValueError, match=r"no tensor '7.weight' in Sequential"):
        blend(a, (a.state_dict(),), (1.0,), names=["7.weight"])


def test_a_mean_loss_weighs_batches_by_their_examples():
    model, y = nn.Sequential(nn.Dropout(), nn.Flatten()).train(), torch.zeros(5, 1)
    batches = [(torch.full((2, 1), 1.0), y[:2]), (torch.full((3, 1), 2.0), y[:3])]
    assert mean_loss(model, batches, nn.functional.mse_loss) == pytest.approx((2 * 1 + 3 * 4) / 5) and model.training
    with pytest.raises(ValueError, match="a batch of type Tensor without targets"):
        mean_loss(model, y, nn.functional.mse_loss)
