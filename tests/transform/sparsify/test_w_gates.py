import copy

import families
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer.core import datasets
from interlayer.core.cost import flops
from interlayer.core.wiring import take, trace
from interlayer.models import ResNet18
from interlayer.testing.common import picture, unchanged
from interlayer.transform.sparsify.w_gates import Gate, Latency, Multiplications, WGates, ends, measured, removable


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def net(width=6):
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
    )  # fmt: skip


def batch(n=16):
    x, y = datasets.split_digits().train
    return x[:n], y[:n]


def test_gates_are_the_step_of_a_linear_score_with_the_gradient_of_an_arc_tangent():
    gate, filters = Gate(5), torch.randn(7, 5)
    nn.init.normal_(gate.score.weight)
    s = filters @ gate.score.weight[0] + gate.score.bias
    hard = torch.tensor([float(v >= 0) for v in s])
    assert 0 < hard.sum() < 7 and torch.equal(gate(filters), hard)
    weigh = torch.randn(7)
    (gate(filters) * weigh).sum().backward()
    slope = weigh / (torch.pi * (1 + s.detach() ** 2))  # d/ds (arctan(s) / pi + 1/2)
    torch.testing.assert_close(gate.score.weight.grad[0], slope @ filters)
    torch.testing.assert_close(gate.score.bias.grad, slope.sum()[None])


def test_all_gates_are_open_at_initialisation_and_one_always_stays():
    gate, filters = Gate(5), torch.randn(7, 5)
    assert gate(filters).tolist() == [1.0] * 7
    nn.init.constant_(gate.score.bias, -9.0), nn.init.normal_(gate.score.weight)
    assert gate(filters).sum() == 1 and gate(filters)[gate.score(filters)[:, 0].argmax()] == 1


def naive(model, keep, wiring, x):
    """The output with masks on the feature maps of the two convolutions."""
    for i, module in enumerate(model):
        x = module(x)
        if i in (2, 4):
            mask = torch.zeros(x.shape[1])
            mask[keep["0.weight:0" if i == 2 else "3.weight:0"]] = 1
            x = x * mask[:, None, None]
    return x


def test_what_gates_close_is_removed():
    model, (x, y) = net(), batch()
    rule = WGates(model, target=0.4, lr=1e-2, gate_lr=5e-2)
    for _ in range(16):
        told = rule.step((x, y))
    model.eval()
    seen, small, keep = picture(model), rule.result(), rule.keep()
    unchanged(seen, model, "result")
    assert told["cost"] < 0.6 and 1 <= len(keep["0.weight:0"]) < 6
    assert (small[0].out_channels, small[3].in_channels) == (len(keep["0.weight:0"]),) * 2
    torch.testing.assert_close(small(x), rule.predict(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small(x), naive(model, keep, rule.wiring, x), rtol=1e-4, atol=1e-5)
    shares = torch.tensor([len(keep[n]) / rule.wiring.groups[n].size for n in rule.found])
    assert abs(flops(small, x) / flops(model, x) - float(rule.cost(shares))) < 1e-6


def test_a_step_descends_cross_entropy_through_the_gates_and_a_hinge_on_the_cost():
    model, (x, y) = net().double(), batch()
    x = x.double()
    rule = WGates(model, target=0.5, weight=3.0, lr=0.0, gate_lr=0.0)
    told = rule.step((x, y))
    g = [torch.ones(6, dtype=torch.float64, requires_grad=True), torch.ones(8, dtype=torch.float64, requires_grad=True)]
    h = x
    for i, module in enumerate(model):
        h = module(h)
        if i in (2, 4):
            h = h * g[i // 3][:, None, None]
    loss = F.cross_entropy(h, y)
    (loss + 3 * (rule.cost(torch.stack([v.mean() for v in g]).float()) / 0.5).log()).backward()
    assert abs(told["loss"] - float(loss.detach())) < 1e-9 and abs(told["cost"] - 1) < 1e-6
    for name, v in zip(("0/weight:0", "3/weight:0"), g, strict=True):  # all scores are 0.5
        expected = v.grad.sum() / (torch.pi * 1.25)
        torch.testing.assert_close(rule.gates[name].score.bias.grad, expected[None], rtol=1e-4, atol=1e-6)


def test_layers_of_a_stream_share_gates_that_see_all_their_filters():
    model, (x, y) = ResNet18(1, 10, width=4), batch()
    rule = WGates(model, target=0.6, gate_lr=3e-2)
    for _ in range(8):
        rule.step((x, y))
    shared = max(rule.found.values(), key=lambda g: len(ends(model, g)[0]))
    assert len(ends(model, shared)[0]) > 2
    assert rule._filters(shared.name).shape[0] == shared.size
    model.eval()
    torch.testing.assert_close(rule.result()(x), rule.predict(x), rtol=1e-3, atol=1e-4)


def test_neurons_and_heads_of_a_vision_transformer():
    model, given = families.model("vit"), families.batch("vit")

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return self.net(x).logits

    wrapped, x, y = Logits(), given["pixel_values"], torch.tensor([0, 1])
    rule = WGates(wrapped, target=0.5, gate_lr=0.1)
    for _ in range(8):
        rule.step((x, y))
    assert {g.members[0].index.shape[1] for g in rule.found.values()} == {1, 8}  # neurons, and heads of 8 features
    wrapped.eval()
    torch.testing.assert_close(rule.result()(x), rule.predict(x), rtol=1e-3, atol=1e-4)


def test_multiply_adds_are_exact_for_channels_and_depthwise_convolutions():
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(64, 3)
    )  # fmt: skip
    x = torch.randn(2, 1, 8, 8)
    wiring = trace(model, x)
    names = [n for n, g in wiring.groups.items() if removable(model, g)]
    assert len(names) == 2
    cost = Multiplications(model, wiring, names, x)
    for kept in ((1, 4), (3, 2), (6, 1)):
        small = take(model, dict(zip(names, map(range, kept), strict=True)), wiring, x)
        said = cost(torch.tensor([kept[0] / 6, kept[1] / 4]))
        assert abs(float(said) * flops(model, x) / flops(small, x) - 1) < 1e-5


def test_the_latency_predictor_fits_times_and_has_gradients():
    shares = torch.cat((torch.ones(1, 3), torch.rand(40, 3)))
    times = 1e-3 * (0.2 + shares[:, 0] * shares[:, 1] + 0.5 * shares[:, 2])
    predictor = Latency(3).learn(shares[:31], times[:31], steps=200)
    said = predictor(shares[31:]).detach()
    assert (said * times[0] / times[31:] - 1).abs().max() < 0.3
    x = torch.full((3,), 0.5, requires_grad=True)
    predictor(x).backward()
    assert (x.grad > 0).all()


def test_latency_as_the_budget():
    model, (x, y) = net(), batch()
    rule = WGates(model, target=0.7, efficiency="latency", samples=4)
    rule.step((x, y))
    assert isinstance(rule.cost, Latency) and not any(p.requires_grad for p in rule.cost.parameters())
    other = WGates(copy.deepcopy(model), target=0.7, efficiency="latency", samples=4)
    other.load_state_dict(copy.deepcopy(rule.state_dict()))
    assert other.step((x, y)) == rule.step((x, y))  # nothing was timed again
    shares, times = measured(model, rule.wiring, list(rule.found), x, samples=2)
    assert shares.shape == (3, 2) and (shares[0] == 1).all() and (times > 0).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target": 1.0}, "WGates: target=1.0"),
        ({"weight": 0.0}, "weight=0.0"),
        ({"samples": 1}, "samples=1"),
        ({"efficiency": "memory"}, "WGates: efficiency was 'memory'; expected one of flops, latency"),
    ],
)
def test_wrong_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        WGates(net(), **options)


def test_networks_without_hidden_units_and_results_before_a_step_are_refused():
    with pytest.raises(ValueError, match="WGates: no batch was seen"):
        WGates(net()).result()
    with pytest.raises(ValueError, match="WGates: Sequential has no units"):
        WGates(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))).step(batch())


def test_units_behind_a_norm_over_channels_stay():
    model, x = (
        nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)),
        torch.randn(3, 4),
    )
    assert [g.size for g in trace(model, x).groups.values() if removable(model, g)] == [6]
