"""Adaptation at test time: the stream, the loop against a plain one, resets, bounded state, and mistakes."""

import copy

import pytest
import torch
from torch import nn

from interlayer.core import aside
from interlayer.core.degraded import corrupt
from interlayer.core.online import Adapted, Adapter, Shift, adapt_online, batch_statistics, corruptions, entropy


class Drift(Adapter):
    """One number moves with each batch: it answers class 1 once it has seen two batches."""

    slug = "drift"

    def __init__(self, model):
        super().__init__(model)
        self.seen = torch.zeros(())

    def moves(self):
        return {"seen": self.seen}

    def run(self, inputs):
        given = super().run(inputs)
        return torch.stack((0 * given[:, 0], 0 * given[:, 0] + self.seen - 1.5), 1)

    def respond(self, inputs):
        self.seen += 1
        return self.run(inputs)


class Descent(Adapter):
    """The bias of a linear layer goes down the entropy."""

    slug, statistics = "descent", False

    def trained(self):
        return {"bias": self.model[1].bias}

    def respond(self, inputs):
        logits = self.run(inputs)
        self.lower(entropy(logits).mean())
        return logits


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))


def stream(names=("a", "b"), count=6):
    torch.manual_seed(1)
    return [Shift(n, torch.randn(count, 1, 2, 2), torch.ones(count, dtype=torch.long)) for n in names]


def test_a_stream_holds_the_same_images_under_each_corruption_in_an_order_of_its_own():
    torch.manual_seed(0)
    images, labels = torch.rand(5, 1, 8, 8), torch.arange(5)
    found = corruptions(images, labels, ["contrast", "impulse-noise"], level=4, seed=3, then=lambda x: 2 * x)
    assert [s.name for s in found] == ["contrast", "impulse-noise"]
    assert found[0].labels.tolist() != found[1].labels.tolist() != [0, 1, 2, 3, 4]
    for shift in found:
        assert sorted(shift.labels.tolist()) == [0, 1, 2, 3, 4]
    torch.testing.assert_close(found[0].inputs, 2 * corrupt(images[found[0].labels], "contrast", 4))
    cifar = corruptions(images, labels, ["contrast"], level=4, table="cifar", seed=3)[0]
    torch.testing.assert_close(cifar.inputs, corrupt(images[cifar.labels], "contrast", 4, table="cifar"))
    again = corruptions(images, labels, ["impulse-noise"], level=4, seed=3, then=lambda x: 2 * x)[0]
    assert torch.equal(again.inputs, found[1].inputs) and torch.equal(again.labels, found[1].labels)
    other = corruptions(images, labels, ["impulse-noise"], level=4, seed=4)[0]
    assert not torch.equal(2 * other.inputs, again.inputs)


@pytest.mark.parametrize(
    ("reset", "judge", "wrong"),
    [
        ("never", "at", {"a": [1, 1, 0, 0, 0, 0], "b": [0] * 6}),  # right from the second batch on
        ("never", "before", {"a": [1, 1, 1, 1, 0, 0], "b": [0] * 6}),  # one batch later
        ("shift", "at", {"a": [1, 1, 0, 0, 0, 0], "b": [1, 1, 0, 0, 0, 0]}),
        ("batch", "at", {"a": [1] * 6, "b": [1] * 6}),
    ],
)
def test_when_a_batch_is_judged_and_when_the_source_comes_back(reset, judge, wrong):
    rule = Drift(linear())
    found = adapt_online(rule, stream(), batch=2, reset=reset, judge=judge)
    assert {n: w.int().tolist() for n, w in found.wrong.items()} == wrong
    assert found.error == pytest.approx(sum(map(sum, wrong.values())) / 12)


def test_the_loop_is_a_plain_loop_over_batches_and_begins_at_the_source():
    rule, other = Descent(linear(), rate=0.1), Descent(linear(), rate=0.1)
    shifts = stream(count=7)
    wrong = [other.adapt(x).argmax(1) != 1 for s in shifts for x in s.inputs.split(3)]
    for _ in range(2):  # the second run begins anew
        found = adapt_online(rule, shifts, batch=3)
        assert torch.equal(torch.cat(list(found.wrong.values())), torch.cat(wrong))
        torch.testing.assert_close(rule.model[1].bias, other.model[1].bias, rtol=0, atol=0)


def test_one_step_of_adam_down_the_entropy():
    rule, x = Descent(linear(), rate=0.1), torch.randn(5, 1, 2, 2)
    naive = linear()
    rule.adapt(x)
    p = naive(x).softmax(1)
    (-(p * p.log()).sum(1)).mean().backward()
    torch.testing.assert_close(
        rule.model[1].bias, naive[1].bias - 0.1 * naive[1].bias.grad.sign(), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(rule.model[1].weight, naive[1].weight)


def test_predict_and_answer_leave_no_trace_and_predict_answers_as_adapt_would():
    rule = Descent(linear(), rate=0.1)
    rule.adapt(torch.randn(5, 1, 2, 2))
    before, x = copy.deepcopy((rule.model.state_dict(), rule.state_dict())), torch.randn(5, 1, 2, 2)
    given, still = rule.predict(x), rule.answer(x)
    assert str((rule.model.state_dict(), rule.state_dict())) == str(before)
    assert torch.equal(given, rule.adapt(x)) and torch.equal(given, still)
    assert all(p.requires_grad for p in rule.model.parameters()) and rule.model.training


def test_the_state_does_not_grow_with_the_stream_and_adapting_resumes_to_the_bit():
    rule, xs = Descent(linear(), rate=0.1), torch.randn(6, 5, 1, 2, 2)
    sizes = []
    for x in xs[:3]:
        rule.adapt(x)
        state = rule.state_dict()
        sizes.append(sum(t.numel() for t in state["source"].values()))
    assert sizes == [2, 2, 2]
    other = Descent(linear(), rate=0.1)
    other.model.load_state_dict(copy.deepcopy(rule.model.state_dict()))
    other.load_state_dict(copy.deepcopy(state))
    for x in xs[3:]:
        assert torch.equal(rule.adapt(x), other.adapt(x))
    other.reset()
    assert torch.equal(other.model[1].bias, linear()[1].bias)


def test_training_the_source_takes_back_what_was_adapted():
    rule, plain = Descent(linear(), rate=0.1, lr=0.01), linear()
    x, y = torch.randn(5, 1, 2, 2), torch.tensor([0, 1, 0, 1, 1])
    rule.adapt(x)
    rule.step((x, y))
    optimiser = torch.optim.Adam(plain.parameters(), lr=0.01)
    nn.functional.cross_entropy(plain(x), y).backward()
    optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(rule.model.parameters(), plain.parameters(), strict=True))
    rule.adapt(x)
    rule.reset()
    assert torch.equal(rule.model[1].bias, plain[1].bias)


def test_training_the_source_adds_auxiliary_losses():
    class Told(nn.Linear):
        def forward(self, x):
            aside.loss(self.bias.sum())
            return super().forward(x)

    torch.manual_seed(0)
    rule = Descent(nn.Sequential(nn.Flatten(), Told(4, 2)), lr=0.01)
    bias = rule.model[1].bias.detach().clone()
    rule.step((torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])))  # slopes of the bias: below one half, and one
    torch.testing.assert_close(rule.model[1].bias, bias - 0.01, rtol=1e-4, atol=1e-6)


def test_where_the_entropy_is_not_finite_nothing_moves():
    rule = Descent(linear())
    rule.adapt(torch.full((2, 1, 2, 2), torch.inf))
    assert torch.equal(rule.model[1].bias, linear()[1].bias)


def test_batch_statistics_are_those_of_the_batch_and_leave_the_running_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)).eval()
    x, before = torch.randn(4, 1, 5, 5), copy.deepcopy(model.state_dict())
    with batch_statistics(model):
        given = model(x)
    r = model[0](x)
    naive = (r - r.mean((0, 2, 3), keepdim=True)) / (r.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(given, naive, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    torch.testing.assert_close(model(x), r / (1 + 1e-5) ** 0.5, rtol=1e-4, atol=1e-5)


def test_entropy_and_its_slope_for_certain_and_for_uniform_predictions():
    logits = torch.tensor([[0.0, 0.0], [1e4, 0.0]], requires_grad=True)
    torch.testing.assert_close(entropy(logits).detach(), torch.tensor([0.6931472, 0.0]))
    assert torch.autograd.grad(entropy(logits).sum(), logits)[0].abs().max() == 0


def test_mistakes_are_told():
    rule, shifts = Drift(linear()), stream()
    for options in ({"batch": 0}, {"reset": "often"}, {"judge": "after"}):
        with pytest.raises(ValueError, match=r"adapt_online: batch .*, reset .*, judge .*; expected"):
            adapt_online(rule, shifts, **options)
    with pytest.raises(ValueError, match="an empty stream; expected at least one Shift"):
        adapt_online(rule, [])
    with pytest.raises(ValueError, match="two shifts 'a'"):
        adapt_online(rule, stream(("a", "a")))
    with pytest.raises(ValueError, match="Shift 'x': 3 inputs and 2 labels; expected as many"):
        Shift("x", torch.zeros(3, 1), torch.zeros(2))
    with pytest.raises(ValueError, match="corruptions: no kind; expected some of"):
        corruptions(torch.rand(2, 1, 8, 8), torch.zeros(2), [])
    for options in ({"rate": -1.0}, {"lr": -1.0}):
        with pytest.raises(ValueError, match=r"Descent: rate .*, lr .*; expected at least 0"):
            Descent(linear(), **options)
    assert Adapted({"a": torch.tensor([True, False])}).error == 0.5
