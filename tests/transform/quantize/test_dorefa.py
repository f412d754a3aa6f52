import copy

import pytest
import torch
from torch import nn

from interlayer import load, save
from interlayer.core import datasets
from interlayer.core.example import Example
from interlayer.core.quantizer import BitMap, Bound, Packed
from interlayer.testing import hold
from interlayer.transform.quantize.dorefa import DoReFa, LowConv2d, LowGradient, LowLinear, inputs, low_weight, net

GRIDS = [(1, 1, 4), (1, 2, 6), (2, 3, 8), (8, 8, 32), (3, 32, 4)]


def images(size=16, seed=0):
    x, labels = datasets.digits()
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:size]
    return x[rows] / 16, labels[rows]


def trained(bits=(1, 2, 6), steps=3, **options):
    torch.manual_seed(0)
    names = dict(zip(("weights", "activations", "gradients"), bits, strict=True))
    rule = DoReFa(net(4), **names, **options)
    for i in range(steps):
        rule.step(images(32, i))
    rule.model.eval()
    return rule


def naive_weight(weight, bits):
    """The paper's equation, one weight after the other."""
    if bits == 1:
        mean = sum(abs(float(w)) for w in weight.flatten()) / weight.numel()
        return torch.tensor([mean if w > 0 else -mean for w in weight.flatten()]).view(weight.shape)
    n = 2**bits - 1
    squeezed = [float(torch.tanh(w)) for w in weight.flatten()]
    largest = max(map(abs, squeezed))
    return torch.tensor([2 * round(n * (t / (2 * largest) + 0.5)) / n - 1 for t in squeezed]).view(weight.shape)


@pytest.mark.parametrize("bits", range(1, 9))
def test_weights_equal_the_equation_and_gradients_pass_the_rounding(bits):
    torch.manual_seed(bits)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    found = low_weight(weight, bits)
    torch.testing.assert_close(found.detach(), naive_weight(weight.detach(), bits))
    assert len(found.unique()) <= 2**bits
    e = torch.randn_like(weight)
    (grad,) = torch.autograd.grad(found, weight, e)
    exact = weight if bits == 1 else weight.tanh() / weight.tanh().abs().max()
    torch.testing.assert_close(grad, torch.autograd.grad(exact, weight, e)[0] if bits > 1 else e)
    assert low_weight(torch.zeros(3), bits).isfinite().all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_activations_are_clipped_and_rounded_with_straight_gradients(bits):
    x = torch.tensor([-0.3, 0.0, 0.2, 0.55, 1.0, 7.0], requires_grad=True)
    n = 2**bits - 1
    found = inputs(bits).fake(x)
    torch.testing.assert_close(found.detach(), (x.detach().clamp(0, 1) * n).round() / n)
    found.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gradients_are_rounded_without_bias_on_the_scale_of_each_example(bits):
    torch.manual_seed(0)
    e = torch.randn(3, 2, 4) * torch.tensor([1.0, 10.0, 1e-3])[:, None, None]
    x = torch.zeros(9000, 2, 4, requires_grad=True)
    (found,) = torch.autograd.grad(LowGradient.apply(x, bits), x, e.repeat(3000, 1, 1))
    found, largest, n = found.view(3000, 3, 2, 4), e.flatten(1).abs().amax(1)[:, None, None], 2**bits - 1
    codes = (found / (2 * largest) + 0.5) * n
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    assert codes.round().min() == 0 and codes.round().max() == n
    torch.testing.assert_close(found.mean(0) / largest, e / largest, atol=0.08 / n, rtol=0)
    assert torch.autograd.grad(LowGradient.apply(x, bits), x, torch.zeros_like(x))[0].abs().max() < 1e-30


# What the authors' functions gave on these numbers: weights (1 to 3 bits) and the gradients that reach them, activations clipped
# and folded (2 bits), and the levels of gradients (2 bits).
WEIGHT = [[0.11, -0.42, 0.9], [-1.3, 0.05, 0.33]]
LOW = {
    1: [[0.5183333158, -0.5183333158, 0.5183333158], [-0.5183333158, 0.5183333158, 0.5183333158]],
    2: [[0.333333373, -0.3333333135, 1.0], [-1.0, 0.333333373, 0.333333373]],
    3: [[0.1428571939, -0.4285714030, 0.7142857313], [-1.0, 0.1428571939, 0.4285714626]],
}
REACH = {
    1: [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]],
    2: [[1.1465364695, 1.9552596807, 1.6951525211], [1.2568919659, 5.7878460884, 6.2563796043]],
}
READ = [-0.2, 0.1, 0.34, 0.61, 0.95, 1.7]
CLIPPED, FOLDED = [0, 0, 0.3333333433, 0.6666666865, 1, 1], [0.3333333433, 0, 0.3333333433, 0.6666666865, 1, 1]
ERRORS = [[0.3, -0.7, 0.11, 0.02], [-4.0, 1.5, 2.2, -0.6]]
LEVELS = [[-0.7, -0.23333, 0.23333, 0.7], [-4.0, -1.33333, 1.33333, 4.0]]


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_weights_and_their_gradients_are_the_authors(bits):
    weight = torch.tensor(WEIGHT, requires_grad=True)
    found = low_weight(weight, bits)
    torch.testing.assert_close(found.detach(), torch.tensor(LOW[bits]), atol=1e-6, rtol=0)
    found.backward(torch.arange(1.0, 7).view(2, 3))
    torch.testing.assert_close(weight.grad, torch.tensor(REACH[min(bits, 2)]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("fold", [False, True])
def test_activations_and_their_gradients_are_the_authors(fold):
    x = torch.tensor(READ, requires_grad=True)
    found = inputs(2).fake(Bound(fold=fold)(x))
    torch.testing.assert_close(found.detach(), torch.tensor(FOLDED if fold else CLIPPED), atol=1e-6, rtol=0)
    found.sum().backward()
    assert x.grad.tolist() == [-1 if fold else 0, 1, 1, 1, 1, 0]


def test_levels_of_gradients_are_the_authors():
    torch.manual_seed(0)
    x = torch.zeros(2, 4, requires_grad=True)
    draws = [torch.autograd.grad(LowGradient.apply(x, 2), x, torch.tensor(ERRORS))[0] for _ in range(300)]
    for found, expected in zip(torch.stack(draws, 1), LEVELS, strict=True):
        torch.testing.assert_close(
            found.flatten().mul(1e4).round().unique() / 1e4, torch.tensor(expected), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("bits", GRIDS)
def test_the_net_for_use_computes_by_bits_what_was_trained(bits, tmp_path):
    rule = trained(bits)
    new, (x, _) = rule.result(), images(8, 9)
    kind = BitMap if bits[1] < 32 else Packed
    assert [n for n, m in new.named_modules() if isinstance(m, kind)] == rule.layers == ["2", "6", "11"]
    assert not any(isinstance(m, LowConv2d | LowLinear) for m in new.modules())
    torch.testing.assert_close(new(x), rule.predict(x), atol=1e-4, rtol=1e-4)
    save(new, tmp_path / "there")
    again = load(tmp_path / "there", base=lambda: net(4))
    assert torch.equal(again(x), new(x))
    if bits == (1, 1, 4):
        words = {n: p for n, p in new.state_dict().items() if n.endswith("words")}
        assert sum(w.numel() for w in words.values()) == 8 * 9 + 16 * 9 + 16  # of 4, 8 and 64 channels
    for name in ("2", "6"):
        old, layer = rule.model.get_submodule(name), new.get_submodule(name)
        torch.testing.assert_close(layer.weight, low_weight(old.weight, bits[0]).detach())


def test_both_ends_and_norms_stay_in_float_and_names_stay():
    start = net(4)
    before = copy.deepcopy(start.state_dict())
    rule = DoReFa(start)
    assert {r.name: "first or last" in r.why for r in rule.skipped} == {
        "0": True, "14": True, "3": False, "7": False, "12": False,
    }  # fmt: skip
    odd = DoReFa(nn.Sequential(nn.Conv1d(1, 1, 1), *(nn.Linear(2, 2) for _ in range(3))))
    assert [r.name for r in odd.skipped if "no 2-d convolution" in r.why] == ["0"]
    assert rule.layers == ["2", "6", "11"] and rule.bounds == ["1", "5", "9", "13"]
    assert type(rule.model[0]) is nn.Conv2d and type(rule.model[-1]) is nn.Linear
    assert before.keys() == rule.model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), rule.model.state_dict().values(), strict=True))
    assert {id(p) for g in rule.optimizer.param_groups for p in g["params"]} == {id(p) for p in rule.model.parameters()}
    assert not any(isinstance(m, Bound) for m in DoReFa(net(4), activations=32).model)  # the paper's float activations
    only = DoReFa(net(4), at="6")
    assert only.layers == ["6"] and type(only.model[2]) is nn.Conv2d


def test_folding_bounds_the_size_and_not_the_value():
    x = torch.tensor([[-0.4, -3.0, 0.2]])
    for fold, expected in ((False, [0, 0, 0.2]), (True, [0.4, 1, 0.2])):
        rule = DoReFa(net(4), fold=fold)
        torch.testing.assert_close(rule.model[1](x), torch.tensor([expected]))
        assert rule.result()[1].fold is fold


def test_the_gradient_is_rounded_between_a_layer_and_what_follows():
    """What follows, such as a norm, gets exact gradients; the layer's weight gets the rounded ones, one scale for each example."""
    torch.manual_seed(0)
    layer = LowLinear(4, 5, bias=False, bits=(32, 32, 2))
    x, e, gain = (
        torch.eye(4),
        torch.randn(4, 5),
        torch.ones(5, requires_grad=True),
    )  # the weight's gradient is the errors
    out = layer(x)
    (out * gain * e).sum().backward()
    torch.testing.assert_close(gain.grad, (out * e).sum(0).detach())
    shares = layer.weight.grad.T / e.abs().amax(1, keepdim=True)
    torch.testing.assert_close(shares * 3, (shares * 3).round(), atol=1e-5, rtol=0)
    assert set((shares * 3).round().unique().tolist()) <= {-3, -1, 1, 3}


LAYER = Example(
    make=lambda: LowConv2d(3, 4, 3, padding=1, bits=(1, 2, 6)),
    inputs=lambda: (torch.rand(2, 3, 5, 5),),
    gradient="surrogate",
)


@pytest.mark.parametrize(
    "contract", ["autocast", "state_dict", "compile", "export", "trace", "deepcopy", "seed", "ddp"]
)
def test_a_layer_keeps_the_contracts_of_layers(contract):
    hold(contract, "layer", LAYER)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: DoReFa(net(4), weights=9), r"bits \(9, 2, 6\).*expected 1 to 8 each, or 32"),
        (lambda: DoReFa(net(4), gradients=0), r"bits \(1, 2, 0\)"),
        (lambda: DoReFa(net(4), weights=32, activations=32, gradients=32), "not 32 for all three"),
        (lambda: LowLinear(2, 2, bits=(1, 2, 16)), r"bits \(1, 2, 16\)"),
        (lambda: DoReFa(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))), "2 linear maps and 2-d convolutions"),
        (lambda: DoReFa(nn.Sequential(nn.LayerNorm(2))), "no layer of Sequential can be quantised"),
        (lambda: DoReFa(net(4), activations=32, fold=True), "no activation module is bounded"),
        (lambda: DoReFa(net(4), weights=32).result(), "the weights have 32 bits"),
    ],
)
def test_clear_errors(call, says):
    with pytest.raises(ValueError, match=says):
        call()
