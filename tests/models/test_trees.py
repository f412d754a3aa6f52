import itertools
import math

import pytest
import torch
from torch import nn

from interlayer.core.example import Example
from interlayer.models import SoftTrees, build
from interlayer.models.trees import SHAPES, routes
from interlayer.testing import check


def one_tree(shape, depth, weight, bias, leaves, x):
    """Equations 2 and 3, node by node and leaf by leaf, for one tree and one input."""
    split = [1 / (1 + math.exp(-float(w @ x + b))) for w, b in zip(weight, bias, strict=True)]
    out = torch.zeros(leaves.shape[1], dtype=x.dtype)
    if shape in ("list", "open-list"):
        left = 1.0
        for n, s in enumerate(split):
            out, left = out + left * s * leaves[n], left * (1 - s)
        return out + left * leaves[depth] if shape == "list" else out
    for leaf, turns in enumerate(itertools.product((0, 1), repeat=depth)):
        share, node = 1.0, 0
        for level, right in enumerate(turns):
            s = split[level if shape == "oblivious" else node]
            share, node = share * ((1 - s) if right else s), 2 * node + 1 + right
        out = out + share * leaves[leaf]
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("depth", [1, 3])
def test_the_equations_node_by_node(shape, depth):
    model = SoftTrees(5, 2, trees=3, depth=depth, shape=shape).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    trees = list(zip(model.weight.detach(), model.bias.detach(), model.leaves.detach(), strict=True))
    expected = torch.stack([torch.stack([one_tree(shape, depth, *tree, row) for tree in trees]) for row in x])
    torch.testing.assert_close(model.outputs(x), expected)
    torch.testing.assert_close(model(x), expected.sum(1))


def test_sizes_of_the_shapes():
    sizes = {shape: tuple(routes(shape, 3).shape) for shape in SHAPES}
    assert sizes == {"oblivious": (3, 8), "full": (7, 8), "list": (3, 4), "open-list": (3, 3)}


def test_a_tree_of_one_level_is_a_perceptron_with_one_hidden_layer():
    """Equation 5."""
    model, x = SoftTrees(4, 2, trees=6, depth=1), torch.randn(3, 4)
    hidden = (x @ model.weight[:, 0].T + model.bias[:, 0]).sigmoid()
    torch.testing.assert_close(model(x), hidden @ (model.leaves[:, 0] - model.leaves[:, 1]) + model.leaves[:, 1].sum(0))


def test_far_from_a_threshold_gradients_stay_finite():
    model = SoftTrees(1, 1, trees=2, depth=2)
    model(torch.tensor([[1e6], [-1e6]])).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_contracts_of_a_layer():
    modes = {shape: (lambda shape=shape: SoftTrees(5, 2, trees=3, depth=2, shape=shape)) for shape in SHAPES[1:]}
    example = Example(make=lambda: SoftTrees(5, 2, trees=3), inputs=lambda: (torch.randn(3, 5),), modes=modes)
    check(SoftTrees, example)


def test_a_base_of_tasks():
    from interlayer.core.data import DataShape

    model = build(
        "soft-trees(trees=4, depth=1)", DataShape("image", "classes", classes=10, channels=1, height=8, width=8)
    )
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10) and model.config["trees"] == 4


def test_clear_errors():
    with pytest.raises(ValueError, match=r"trees 0, depth 2, shape 'oblivious'; expected at least 1"):
        SoftTrees(3, 2, trees=0)
    with pytest.raises(ValueError, match=r"shape 'bush'; expected .* one of oblivious, full, list, open-list"):
        SoftTrees(3, 2, shape="bush")
    with pytest.raises(ValueError, match=r"input \(2, 4\) has 4 features; expected 3"):
        nn.Sequential(SoftTrees(3, 2, trees=2))(torch.zeros(2, 4))
