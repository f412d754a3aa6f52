"""Ensembles of soft decision trees."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.config import configured

Shape = Literal["oblivious", "full", "list", "open-list"]
SHAPES = get_args(Shape)


def routes(shape: Shape, depth: int) -> Float[Tensor, "N L"]:
    """How each of L leaves is reached from N splitting nodes: 1 left of the node, -1 right of it, 0 not below it.

    Nodes of a full tree are counted level by level, leaves from left to right.

    Examples:
        >>> routes("list", 2)
        tensor([[ 1., -1., -1.],
                [ 0.,  1., -1.]])
        >>> routes("open-list", 2)
        tensor([[ 1., -1.],
                [ 0.,  1.]])
    """
    if shape in ("list", "open-list"):
        below = torch.eye(depth, depth + 1) - torch.ones(depth, depth + 1).triu(1)
        return below[:, :depth] if shape == "open-list" else below
    leaves = torch.arange(2**depth)
    level = torch.arange(depth).unsqueeze(1)
    turns = 1.0 - 2 * (leaves >> (depth - 1 - level) & 1)  # [D, L]
    if shape == "oblivious":
        return turns
    node = torch.cat([torch.arange(2**k) for k in range(depth)]).unsqueeze(1)
    level = torch.cat([torch.full((2**k,), k) for k in range(depth)]).unsqueeze(1)
    return turns[level.squeeze(1)] * (leaves >> (depth - level) == node)


@configured
class SoftTrees(nn.Module):
    r"""An ensemble of soft decision trees: every split sends a share of the input each way, so that gradients train all of it.

    As in Kanoh and Sugiyama, Linear Mode Connectivity in Differentiable Tree Ensembles, arXiv:2405.14596, equations 2 to 4: with
    :math:`s_{mn} = \sigma(w_{mn}^\top x + b_{mn})` the share that goes left at node n of tree m, leaf l gets

    .. math:: \mu_{ml} = \prod_{n:\ l\ \text{left of}\ n} s_{mn} \prod_{n:\ l\ \text{right of}\ n} (1 - s_{mn}),
        \qquad f(x) = \sum_m \sum_l \pi_{ml} \mu_{ml} .

    An oblivious tree asks one question for a whole level, a full one has its own question at every node, and a list ends at one
    side of every node. The last leaf of an open list is empty: it holds zero. All weights and thresholds are initialised like those
    of ``torch.nn.Linear``; so are the leaves, as a linear map from the shares of all leaves.

    It takes O(B T N F + B T N L + B T L K) multiply-adds. N is D, and 2^D - 1 for full trees; L is 2^D, D + 1 or D.

    Args:
        features: Numbers in one input; inputs of more dimensions are flattened.
        classes: Outputs K.
        trees: Trees T.
        depth: Levels D of splits.
        shape: ``"oblivious"``, ``"full"``, ``"list"`` or ``"open-list"``.

    Shapes: [B, ...] to [B, K].

    Raises:
        ValueError: Fewer than one tree or level, an unknown shape, or an input of another size.

    Examples:
        >>> SoftTrees(13, 3, trees=32, depth=2)(torch.zeros(5, 13)).shape
        torch.Size([5, 3])
    """

    left: Tensor
    right: Tensor

    def __init__(
        self, features: int, classes: int, *, trees: int = 256, depth: int = 2, shape: Shape = "oblivious"
    ) -> None:
        if trees < 1 or depth < 1 or shape not in SHAPES:
            raise ValueError(
                f"SoftTrees: trees {trees}, depth {depth}, shape {shape!r}; expected at least 1, at least 1, and one of "
                f"{', '.join(SHAPES)}."
            )
        super().__init__()
        self.features, self.depth, self.shape = features, depth, shape
        ways = routes(shape, depth)
        nodes, ends = ways.shape
        self.weight = nn.Parameter(torch.empty(trees, nodes, features))
        self.bias = nn.Parameter(torch.empty(trees, nodes))
        self.leaves = nn.Parameter(torch.empty(trees, ends, classes))
        self.register_buffer("left", (ways > 0).float(), persistent=False)
        self.register_buffer("right", (ways < 0).float(), persistent=False)
        for value, inputs in ((self.weight, features), (self.bias, features), (self.leaves, trees * ends)):
            nn.init.uniform_(value, -(inputs**-0.5), inputs**-0.5)

    def shares(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B T L"]:
        """The share of each input that reaches each leaf."""
        if (given := math.prod(x.shape[1:])) != self.features:
            raise ValueError(f"SoftTrees: input {tuple(x.shape)} has {given} features; expected {self.features}.")
        split = F.linear(x.flatten(1), self.weight.flatten(0, 1), self.bias.flatten())
        with torch.autocast(x.device.type, enabled=False):  # a sum of logarithms in 16 bits would be off by per cents
            split = split.unflatten(1, self.bias.shape).to(self.left.dtype)
            return (F.logsigmoid(split) @ self.left + F.logsigmoid(-split) @ self.right).exp()

    def outputs(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B T K"]:
        """What each tree gives; the ensemble's output is their sum."""
        return torch.einsum("btl,tlk->btk", self.shares(x), self.leaves)

    def forward(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B K"]:
        """The sum over all trees."""
        return F.linear(self.shares(x).flatten(1), self.leaves.flatten(0, 1).T)
