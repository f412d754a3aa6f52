"""TAPS: the authors' numbers, what a task trains, shares and stores, any modules, and the joint variant."""

import math

import families
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from interlayer.core import aside
from interlayer.core.data import Experience
from interlayer.core.datasets import split_digits
from interlayer.core.experiences import by_classes, run_stream
from interlayer.core.kinds import NotBegun
from interlayer.transform.adapt.taps import START, TAPS, Gated, share

FAMILIES = ("bert", "vit", "resnet", "lstm", "mha", "twice")  # one answer for each example


def wave(*shape, k=1):
    """Numbers that any machine makes again."""
    return (0.7 * k * torch.arange(math.prod(shape), dtype=torch.float64)).sin().reshape(shape)


def stream():
    return by_classes(split_digits(), [[0, 1, 2], [3, 4], [5, 6]])


def net(width=8):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 10),
    )  # fmt: skip


def gates(rule, task):
    return [m.gate for m in rule.nets[task.name].modules() if isinstance(m, Gated)]


def test_gates_weights_and_answers_are_those_of_the_authors_code():
    """Four steps with their convolution (MattWallingford/TAPS), the penalty from the third on, and a step after each batch.

    They keep gates' first values and gradients in single precision, so digits agree up to the eighth.
    """
    layers = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    ).double()  # fmt: skip
    with torch.no_grad():
        for p in layers.parameters():
            p.copy_(0.9 * wave(*p.shape, k=2) + 0.1)
    x, y = wave(32, 1, 6, 6, k=3), torch.arange(32) % 3
    task = Experience("t", (x[:8], y[:8]), (x[:2], y[:2]), 3)
    rule = TAPS(layers, sparsity=0.15, warmup=1.0, lr=0.2)  # 26 of their 52 gates would weigh as much
    rule.begin(task)
    with torch.no_grad():
        head = rule.nets["t"][-1]
        for p in head.parameters():
            p.copy_(0.9 * wave(*p.shape, k=2) + 0.1)
        for gate in gates(rule, task):
            gate.fill_(float(torch.tensor(0.15)))
    seen = []
    for i in range(4):
        rule.step((x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4]))
        seen.append([g.item() for g in gates(rule, task)])
    assert seen[1] == pytest.approx([0.1500910648785066, 0.13468149155378342], abs=1e-8)
    assert seen[3] == pytest.approx([0.1079172142390744, 0.04258127838373185], abs=1e-8)
    assert rule.layers(task) == {"0.weight": True, "3.weight": False}
    wanted = [2.062802785652163, 1.2376426980649535, 2.4910378942478966]
    torch.testing.assert_close(rule.predict(x[:2])[0], torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-7)
    residual = rule.nets["t"][3].parametrizations.weight[0].residual.flatten()[:2].tolist()
    assert residual == pytest.approx([-4.346422029384553e-05, -0.0001914286523622079], abs=1e-8)


def test_a_gate_lets_the_residual_in_and_passes_its_gradient_straight():
    torch.manual_seed(0)
    part, weight = Gated(torch.zeros(3, 2)), torch.randn(3, 2)
    nn.init.normal_(part.residual)
    for value, inside in ((START, 1.0), (0.1, 1.0), (0.0999, 0.0), (-3.0, 0.0)):
        part.zero_grad()
        part.gate.data.fill_(value)
        new, pull = part(weight), torch.randn(3, 2)
        (new * pull).sum().backward()
        assert torch.equal(new, weight + inside * part.residual)
        assert torch.equal(part.residual.grad, inside * pull)
        torch.testing.assert_close(part.gate.grad, (pull * part.residual).sum())
    half = Gated(torch.zeros(2, 2, dtype=torch.bfloat16))
    assert half.residual.dtype == torch.float32 and half(torch.ones(2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_penalty_is_the_mean_gate_after_the_warm_up():
    task = stream()[0]
    rule = TAPS(net(), sparsity=0.4, warmup=16 / len(task.train[1]))
    rule.begin(task)
    told = []
    for rows in (slice(0, 16), slice(16, 32)):
        with aside.collect() as found:
            labels = task.train[1][rows]
            rule.loss(rule.nets[task.name], torch.zeros(len(labels), 3), labels)
        told.append(found.loss)
    assert told[0] is None and told[1].item() == pytest.approx(0.4 * 0.15)
    assert float(found.metrics["specific"][0]) == 1.0


def test_a_task_begins_as_the_base_and_a_strong_penalty_leaves_it_the_base_s_weights():
    task, base = stream()[0], net().eval()
    features = nn.Sequential(*base[:-1])
    x = task.test[0]
    wanted = features(x).detach()
    rule = TAPS(base, sparsity=30.0, warmup=0.0, lr=0.01)
    rule.begin(task)
    assert torch.equal(rule.nets[task.name].eval()[:-1](x), wanted)
    for _ in range(3):
        rule.step((task.train[0][:32], task.train[1][:32]))
    assert set(rule.layers(task).values()) == {False}
    plain = rule.model_for(task)
    assert torch.equal(plain[0].weight, base[0].weight) and torch.equal(plain[3].weight, base[3].weight)
    assert not torch.equal(plain[1].weight, base[1].weight) and not torch.equal(plain[3].bias, base[3].bias)
    # BatchNorm 16, a bias 8, the head 3 * 129: no convolution
    assert rule.parameters(task) == 16 + 8 + 3 * 129


def test_a_file_holds_what_the_task_changed(tmp_path):
    first, second, _ = stream()
    rule = TAPS(net(), sparsity=0.0, lr=0.05)
    for task in (first, second):
        rule.begin(task)
        for _ in range(2):
            rule.step((task.train[0][:32], task.train[1][:32]))
    with torch.no_grad():
        gates(rule, first)[1].fill_(0.0)
    rule.save(first, tmp_path / "first.safetensors")
    rule.save(second, tmp_path / "second.safetensors")
    small, large = ((tmp_path / f"{n}.safetensors").stat().st_size for n in ("first", "second"))
    assert large - small > 4 * 9 * 64 - 4 * 129 - 300  # the second convolution, less a row of the head
    again = TAPS(net())
    again.load(first, tmp_path / "first.safetensors")
    assert torch.equal(again.predict(first.test[0]), (rule.at(first), rule.predict(first.test[0]))[1])
    assert again.layers(first) == {"0.weight": True, "3.weight": False}
    assert again.parameters(first) == rule.parameters(first) == 9 * 8 + 16 + 8 + 3 * 129
    with pytest.raises(ValueError, match="does not fit"):
        TAPS(net(4)).load(first, tmp_path / "first.safetensors")


@pytest.mark.parametrize("name", FAMILIES)
def test_any_modules_are_gated_and_the_result_is_plain(name, tmp_path):
    model, given = families.model(name), families.batch(name)
    count = families.output(model, given).shape[-1]
    if families.output(model, given).ndim > 2:
        model, count = Pooled(model, count), 3
    labels = torch.tensor([0, 1])
    rule = TAPS(model, sparsity=0.0, lr=0.02)
    before = [p.detach().clone() for p in rule.shared()]
    losses = [rule.step((given, labels))["loss"] for _ in range(8)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, rule.shared(), strict=True))
    plain, out = rule.result(), rule.predict(given)
    assert not any(parametrize.is_parametrized(m) or m._forward_pre_hooks for m in plain.modules())
    torch.testing.assert_close(families.output(plain, given), out)
    whole = [torch.equal(a, b) for a, b in zip(before, TAPS(plain).shared(), strict=True)]
    assert not all(whole) and out.shape == (2, count)
    if hasattr(plain, "save_pretrained"):
        plain.save_pretrained(tmp_path)
        assert torch.equal(
            families.output(type(plain).from_pretrained(tmp_path).eval(), given), families.output(plain, given)
        )


class Pooled(nn.Module):
    """A classifier of the mean state."""

    def __init__(self, body, width):
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.body(x).mean(1))


def test_a_weight_in_two_places_has_one_gate():
    torch.manual_seed(0)
    table, out = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
    out.weight = table.weight
    model = nn.Sequential(table, nn.Linear(8, 8), out, nn.Flatten(), nn.Linear(36, 2))
    tokens, labels = torch.randint(12, (6, 3)), torch.arange(6) % 2
    rule = TAPS(model, sparsity=0.0, lr=0.5)
    for _ in range(5):
        rule.step((tokens, labels))
    assert len(list(rule._weights(model))) == 3
    plain = rule.result()
    assert plain[0].weight is plain[2].weight and not torch.equal(plain[0].weight, table.weight)
    torch.testing.assert_close(plain(tokens), rule.predict(tokens))


def test_the_joint_variant_trains_the_base_on_all_tasks_first():
    tasks, base = stream()[:2], net()
    before = [p.detach().clone() for p in base.parameters()]
    alone = run_stream(TAPS(net(), sparsity=100.0, warmup=0.0), tasks, steps=40).average
    assert share(base, tasks, steps=60, lr=3e-3) is base
    assert not any(torch.equal(a, b) for a, b in zip(before[:-2], list(base.parameters())[:-2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before[-2:], list(base.parameters())[-2:], strict=True))
    learned = run_stream(TAPS(base, sparsity=100.0, warmup=0.0), tasks, steps=40)
    assert learned.average > alone and learned.average > 0.95


def test_what_cannot_be_shared_says_why():
    weighted = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    cases = [
        (lambda: TAPS(net(), sparsity=-1.0), "sparsity=-1.0"),
        (lambda: TAPS(net(), warmup=-1.0), "warmup=-1.0"),
        (lambda: TAPS(nn.Linear(3, 3)), "is no linear layer"),
        (lambda: TAPS(nn.Sequential(nn.Linear(3, 3))), "no weight beside its head"),
        (lambda: TAPS(weighted), "has parametrizations"),
        (lambda: share(net(), [], steps=1), "no tasks"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(NotBegun):
        TAPS(net()).layers(stream()[0])
