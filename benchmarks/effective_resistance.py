"""One step of effective-resistance rewiring: rank-one updates against computing the pseudo-inverse anew.

    python -m benchmarks.effective_resistance [--nodes 2000] [--rounds 3]

A step chooses the best edge and adds it. The peers add the same edge to the Laplacian, then compute pinv(L) and its square
again, once with ``torch.linalg.pinv(hermitian=True)`` and once as inv(L + J / n) - J / n by Cholesky, which is the fastest form
we know, and choose the next edge from them. After three steps all ways must have chosen the same edges and agree on every
resistance to 1e-9.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.harness import compare
from interlayer.domains.graph.effective_resistance import Resistances, pseudo_inverse


def graph(nodes: int) -> torch.Tensor:
    """The adjacency of a random tree with half as many extra edges."""
    generator = torch.Generator().manual_seed(0)
    parent = (torch.rand(nodes - 1, generator=generator) * torch.arange(1, nodes)).long()
    edges = torch.cat(
        [torch.stack([torch.arange(1, nodes), parent]), torch.randint(nodes, (2, nodes // 2), generator=generator)], 1
    )
    edges = edges[:, edges[0] != edges[1]]
    adjacency = torch.zeros(nodes, nodes, dtype=torch.float64)
    adjacency[edges[0], edges[1]] = adjacency[edges[1], edges[0]] = 1
    return adjacency


def by_pinv(adjacency):
    return torch.linalg.pinv(adjacency.sum(1).diag() - adjacency, hermitian=True)


class Anew:
    """The same greedy algorithm without updates."""

    def __init__(self, adjacency, inverse):
        self.adjacency, self.inverse = adjacency.clone(), inverse

    def step(self):
        inverse = self.inverse(self.adjacency)
        square = inverse @ inverse
        p, q = inverse.diagonal(), square.diagonal()
        self.resistance = p[:, None] + p - 2 * inverse
        gain = (q[:, None] + q - 2 * square) / (1 + self.resistance)
        gain[self.adjacency > 0] = -1
        gain.fill_diagonal_(-1)
        s, t = divmod(int(gain.argmax()), len(gain))
        self.adjacency[s, t] = self.adjacency[t, s] = 1
        return min(s, t), max(s, t)


class Updated:
    def __init__(self, adjacency):
        self.state = Resistances(adjacency)

    def step(self):
        found = self.state.best()
        self.state.add(*found[1:])
        return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    adjacency = graph(args.nodes)
    ways = {
        "rank-one updates": Updated(adjacency),
        "pinv anew": Anew(adjacency, by_pinv),
        "Cholesky inverse anew": Anew(adjacency, pseudo_inverse),
    }

    def agree() -> bool:
        steps = [[way.step() for _ in range(3)] for way in ways.values()]
        for way in list(ways.values())[1:]:
            last = pseudo_inverse(way.adjacency)
            resistance = last.diagonal()[:, None] + last.diagonal() - 2 * last
            if (resistance - (ways["rank-one updates"].state.denominator - 1)).abs().max() > 1e-9:
                return False
        return steps[0] == steps[1] == steps[2]

    compare(
        f"effective-resistance: one edge on {args.nodes} nodes",
        {name: way.step for name, way in ways.items()},
        agree=agree,
        rounds=args.rounds,
        goal={"pinv anew": 1 / 20, "Cholesky inverse anew": 1 / 20},
    )
    for nodes in (500, 1000, 2000, 4000):
        way = Updated(graph(nodes))
        start = time.perf_counter()
        for _ in range(5):
            way.step()
        print(f"  {nodes} nodes: {(time.perf_counter() - start) / 5 * 1000:.1f} ms for an edge")


if __name__ == "__main__":
    main()
