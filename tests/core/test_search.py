"""Spaces, mixed operations, networks of cells and the two levels of a differentiable search."""

import json
import random
import tomllib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from interlayer.core import recipe
from interlayer.core.data import DataShape
from interlayer.core.example import Example
from interlayer.core.search import (
    OPERATIONS,
    CellNet,
    Mixed,
    Space,
    Supernet,
    architecture_gradients,
    cell_space,
    held_out,
    operation,
    read_genotype,
)
from interlayer.models import build
from interlayer.testing import hold

SMALL = Space({"a": (1, 2, 3), "b": Space({"c": ("x", "y"), "d": ([0, 1], [1, 2])}), "e": (True,)})


def genotype(**cells):
    """The form of the authors' genotypes, two (operation, input) pairs for each node, as a point of a cell space."""
    found = {}
    for kind, genes in cells.items():
        found[kind] = {}
        for i in range(0, len(genes), 2):
            (op0, first), (op1, second) = sorted(genes[i : i + 2], key=lambda gene: gene[1])
            found[kind][f"node{2 + i // 2}"] = {"inputs": [first, second], "op0": op0, "op1": op1}
    return found


SEP, SKIP, DIL, MAX = "sep_conv_3x3", "skip_connect", "dil_conv_3x3", "max_pool_3x3"
# The architecture that the authors found with second order on CIFAR-10 (DARTS_V2 in their code).
DARTS_V2 = genotype(
    normal=[(SEP, 0), (SEP, 1), (SEP, 0), (SEP, 1), (SEP, 1), (SKIP, 0), (SKIP, 0), (DIL, 2)],
    reduce=[(MAX, 0), (MAX, 1), (SKIP, 2), (MAX, 1), (MAX, 0), (SKIP, 2), (SKIP, 2), (MAX, 1)],
)


def test_a_space_counts_its_points_and_enumerates_them():
    points = list(SMALL.points())
    assert SMALL.count == len(points) == len({SMALL.key(p) for p in points}) == 12
    for point in points:
        SMALL.check(point)


def test_sampling_is_uniform_over_valid_points():
    odd = Space({"a": (1, 2, 3), "b": (1, 2)}, valid=lambda p: (p["a"] + p["b"]) % 2 == 1)
    draw = random.Random(0)
    seen = [odd.key(odd.sample(draw)) for _ in range(3000)]
    counts = {key: seen.count(key) for key in set(seen)}
    assert counts.keys() == {odd.key(p) for p in odd.points()} and odd.count == 6 and len(counts) == 3
    assert all(abs(n - 1000) < 100 for n in counts.values())  # 4 standard deviations


@pytest.mark.parametrize("changes", [1, 2, 3])
def test_a_mutation_changes_exactly_so_many_choices(changes):
    draw = random.Random(0)
    for _ in range(50):
        point = SMALL.sample(draw)
        before = json.dumps(point)
        new = SMALL.mutate(point, draw, changes=changes)
        SMALL.check(new)
        flat = [(p["a"], p["b"]["c"], p["b"]["d"]) for p in (point, new)]
        assert sum(a != b for a, b in zip(*flat, strict=True)) == changes
        assert json.dumps(point) == before


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Space({}), "no choices"),
        (lambda: Space({"a": ()}), "'a' has no options"),
        (lambda: Space({"a": (1, 1)}), "option 1 twice"),
        (lambda: Space({"a": (1,)}, valid=lambda p: False).sample(random.Random(0)), "none of 1000 draws"),
        (lambda: Space({"a": (1,)}, valid=lambda p: False).check({"a": 1}), "refused"),
        (lambda: SMALL.check({"a": 1}), "expected the choices"),
        (lambda: SMALL.check({"a": 1, "b": {"c": "z", "d": [0, 1]}, "e": True}), "b.c is 'z'"),
        (lambda: SMALL.check({"a": 1, "b": 3, "e": True}), "b. has 3"),
        (lambda: SMALL.mutate(SMALL.sample(random.Random(0)), random.Random(0), changes=4), "expected 1 to 3"),
        (lambda: cell_space(operations=()), "no operations"),
        (lambda: cell_space(operations=("conv",)), "unknown operation 'conv'"),
        (lambda: cell_space(operations=(SEP, SEP)), "each once"),
        (lambda: cell_space(nodes=0), "at least one node"),
        (lambda: cell_space(inputs=3), "two before it"),
        (lambda: operation("conv", 4), "unknown operation"),
        (lambda: Mixed({}), "no operations"),
        (lambda: Mixed({"a": nn.Identity()})(torch.ones(1), torch.ones(2)), "weights"),
        (lambda: Supernet(1, 10, operations=["none"]), "no operations"),
        (lambda: Supernet(0, 10), "at least 1 each"),
        (lambda: CellNet(1, 10, genotype={}), "genotype"),
        (lambda: CellNet(1, 10, genotype={"normal": DARTS_V2["normal"]}, layers=3), "reduce"),
        (lambda: CellNet(1, 10, genotype=genotype(normal=[(SEP, 0), (SEP, 2)]), layers=1), "inputs is"),
        (lambda: CellNet(1, 10, genotype=genotype(normal=[("none", 0), (SEP, 1)]), layers=1), "op0 is 'none'"),
        (lambda: CellNet(1, 10, genotype={"normal": 3}, layers=1), "normal"),
        (lambda: CellNet(1, 10, genotype=DARTS_V2, width=4)(torch.ones(1, 3, 8, 8)), "input"),
        (lambda: read_genotype("found.yaml"), "json or .toml"),
        (lambda: architecture_gradients([], [], lambda: None, lambda: None, unroll=-1), "unroll"),
    ],
)
def test_bad_input_is_one_clear_error(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_the_space_of_darts_has_the_published_size():
    """DARTS, arXiv:1806.09055, section 3.1.1: prod over k of (k + 1) k / 2 times 7^2, about 10^9 for one cell."""
    wanted = 1
    for k in range(1, 5):
        wanted *= (k + 1) * k // 2 * 7**2
    assert cell_space(kinds=["normal"]).count == wanted == 1_037_664_180
    cell_space().check(DARTS_V2)


def test_parameters_are_as_many_as_in_the_authors_code():
    """quark0/darts logs 3.349342 MB for DARTS_V2 on CIFAR-10 and 1.930618 MB for the supernet."""
    with torch.device("meta"):
        final, supernet = CellNet(3, 10, genotype=DARTS_V2, width=36, layers=20), Supernet(3, 10)
    assert sum(p.numel() for p in final.parameters()) == 3_349_342
    assert sum(p.numel() for p in supernet.weight_parameters()) == 1_930_618
    assert {k: tuple(a.shape) for k, a in supernet.architecture.items()} == {"normal": (14, 8), "reduce": (14, 8)}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [7, 8])
def test_all_operations_give_one_shape(stride, side):
    x = torch.randn(2, 4, side, side)
    shapes = {operation(name, 4, stride=stride)(x).shape for name in OPERATIONS}
    assert shapes == {(2, 4, -(-side // stride), -(-side // stride))}


def test_a_mixture_is_the_weighted_sum():
    mixed = Mixed({name: operation(name, 3) for name in ("none", SKIP, SEP)})
    x, weights = torch.randn(2, 3, 5, 5), torch.tensor([0.2, 0.3, 0.5])
    skip, sep = mixed.candidates[SKIP], mixed.candidates[SEP]
    torch.testing.assert_close(mixed(x, weights), 0.3 * skip(x) + 0.5 * sep(x))
    torch.testing.assert_close(mixed(x, torch.tensor([0.0, 1.0, 0.0])), x)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_pruned_supernet_is_the_plain_network(layers):
    """With the weights of the chosen operations: the supernet runs the same cells, and its norms have no gain or bias."""
    net = Supernet(1, 10, width=4, layers=layers, nodes=2, operations=["none", SKIP, SEP, DIL])
    found = net.space.sample(random.Random(0))
    plain = net.plain(found)
    there, state = net.state_dict(), plain.state_dict()
    for name in state:
        parts = name.split(".")
        if parts[0] == "cells" and parts[2] == "edges":
            kind, edge = net.kinds[int(parts[1])], int(parts[3])
            node, k = divmod(edge, 2)
            chosen = found[kind][f"node{node + 2}"]
            row = sum(range(2, 2 + node)) + chosen["inputs"][k]
            parts[3:4] = [str(row), "candidates", chosen[f"op{k}"]]
        if (old := ".".join(parts)) in there:
            state[name] = there[old]
    plain.load_state_dict(state)
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(net(x, net.pruned(found)), plain(x))
    torch.testing.assert_close(net.eval()(x, net.pruned(found)), plain.eval()(x))


def test_the_strongest_edges_are_kept_without_none():
    net = Supernet(1, 10, width=2, layers=1, nodes=2, operations=["none", SKIP, SEP])
    with torch.no_grad():
        net.architecture["normal"].copy_(
            torch.tensor([[9.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 3.0, 0.0], [5.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
        )
    # Node 2 has edges 0 and 1. Node 3 has edges 2 to 4, where the middle one is mostly `none`.
    assert net.derive() == genotype(normal=[(SKIP, 0), (SEP, 1), (SKIP, 0), (SEP, 2)])


def test_a_genotype_is_read_from_json_and_toml(tmp_path):
    found = cell_space(nodes=1).sample(random.Random(0))
    (tmp_path / "found.json").write_text(json.dumps(found), encoding="utf-8")
    cells = "".join(
        f"[{kind}.node2]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in cell["node2"].items())
        for kind, cell in found.items()
    )
    (tmp_path / "found.toml").write_text(cells, encoding="utf-8")
    assert tomllib.loads(cells) == found
    for name in ("found.json", "found.toml"):
        assert read_genotype(tmp_path / name) == found
    shape = DataShape("image", "classes", channels=1, height=8, width=8, classes=10)
    net = build("cells", shape, genotype=str(tmp_path / "found.toml"), width=2, layers=3)
    assert net.genotype == found


def test_networks_are_saved_and_built_again_without_pickle(tmp_path):
    net = Supernet(1, 10, width=2, layers=3, nodes=1, operations=[SKIP, SEP])
    for name, model in (("supernet", net), ("plain", net.plain(net.derive()))):
        recipe.save(model, tmp_path / name)
        again = recipe.load(tmp_path / name)
        x = torch.randn(2, 1, 8, 8)
        assert type(again) is type(model)
        torch.testing.assert_close(again(x), model.eval()(x))


MAKES = {
    "plain": lambda: CellNet(1, 3, genotype=genotype(normal=[(SEP, 0), (SKIP, 1)]), width=4, layers=1),
    "supernet": lambda: Supernet(1, 3, width=2, layers=1, nodes=1, operations=["none", SKIP, SEP]),
}


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("contract", ["compile", "export", "state_dict", "deepcopy", "autocast"])
def test_networks_run_as_others_do(contract, make):
    example = Example(
        make=MAKES[make],
        inputs=lambda: (torch.randn(3, 1, 6, 6),),
        batch="coupled",
    )
    hold(contract, "layer", example)


def test_an_example_stays_on_its_side():
    x = torch.randn(4000, 3)
    side = held_out(x)
    assert abs(int(side.sum()) - 2000) < 130  # 4 standard deviations
    order = torch.randperm(len(x))
    assert torch.equal(held_out(x[order][:100]), side[order][:100])
    assert 0 < int(held_out(torch.arange(64)[:, None]).sum()) < 64


class Small(nn.Module):
    """A model with three weights and two logits, smooth in both."""

    def __init__(self):
        super().__init__()
        self.w, self.a = nn.Parameter(torch.tensor([0.3, -0.2, 0.5])), nn.Parameter(torch.tensor([0.1, -0.4]))

    def forward(self, x):
        p = self.a.softmax(-1)
        return p[0] * (x @ self.w).tanh() + p[1] * (x @ self.w.square()).sin()


def test_the_gradient_of_an_unrolled_step_is_that_of_autograd():
    """The exact second-order gradient, through the step of the weights, and the first-order one beside it."""
    torch.manual_seed(0)
    model = Small().double()
    x, y, hx, hy = (torch.randn(*s, dtype=torch.float64) for s in ((20, 3), (20,), (20, 3), (20,)))
    m, rate, decay = [torch.tensor([0.1, 0.0, -0.1], dtype=torch.float64)], 0.3, 0.05

    def held(w):
        return F.mse_loss(functional_call(model, {"w": w}, (hx,)), hy)

    slope = torch.autograd.grad(F.mse_loss(model(x), y), model.w, create_graph=True)[0]
    moved = model.w - rate * (m[0] + slope + decay * model.w.detach())
    exact = torch.autograd.grad(held(moved), model.a)[0]
    first = torch.autograd.grad(held(model.w), model.a)[0]
    before = model.w.detach().clone()
    losses = lambda: F.mse_loss(model(x), y), lambda: F.mse_loss(model(hx), hy)
    found = architecture_gradients([model.a], [model.w], *losses, unroll=rate, momentum=m, decay=decay)
    torch.testing.assert_close(found[0], exact, rtol=1e-3, atol=1e-6)
    direct = torch.autograd.grad(held(moved.detach()), model.a)[0]
    assert (exact - direct).abs().max() > 0.05 * exact.abs().max()  # the second term counts here
    assert torch.equal(model.w.detach(), before)
    torch.testing.assert_close(architecture_gradients([model.a], [model.w], *losses)[0], first)
