import importlib.util
import itertools
import sys

import networkx as nx
import numpy as np
import pytest
import torch
from torch import nn
from torch_geometric.data import Batch, Data, HeteroData
from torch_geometric.utils import contains_self_loops, is_undirected

from interlayer.domains.graph.effective_resistance import (
    EffectiveResistance,
    Resistances,
    adjacency,
    effective_resistance,
    jacobian_bound,
    total_resistance,
)


def graph(nodes, more, seed):
    """A random tree and some more edges, in both directions."""
    generator = torch.Generator().manual_seed(seed)
    place = (torch.rand(nodes - 1, generator=generator) * torch.arange(1, nodes)).long()
    extra = torch.randint(nodes, (2, more), generator=generator)
    edges = torch.cat([torch.stack([torch.arange(1, nodes), place]), extra[:, extra[0] != extra[1]]], 1)
    return torch.cat([edges, edges.flip(0)], 1)


def laplacian(edge_index, nodes):
    a = adjacency(edge_index, torch.arange(nodes), nodes).numpy()
    return np.diag(a.sum(1)) - a


def naive(edge_index, nodes):
    """Resistance of each pair by numpy's pseudo-inverse, as the definition says."""
    pinv, found = np.linalg.pinv(laplacian(edge_index, nodes)), np.zeros((nodes, nodes))
    for s, t in itertools.product(range(nodes), repeat=2):
        x = np.eye(nodes)[s] - np.eye(nodes)[t]
        found[s, t] = x @ pinv @ x
    return found


def test_resistance_is_that_of_the_pseudo_inverse_and_of_networkx():
    edges = graph(15, 5, 0)
    found = effective_resistance(edges, 15).numpy()
    np.testing.assert_allclose(found, naive(edges, 15), atol=1e-10)
    assert total_resistance(edges, 15) == pytest.approx(found[np.triu_indices(15)].sum())
    g = nx.Graph(edges.T.tolist())
    assert found[2, 7] == pytest.approx(nx.resistance_distance(g, 2, 7))
    assert total_resistance(edges, 15) == pytest.approx(nx.effective_graph_resistance(g))


def test_loops_repetitions_and_direction_do_not_count():
    one = torch.tensor([[0, 1], [1, 2]])
    other = torch.tensor([[0, 0, 1, 1, 2], [1, 1, 0, 1, 1]])
    torch.testing.assert_close(effective_resistance(one, 3), effective_resistance(other, 3))


def test_updates_are_the_pseudo_inverse_of_the_larger_graph():
    edges, n = graph(40, 10, 3), 40
    state = Resistances(adjacency(edges, torch.arange(n), n))
    for _ in range(60):
        gain, s, t = state.best()
        before = state.total
        state.add(s, t)
        edges = torch.cat([edges, torch.tensor([[s, t], [t, s]])], 1)
        assert before - state.total == pytest.approx(gain, rel=1e-9)
    pinv = np.linalg.pinv(laplacian(edges, n), hermitian=True)
    square = pinv @ pinv
    for found, matrix in ((state.denominator - 1, pinv), (state.biharmonic, square)):
        d = np.diag(matrix)
        np.testing.assert_allclose(found, d[:, None] + d - 2 * matrix, atol=1e-12)
    assert state.total == pytest.approx(total_resistance(edges, n), rel=1e-12)


def test_each_edge_is_the_best_of_all():
    edges, n = graph(9, 2, 5), 9
    for s, t in EffectiveResistance(edges=4).choose(edges, n).T[::2].tolist():
        present = {tuple(e) for e in edges.T.tolist()}
        trials = {
            pair: total_resistance(torch.cat([edges, torch.tensor([pair]).T], 1), n)
            for pair in itertools.combinations(range(n), 2)
            if pair not in present
        }
        assert trials[s, t] == pytest.approx(min(trials.values()))
        edges = torch.cat([edges, torch.tensor([[s, t], [t, s]])], 1)


# Six edges on random graphs without equally good edges, by the authors' code (blackmit/gtr_rewiring, src/gtr.py).
AUTHORS = [
    (12, 3, 0, 121.869565, 49.711149, [[9, 10], [5, 11], [5, 9], [2, 7], [8, 11], [4, 6]]),
    (20, 20, 1, 173.711111, 111.837548, [[15, 19], [11, 19], [15, 16], [18, 19], [2, 12], [1, 14]]),
    (30, 25, 2, 479.114539, 327.545149, [[15, 25], [4, 24], [15, 27], [4, 9], [24, 25], [27, 28]]),
]


@pytest.mark.parametrize(("n", "more", "seed", "before", "after", "chosen"), AUTHORS)
def test_numbers_of_the_authors_code(n, more, seed, before, after, chosen):
    edges = graph(n, more, seed)
    new = EffectiveResistance(edges=6).choose(edges, n)
    assert new[:, ::2].T.sort(1).values.tolist() == chosen
    assert total_resistance(edges, n) == pytest.approx(before, abs=1e-5)
    assert total_resistance(torch.cat([edges, new], 1), n) == pytest.approx(after, abs=1e-5)


def test_components_stay_apart_and_the_larger_gain_goes_first():
    # a path of 3, a path of 6, a lone node
    edges = torch.tensor([[0, 1, 3, 4, 5, 6, 7], [1, 2, 4, 5, 6, 7, 8]])
    assert torch.isinf(effective_resistance(edges, 10)[0, 3])
    assert total_resistance(edges, 10) == pytest.approx(4 + 35)
    new = EffectiveResistance(edges=20).choose(edges, 10)[:, ::2].T.tolist()
    assert new[0][0] >= 3 and [0, 2] in new and len(new) == 1 + 10  # all that there is room for
    assert all((s < 3) == (t < 3) and 9 not in (s, t) for s, t in new)


def test_full_graphs_get_no_loops():
    square = Data(edge_index=torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]]), num_nodes=4)
    found = EffectiveResistance(edges=10)(square)
    assert found.edge_index.shape[1] == 8 and not contains_self_loops(found.edge_index)
    again = EffectiveResistance(edges=10)(found)
    assert torch.equal(again.edge_index, found.edge_index)
    empty = EffectiveResistance(edges=2)(Data(edge_index=torch.zeros(2, 0, dtype=torch.long), num_nodes=0))
    assert empty.edge_index.shape == (2, 0)


def test_attributes_of_edges_and_types():
    edges = graph(8, 2, 0)
    n = edges.shape[1]
    data = Data(edge_index=edges, edge_attr=torch.ones(n, 3), edge_weight=torch.full((n,), 0.5), num_nodes=8)
    found = EffectiveResistance(edges=2)(data)
    assert found.edge_type.tolist() == [0] * n + [1] * 4
    assert found.edge_attr[n:].eq(0).all() and found.edge_weight[n:].eq(1).all()
    assert is_undirected(found.edge_index) and found.validate()
    assert EffectiveResistance(edges=1)(found).edge_type.tolist() == [0] * n + [1] * 4 + [2] * 2
    assert data.edge_index is edges and "edge_type" not in data
    assert Batch.from_data_list([found, found]).edge_type.shape == (2 * n + 8,)


def test_bound_holds_for_the_jacobian_of_a_network():
    edges, n, layers = graph(9, 6, 2), 9, 3
    a = adjacency(edges, torch.arange(n), n)
    a = a / (a.sum(1)[:, None] * a.sum(1)).sqrt()
    torch.manual_seed(0)
    maps = [(nn.Linear(8, 4).double(), nn.Linear(4, 4).double()) for _ in range(layers)]
    update = max(float(torch.linalg.matrix_norm(p.weight.detach(), 2)) for p, _ in maps)
    message = max(1.0, *(float(torch.linalg.matrix_norm(m.weight.detach(), 2)) for _, m in maps))

    def network(h):
        for phi, psi in maps:
            h = torch.tanh(phi(torch.cat([h, a @ torch.tanh(psi(h))], 1)))
        return h

    jacobian = torch.autograd.functional.jacobian(network, torch.randn(n, 4).double()).permute(0, 2, 1, 3)
    measured = torch.linalg.matrix_norm(jacobian, 2)
    bound = jacobian_bound(edges, n, layers, update=update, message=message)
    assert (bound >= measured.T).all()


def test_bound_by_its_terms():
    # A triangle with a tail: the sum of the powers of the normalised adjacency never exceeds the bracket.
    edges, n = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 3]]), 4
    a = adjacency(edges, torch.arange(n), n)
    a = a / (a.sum(1)[:, None] * a.sum(1)).sqrt()
    for layers in (1, 2, 5, 20):
        powers = sum(torch.linalg.matrix_power(a, k) for k in range(layers + 1))
        bound = jacobian_bound(edges, n, layers) / 2**layers
        assert (powers <= bound + 1e-12).all()
        resistance = effective_resistance(edges, n)
        assert bound[0, 3] - bound[0, 1] == pytest.approx(float(1.5 * (resistance[0, 1] - resistance[0, 3])))
    assert torch.isinf(jacobian_bound(torch.tensor([[0], [1]]), 3, 2)[0, 1])  # bipartite
    assert jacobian_bound(torch.tensor([[0], [1]]), 3, 2)[0, 2] == 0  # another component


def test_bad_input_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="edges=0; expected at least 1"):
        EffectiveResistance(edges=0)
    with pytest.raises(TypeError, match="a HeteroData; expected"):
        EffectiveResistance(edges=1)(HeteroData())
    with pytest.raises(TypeError, match=r"a DataBatch; expected one .*graph before batching"):
        EffectiveResistance(edges=1)(Batch.from_data_list([Data(edge_index=graph(5, 0, 0), num_nodes=5)] * 2))
    with pytest.raises(ValueError, match="no edge_index"):
        EffectiveResistance(edges=1)(Data(x=torch.randn(3, 1)))
    with pytest.raises(ValueError, match="names nodes 0 to 5; expected 0 to 2"):
        total_resistance(torch.tensor([[0], [5]]), 3)
    with pytest.raises(ValueError, match=r"shape \(3, 2\)"):
        total_resistance(torch.zeros(3, 2, dtype=torch.long), 3)
    with pytest.raises(ValueError, match="layers=0"):
        jacobian_bound(torch.tensor([[0], [1]]), 2, 0)


def test_without_pytorch_geometric_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_geometric.transforms", None)
    spec = importlib.util.spec_from_file_location("fresh", sys.modules[EffectiveResistance.__module__].__file__)
    with pytest.raises(ImportError, match=r"EffectiveResistance needs .*interlayer\[graph\]"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
