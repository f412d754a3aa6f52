"""Networks of repeated cells, as DARTS searches them: the supernet of all candidates, and the plain network of a genotype."""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.config import configured
from interlayer.core.search.operations import OPERATIONS, Halved, Mixed, known, operation, projected
from interlayer.core.search.space import Point, Space

DERIVED = tuple(name for name in OPERATIONS if name != "none")  # what a genotype may hold


def cell_space(
    *,
    nodes: int = 4,
    inputs: int = 2,
    operations: Sequence[str] = DERIVED,
    kinds: Sequence[str] = ("normal", "reduce"),
) -> Space:
    """The space of DARTS: each node of a cell adds up operations on some of the nodes before it.

    Nodes 0 and 1 are the outputs of the two cells before. A point names for each node its ``inputs`` and an operation for
    each: ``{"normal": {"node2": {"inputs": [0, 1], "op0": "skip_connect", "op1": "sep_conv_3x3"}, ...}, "reduce": ...}``.

    Args:
        nodes: Nodes N of a cell beside its inputs.
        inputs: Inputs of each node.
        operations: Candidates.
        kinds: Kinds of cells that are searched apart.

    Raises:
        ValueError: Unknown operations, no nodes, or more inputs than nodes before the first.

    Examples:
        >>> cell_space(kinds=["normal"]).count  # 180 graphs of 8 edges with 7 operations each
        1037664180
    """
    names = known(operations)
    if nodes < 1 or not 1 <= inputs <= 2:
        raise ValueError(
            f"cell_space: nodes={nodes} with inputs={inputs}; expected at least one node, and 1 or 2 inputs, because the "
            "first node has two before it."
        )
    cell = {
        f"node{i}": Space(
            {
                "inputs": [list(pair) for pair in itertools.combinations(range(i), inputs)],
                **{f"op{k}": names for k in range(inputs)},
            }
        )
        for i in range(2, 2 + nodes)
    }
    return Space({kind: Space(cell) for kind in kinds})


def read_genotype(path: str | Path) -> Point:
    """A genotype from a JSON or TOML file.

    Raises:
        ValueError: Another kind of file.
    """
    path = Path(path)
    if path.suffix not in (".json", ".toml"):
        raise ValueError(f"read_genotype: {str(path)!r}; expected a file that ends in .json or .toml.")
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else tomllib.loads(text)


def kinds(layers: int) -> list[str]:
    """Which kind each cell is: at a third and at two thirds of the depth it halves the sides; below three cells none does."""
    reduce = {layers // 3, 2 * layers // 3} if layers > 2 else set()
    return ["reduce" if layer in reduce else "normal" for layer in range(layers)]


class Cell(nn.Module):
    """One cell: nodes that add up their edges, concatenated.

    Args:
        enter: What is done with the outputs of the two cells before.
        nodes: For each node its edges: the index of the node that is read, and the operation.
    """

    def __init__(self, enter: Sequence[nn.Module], nodes: Sequence[Sequence[tuple[int, nn.Module]]]) -> None:
        super().__init__()
        self.enter = nn.ModuleList(enter)
        self.sources = [[source for source, _ in edges] for edges in nodes]
        self.edges = nn.ModuleList(op for edges in nodes for _, op in edges)

    def forward(
        self, before: Float[Tensor, "B C H W"], x: Float[Tensor, "B D h w"], weights: Float[Tensor, "E O"] | None = None
    ) -> Float[Tensor, "B F h w"]:
        """Run the nodes in order; ``weights`` are those of mixed edges."""
        states = [enter(s) for enter, s in zip(self.enter, (before, x), strict=True)]
        rows = [()] * len(self.edges) if weights is None else [(w,) for w in weights.unbind()]
        edges = zip(self.edges, rows, strict=True)
        for sources in self.sources:
            terms = [edge(states[source], *row) for source, (edge, row) in zip(sources, edges, strict=False)]
            states.append(sum(terms[1:], terms[0]))
        return torch.cat(states[2:], 1)


@configured
class CellNet(nn.Module):
    """The plain network of a genotype (Liu et al., "DARTS: Differentiable Architecture Search", arXiv:1806.09055).

    A stem of 3 ``width`` channels, ``layers`` cells, global average pooling and a linear head. The cells at a third and two
    thirds of the depth halve the sides and double the channels. The auxiliary head and the dropped paths of the authors'
    training are left out.

    Args:
        channels: Channels C of the image.
        classes: Number of classes K.
        genotype: A point of ``cell_space``; its sizes are read from it. ``read_genotype`` reads one from a file.
        width: Channels of a node in the first cells.
        layers: Number of cells L; from 3 on two of them reduce.

    Shapes: [B, C, H, W] to [B, K].

    Raises:
        ValueError: A genotype that is no point of a cell space or lacks a kind of cell, or images of other channels.

    Examples:
        >>> import random
        >>> found = cell_space(nodes=2).sample(random.Random(0))
        >>> CellNet(1, 10, genotype=found, width=4, layers=3)(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    affine = True

    def __init__(
        self, channels: int = 3, classes: int = 10, *, genotype: Point, width: int = 16, layers: int = 8
    ) -> None:
        super().__init__()
        _checked(genotype, layers)
        self.genotype = genotype
        self._assemble(channels, classes, width, layers, len(genotype["normal"]))

    def _assemble(self, channels: int, classes: int, width: int, layers: int, nodes: int) -> None:
        if min(channels, classes, width, layers) < 1:
            raise ValueError(
                f"{type(self).__name__}: channels={channels}, classes={classes}, width={width}, layers={layers}; expected "
                "at least 1 each."
            )
        self.channels = channels
        self.kinds = kinds(layers)
        self.stem = nn.Sequential(nn.Conv2d(channels, 3 * width, 3, padding=1, bias=False), nn.BatchNorm2d(3 * width))
        self.cells = nn.ModuleList()
        sizes, halved = (3 * width, 3 * width), False
        for kind in self.kinds:
            width *= 1 + (kind == "reduce")
            first = Halved(sizes[0], width, self.affine) if halved else projected(sizes[0], width, self.affine)
            enter = (first, projected(sizes[1], width, self.affine))
            self.cells.append(Cell(enter, [self._edges(kind, i, width) for i in range(2, 2 + nodes)]))
            sizes, halved = (sizes[1], nodes * width), kind == "reduce"
        self.head = nn.Linear(sizes[1], classes)

    def _edges(self, kind: str, node: int, width: int) -> list[tuple[int, nn.Module]]:
        chosen = self.genotype[kind][f"node{node}"]
        return [
            (source, operation(chosen[f"op{k}"], width, stride=_stride(kind, source)))
            for k, source in enumerate(chosen["inputs"])
        ]

    def forward(
        self, x: Float[Tensor, "B C H W"], weights: Mapping[str, Float[Tensor, "E O"]] | None = None
    ) -> Float[Tensor, "B K"]:
        """Run the cells; ``weights`` are a supernet's, by kind of cell."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"{type(self).__name__}: input {tuple(x.shape)}; expected [B, {self.channels}, H, W].")
        before = now = self.stem(x)
        for kind, cell in zip(self.kinds, self.cells, strict=True):
            before, now = now, cell(before, now, weights[kind] if weights else None)
        return self.head(now.mean((2, 3)))


@configured
class Supernet(CellNet):
    """All networks of a cell space in one, with shared weights: every edge is the mixture of all operations.

    ``architecture`` holds one logit for each edge and operation, shared by the cells of a kind. Without ``weights``, the
    mixture is their softmax, as in DARTS; a search rule passes other weights. Memory and time grow with edges times
    operations: N (N + 3) / 2 edges for N nodes.

    Args:
        channels: Channels C of the image.
        classes: Number of classes K.
        width: Channels of a node in the first cells.
        layers: Number of cells L.
        nodes: Nodes N of a cell.
        operations: Candidates.

    Shapes: [B, C, H, W] to [B, K].

    Raises:
        ValueError: Unknown operations, none beside ``none``, or images of other channels.

    Examples:
        >>> net = Supernet(1, 10, width=4, layers=2, nodes=2, operations=["none", "skip_connect", "sep_conv_3x3"])
        >>> net(torch.randn(2, 1, 8, 8)).shape, net.architecture["normal"].shape
        (torch.Size([2, 10]), torch.Size([5, 3]))
        >>> net.plain(net.derive()).genotype == net.derive()
        True
    """

    affine = False

    def __init__(
        self,
        channels: int = 3,
        classes: int = 10,
        *,
        width: int = 16,
        layers: int = 8,
        nodes: int = 4,
        operations: Sequence[str] = tuple(OPERATIONS),
    ) -> None:
        nn.Module.__init__(self)
        self.operations = known(operations)
        self.candidates = [name for name in self.operations if name != "none"]
        self.space = cell_space(nodes=nodes, operations=self.candidates, kinds=sorted(set(kinds(layers))))
        self.sizes = {"channels": channels, "classes": classes, "width": width, "layers": layers}
        self.nodes, self.share = nodes, 0.0
        self._assemble(channels, classes, width, layers, nodes)
        edges = nodes * (nodes + 3) // 2
        # DARTS starts at nearly equal weights.
        self.architecture = nn.ParameterDict(
            {kind: nn.Parameter(1e-3 * torch.randn(edges, len(self.operations))) for kind in self.space.choices}
        )

    def _edges(self, kind: str, node: int, width: int) -> list[tuple[int, nn.Module]]:
        def mixed(stride: int) -> Mixed:
            made = {name: operation(name, width, stride=stride, affine=False) for name in self.operations}
            # Pools are normalised as the other candidates are.
            pools = {n: nn.Sequential(m, nn.BatchNorm2d(width, affine=False)) for n, m in made.items() if "pool" in n}
            return Mixed({**made, **pools})

        return [(source, mixed(_stride(kind, source))) for source in range(node)]

    def progress(self, share: float) -> None:
        """Take note of the share of the search that is done, for rules whose mixture follows it."""
        self.share = share

    def forward(
        self, x: Float[Tensor, "B C H W"], weights: Mapping[str, Float[Tensor, "E O"]] | None = None
    ) -> Float[Tensor, "B K"]:
        """Mix by ``weights``; defaults to the softmax of ``architecture``."""
        return super().forward(x, weights or {kind: a.softmax(-1) for kind, a in self.architecture.items()})

    def weight_parameters(self) -> list[nn.Parameter]:
        """All parameters but ``architecture``."""
        return [p for name, p in self.named_parameters() if not name.startswith("architecture.")]

    @torch.no_grad()
    def derive(self) -> Point:
        """The genotype of the strongest edges: for each node the two whose best operation has the largest softmax, ``none``
        left out."""
        real = [self.operations.index(name) for name in self.candidates]
        point: Point = {}
        for kind, logits in self.architecture.items():
            strength, best = logits.softmax(-1)[:, real].max(-1)
            point[kind], first = {}, 0
            for node in range(2, 2 + self.nodes):
                chosen = sorted(strength[first : first + node].topk(2).indices.tolist())
                ops = {f"op{k}": self.candidates[int(best[first + source])] for k, source in enumerate(chosen)}
                point[kind][f"node{node}"] = {"inputs": chosen, **ops}
                first += node
        return point

    def pruned(self, genotype: Point) -> dict[str, Float[Tensor, "E O"]]:
        """Weights that leave only the genotype: one for its operations, zero for all others."""
        self.space.check(genotype)
        found = {}
        for kind, logits in self.architecture.items():
            mask, first = torch.zeros_like(logits), 0
            for node in range(2, 2 + self.nodes):
                chosen = genotype[kind][f"node{node}"]
                for k, source in enumerate(chosen["inputs"]):
                    mask[first + source, self.operations.index(chosen[f"op{k}"])] = 1
                first += node
            found[kind] = mask.detach()
        return found

    def plain(self, genotype: Point) -> CellNet:
        """The plain network of a genotype at this size, freshly initialised."""
        self.space.check(genotype)
        device = next(self.parameters()).device
        return CellNet(genotype=genotype, **self.sizes).to(device)


def _stride(kind: str, source: int) -> int:
    """Only what a reducing cell reads from the cells before it is halved."""
    return 2 if kind == "reduce" and source < 2 else 1


def _checked(point: Any, layers: int) -> None:
    wanted = {"normal", *kinds(layers)}
    cells = point if isinstance(point, Mapping) else {}
    nodes = cells.get("normal")
    if not wanted <= cells.keys() <= {"normal", "reduce"} or not isinstance(nodes, Mapping) or not nodes:
        raise ValueError(
            f"CellNet: genotype {point!r}; expected a point of cell_space with the cells {sorted(wanted)}, for layers={layers}."
        )
    first = next(iter(nodes.values()))
    inputs = len(first["inputs"]) if isinstance(first, Mapping) and isinstance(first.get("inputs"), list) else 2
    cell_space(nodes=len(nodes), inputs=inputs, kinds=list(cells)).check(cells)
