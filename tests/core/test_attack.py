"""Attacks: a public implementation's figures, naive twins, bounds, what stays untouched, and mistakes."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from interlayer.core.attack import attack, errors, project, steepest


def net():
    model = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(5 * 36, 4))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


X = torch.rand(3, 2, 6, 6, generator=torch.Generator().manual_seed(4))
Y = torch.tensor([0, 3, 1])


@pytest.mark.parametrize(
    ("options", "losses", "moved"),
    [
        ({"radius": 0.1, "steps": 1, "random": False}, [3.624029, 2.78957, 4.495893], -0.166181),
        ({"radius": 0.1, "steps": 7, "size": 0.03, "random": False}, [3.633704, 2.949607, 4.59368], -0.733015),
        ({"norm": "2", "radius": 0.5, "steps": 7, "size": 0.1, "random": False}, [3.074307, 2.271627, 3.733251], -0.321724),
    ],
)  # fmt: skip
def test_numbers_are_those_of_torchattacks(options, losses, moved):
    """FGSM, PGD and PGDL2 of torchattacks 3.5.1 on this net and these inputs."""
    found = attack(net(), X, Y, **options)
    torch.testing.assert_close(errors(net()(found), Y), torch.tensor(losses), atol=2e-5, rtol=0)
    assert float((found - X).sum()) == pytest.approx(moved, abs=1e-4)


def naive_project(delta, radius):
    """The nearest point of the 1-norm ball, by bisection on how much every coordinate shrinks."""
    low, high = 0.0, float(np.abs(delta).max())
    if np.abs(delta).sum() <= radius:
        return delta
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(np.abs(delta) - middle, 0).sum() > radius else (low, middle)
    return np.sign(delta) * np.maximum(np.abs(delta) - high, 0)


def test_projections_are_the_nearest_points():
    delta = torch.randn(4, 3, 5, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    for radius in (0.5, 3.0, 100.0):
        rows = [naive_project(row.flatten().numpy(), radius) for row in delta]
        torch.testing.assert_close(project(delta, "1", radius).flatten(1), torch.tensor(np.stack(rows)))
        for row, found in zip(delta, project(delta, "2", radius), strict=True):
            torch.testing.assert_close(found, row * min(1.0, radius / float(row.norm())))
        torch.testing.assert_close(project(delta, "inf", radius), delta.clamp(-radius, radius))


@pytest.mark.parametrize("norm", ["inf", "2", "1"])
def test_a_unit_step_has_length_one_and_raises_a_linear_loss_most(norm):
    gradient = torch.randn(2, 7, 60, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    step = steepest(gradient, norm).flatten(1)
    torch.testing.assert_close(step.norm(p=float(norm), dim=1), torch.ones(2, dtype=torch.double))
    others = torch.randn(500, 2, 420, dtype=torch.double)
    others = others / others.norm(p=float(norm), dim=2, keepdim=True)
    assert bool(((others * gradient.flatten(1)).sum(2) < (step * gradient.flatten(1)).sum(1)).all())


@pytest.mark.parametrize(("norm", "radius"), [("inf", 0.05), ("2", 0.4), ("1", 2.0)])
def test_it_stays_in_the_ball_and_the_bounds_and_raises_every_loss(norm, radius):
    model = net()
    found = attack(model, X, Y, norm, radius, steps=5, restarts=2)
    assert bool(((found - X).flatten(1).norm(p=float(norm), dim=1) <= radius * (1 + 1e-5)).all())
    assert found.min() >= 0 and found.max() <= 1
    assert bool((errors(model(found), Y) > errors(model(X), Y)).all())
    assert torch.equal(found, attack(model, X, Y, norm, radius, steps=5, restarts=2))
    assert not torch.equal(found, attack(model, X, Y, norm, radius, steps=5, restarts=2, seed=1))
    more = attack(model, X, Y, norm, radius, steps=5, restarts=6)
    assert bool((errors(model(more), Y) >= errors(model(found), Y)).all())


def test_targeted_attacks_approach_the_wanted_class():
    wanted = torch.tensor([2, 2, 2])
    found = attack(net(), X, wanted, radius=0.2, targeted=True)
    assert bool((errors(net()(found), wanted) < errors(net()(X), wanted)).all())
    assert bool((net()(found).argmax(1) == 2).all())


def test_the_model_stays_as_it_was():
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 4)).train()
    model[1].weight.requires_grad_(False)
    model[4](torch.ones(1, 6)).sum().backward()
    before, held = copy.deepcopy(model.state_dict()), model[4].weight.grad.clone()
    torch.manual_seed(0)
    drawn = torch.get_rng_state()
    found = attack(model, X, Y)
    assert model.training and not found.requires_grad and torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.equal(model[4].weight.grad, held) and model[1].weight.grad is None
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * 5]


def test_embeddings_and_models_of_hugging_face():
    import transformers

    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=3,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4) % 3
    found = attack(model, x, y, radius=0.1)
    assert bool((errors(model.eval()(found).logits, y) > errors(model(x).logits, y)).all())
    assert attack(net(), X[:0], Y[:0]).shape == (0, 2, 6, 6)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"norm": "3"}, ValueError, "norm '3'; expected one of 'inf', '2', '1'"),
        ({"radius": -0.1}, ValueError, "radius -0.1, size None; expected 0 or more"),
        ({"size": float("nan")}, ValueError, "size nan; expected 0 or more"),
        ({"steps": 0}, ValueError, "0 steps, 1 restarts; expected 1 or more"),
        ({"restarts": 2, "random": False}, ValueError, "2 restarts from the same start"),
        ({"x": X * 3}, ValueError, "expected inputs within the bounds"),
        ({"x": X / 0}, ValueError, "expected .* finite numbers"),
        ({"x": torch.ones(3, 2, dtype=torch.long)}, TypeError, "inputs of torch.int64"),
        ({"loss": lambda out, y: out.sum()}, ValueError, r"a loss of shape \(\); expected \[3\]"),
    ],
)
def test_mistakes_are_refused(given, error, says):
    with pytest.raises(error, match=says):
        attack(net(), given.pop("x", X), Y, **given)
