"""Add the edges that lower a graph's total effective resistance the most."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interlayer.core.example import Example
from interlayer.core.extras import need

if TYPE_CHECKING:
    from torch_geometric.data import Data
    from torch_geometric.transforms import BaseTransform
else:
    BaseTransform = need("torch_geometric.transforms", "graph", "EffectiveResistance").BaseTransform

Edges = Int[Tensor, "2 E"]


def components(edge_index: Edges, num_nodes: int) -> list[Int[Tensor, " n"]]:
    """The nodes of each connected component; the direction of edges doesn't matter.

    Raises:
        ValueError: ``edge_index`` is not [2, E], or names a node that doesn't exist.

    Examples:
        >>> [c.tolist() for c in components(torch.tensor([[0, 3], [2, 1]]), 5)]
        [[0, 2], [1, 3], [4]]
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    if edge_index.ndim != 2 or len(edge_index) != 2:
        raise ValueError(f"components: edge_index has shape {tuple(edge_index.shape)}; expected [2, edges].")
    if edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < num_nodes:
        span = f"{int(edge_index.min())} to {int(edge_index.max())}"
        raise ValueError(f"components: edge_index names nodes {span}; expected 0 to {num_nodes - 1}.")
    if not num_nodes:
        return []
    row, column = edge_index.numpy(force=True)
    adjacency = coo_matrix(([True] * len(row), (row, column)), shape=(num_nodes, num_nodes))
    label = torch.as_tensor(connected_components(adjacency, directed=False)[1]).long()
    return [c.to(edge_index.device) for c in label.argsort(stable=True).split(label.bincount().tolist())]


def adjacency(edge_index: Edges, nodes: Int[Tensor, " n"], num_nodes: int) -> Float[Tensor, "n n"]:
    """The symmetric 0-1 adjacency of some nodes in float64, without loops and repeated edges."""
    place = nodes.new_full((num_nodes,), -1)
    place[nodes] = torch.arange(len(nodes), device=nodes.device)
    row, column = place[edge_index]
    inside = (row >= 0) & (column >= 0) & (row != column)
    matrix = torch.zeros(len(nodes), len(nodes), dtype=torch.float64, device=nodes.device)
    matrix[row[inside], column[inside]] = matrix[column[inside], row[inside]] = 1
    return matrix


def pseudo_inverse(adjacency: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The pseudo-inverse of the Laplacian L of a connected graph, by ``pinv(L) = inv(L + J / n) - J / n`` with J all ones."""
    n = len(adjacency)
    laplacian = adjacency.sum(1).diag() - adjacency
    return torch.cholesky_inverse(torch.linalg.cholesky(laplacian + 1 / n)).contiguous() - 1 / n


def _between(inverse: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """x' P x for x = e_s - e_t, for all pairs."""
    diagonal = inverse.diagonal()
    return diagonal[:, None] + diagonal - 2 * inverse


class Resistances:
    """The effective resistances of one connected graph, kept up to date while edges are added.

    It holds ``denominator = 1 + R`` and ``biharmonic = B`` for all pairs, where R_st = |x|^2 in the metric of pinv(L) and
    B_st in that of pinv(L)^2, with x = e_s - e_t. Adding the edge {s, t} is an update of rank one of pinv(L), and of rank
    three and four of the two matrices: O(n^2) each, without a matrix product.

    Args:
        adjacency: Symmetric, 0 or 1, connected.

    Examples:
        >>> path = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]], dtype=torch.float64)
        >>> graph = Resistances(path)
        >>> round(graph.total, 6), graph.best()[1:]
        (4.0, (0, 2))
        >>> graph.add(0, 2)
        >>> round(graph.total, 6), graph.best()
        (2.0, None)
    """

    def __init__(self, adjacency: Float[Tensor, "n n"]) -> None:
        inverse = pseudo_inverse(adjacency)
        square = inverse @ inverse
        self.diagonal, self.square_diagonal = inverse.diagonal().clone(), square.diagonal().clone()
        self.denominator, self.biharmonic = 1 + _between(inverse), _between(square)
        taken = adjacency.clone()
        taken.fill_diagonal_(1)
        self._taken = taken.flatten().nonzero()[:, 0]
        self._gain = torch.empty_like(inverse)

    @property
    def total(self) -> float:
        """The sum over all pairs of nodes: n times the trace of the pseudo-inverse."""
        return len(self.diagonal) * float(self.diagonal.sum())

    def best(self) -> tuple[float, int, int] | None:
        """The edge that isn't there and lowers the total the most, with by how much; None where there is none."""
        n = len(self.diagonal)
        if len(self._taken) >= n * n:
            return None
        torch.div(self.biharmonic, self.denominator, out=self._gain)
        self._gain.view(-1).index_fill_(0, self._taken, -1.0)
        s = int(self._gain.amax(1).argmax())  # six times as fast as the argmax of the whole matrix
        t = int(self._gain[s].argmax())
        return n * float(self._gain[s, t]), min(s, t), max(s, t)

    def add(self, s: int, t: int) -> None:
        """Add the edge {s, t}."""
        d, b, p, q = self.denominator, self.biharmonic, self.diagonal, self.square_diagonal
        # v = pinv(L) x and w = pinv(L)^2 x, from P_is = (P_ii + P_ss + 1 - d_is) / 2
        v = (d[:, t] - d[:, s] + p[s] - p[t]) / 2
        w = (b[:, t] - b[:, s] + q[s] - q[t]) / 2
        c = 1 / d[s, t]
        # pinv(L) - c v v', and its square: pinv(L)^2 - a v' - v a'
        a = c * w - c.square() / 2 * v.dot(v) * v
        one = torch.ones_like(v)
        p.sub_(c * v.square())
        q.sub_(2 * a * v)
        d.addmm_(torch.stack([-c * v.square(), one, 2 * c * v], 1), torch.stack([one, -c * v.square(), v]))
        b.addmm_(torch.stack([-2 * a * v, one, 2 * a, 2 * v], 1), torch.stack([one, -2 * a * v, v, a]))
        n = len(p)
        self._taken = torch.cat([self._taken, self._taken.new_tensor([s * n + t, t * n + s])])


def effective_resistance(edge_index: Edges, num_nodes: int) -> Float[Tensor, "n n"]:
    """The effective resistance between all pairs of nodes; infinite between components.

    Every edge has resistance 1; loops, repeated edges and directions don't count.

    Raises:
        ValueError: See ``components``.

    Examples:
        >>> effective_resistance(torch.tensor([[0, 1], [1, 2]]), 3).round(decimals=6)
        tensor([[0., 1., 2.],
                [1., 0., 1.],
                [2., 1., 0.]], dtype=torch.float64)
    """
    found = torch.full((num_nodes, num_nodes), torch.inf, dtype=torch.float64, device=edge_index.device)
    for nodes in components(edge_index, num_nodes):
        found[nodes[:, None], nodes] = _between(pseudo_inverse(adjacency(edge_index, nodes, num_nodes)))
    return found


def total_resistance(edge_index: Edges, num_nodes: int) -> float:
    """The sum of the effective resistances over all connected pairs of nodes.

    Raises:
        ValueError: See ``components``.

    Examples:
        >>> round(total_resistance(torch.tensor([[0, 1], [1, 2]]), 3), 6)
        4.0
    """
    parts = (adjacency(edge_index, nodes, num_nodes) for nodes in components(edge_index, num_nodes))
    return sum(len(a) * float(pseudo_inverse(a).trace()) for a in parts)


def jacobian_bound(
    edge_index: Edges, num_nodes: int, layers: int, *, update: float = 1.0, message: float = 1.0
) -> Float[Tensor, "n n"]:
    r"""The paper's bound on $\|\partial h_v^{(r)} / \partial h_u^{(0)}\|$, for all pairs of nodes.

    For layers $h_v' = \phi(h_v, \sum_u \hat A_{vu} \psi(h_u))$ with $\hat A = D^{-1/2} A D^{-1/2}$, $\|\nabla \phi\| \le
    \alpha$ and $\max(\|\nabla \psi\|, 1) \le \beta$, where $\mu < 1$ is the second largest absolute eigenvalue of $\hat A$,

    $$\left\|\frac{\partial h_v^{(r)}}{\partial h_u^{(0)}}\right\| \le (2 \alpha \beta)^r \, \frac{d_{\max}}{2}
      \left(\frac{2}{d_{\min}} \left(r + 1 + \frac{\mu^{r+1}}{1 - \mu}\right) - R_{uv}\right).$$

    The greater the resistance between two nodes, the less one can hear of the other. In a bipartite component $\mu = 1$, and
    the bound is infinite; between components nothing passes, and it is 0.

    Args:
        edge_index: [2, E].
        num_nodes: Nodes n.
        layers: Layers r.
        update: Bound $\alpha$ on the Jacobian of $\phi$.
        message: Bound $\beta$ on the Jacobian of $\psi$, at least 1.

    Raises:
        ValueError: ``layers`` is below 1, ``update`` is not positive or ``message`` below 1; see also ``components``.

    Examples:
        >>> bound = jacobian_bound(torch.tensor([[0, 1, 2, 2], [1, 2, 0, 3]]), 4, layers=3)
        >>> bool(bound[0, 3] < bound[0, 2])
        True
    """
    if layers < 1 or not update > 0 or not message >= 1:
        raise ValueError(
            f"jacobian_bound: layers={layers}, update={update}, message={message}; expected at least 1, above 0, at least 1."
        )
    found = torch.zeros(num_nodes, num_nodes, dtype=torch.float64, device=edge_index.device)
    for nodes in components(edge_index, num_nodes):
        matrix = adjacency(edge_index, nodes, num_nodes)
        degree = matrix.sum(1)
        if len(nodes) == 1:
            found[nodes, nodes] = (2 * update * message) ** layers
            continue
        values = torch.linalg.eigvalsh(matrix / (degree[:, None] * degree).sqrt())
        mu = max(float(values[-2]), -float(values[0]))
        tail = mu ** (layers + 1) / (1 - mu) if mu < 1 - 1e-12 else torch.inf
        room = 2 / degree.min() * (layers + 1 + tail) - _between(pseudo_inverse(matrix))
        found[nodes[:, None], nodes] = (2 * update * message) ** layers * degree.max() / 2 * room
    return found


class EffectiveResistance(BaseTransform):
    r"""Adds the edges that lower a graph's total effective resistance the most, one after the other.

    From `Understanding Oversquashing in GNNs through the Lens of Effective Resistance <https://arxiv.org/abs/2302.06835>`_.
    With the pseudo-inverse $L^+$ of the Laplacian and $x = e_s - e_t$, the effective resistance is $R_{st} = x^\top L^+ x$,
    and the edge $\{s, t\}$ lowers the total $R_{tot} = \sum_{s < t} R_{st} = n \operatorname{tr} L^+$ by

    $$n \, \frac{x^\top (L^+)^2 x}{1 + x^\top L^+ x}.$$

    Each step adds the best edge that isn't there within a component (never a loop) and updates $L^+$ by the matrix
    $-L^+ x x^\top L^+ / (1 + R_{st})$ of rank one: $O(n^2)$ time for an edge, and $24 n^2$ bytes of memory. Components stay
    apart, as in the paper: each counts with its own number of nodes n (the authors' code leaves out this factor, which
    matters only between components).

    ``edge_type`` marks the new edges: it is 0 and 1 where the data has no ``edge_type``, otherwise one more than the largest.
    Other attributes of edges are 0 for the new ones, except ``edge_weight``, which is 1. Resistances ignore weights,
    directions, loops and repeated edges. A graph that has no room for as many edges gets as many as fit.

    Args:
        edges: Undirected edges to add; each becomes two columns of ``edge_index``.

    Shapes: ``edge_index`` [2, E] to [2, E + 2 edges].

    Raises:
        ValueError: ``edges`` is below 1; the data has no ``edge_index``, or it names a node that doesn't exist.
        TypeError: The data is not a ``torch_geometric.data.Data``, or is a batch.
        ImportError: PyTorch Geometric is not installed.

    Examples:
        >>> from torch_geometric.data import Data
        >>> path = Data(edge_index=torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]]), num_nodes=4)
        >>> rewired = EffectiveResistance(edges=1)(path)
        >>> rewired.edge_index[:, -2:].tolist(), rewired.edge_type.tolist()
        ([[0, 3], [3, 0]], [0, 0, 0, 0, 0, 0, 1, 1])
        >>> round(total_resistance(path.edge_index, 4), 6), round(total_resistance(rewired.edge_index, 4), 6)
        (10.0, 5.0)
    """

    def __init__(self, *, edges: int = 10) -> None:
        if edges < 1:
            raise ValueError(f"EffectiveResistance: edges={edges}; expected at least 1.")
        self.edges = edges

    def forward(self, data: Data) -> Data:
        """The graph with more edges; ``BaseTransform`` gives a shallow copy, so the input stays as it is."""
        from torch_geometric.data import Batch, Data

        if not isinstance(data, Data) or isinstance(data, Batch):
            raise TypeError(
                f"EffectiveResistance: data is a {type(data).__name__}; expected one torch_geometric.data.Data. "
                "Transform each graph before batching."
            )
        if data.edge_index is None or data.num_nodes is None:
            raise ValueError("EffectiveResistance: the data has no edge_index; expected [2, edges].")
        new, old = self.choose(data.edge_index, data.num_nodes), data.edge_index.shape[1]
        if "edge_type" not in data:
            data.edge_type = data.edge_index.new_zeros(old)
        for key, value in data.to_dict().items():
            if key != "edge_index" and isinstance(value, Tensor) and data.is_edge_attr(key):
                extra = value.new_full((new.shape[1], *value.shape[1:]), key == "edge_weight")
                if key == "edge_type":
                    extra += value.max() + 1 if old else 1
                data[key] = torch.cat([value, extra])
        data.edge_index = torch.cat([data.edge_index, new], 1)
        return data

    def choose(self, edge_index: Edges, num_nodes: int) -> Int[Tensor, "2 E"]:
        """The new edges in the order in which they are chosen, each in both directions."""
        groups = [nodes for nodes in components(edge_index, num_nodes) if len(nodes) > 2]
        graphs = [Resistances(adjacency(edge_index, nodes, num_nodes)) for nodes in groups]
        best = {i: found for i, graph in enumerate(graphs) if (found := graph.best())}
        chosen: list[Tensor] = []
        while best and len(chosen) < self.edges:
            at, (_, s, t) = max(best.items(), key=lambda item: item[1][0])
            chosen.append(groups[at][edge_index.new_tensor([[s, t], [t, s]])])
            graphs[at].add(s, t)
            if found := graphs[at].best():
                best[at] = found
            else:
                del best[at]
        return torch.cat(chosen, 1) if chosen else edge_index.new_zeros(2, 0)

    def __repr__(self) -> str:
        return f"EffectiveResistance(edges={self.edges})"


def _graph(nodes: int = 12, more: int = 3) -> tuple[Data]:
    from torch_geometric.data import Data

    tree = torch.stack([torch.arange(1, nodes), (torch.rand(nodes - 1) * torch.arange(1, nodes)).long()])
    edges = torch.cat([tree, torch.randint(nodes, (2, more))], 1)
    return (Data(x=torch.randn(nodes, 3), edge_index=torch.cat([edges, edges.flip(0)], 1)),)


def _known() -> dict[str, tuple[float, float, float]]:
    n = 9
    i = torch.arange(n)
    path = torch.stack([i[:-1], i[1:]])
    graphs = {
        "path": (path, (n**3 - n) / 6),
        "cycle": (torch.stack([i, (i + 1) % n]), (n**3 - n) / 12),
        "complete graph": (torch.combinations(i).T, n - 1),
        "star": (torch.stack([torch.zeros(n - 1, dtype=torch.long), i[1:]]), (n - 1) ** 2),
        "two paths": (torch.cat([path[:, : n - 4], path[:, n - 3 :]], 1), ((n - 3) ** 3 - (n - 3)) / 6 + 4),
    }
    found = {name: (total_resistance(e, n), float(exact), 1e-9) for name, (e, exact) in graphs.items()}
    square = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    more = torch.cat([square, EffectiveResistance(edges=1).choose(square, 4)], 1)
    return {**found, "a diagonal of the square": (total_resistance(more, 4), 4.0, 1e-9)}


def _numbering_is_free(transform: EffectiveResistance, data: Data) -> bool:
    # Of two equally good edges, as at twin leaves, rounding may choose either: totals are compared, not edges.
    n = int(data.num_nodes or 0)
    order = torch.randperm(n)
    moved = data.clone()
    moved.edge_index = order.argsort()[data.edge_index]
    one, two = (total_resistance(transform(d).edge_index, n) for d in (data, moved))
    return abs(one - two) < 1e-9 * one


def _old_edges_stay(transform: EffectiveResistance, data: Data) -> bool:
    found = transform(data)
    new = found.edge_index[:, found.edge_type == 1]
    return bool((found.edge_index[:, found.edge_type == 0] == data.edge_index).all() and (new[0] != new[1]).all())


EXAMPLE = Example(
    make=lambda: EffectiveResistance(edges=4),
    inputs=_graph,
    known=_known,
    invariances={
        "the total under another numbering of the nodes": _numbering_is_free,
        "the old edges, and no loops": _old_edges_stay,
    },
)
