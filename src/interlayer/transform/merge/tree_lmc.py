"""Linear mode connectivity of tree ensembles: write one ensemble of soft trees in the way of another, and average the two."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from interlayer.core import recipe, taps
from interlayer.core.example import Example, perturbed
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.paths import expect_alike, interpolate, layers
from interlayer.core.transport import assign
from interlayer.models.trees import Shape, SoftTrees, routes

Method = Literal["weights", "activations"]
METHODS = get_args(Method)
MOST = 5000  # ways to write an oblivious tree that are compared: 5 levels have 3840, 6 have 46080
PRODUCTS = 2**24  # inner products that are held at a time


class Ways(NamedTuple):
    """Ways to write a tree without changing what it gives: which node and leaf goes where, and each node's sign."""

    nodes: Int[Tensor, "* N"]
    signs: Float[Tensor, "* N"]
    leaves: Int[Tensor, "* L"]

    def at(self, *index: Tensor) -> Ways:
        """Some of them."""
        return Ways(*(part[index] for part in self))


def ways(shape: Shape, depth: int, *, flip: bool = True, order: bool = True) -> Ways:
    """All ways to write a tree that is not full, itself first; of a full tree, itself only.

    Args:
        shape: Of the tree.
        depth: Its levels.
        flip: Whether left and right may change places at a node whose sign is turned.
        order: Whether the levels of an oblivious tree may change places.

    Raises:
        ValueError: There are too many.

    Examples:
        >>> [len(ways(shape, 3).nodes) for shape in ("oblivious", "list", "open-list")]
        [48, 2, 1]
    """
    nodes, ends = routes(shape, depth).shape
    if shape != "oblivious":
        same = Ways(torch.arange(nodes)[None], torch.ones(1, nodes), torch.arange(ends)[None])
        if shape != "list" or not flip:
            return same
        turned = Ways(*(part.clone() for part in same))  # only the last node has a leaf on both sides
        turned.signs[0, -1] = -1
        turned.leaves[0, -2:] = turned.leaves[0, -2:].flip(0)
        return Ways(*(torch.cat(both) for both in zip(same, turned, strict=True)))
    count = (2**depth if flip else 1) * (math.factorial(depth) if order else 1)
    if count > MOST:
        raise ValueError(
            f"tree-lmc: there are {count} ways to write an oblivious tree of {depth} levels, expected at most {MOST}. Set "
            "flip=False or order=False, or train trees of another shape: full ones of any depth are matched, and open lists "
            "have one way only."
        )
    orders = torch.tensor(list(itertools.permutations(range(depth)) if order else [range(depth)]))
    turns = torch.tensor(list(itertools.product((0, 1), repeat=depth)) if flip else [[0] * depth])
    orders, turns = orders.repeat_interleave(len(turns), 0), turns.repeat(len(orders), 1)  # [U, D]
    sides = torch.arange(ends).unsqueeze(1) >> (depth - 1 - torch.arange(depth)) & 1  # [L, D], 1 is right
    old = (sides ^ turns[:, None]) << (depth - 1 - orders[:, None])
    return Ways(orders, 1.0 - 2 * turns, old.sum(-1))


def agree(
    nodes: Float[Tensor, "* N N"], leaves: Float[Tensor, "* L L"], known: Ways | None = None
) -> tuple[Float[Tensor, " *"], Ways]:
    """The largest inner product of a tree with all ways to write another one, and the way that reaches it.

    Args:
        nodes: Inner products of the nodes of the tree that stays (rows) with those of the other.
        leaves: The same of their leaves.
        known: The ways to compare. None is all flips of full trees: as subtrees are flipped on their own, the best flip of a node
            follows from those below it, by 4^D comparisons in place of 2^(2^D - 1).
    """
    if known is None:
        return _flips(nodes, leaves)
    known = Ways(*(part.to(nodes.device) for part in known))
    picked = (
        F.one_hot(known.nodes, nodes.shape[-1]) * known.signs.unsqueeze(-1),
        F.one_hot(known.leaves, leaves.shape[-1]),
    )
    table = torch.cat([part.flatten(1).to(nodes.dtype) for part in picked], 1)
    best = (torch.cat([nodes.flatten(-2), leaves.flatten(-2)], -1) @ table.T).max(-1)
    return best.values, known.at(best.indices)


def _flips(nodes: Tensor, leaves: Tensor) -> tuple[Tensor, Ways]:
    depth, best, turned = leaves.shape[-1].bit_length() - 1, leaves, list[Tensor]()
    for level in reversed(range(depth)):
        own = nodes[..., 2**level - 1 : 2 ** (level + 1) - 1, 2**level - 1 : 2 ** (level + 1) - 1]
        as_it_is = own + best[..., ::2, ::2] + best[..., 1::2, 1::2]
        flipped = best[..., ::2, 1::2] + best[..., 1::2, ::2] - own
        best = torch.maximum(as_it_is, flipped)
        turned.insert(0, flipped > as_it_is)
    at = torch.zeros(best.shape[:-1], dtype=torch.long, device=best.device)  # the root of the other tree
    places, signs = list[Tensor](), list[Tensor]()
    for level, turns in enumerate(turned):
        turn = turns.gather(-1, at.unsqueeze(-1)).squeeze(-1).long()
        places.append(2**level - 1 + at)
        signs.append(1.0 - 2 * turn)
        at = torch.stack([2 * at + turn, 2 * at + 1 - turn], -1).flatten(-2)
    return best[..., 0, 0], Ways(torch.cat(places, -1), torch.cat(signs, -1), at)


def importance(trees: SoftTrees) -> Float[Tensor, " N"]:
    """How many leaves a node decides about, which is how much it counts when trees are compared."""
    return (trees.left + trees.right).sum(1)


@torch.no_grad()
def compare(
    trees: SoftTrees, other: SoftTrees, *, flip: bool = True, order: bool = True
) -> tuple[Float[Tensor, "T T"], Ways]:
    """The agreement of each tree with each one of another ensemble, and the way to write the other one that reaches it."""
    known = None if trees.shape == "full" and flip else ways(trees.shape, trees.depth, flip=flip, order=order)
    scale = importance(trees).sqrt().unsqueeze(-1).double()
    nodes = [torch.cat([m.weight, m.bias.unsqueeze(-1)], -1).double() * scale for m in (trees, other)]
    leaves = [m.leaves.double() for m in (trees, other)]
    some = max(1, PRODUCTS // (len(leaves[1]) * (nodes[1].shape[1] ** 2 + leaves[1].shape[1] ** 2)))
    found = []
    for mine in zip(nodes[0].split(some), leaves[0].split(some), strict=True):
        grams = [torch.einsum("tnf,umf->tunm", a, b) for a, b in zip(mine, (nodes[1], leaves[1]), strict=True)]
        found.append(agree(grams[0], grams[1], known))
    values, best = zip(*found, strict=True)
    return torch.cat(values), Ways(*(torch.cat(parts) for parts in zip(*best, strict=True)))


@torch.no_grad()
def rewrite(trees: SoftTrees, which: Int[Tensor, " T"], how: Ways) -> SoftTrees:
    """A copy in which tree t is tree ``which[t]``, written in the t-th way; as a function it is the same."""
    new, row = copy.deepcopy(trees), torch.arange(len(which), device=trees.bias.device).unsqueeze(1)
    which, (nodes, signs, leaves) = which.to(row.device), (part.to(row.device) for part in how)
    signs = signs.to(trees.bias.dtype)
    new.weight.copy_(trees.weight[which][row, nodes] * signs.unsqueeze(-1))
    new.bias.copy_(trees.bias[which][row, nodes] * signs)
    new.leaves.copy_(trees.leaves[which][row, leaves])
    return new


class TreeLMC(Transform):
    r"""Rearranges an ensemble of soft trees like another one, by all changes that leave it the same function, and averages both.

    Kanoh and Sugiyama, Linear Mode Connectivity in Differentiable Tree Ensembles, ICLR 2025, arXiv:2405.14596. Beside the order of the
    trees, a subtree may be flipped, since :math:`\sigma(-c) = 1 - \sigma(c)`: its node changes its sign and its children their places.
    The levels of an oblivious tree may change their order, with the leaves. Of a list, only the last node can be flipped; of an open
    list, none. ``"weights"`` (algorithm 2) looks for the order :math:`p` and the ways :math:`q` to write trees of

    .. math:: \arg\max_{p, q} \sum_m \langle D^{1/2} \theta^A_m,\ D^{1/2} q_m(\theta^B_{p(m)}) \rangle

    with one linear assignment, where D counts the leaves that a node decides about. ``"activations"`` (algorithm 1) finds the order by
    the inner products of the trees' outputs and then the best way to write each. The best flips of full trees are found subtree by
    subtree, with the same result as the paper's search through all of them.

    ``plan(model, data, others=(other,))``. All layers of the type ``interlayer.models.SoftTrees`` are matched. Other layers are
    averaged as they are, so that models whose trees are not the only trained layers gain less. Matching T trees takes about
    T^2 (N + F) N multiply-adds, and T^2 ways (N^2 + L^2) where ways are compared: oblivious trees of D levels have 2^D D!, lists 2.

    Args:
        method: ``"weights"``, or ``"activations"``, which needs data; the paper takes 512 examples.
        merge: Weight of the other model in the merged one; None returns the aligned other, the same function as before.
        flip: Whether subtrees may be flipped.
        order: Whether the levels of oblivious trees may change places.

    Shapes: any.

    Raises:
        ValueError: An option out of range; from ``plan``: no ensemble of soft trees, models of different structure, no data for
            ``"activations"``, or trees that are too deep to be compared.

    Examples:
        >>> a, b = (SoftTrees(4, 3, trees=8) for _ in range(2))
        >>> x = torch.randn(5, 4)
        >>> aligned = TreeLMC(merge=None).plan(a, others=(b,)).apply()
        >>> torch.allclose(aligned(x), b(x), atol=1e-6), torch.equal(aligned.weight, b.weight)
        (True, False)
    """

    slug: ClassVar[str] = "tree-lmc"
    merges: ClassVar[int] = 1

    def __init__(
        self, *, method: Method = "weights", merge: float | None = 0.5, flip: bool = True, order: bool = True
    ) -> None:
        if method not in METHODS or not (merge is None or 0 < merge < 1):
            raise ValueError(
                f"tree-lmc: method {method!r}, merge {merge}; expected one of {', '.join(METHODS)}, and a weight above 0 and below "
                "1 or None."
            )
        self.method, self.merge, self.flip, self.order = method, merge, flip, order

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """List the ensembles and what may change in them."""
        (other,) = self.take(others)
        batches = taps.batches(data)
        found = {n: m for n, m in model.named_modules() if isinstance(m, SoftTrees)}
        if not found:
            raise ValueError(
                f"{self.slug}: {type(model).__name__} has no ensemble of soft trees; expected layers interlayer.models.SoftTrees. "
                "git-rebasin matches networks."
            )
        expect_alike(self.slug, model, other)
        for name, trees in found.items():
            there = other.get_submodule(name)
            if not isinstance(there, SoftTrees) or (there.shape, there.depth) != (trees.shape, trees.depth):
                raise ValueError(
                    f"{self.slug}: {name or 'the model'} is an ensemble of {trees.shape} trees of {trees.depth} levels here "
                    "and something else in the other model. Both need the same structure."
                )
            ways(trees.shape, trees.depth, flip=self.flip, order=self.order)  # refuses too many
        if self.method == "activations" and not batches:
            raise ValueError(f"{self.slug}: no data; expected batches, on which outputs of trees are compared.")
        rows = [Row(n or "(root)", self._says(m)) for n, m in found.items()]
        skipped = [
            Row(
                n or "(root)",
                "averaged as it is" if self.merge is not None else "left as it is",
                "is no ensemble of soft trees",
            )
            for n in layers(model)
            if n not in found
        ]
        options = {"method": self.method, "merge": self.merge, "flip": self.flip, "order": self.order}

        def build() -> nn.Module:
            outputs = self._outputs(model, other, list(found), batches)
            aligned = copy.deepcopy(other)
            for name, trees in found.items():
                there: Any = aligned.get_submodule(name)
                values, best = compare(trees, there, flip=self.flip, order=self.order)
                which = assign(outputs.get(name, values))
                how = best.at(torch.arange(len(which)), which)
                there.load_state_dict(rewrite(there, which, how).state_dict())
            out = aligned if self.merge is None else interpolate(model, aligned, self.merge, batches or None)
            recipe.record(out, self.slug, options, {})
            return out

        return Plan(self.slug, options, rows, skipped, build)

    def _says(self, trees: SoftTrees) -> str:
        count, parts = len(trees.bias), ["order of trees"]
        if self.flip and trees.shape != "open-list":
            parts.append("flips" if trees.shape != "list" else "flips of the last node")
        if self.order and trees.shape == "oblivious":
            parts.append("order of levels")
        return f"{count} {trees.shape} trees of {trees.depth} levels are matched by {', '.join(parts)}"

    @torch.no_grad()
    def _outputs(
        self, model: nn.Module, other: nn.Module, names: Sequence[str], batches: Sequence[Any]
    ) -> dict[str, Tensor]:
        """Inner products of the outputs of trees; empty where weights are compared."""
        found = dict[str, Tensor]()
        for batch in batches if self.method == "activations" else ():
            seen = []
            for net in (model, other):
                held = nn.Sequential(net) if "" in names else net  # an ensemble alone, so that its input can be read
                with taps.at_rest(net), taps.read(held, [n or "0" for n in names], side="input") as inputs:
                    next(taps.feed(held, [batch]))
                trees: dict[str, Any] = {n: net.get_submodule(n) for n in names}
                seen.append({n: m.outputs(inputs[n or "0"]).double() for n, m in trees.items()})
            for name in names:
                found[name] = found.get(name, 0) + torch.einsum("btk,buk->tu", seen[0][name], seen[1][name])
        return found


def _plain() -> tuple[Any, ...]:
    return SoftTrees(5, 3, trees=6), torch.randn(20, 5)


_NO_TREES = "no model of the library is made of soft trees"
EXAMPLE = Example(make=TreeLMC, inputs=_plain, others=perturbed, exceptions={"hf": _NO_TREES, "pretrained": _NO_TREES})
