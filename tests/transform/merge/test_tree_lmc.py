import copy
import itertools
import sys

import families
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from interlayer.cli import app
from interlayer.core import recipe
from interlayer.models import SoftTrees
from interlayer.models.trees import SHAPES
from interlayer.transform.merge.tree_lmc import TreeLMC, Ways, compare, importance, rewrite, ways

DEPTHS = [(shape, depth) for shape in SHAPES for depth in (1, 2, 3)]


def trees(shape="oblivious", depth=2, count=6, seed=0):
    torch.manual_seed(seed)
    return SoftTrees(5, 2, trees=count, depth=depth, shape=shape).double()


def flip(model, tree, node):
    """Flip one node of a full tree, number by number."""
    with torch.no_grad():
        model.weight[tree, node] *= -1
        model.bias[tree, node] *= -1
        left, right = [2 * node + 1], [2 * node + 2]
        while left[0] < model.weight.shape[1]:
            for a, b in zip(left, right, strict=True):
                for value in (model.weight, model.bias):
                    value[tree, [a, b]] = value[tree, [b, a]]
            left, right = ([c for n in side for c in (2 * n + 1, 2 * n + 2)] for side in (left, right))
        first = model.weight.shape[1]
        for a, b in zip(left, right, strict=True):
            model.leaves[tree, [a - first, b - first]] = model.leaves[tree, [b - first, a - first]]


def shuffled(model, seed=1):
    """The same function, with trees in another order and each of them written in a random way."""
    chance = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(model.bias), generator=chance)
    known = ways(model.shape, model.depth)
    new = rewrite(model, order, known.at(torch.randint(len(known.nodes), (len(order),), generator=chance)))
    for tree, node in itertools.product(*map(range, model.bias.shape)) if model.shape == "full" else ():
        if torch.rand((), generator=chance) < 0.5:
            flip(new, tree, node)
    return new


def differ(a, b):
    return max(
        float((p.detach() - q.detach()).abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


@pytest.mark.parametrize(("shape", "depth"), DEPTHS)
def test_every_way_is_the_same_function(shape, depth):
    model, x = trees(shape, depth, count=1), torch.randn(9, 5, dtype=torch.float64)
    known = ways(shape, depth)
    for n in range(len(known.nodes)):
        new = rewrite(model, torch.zeros(1, dtype=torch.long), known.at(torch.tensor([n])))
        torch.testing.assert_close(new(x), model(x), rtol=0, atol=1e-12)
        assert (differ(new, model) == 0) == (n == 0)  # each is another one; the first is the tree itself
    for node in range(model.bias.shape[1]) if shape == "full" else ():
        new = copy.deepcopy(model)
        flip(new, 0, node)
        torch.testing.assert_close(new(x), model(x), rtol=0, atol=1e-12)
        assert differ(new, model) > 0


def test_how_many_ways_there_are():
    for depth, factorial in ((1, 1), (2, 2), (3, 6), (4, 24)):
        assert len(ways("oblivious", depth).nodes) == 2**depth * factorial
        assert len(ways("oblivious", depth, order=False).nodes) == 2**depth
        assert len(ways("oblivious", depth, flip=False).nodes) == factorial
        assert len(ways("list", depth).nodes) == 2  # the last node alone
        assert len(ways("list", depth, flip=False).nodes) == len(ways("open-list", depth).nodes) == 1


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_flips_of_full_trees_are_as_good_as_the_best_of_all_of_them(depth):
    a, b = trees("full", depth, 1, seed=0), trees("full", depth, 1, seed=1)
    scale = importance(a).double()

    def agreement(model):
        nodes = (a.weight * model.weight).sum(-1) + a.bias * model.bias
        return float(((nodes * scale).sum() + (a.leaves * model.leaves).sum()).detach())

    every = []
    for chosen in itertools.product((False, True), repeat=2**depth - 1):
        new = copy.deepcopy(b)
        for node in reversed([n for n, turn in enumerate(chosen) if turn]):
            flip(new, 0, node)
        every.append(agreement(new))
    assert len({round(v, 12) for v in every}) == 2 ** (2**depth - 1)
    values, how = compare(a, b)
    assert float(values) == pytest.approx(max(every), abs=1e-12)
    found = rewrite(b, torch.tensor([0]), Ways(*(part[0] for part in how)))
    assert agreement(found) == pytest.approx(max(every), abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_compared_ways_are_as_good_as_they_say(shape):
    """The agreement of the chosen way, from the weights themselves, and no other way is better."""
    a, b = trees(shape, 3, 4, seed=0), trees(shape, 3, 4, seed=1)
    values, how = compare(a, b)
    scale = importance(a).double()
    for i, j in itertools.product(range(4), repeat=2):
        one = rewrite(b, torch.tensor([j]), Ways(*(part[i, j][None] for part in how)))
        nodes = (a.weight[i] * one.weight[0]).sum(-1) + a.bias[i] * one.bias[0]
        assert float(((nodes * scale).sum() + (a.leaves[i] * one.leaves[0]).sum()).detach()) == pytest.approx(
            float(values[i, j])
        )
    plain, _ = compare(a, b, flip=False, order=False)
    assert bool((values > plain - 1e-12).all()) and bool((values > plain + 0.01).any())


def test_how_much_nodes_count():
    assert importance(trees("full", 3)).tolist() == [8, 4, 4, 2, 2, 2, 2]
    assert importance(trees("oblivious", 3)).tolist() == [8, 8, 8]
    assert importance(trees("list", 3)).tolist() == [4, 3, 2]
    assert importance(trees("open-list", 3)).tolist() == [3, 2, 1]


@pytest.mark.parametrize("method", ["weights", "activations"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shuffled_copy_is_found_exactly(shape, method):
    model, x = trees(shape, 3, 12), torch.randn(40, 5, dtype=torch.float64)
    other = shuffled(model)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-12)
    assert differ(other, model) > 0.1
    aligned = TreeLMC(method=method, merge=None).plan(model, x, others=(other,)).apply()
    assert differ(aligned, model) < 1e-12
    merged = TreeLMC(method=method, merge=0.3).plan(model, x, others=(other,)).apply()
    assert differ(merged, model) < 1e-12


def test_what_is_left_out_is_not_found():
    model = trees("oblivious", 3, 12)
    other = shuffled(model)
    for left in ({"flip": False}, {"order": False}, {"flip": False, "order": False}):
        assert differ(TreeLMC(merge=None, **left).plan(model, others=(other,)).apply(), model) > 0.1
    only = rewrite(model, torch.randperm(12), ways("oblivious", 3).at(torch.zeros(12, dtype=torch.long)))
    assert differ(TreeLMC(merge=None, flip=False, order=False).plan(model, others=(only,)).apply(), model) == 0


def test_activations_are_those_that_a_layer_gets_inside_a_network_over_all_batches():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), SoftTrees(5, 2, trees=8)).double()
    other = copy.deepcopy(net)
    other[2] = shuffled(net[2])
    data = [(x, None) for x in torch.randn(3, 16, 4, dtype=torch.float64)]
    plan = TreeLMC(method="activations", merge=None).plan(net, data, others=(other,))
    assert "8 oblivious trees of 2 levels are matched by order of trees, flips, order of levels" in str(plan)
    assert "- 0  left as it is  (is no ensemble of soft trees)" in str(plan)
    assert differ(plan.apply(), net) < 1e-12


def test_what_a_plan_says_of_each_shape():
    said = {shape: TreeLMC().plan(trees(shape), others=(trees(shape),)).touched[0].what for shape in SHAPES}
    assert [text.partition("by ")[2] for text in said.values()] == [
        "order of trees, flips, order of levels",
        "order of trees, flips",
        "order of trees, flips of the last node",
        "order of trees",
    ]


@pytest.mark.parametrize("name", families.NAMES)
def test_families_are_refused(name):
    with pytest.raises(
        ValueError, match=r"has no ensemble of soft trees; expected layers .*git-rebasin matches networks"
    ):
        TreeLMC().plan(families.model(name), families.batch(name), others=(families.other(name),))


def first() -> nn.Module:
    return trees(seed=0).float()


def second() -> nn.Module:
    return trees(seed=1).float()


def batches() -> list[torch.Tensor]:
    return list(torch.linspace(-1, 1, 100).view(2, 10, 5))


def test_the_command_merges_and_the_folder_needs_no_base(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pair", sys.modules[__name__])
    args = ["apply", "tree-lmc", "--model", "pair:first", "--other", "pair:second", "--data", "pair:batches"]
    result = CliRunner().invoke(app, [*args, "-o", "method=activations", "--out", str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    expected = TreeLMC(method="activations").plan(first(), batches(), others=(second(),)).apply()
    assert differ(recipe.load(tmp_path / "new"), expected) == 0


def test_clear_errors():
    model = trees()
    with pytest.raises(ValueError, match=r"method 'magic', merge 0.5; expected one of weights, activations"):
        TreeLMC(method="magic")
    with pytest.raises(ValueError, match=r"merge 1.0; expected .* a weight above 0 and below 1 or None"):
        TreeLMC(merge=1.0)
    with pytest.raises(ValueError, match=r"no data; expected batches, on which outputs of trees are compared"):
        TreeLMC(method="activations").plan(model, others=(model,))
    with pytest.raises(ValueError, match=r"differ at 'weight': \(6, 2, 5\) here, \(7, 2, 5\) in the other"):
        TreeLMC().plan(model, others=(trees(count=7),))
    with pytest.raises(
        ValueError, match=r"the model is an ensemble of list trees of 1 levels here and something else in the other"
    ):
        TreeLMC().plan(trees("list", 1), others=(trees("full", 1),))
    with pytest.raises(
        ValueError, match=r"46080 ways to write an oblivious tree of 6 levels, expected at most 5000. Set"
    ):
        TreeLMC().plan(trees(depth=6), others=(trees(depth=6),))
    assert TreeLMC(order=False).plan(trees(depth=6), others=(trees(depth=6),)).touched
