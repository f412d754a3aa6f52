"""Small temperature: the sparse-noisy softmax, the schedule, the entropy scheme, and DARTS below them."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer.core import datasets
from interlayer.core.schedule import progress
from interlayer.core.search import CellNet, Supernet, held_out
from interlayer.learn.search import DARTS
from interlayer.learn.search.small_temp import (
    SmallTemp,
    entropy,
    exponential,
    sparse_noisy_softmax,
    temperature_of,
)


def supernet(**options):
    return Supernet(
        1,
        10,
        **{"width": 2, "layers": 1, "nodes": 1, "operations": ["none", "skip_connect", "sep_conv_3x3"], **options},
    )


def batch(size=24):
    x, y = datasets.split_digits().train
    return x[:size], y[:size]


def gumbel(*shape):
    return -torch.empty(*shape, dtype=torch.float64).exponential_().log()


def test_the_softmax_becomes_one_hot_as_the_temperature_falls():
    torch.manual_seed(0)
    logits, noise = torch.randn(50, 5, dtype=torch.float64), gumbel(50, 5)
    top = F.one_hot((logits + noise).argmax(-1), 5).double()
    errors = [float((sparse_noisy_softmax(logits, t, noise) - top).abs().max()) for t in (1, 0.1, 1e-2, 1e-4)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.5 and errors[-1] < 1e-9
    # Every wrong operation is below exp(-gap / T), gap the distance of the two largest.
    best = (logits + noise).topk(2).values
    bound = (-(best[:, 0] - best[:, 1]) / 0.1).exp()
    assert bool((1 - sparse_noisy_softmax(logits, 0.1, noise).amax(-1) <= 4 * bound).all())


def test_noise_keeps_the_gradient_that_saturation_takes_away():
    """Two operations, one logit ahead by 1, T = 0.01: p (1 - p) / T without noise, the slope of a sigmoid with it."""
    torch.manual_seed(0)
    temperature, ahead = 0.01, torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def mean(noise):
        logits = torch.stack((ahead, torch.zeros_like(ahead)))
        return sparse_noisy_softmax(logits, temperature, noise)[..., 0].mean()

    still = torch.autograd.grad(mean(0.0), ahead)[0]
    p = torch.tensor(1 / temperature, dtype=torch.float64).sigmoid()
    torch.testing.assert_close(still, p * (1 - p) / temperature, rtol=1e-3, atol=0)
    assert still < 1e-40
    noise = gumbel(400_000, 2)
    slope = torch.autograd.grad(mean(noise), ahead)[0]
    wanted = ahead.detach().sigmoid() * (1 - ahead.detach().sigmoid())
    assert abs(slope - wanted) < 0.02 * wanted  # 2 standard errors are 0.014
    chosen = ((ahead.detach() + noise[:, 0]) > noise[:, 1]).double().mean()
    assert abs(chosen - ahead.detach().sigmoid()) < 0.003


def test_the_schedule_falls_by_one_factor_in_equal_parts():
    values = [exponential(i / 10, 1.0, 0.02) for i in range(11)]
    ratios = [b / a for a, b in itertools.pairwise(values)]
    assert values[0] == 1.0 and math.isclose(values[-1], 0.02) and max(ratios) - min(ratios) < 1e-12
    torch.testing.assert_close(torch.tensor(ratios), torch.full((10,), 0.02**0.1))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("target", [0.9, 0.3, 0.02])
def test_the_adaptive_temperature_gives_the_entropy(scale, target):
    torch.manual_seed(0)
    logits = [scale * torch.randn(14, 8), scale * torch.randn(5, 8)]
    temperature = temperature_of(target, logits)
    naive = [
        -sum(float(p) * math.log(float(p)) for p in row if p > 0) / math.log(8)
        for a in logits
        for row in sparse_noisy_softmax(a, temperature)
    ]
    assert abs(sum(naive) / 19 - target) < 1e-4
    torch.testing.assert_close(temperature_of(target, [10 * a for a in logits]), 10 * temperature, rtol=1e-3, atol=0)


def test_tied_logits_keep_a_finite_mixture():
    tied = [torch.zeros(3, 4)]
    assert torch.equal(sparse_noisy_softmax(tied[0], temperature_of(0.1, tied)), torch.full((3, 4), 0.25))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_rule_follows_the_share_of_the_search(share):
    net = supernet()
    rule, warm = SmallTemp(net, end=0.1), SmallTemp(net, adaptive=False, start=2.0, end=0.5)
    progress(net, share)
    for noisy in (False, True):
        assert abs(float(entropy(list(rule.mix(noisy).values())).detach()) - 0.1**share) < 1e-3
    logits = net.architecture["normal"]
    torch.testing.assert_close(warm.mix()["normal"], (logits / (2.0 * 0.25**share)).softmax(-1))
    torch.testing.assert_close(
        warm.mix(noisy=True)["normal"], ((logits + warm.drawn["normal"]) / (2.0 * 0.25**share)).softmax(-1)
    )


def test_at_temperature_one_without_noise_it_is_darts():
    models = []
    for make in (DARTS, lambda net: SmallTemp(net, adaptive=False, start=1.0, end=1.0, noise=0.0)):
        torch.manual_seed(0)
        rule = make(supernet())
        for _ in range(3):
            rule.step(batch())
        models.append(rule.model.state_dict())
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name


@pytest.mark.parametrize("make", [DARTS, SmallTemp])
def test_weights_and_logits_learn_from_their_own_halves(make):
    """A plain reading of one step: Adam on the held-out half, then SGD on the other."""
    rule, x, y = make(supernet(), lr=0.1, arch_lr=0.01), *batch()
    twin = supernet()
    twin.load_state_dict(rule.model.state_dict())
    torch.manual_seed(1)
    metrics = rule.step((x, y))
    side = held_out(x)
    torch.manual_seed(1)

    def mixture():
        logits = twin.architecture["normal"]
        if make is DARTS:
            return {"normal": logits.softmax(-1)}
        noisy = logits - torch.empty_like(logits).exponential_().log()
        return {"normal": (noisy / temperature_of(1.0, [noisy])).softmax(-1)}

    logits, weights = list(twin.architecture.values()), twin.weight_parameters()
    held = F.cross_entropy(twin(x[side], mixture()), y[side])
    search = torch.optim.Adam(logits, 0.01, betas=(0.5, 0.999), weight_decay=1e-3)
    logits[0].grad = torch.autograd.grad(held, logits)[0]
    search.step()
    train = F.cross_entropy(twin(x[~side], mixture()), y[~side])
    slopes = torch.autograd.grad(train, weights)
    with torch.no_grad():
        for weight, slope in zip(weights, slopes, strict=True):
            weight -= 0.1 * (slope + 3e-4 * weight)
    assert metrics == pytest.approx({"held": held.item(), "loss": train.item()}, rel=1e-4)
    for name, value in rule.model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-3, atol=1e-5)


def test_second_order_moves_the_logits_elsewhere_and_nothing_else():
    found = []
    for unrolled in (False, True):
        torch.manual_seed(0)
        net = supernet()
        rule = DARTS(net, lr=0.5, arch_lr=0.01, unrolled=unrolled)
        before = [w.detach().clone() for w in rule.weights]
        rule._search(*((batch()[0][i::2], batch()[1][i::2]) for i in range(2)))
        assert all(torch.equal(a, b) for a, b in zip(before, rule.weights, strict=True))
        found.append(rule.logits[0].grad)
    assert (found[0] - found[1]).abs().max() > 1e-3 * found[0].abs().max()


def test_the_result_is_a_plain_network_of_a_genotype_that_is_data():
    rule = SmallTemp(supernet(nodes=2, layers=3))
    rule.step(batch())
    found = json.loads(json.dumps(rule.genotype()))
    again = CellNet(1, 10, genotype=found, width=2, layers=3)
    result = rule.result()
    again.load_state_dict(result.state_dict())
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(result.eval()(x), again.eval()(x))
    assert sum(p.numel() for p in result.parameters()) < sum(p.numel() for p in rule.weights)


def test_a_half_without_examples_updates_nothing():
    x, y = batch()
    for side in (False, True):
        rule = DARTS(supernet())
        before = {name: value.clone() for name, value in rule.model.named_parameters()}
        rows = held_out(x) == side
        metrics = rule.step((x[rows], y[rows]))
        assert ("held" in metrics) == side and metrics["loss"] > 0
        for name, value in rule.model.named_parameters():
            assert name.startswith("architecture") == side or torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: DARTS(nn.Linear(2, 2)), "expected a core.search.Supernet"),
        (lambda: SmallTemp(supernet(), start=0.0), "above 0"),
        (lambda: SmallTemp(supernet(), end=-1.0), "above 0"),
        (lambda: SmallTemp(supernet(), start=2.0), "at most 1"),
        (lambda: SmallTemp(supernet(), noise=-0.1), "0 or more"),
        (lambda: sparse_noisy_softmax(torch.ones(1, 2), 0.0), "temperature 0.0"),
        (lambda: DARTS(supernet()).step((torch.ones(0, 1, 8, 8), torch.zeros(0).long())), "empty batch"),
    ],
)
def test_bad_input_is_one_clear_error(make, text):
    with pytest.raises(ValueError, match=text):
        make()
