from itertools import pairwise, permutations, product

import pytest
import torch
from torch import nn
from torch.nn.utils import vector_to_parameters

from interlayer.core import datasets
from interlayer.core.data import DataShape
from interlayer.core.fields import Layout, grid
from interlayer.transform.merge.weight_space_nets import POOLS, DWSNet, Equivariant, Invariant, Normalise, WeightSpace
from interlayer.transform.merge.weight_space_nets.data import FIELDS, Stack, _descend, fields, sine, small_digits, zoo

WIDTHS = [(2, 3, 1), (2, 3, 4, 2), (3, 4, 4, 4, 2)]


def numbers(space, count=3, features=()):
    torch.manual_seed(0)
    return torch.randn(count, space.count, *features, dtype=torch.double)


def orders(space, count=3):
    return {m: torch.rand(count, d).argsort(1) for m, d in enumerate(space.widths) if 0 < m < len(space.widths) - 1}


def mlp(widths=(2, 5, 4, 3)):
    layers = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("pool", POOLS)
def test_outputs_follow_any_permutation_of_hidden_neurons(widths, pool):
    space = WeightSpace(widths)
    x, order = numbers(space), orders(space)
    for norm in (True, False):
        reader = DWSNet(widths, 4, channels=3, pool=pool, norm=norm).double()
        torch.testing.assert_close(reader(space.permuted(x, order)), reader(x), atol=1e-10, rtol=0)
        editor = DWSNet(widths, channels=3, pool=pool, norm=norm, scale=1.0).double()
        wanted = space.permuted(editor(x), order)
        torch.testing.assert_close(editor(space.permuted(x, order)), wanted, atol=1e-10, rtol=0)
        assert editor(x).std() > 0.05 and not torch.allclose(wanted, editor(x), atol=0.01)


@pytest.mark.parametrize("widths", [(2, 3, 2), (1, 3, 4, 2), (2, 2, 3, 2, 1)])
def test_one_free_parameter_for_each_map(widths):
    """As many as Burnside's lemma counts, all independent, and none that is not equivariant (the test above)."""
    space = WeightSpace(widths)
    places, hidden = torch.arange(space.count)[None], range(1, len(widths) - 1)
    group = list(product(*(permutations(range(widths[m])) for m in hidden)))
    fixed = [
        int((space.permuted(places, {m: torch.tensor([p]) for m, p in zip(hidden, g, strict=True)}) == places).sum())
        for g in group
    ]
    layer = Equivariant(space, 1, 1, pool="mean").double()
    count = sum(p.numel() for p in layer.parameters())
    assert count == sum(f * f + f for f in fixed) / len(group)
    assert sum(p.numel() for p in Invariant(space, 1, 1).parameters()) == sum(fixed) / len(group) + 1
    x = space.split(torch.cat([torch.zeros(1, space.count), torch.eye(space.count)]).double())
    weights = {n: p.detach() for n, p in layer.named_parameters()}
    slopes = torch.func.jacrev(lambda w: space.join(torch.func.functional_call(layer, w, (x,))))(weights)
    assert torch.linalg.matrix_rank(torch.cat([s.flatten(0, 1).flatten(1) for s in slopes.values()], 1)) == count


def test_the_table_of_cases_for_matrices():
    """The paper's rows for matrix to matrix with one feature: twice for each shared axis, and all pairs of fixed neurons."""
    space = WeightSpace((2, 3, 4, 3, 5))
    table = {
        (a, b): sum(space.features[a] * space.features[b] for among in space.kept.values() if a in among and b in among)
        for a, b in product((0, 2, 4, 6), repeat=2)
    }
    assert [table[0, b] for b in (0, 2, 4, 6)] == [2 * 2 * 2, 2 * 2, 2, 2 * 5]
    assert [table[2, b] for b in (0, 2, 4, 6)] == [2 * 2, 4, 2, 5]
    assert [table[6, b] for b in (0, 2, 4, 6)] == [5 * 2, 5, 2 * 5, 2 * 5 * 5]


@pytest.mark.parametrize("pool", POOLS)
def test_figures_of_the_authors_code(pool):
    """``DWSLayer`` of AvivNavon/DWSNets, set_layer="ds", each block's weights one constant and no biases; and its count of weights."""
    space = WeightSpace((2, 3, 4, 3, 1))
    layer = Equivariant(space, 2, 3, pool=pool).double()
    for (kept, among), dense in zip(space.kept.items(), layer.maps, strict=True):
        rows = []
        for b in among:
            constants = [((7 * a + 3 * b + 5 * len(kept) + sum(kept)) % 11 - 5) / 10 for a in among]
            blocks = [
                torch.full((3 * space.features[b], 2 * space.features[a]), c, dtype=torch.double)
                for a, c in zip(among, constants, strict=True)
            ]
            rows.append(torch.cat(blocks, 1))
        dense.weight.data = torch.cat(rows)
        if dense.bias is not None:
            nn.init.zeros_(dense.bias)
    x = torch.sin(torch.arange(2 * space.count * 2, dtype=torch.double) * 0.7).reshape(2, space.count, 2)
    y = space.join(layer(space.split(x)))
    found = [y[1, 0, 0], y[1, 12, 0], y[1, 36, 0], y.sum(), y.abs().sum()]
    wanted = {
        "max": [0.0034865003797, 0.1869104523844, -0.0350496829328, -7.0005246569448, 40.3793961806157],
        "mean": [-0.0985828904695, 0.1777250592394, 0.2115402877347, 1.6213416520074, 25.9189003964607],
    }[pool]
    torch.testing.assert_close(torch.stack(found), torch.tensor(wanted, dtype=torch.double), atol=1e-8, rtol=0)
    assert sum(d.weight.numel() for d in layer.maps) == 702


def test_initial_weights_are_those_of_each_block():
    """Standard deviation 2 sqrt(i / (o (i + o))) for i features to o, a quarter of it where four maps of a middle matrix add up."""
    torch.manual_seed(0)
    space = WeightSpace((4, 8, 8, 1))
    layer = Equivariant(space, 16, 32, scale=0.1)
    pairs = layer.maps[3].weight  # both axes of the middle matrix kept
    torch.testing.assert_close(pairs.std().item(), 0.1 * 2 * (16 / (32 * 48)) ** 0.5 / 4, rtol=0.1, atol=0)
    first = layer.maps[1].weight[: 4 * 32, : 4 * 16]
    torch.testing.assert_close(first.std().item(), 0.1 * 2 * (64 / (128 * 192)) ** 0.5, rtol=0.1, atol=0)
    assert layer.maps[0].bias.abs().max() <= 1e-4 and layer.maps[1].bias is None
    assert (
        DWSNet((2, 3, 1), norm=False)(torch.randn(4, 13)).abs().max() < 1e-4
    )  # a change of the weights begins near zero


def test_weights_of_models_and_what_they_compute():
    models = [mlp() for _ in range(3)]
    space, flat = WeightSpace.of(*models)
    assert space.widths == (2, 5, 4, 3) and flat.shape == (3, space.count)
    x = torch.randn(7, 2)
    torch.testing.assert_close(space.run(flat, x), torch.stack([m(x) for m in models]))
    own = torch.randn(3, 7, 2)
    torch.testing.assert_close(space.run(flat, own)[1], models[1](own[1]))
    shuffled = space.shuffled(flat, torch.Generator().manual_seed(0))
    assert not torch.equal(shuffled, flat)
    torch.testing.assert_close(space.run(shuffled, x), space.run(flat, x))
    vector_to_parameters(shuffled[2], models[2].parameters())
    torch.testing.assert_close(models[2](x), space.run(flat, x)[2])


def test_split_and_join_are_inverse_and_statistics_do_not_tell_neurons_apart():
    for widths in WIDTHS:
        space = WeightSpace(widths)
        for x in (numbers(space), numbers(space, features=(4,))):
            assert torch.equal(space.join(space.split(x)), x)
    x = 3 + 2 * numbers(space, 50)
    mean, deviation = space.statistics(x)
    for whole in (mean, deviation):
        assert torch.equal(space.shuffled(whole[None])[0], whole)
    first = x[:, : 4 * 3].view(50, 4, 3)  # [neurons, inputs]: each input has its own
    torch.testing.assert_close(mean[:12].view(4, 3), first.mean((0, 1)).expand(4, 3))
    torch.testing.assert_close(deviation[:12].view(4, 3), first.flatten(0, 1).std(0).expand(4, 3))


def test_normalisation_is_of_each_feature_of_each_tensor():
    space = WeightSpace((2, 3, 4, 2))
    x = space.split(numbers(space, 20, (5,)) * torch.arange(1, 6))
    for y in Normalise(space, 5).double()(x):
        flat = y.reshape(-1, 5)
        torch.testing.assert_close(flat.mean(0), torch.zeros(5).double(), atol=1e-6, rtol=0)
        torch.testing.assert_close(flat.std(0, correction=0), torch.ones(5).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: WeightSpace((2, 3)), r"widths \(2, 3\); expected at least three"),
        (lambda: DWSNet((2, 0, 1), 3), "at least 1"),
        (lambda: DWSNet((2, 3, 1), 0), "outputs 0; expected at least 1"),
        (lambda: DWSNet((2, 3, 1), pool="sum"), "pool 'sum'; expected one of"),
        (lambda: DWSNet((2, 3, 1))(torch.randn(2, 12)), r"\(2, 12\); expected \[batch, 13\]"),
        (lambda: DWSNet((2, 3, 1), inputs=2)(torch.randn(2, 13)), "with 2 features each"),
        (lambda: WeightSpace.of(nn.Conv1d(2, 3, 1)), "not a chain of linear layers"),
        (lambda: WeightSpace.of(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))), "not a chain"),
        (lambda: WeightSpace.of(mlp(), mlp((2, 5, 3, 3))), "expected models of one shape"),
        (lambda: DWSNet.for_task(DataShape("vector", "classes", classes=3, features=50)), "the task gives 50"),
    ],
)
def test_bad_input_is_told(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_task_of_the_users_own_names_the_widths():
    shape = DataShape("vector", "values", classes=2, features=13)
    assert DWSNet.for_task(shape, widths=(2, 3, 1), channels=4)(torch.randn(5, 13)).shape == (5, 2)
    fields = DataShape("vector", "classes", classes=10, features=WeightSpace(FIELDS).count)
    assert DWSNet.for_task(fields, channels=4)(torch.randn(5, fields.features)).shape == (5, 10)


def test_fields_show_their_digits_and_classifiers_classify():
    space, flat, labels = fields(count=30, steps=150)
    assert flat.shape == (30, space.count) and labels.shape == (30,)
    wanted = datasets.digits()[0][:30].flatten(1) / 8 - 1
    seen = space.run(flat, grid(8, 8), sine).squeeze(-1)
    assert (seen - wanted).square().mean() < 0.1 * wanted.var()
    found = zoo(count=30, steps=60)
    (_, _), (held, truth) = small_digits()
    right = (found.space.run(found.flat, held).argmax(-1) == truth).float().mean(1)
    torch.testing.assert_close(found.accuracy, right)
    assert found.accuracy.max() > 0.3 and found.accuracy.std() > 0.05


def test_descent_on_many_networks_is_adam_on_each():
    torch.manual_seed(0)
    stack = Stack(3, Layout(2, 1, width=4, depth=1))
    wanted = [nn.Parameter(row.detach().clone()) for row in stack.flat]
    for row, lr in zip(wanted, (0.1, 0.01, 0.03), strict=True):
        optimiser = torch.optim.Adam([row], lr=lr)
        for _ in range(5):
            optimiser.zero_grad()
            row.square().sum().backward()
            optimiser.step()
    _descend(stack, lambda flat, step: flat.square().sum(1), 5, torch.tensor([[0.1], [0.01], [0.03]]))
    torch.testing.assert_close(stack.flat, torch.stack([w.detach() for w in wanted]))
