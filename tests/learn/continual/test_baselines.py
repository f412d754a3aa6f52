"""The baselines of continual learning: EWC's equation, what each trains, and what each forgets."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer.core.datasets import split_digits
from interlayer.core.experiences import by_classes, permuted, run_stream
from interlayer.learn.continual import EWC, FineTune, Joint, LinearProbe
from interlayer.models.classic import ResNet18


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def stream():
    return by_classes(split_digits(), [[0, 1], [2, 3], [4, 5]])


def test_the_fisher_information_is_the_mean_squared_score():
    task = stream()[0]
    rule = EWC(mlp())
    rule.begin(task)
    x = task.train[0][:20]
    torch.manual_seed(3)
    found = rule.fisher(x)
    net = rule.nets[task.name]
    torch.manual_seed(3)
    drawn = torch.multinomial(net(x).softmax(1), 1).squeeze(1)
    naive = {k: torch.zeros_like(p) for k, p in net.named_parameters() if k.startswith("1.")}
    for each, label in zip(x, drawn, strict=True):
        score = torch.autograd.grad(F.log_softmax(net(each[None]), 1)[0, label], [net[1].weight, net[1].bias])
        for total, g in zip(naive.values(), score, strict=True):
            total += g.square() / len(x)
    assert found.keys() == naive.keys()
    for k, value in naive.items():
        torch.testing.assert_close(found[k], value)


def test_the_springs_of_every_earlier_task_pull():
    rule = EWC(mlp(), strength=3.0, samples=16)
    first, second, third = stream()
    for task in (first, second):
        rule.begin(task)
        rule.step((task.train[0][:16], task.train[1][:16]))
        rule.end(task)
    rule.begin(third)
    rule.step((third.train[0][:16], third.train[1][:16]))
    net = rule.nets[third.name]
    x, y = third.train[0][:8], third.train[1][:8]
    wanted = F.cross_entropy(net(x), y)
    for fisher, at in rule.springs:
        for k, p in (("1.weight", net[1].weight), ("1.bias", net[1].bias)):
            wanted = wanted + 1.5 * (fisher[k] * (p - at[k]) ** 2).sum()
    assert len(rule.springs) == 2 and not torch.equal(rule.springs[0][1]["1.weight"], rule.springs[1][1]["1.weight"])
    torch.testing.assert_close(rule.loss(net, net(x), y), wanted)


def test_springs_hold_what_fine_tuning_forgets():
    results = {}
    for name, make in {"fine-tune": FineTune, "ewc": EWC, "joint": Joint}.items():
        options = {"strength": 1000.0} if make is EWC else {}
        rule = make(mlp(), lr=1e-2, own_heads=False, **options)
        results[name] = run_stream(rule, permuted(split_digits(), 3), steps=60, known=False)
    forgotten = {name: r.forgetting for name, r in results.items()}
    assert forgotten["fine-tune"] > 0.1 > forgotten["ewc"] and forgotten["joint"] < 0.05
    assert results["joint"].average > results["fine-tune"].average


def test_a_probe_moves_nothing_but_its_head():
    torch.manual_seed(0)
    model = ResNet18(1, 10, width=4)
    before = copy.deepcopy(model.state_dict())
    rule = LinearProbe(model)
    result = run_stream(rule, stream(), steps=5)
    assert all(torch.equal(v, before[k]) for k, v in rule.model.state_dict().items())
    assert list(rule.own(stream()[0].name)) == ["head.weight", "head.bias"]
    assert result.forgetting == 0


def test_fine_tuning_trains_the_model_and_keeps_old_heads():
    torch.manual_seed(0)
    model = ResNet18(1, 10, width=4)
    before = copy.deepcopy(model.state_dict())
    rule, (first, second, _) = FineTune(model), stream()
    rule.begin(first)
    rule.step((first.train[0][:16], first.train[1][:16]))
    old = [t.clone() for t in rule.own(first.name).values()]
    rule.begin(second)
    rule.step((second.train[0][:16], second.train[1][:16]))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if not k.startswith("head.")}
    assert all(torch.equal(a, b) for a, b in zip(old, rule.own(first.name).values(), strict=True))


def test_running_statistics_stay_if_they_are_to():
    torch.manual_seed(0)
    rule, task = FineTune(ResNet18(1, 10, width=4), statistics=False), stream()[0]
    rule.begin(task)
    before = {k: v.clone() for k, v in rule.model.named_buffers()}
    rule.step((task.train[0][:16], task.train[1][:16]))
    assert all(torch.equal(v, before[k]) for k, v in rule.model.named_buffers())


@pytest.mark.parametrize("make", [FineTune, EWC, Joint, LinearProbe])
def test_a_stream_resumes_bit_exact(make):
    first, second, _ = stream()
    rules = [make(mlp()), make(mlp())]
    for task in (first,):
        torch.manual_seed(1)
        rules[0].begin(task)
        rules[0].step((task.train[0][:16], task.train[1][:16]))
        rules[0].end(task)
    rules[1].model.load_state_dict(copy.deepcopy(rules[0].model.state_dict()))
    rules[1].load_state_dict(copy.deepcopy(rules[0].state_dict()))
    for rule in rules:
        torch.manual_seed(2)
        rule.begin(second)
        for at in range(2):
            rule.step((second.train[0][16 * at : 16 * at + 16], second.train[1][16 * at : 16 * at + 16]))
    for task in (first, second):
        for rule in rules:
            rule.at(task)
        assert torch.equal(*(rule.predict(task.test[0]) for rule in rules))


def test_a_loss_that_is_not_finite_moves_no_weight():
    rule = FineTune(mlp())
    before = copy.deepcopy(rule.model.state_dict())
    rule.begin(stream()[0])
    rule.step((torch.full((2, 1, 8, 8), torch.inf), torch.tensor([0, 1])))
    assert all(torch.equal(v, before[k]) for k, v in rule.model.state_dict().items())


def test_one_head_must_be_wide_enough():
    with pytest.raises(ValueError, match="the head has 10 outputs"):
        FineTune(mlp(), own_heads=False).begin(by_wide())


def by_wide():
    from interlayer.core.data import Experience

    data = torch.zeros(2, 64), torch.tensor([0, 11])
    return Experience("wide", data, data, 12)
