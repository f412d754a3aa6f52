"""LAP: the authors' figures, what a push is, plain one-step training as its special case, detectors, and mistakes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer.core.attack import attack
from interlayer.learn.robust.lap import LAP, strengths
from interlayer.learn.robust.lap.overfitting import gap, layers, sensitivity, spectral, without_largest


def net():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(),
        nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    return model


def batches(count=4):
    generator = torch.Generator().manual_seed(6)
    return [
        (torch.rand(8, 1, 6, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(count)
    ]


def test_four_steps_are_those_of_the_authors():
    """The loop of CIFAR10/LAP.py at commit 0904ace, on this net in float32 with 4 layers and without noise; the optimiser's state
    copied, as ``load_state_dict`` did in the torch of that time."""
    sums = [0.11186, 0.227696, -1.425132, -0.472528, 2.500123, -0.53627, 0.090836, 1.798663, -3.395524, -1.061382]
    model = net()
    rule = LAP(model, radius=0.1, noise=0, bounds=(0, 1), beta=0.05, gamma=0.7, lr=0.1)
    for batch in batches():
        last = rule.step(batch)
    assert last["loss"] == pytest.approx(0.9627596, abs=1e-5)
    found = [float(p.detach().sum()) for p in model.parameters()]
    assert found == pytest.approx([*sums, -1.984319, -0.083933], abs=5e-5)


def test_the_push_of_each_layer_has_its_length_and_points_along_the_optimisers_step():
    model, (x, y) = net(), batches(1)[0]
    rule = LAP(model, radius=0.1, noise=0, beta=0.05, lr=0.1)
    before, at = copy.deepcopy(model), copy.deepcopy(model).train()
    loss = F.cross_entropy(at(x), y)
    steps = torch.autograd.grad(loss, list(layers(at).values()))
    rule._backward(x, y)
    rule._push()
    assert strengths(4, 0.05, 1.0) == pytest.approx([0.05, 0.025, 0.05 * (1 - 0.7924813), 0.0])
    for (name, old), step, strength in zip(layers(before).items(), steps, strengths(4, 0.05, 1.0), strict=True):
        old = old.detach()
        change = layers(model)[name].detach() - old
        assert float(change.norm()) == pytest.approx(strength * float(old.norm()), rel=1e-4, abs=1e-7)
        down = -(step + 5e-4 * old)
        torch.testing.assert_close(change, strength * old.norm() * down / down.norm(), rtol=1e-3, atol=1e-6)
    others = {n for n, _ in before.named_parameters()} - set(layers(before))
    assert all(torch.equal(model.get_parameter(n), before.get_parameter(n)) for n in others)
    assert not rule.optimiser.state


def test_without_a_push_it_is_one_step_training():
    (x, y), model = batches(1)[0], net()
    twin = copy.deepcopy(model).train()
    optimiser = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    LAP(model, radius=0.1, noise=0, beta=0, lr=0.1, bounds=(0, 1)).step((x, y))
    at = x.clone().requires_grad_()
    F.cross_entropy(twin(at), y).backward()
    moved = (x + 0.1 * at.grad.sign()).clamp(0, 1)
    optimiser.zero_grad()
    F.cross_entropy(twin(moved), y).backward()
    optimiser.step()
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_noise_and_clip_bound_what_the_model_sees():
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            seen.append(x.detach().clone())
            return super().forward(x)

    x, y = torch.full((64, 5), 0.5), torch.arange(64) % 3
    wanted = [({}, 0.2, 0.3), ({"noise": 1, "size": 1.25, "clip": True}, 0.1, 0.1), ({"noise": 0}, 0, 0.1)]
    for options, first, second in wanted:
        seen.clear()
        LAP(Spy(5, 3), radius=0.1, **options).step((x, y))
        for inputs, most in zip(seen, (first, second), strict=True):
            assert most * 0.9 - 1e-6 <= float((inputs - x).abs().max()) <= most + 1e-6


def test_parameters_of_any_name_and_shared_ones_are_layers():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.shift = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.zeros(4))
            self.again, self.frozen = self.kernel, nn.Parameter(torch.ones(4, 4), requires_grad=False)

        def forward(self, x):
            return torch.tanh(x @ self.kernel + self.shift) @ self.again @ self.frozen

    model = Odd()
    assert list(layers(model)) == ["kernel"]
    before = model.kernel.detach().clone()
    LAP(model, radius=0.1, lr=0.1).step((torch.rand(6, 4), torch.arange(6) % 4))
    assert not torch.equal(before, model.kernel)
    with pytest.raises(ValueError, match="has no trained weight of two axes and more"):
        layers(nn.BatchNorm1d(3))


def test_detectors():
    model, x, y = net().eval(), *batches(1)[0]
    found = gap(model, x, y, radius=0.1, bounds=(0, 1))
    one = attack(model, x, y, radius=0.1, steps=1, random=False)
    assert found["fgsm"] == float((model(one).argmax(1) == y).float().mean())
    assert found["gap"] == found["fgsm"] - found["pgd"] and found["pgd"] <= found["clean"]
    profile = sensitivity(model, x, y, ratio=0.5)
    assert (
        list(profile)
        == list(layers(model))
        == list(spectral(model))
        == ["0.weight", "3.weight", "7.weight", "9.weight"]
    )
    assert set(sensitivity(model, x, y, ratio=0.0).values()) == {0.0}
    weight = model[7].weight.detach()
    assert spectral(model)["7.weight"] == pytest.approx(float(torch.linalg.svdvals(weight)[0]), rel=1e-5)
    cut = without_largest(model, 0.25, ["7.weight"])
    gone = cut[7].weight == 0
    assert int(gone.sum()) == 20 and weight[gone].abs().min() >= weight[~gone].abs().max()
    assert torch.equal(cut[0].weight, model[0].weight) and int((model[7].weight == 0).sum()) == 0
    with pytest.raises(ValueError, match="layer 'no'; expected a share from 0 to 1"):
        without_largest(model, 0.5, ["no"])
    with pytest.raises(ValueError, match="share 2; expected"):
        without_largest(model, 2, [])


@pytest.mark.parametrize(
    ("options", "batch", "error", "says"),
    [
        ({"radius": -1}, None, ValueError, "LAP: radius=-1; expected 0 or more"),
        ({"gamma": 0}, None, ValueError, "gamma=0; expected a number above 0"),
        ({"bounds": (0, 1)}, torch.full((2, 1, 6, 6), 2.0), ValueError, "expected inputs within the bounds"),
        ({}, torch.ones(2, 1, 6, 6, dtype=torch.long), TypeError, "inputs of torch.int64"),
    ],
)
def test_mistakes_are_refused(options, batch, error, says):
    with pytest.raises(error, match=says):
        LAP(net(), **options).step((batch, torch.zeros(2, dtype=torch.long)))
