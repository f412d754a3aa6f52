"""CLR: what a task trains, where its parts sit, what stays, and the authors' numbers."""

import copy

import pytest
import torch
import transformers
from torch import nn

from interlayer.core.data import Experience
from interlayer.core.datasets import split_digits
from interlayer.core.experiences import by_classes, run_stream
from interlayer.core.kinds import NotBegun
from interlayer.learn.continual.clr import CLR
from interlayer.models import ConvNet
from interlayer.models.classic import MobileNetV3Small, ResNet18


def stream():
    return by_classes(split_digits(), [[0, 1, 2], [3, 4], [5, 6]])


def resnet(width=4):
    torch.manual_seed(0)
    return ResNet18(1, 10, width=width)


def hugging_face():
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(num_channels=1, layer_type="basic", **sizes)
    )


def mobile():
    return MobileNetV3Small(1, 10, width=0.25)


def bottlenecks():
    return ConvNet(1, 10, depth=11, width=4, unit="bottleneck")


# After three steps of the authors' training loop on seeded inputs (with their classes around the same network and head).
@pytest.mark.parametrize(
    ("pointwise", "logits", "trained"),
    [
        ("none", [0.03616, 0.14016, -0.01797], 2895),
        ("scale", [0.11235, -0.08513, 0.08824], 2951),
        ("full", [0.07717, 0.14178, -0.03107], 3399),
    ],
)
def test_three_steps_give_the_authors_logits(pointwise, logits, trained):
    model = resnet()
    x, y = torch.randn(3, 8, 1, 8, 8), torch.randint(3, (3, 8))
    rule = CLR(model, pointwise=pointwise)
    torch.manual_seed(1)
    rule.begin(Experience("t", (x.flatten(0, 1), y.flatten()), (x[0], y[0]), 3))
    for batch in zip(x, y, strict=True):
        rule.step(batch)
    torch.testing.assert_close(rule.predict(x[0])[0], torch.tensor(logits), rtol=0, atol=1e-4)
    assert rule.parameters(Experience("t", (x[0], y[0]), (x[0], y[0]), 3)) == trained


def test_the_reprogrammed_features_are_the_channels_filtered_one_by_one():
    torch.manual_seed(0)
    rule = CLR(nn.Sequential(nn.Conv2d(1, 5, 3, stride=2), nn.Flatten(), nn.Linear(45, 2)))
    rule.begin(stream()[0])
    convolution, kernels = rule.nets[stream()[0].name][0]
    nn.init.normal_(kernels.weight)
    x = torch.randn(2, 1, 8, 8)
    raw = rule.model[0](x)
    padded = nn.functional.pad(raw, (1, 1, 1, 1))
    naive = torch.stack(
        [
            sum(kernels.weight[k, 0, i, j] * padded[:, k, i : i + 3, j : j + 3] for i in range(3) for j in range(3))
            for k in range(5)
        ],
        1,
    )
    torch.testing.assert_close(kernels(convolution(x)), naive)


@pytest.mark.parametrize(
    "make",
    [resnet, hugging_face, mobile, bottlenecks],
)
def test_any_convolutional_network_learns_tasks_and_forgets_none(make):
    model = make().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rule, tasks, kept = CLR(model), stream()[:2], {}

    def watch(task):
        rule.at(task)
        kept[task.name] = [rule.predict(task.test[0]), *map(torch.clone, rule.own(task.name).values())]

    result = run_stream(rule, tasks, steps=6, watch=watch)
    rule.at(tasks[0])
    now = [rule.predict(tasks[0].test[0]), *rule.own(tasks[0].name).values()]
    assert all(torch.equal(a, b) for a, b in zip(kept[tasks[0].name], now, strict=True))
    assert any(k.endswith("running_var") for k in rule.own(tasks[0].name))
    assert result.forgetting == 0 and result.backward == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training and all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_a_task_starts_from_the_frozen_features_and_trains_its_parts_alone():
    model, (task, *_) = resnet(), stream()
    twin = copy.deepcopy(model).eval()
    rule = CLR(model)
    rule.begin(task)
    net = rule.model_for(task)
    twin.head, net.head = nn.Identity(), nn.Identity()
    assert torch.equal(net(task.test[0]), twin(task.test[0]))
    trained = {n for n, p in rule.nets[task.name].named_parameters() if p.requires_grad}
    assert trained == {k for k, v in rule.own(task.name).items() if isinstance(v, nn.Parameter)}
    assert {n.rpartition(".")[0] for n in trained} == {
        n for n, m in rule.nets[task.name].named_modules()
        if isinstance(m, nn.BatchNorm2d | nn.Linear) or (isinstance(m, nn.Conv2d) and n.endswith(".1") and m.groups > 1)
    }  # fmt: skip


def test_parameters_of_a_task_in_closed_form_and_for_resnet_50():
    rule, task = CLR(resnet()), stream()[1]
    rule.begin(task)
    assert rule.parameters(task) == 9 * 244 + 2 * 300 + 33 * 2
    with torch.device("meta"):
        big = transformers.ResNetForImageClassification(transformers.ResNetConfig())
        whole = sum(p.numel() for p in big.resnet.parameters())
        rule = CLR(big)
        rule.begin(task)
    parts = rule.parameters(task) - 2049 * 2
    assert (whole, parts) == (23_508_032, 9 * 3840 + 2 * 26_560)
    assert f"{parts / whole:.2%} {(parts + 2 * 26_560) / whole:.2%}" == "0.37% 0.60%"  # with running statistics


def test_the_parts_of_a_task_travel_alone(tmp_path):
    rule, (first, second, third) = CLR(resnet()), stream()
    run_stream(rule, [first, second], steps=3)
    rule.save(second, tmp_path / "second.safetensors")
    assert (tmp_path / "second.safetensors").stat().st_size < 6 * 4 * rule.parameters(second)
    other = CLR(resnet())
    other.load(second, tmp_path / "second.safetensors")
    rule.at(second)
    assert torch.equal(other.predict(second.test[0]), rule.predict(second.test[0]))
    plain = rule.model_for(second)
    assert torch.equal(plain(second.test[0]), rule.predict(second.test[0]))
    shares = {t.data_ptr() for t in plain.state_dict().values()} & {
        t.data_ptr() for t in rule.model.state_dict().values()
    }
    assert not shares - {0}
    with pytest.raises(ValueError, match=r"'head\.weight' of .* does not fit"):
        other.load(first, tmp_path / "second.safetensors")
    with pytest.raises(NotBegun, match="never begun"):
        other.save(third, tmp_path / "third.safetensors")


def test_the_norm_of_every_trained_tensor_costs():
    task = stream()[0]
    batch = task.train[0][:8], task.train[1][:8]
    found = []
    for penalty in (0.0, 0.5):
        rule = CLR(resnet(), penalty=penalty, lr=0.0)
        torch.manual_seed(1)
        rule.begin(task)
        rule.step(batch)
        found.append([p.grad.clone() for p in rule.optimiser.param_groups[0]["params"]])
        weights = rule.optimiser.param_groups[0]["params"]
    for plain, more, w in zip(*found, weights, strict=True):
        expected = 0.5 * w / w.norm() if w.norm() else torch.zeros_like(w)
        torch.testing.assert_close(more - plain, expected, rtol=1e-4, atol=1e-5)


def test_clear_errors():
    with pytest.raises(ValueError, match=r"pointwise 'some'; expected one of none, scale, full"):
        CLR(resnet(), pointwise="some")
    pointwise = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(128, 2))
    with pytest.raises(ValueError, match=r"no convolution to reprogram; .* Choose pointwise=scale or full"):
        CLR(pointwise)
    assert CLR(pointwise, pointwise="scale").reprogrammed() == ["0"]
    with pytest.raises(ValueError, match="expected one of none, there is none"):
        CLR(nn.Sequential(nn.Conv2d(1, 2, 3)))
    with pytest.raises(ValueError, match="'fc' is no linear layer"):
        CLR(resnet(), head="fc")
    rule, task = CLR(resnet()), stream()[0]
    rule.begin(task)
    with pytest.raises(ValueError, match="was begun before"):
        rule.begin(task)


def test_without_begin_there_is_one_task():
    rule, (x, y) = CLR(resnet(), lr=1e-2), split_digits().train
    scores = rule.predict(x[:4])
    assert rule.model.training and torch.equal(scores, rule.model.eval()(x[:4])) and rule.optimizers() == ()
    losses = [rule.step((x[i : i + 64], y[i : i + 64]))["loss"] for i in range(0, 640, 64)]
    assert losses[-1] < losses[0] and len(rule.optimizers()) == 1
    assert rule.predict(x[:4]).shape == (4, 10) and list(rule.nets) == [""]
