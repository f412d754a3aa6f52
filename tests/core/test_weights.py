import copy

import pytest
import torch
from torch import nn

from interlayer.core import recipe, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mask_zeroes_exactly_and_stops_the_gradient(dtype):
    layer = nn.Linear(5, 4, dtype=dtype)
    full, keep = layer.weight.detach().clone(), torch.rand(4, 5) > 0.5
    weights.mask(layer, "weight", keep)
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.weight, torch.where(keep, full, 0))
    layer(torch.randn(3, 5, dtype=dtype)).sum().backward()
    grad = layer.parametrizations.weight.original.grad
    assert torch.equal(grad != 0, keep)


def test_masking_again_replaces_the_mask_and_masks_lists_it():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2))
    weights.mask(model[0], "weight", torch.ones(2, 1, 3, 3, dtype=torch.bool))
    weights.mask(model[0], "weight", torch.zeros(2, 1, 3, 3, dtype=torch.bool))
    assert len(model[0].parametrizations.weight) == 1
    assert list(weights.masks(model)) == ["0.weight"] and not weights.masks(model)["0.weight"].any()
    assert list(weights.masks(model[0])) == ["weight"]


def test_masks_and_weights_travel_in_the_state_dict():
    one, two = (weights.mask(nn.Linear(3, 3), "weight", torch.rand(3, 3) > 0.5) for _ in range(2))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.weight, two.weight)


def test_low_rank_is_the_best_approximation():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 6, 2)
    u, s, v = torch.linalg.svd(layer.weight.detach().flatten(1), full_matrices=False)
    weights.low_rank(layer, "weight", 2)
    torch.testing.assert_close(layer.weight.flatten(1), (u[:, :2] * s[:2]) @ v[:2])
    sizes = [tuple(p.shape) for p in layer.parametrizations.weight.parameters()]
    assert sizes == [(6, 2), (2, 12)]
    full = nn.Linear(4, 3, dtype=torch.bfloat16)
    assert weights.low_rank(full, "weight", 3).weight.dtype == torch.bfloat16


def test_shift_adds_a_trainable_difference_to_a_held_weight():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    plain = layer(x)
    weights.shift(layer, "weight")
    assert torch.equal(layer(x), plain)
    layer(x).sum().backward()
    trained = [n for n, p in layer.named_parameters() if p.grad is not None]
    assert trained == ["bias", "parametrizations.weight.0.delta"]
    delta = torch.randn(2, 3)
    torch.testing.assert_close(weights.shift(nn.Linear(3, 2), "weight", delta).parametrizations.weight[0].delta, delta)


def test_tie_makes_one_parameter():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    weights.tie(model, "1.weight", "0.weight")
    assert model[1].weight is model[0].weight
    with pytest.raises(ValueError, match=r"1.bias is \(5,\)"):
        weights.tie(model, "1.bias", "0.weight")


def test_bake_gives_plain_weights_and_the_same_outputs():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    torch.nn.utils.parametrizations.weight_norm(model[3])
    weights.mask(model[0], "weight", torch.rand(4, 4) > 0.5)
    weights.low_rank(model[1], "weight", 2)
    weights.shift(model[2], "weight", torch.randn(4, 4))
    baked = weights.bake(model)
    torch.testing.assert_close(baked(x), model(x), rtol=0, atol=0)
    assert all(type(baked[i]) is nn.Linear and isinstance(baked[i].weight, nn.Parameter) for i in range(3))
    assert weights.masks(model) and hasattr(baked[3], "parametrizations") and not recipe.steps(baked)
    with pytest.raises(ValueError, match="no masked, low-rank or shifted"):
        weights.bake(baked)


def test_a_copy_can_be_changed_without_the_original():
    one = nn.Sequential(weights.mask(nn.Linear(3, 3), "weight", torch.eye(3, dtype=torch.bool)))
    two = copy.deepcopy(one)
    weights.shift(two[0], "bias")
    weights.mask(two[0], "weight", torch.ones(3, 3, dtype=torch.bool))
    assert torch.equal(weights.masks(one)["0.weight"], torch.eye(3, dtype=torch.bool))
    assert isinstance(one[0].bias, nn.Parameter)
    weights.bake(two)
    assert torch.equal(one[0].weight != 0, torch.eye(3, dtype=torch.bool))


def test_bake_keeps_ties_and_leaves_other_owners_alone():
    tied = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    weights.tie(tied, "1.weight", "0.weight")
    plain = tied[0].weight.detach().clone()
    weights.shift(tied[1], "weight", torch.ones(5, 3))
    baked = weights.bake(tied)
    assert torch.equal(baked[0].weight, plain) and torch.equal(baked[1].weight, plain + 1)
    assert baked[1].weight.requires_grad
    one = weights.shift(nn.Linear(3, 3), "weight", torch.ones(3, 3))
    twin = copy.deepcopy(one, {id(p): p for p in one.parameters()})
    baked = weights.bake(nn.Sequential(one, twin))
    assert baked[0].weight is baked[1].weight and torch.equal(baked[0].weight, one.weight)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: weights.mask(m, "weight", torch.ones(3, 3)), r"weight is \(2, 3\), the mask \(3, 3\)"),
        (lambda m: weights.mask(m, "wieght", torch.ones(2, 3)), r"no parameter 'wieght'; it has \['weight', 'bias'\]"),
        (lambda m: weights.low_rank(m, "weight", 3), "rank 3 .* expected 1 to 2"),
        (lambda m: weights.low_rank(m, "bias", 1), "expected 1 to 0"),
        (lambda m: weights.shift(m, "weight", torch.ones(1)), r"delta \(1,\)"),
    ],
)
def test_errors_say_what_came_and_what_was_wanted(call, says):
    with pytest.raises(ValueError, match=says):
        call(nn.Linear(3, 2))
