"""The Hessian of a model's loss in the directions of given changes of weights: what layers do to the outputs, alone and in pairs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

from interlayer.core import taps
from interlayer.core.blockwise import call
from interlayer.core.quantizer.layers import weight_of

STEP = 0.1  # share of a move by which a weight goes each way, to differentiate the outputs
Loss = Literal["divergence", "square"]
Move: TypeAlias = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Curvature:
    r"""The second-order loss of moving L weights, each by one of K moves: :math:`\Delta W_i^\top H_{ij} \Delta W_j` for each pair.

    For i = j it is a trace of the layer's block of the Hessian, :math:`tr(H_{ii} \Delta W_i \Delta W_i^\top)`.

    Shapes: ``pairs`` [L, K, L, K].
    """

    pairs: Float[Tensor, "L K L K"]

    def loss(self, levels: Sequence[int]) -> float:
        """Half the quadratic form of one move for each layer, by index."""
        rows, k = torch.arange(len(levels)), torch.tensor(levels)
        return float(self.pairs[rows, k][:, rows, k].sum()) / 2

    def rises(self, levels: Sequence[int]) -> Float[Tensor, "L K"]:
        """How much the loss rises where one layer takes another move and the others keep theirs."""
        rows, k = torch.arange(len(levels)), torch.tensor(levels)
        mine = self.pairs[rows, :, rows]  # [L, K, K]
        others = self.pairs[:, :, rows, k].sum(-1) - mine[rows, :, k]
        total = mine.diagonal(dim1=1, dim2=2) / 2 + others
        return total - total[rows, k][:, None]


def root(outputs: Tensor, change: Tensor, loss: Loss) -> Float[Tensor, " numbers"]:
    """A change of the outputs in coordinates in which its square is twice the loss, to second order.

    The loss is 0 at the float model's own outputs, and so is its gradient.
    """
    if loss == "square":
        return (change * (2 / change.numel()) ** 0.5).flatten()
    p = outputs.softmax(-1)
    return (p.sqrt() * (change - (p * change).sum(-1, keepdim=True)) * (p.shape[-1] / p.numel()) ** 0.5).flatten()


@torch.no_grad()
def products(model: nn.Module, batches: Sequence[Any], moves: Mapping[str, Move], loss: Loss) -> Float[Tensor, "D D"]:
    r"""Products :math:`v^\top H w` of directions with the Hessian of the loss.

    The loss is the divergence of the outputs' softmax over the last axis from the float model's, or their mean squared difference. Its
    gradient at the float model is zero, so the Hessian is :math:`J^\top F J` with F that of the outputs, and a product takes two
    changes of the outputs, each a central difference: two forward passes for a direction, whatever the number of pairs.

    Memory: a copy of the model in 32 bits, and the outputs of one batch for each direction.

    Args:
        model: Any module. It is not changed.
        batches: As ``taps.feed`` takes them.
        moves: Makes the directions of a layer's weight from the weight, by name; called for each batch.
        loss: ``"divergence"`` or ``"square"``.

    Raises:
        ValueError: The outputs are a loss or not finite.
    """
    found = torch.zeros(())
    work = copy.deepcopy(model)
    if any(_low(p) for p in work.parameters()):
        work = work.float()
    with taps.at_rest(work):
        for batch in (tree_map(_wide, b) for b in tqdm(batches, desc="curvature", disable=None, leave=False)):
            exact, changes = outputs(work, batch), list[Tensor]()
            for name, move in moves.items():
                weight = weight_of(work.get_submodule(name))
                start = weight.clone()
                for direction in move(start):
                    weight.copy_(start + STEP * direction)
                    ahead = outputs(work, batch)
                    weight.copy_(start - STEP * direction)
                    changes.append(root(exact, (ahead - outputs(work, batch)) / (2 * STEP), loss).cpu())
                weight.copy_(start)
            rows = torch.stack(changes)
            found = found + rows @ rows.T / len(batches)
    return found


def curvature(
    model: nn.Module, batches: Sequence[Any], moves: Mapping[str, Move], loss: Loss = "divergence"
) -> Curvature:
    """The second-order loss of moving L weights, each in one of K directions, alone and together; see ``products``.

    Args:
        model: Any module. It is not changed.
        batches: As ``taps.feed`` takes them.
        moves: Makes K directions of a layer's weight (outputs first) from the weight, by name.
        loss: See ``products``.
    """
    found = products(model, batches, moves, loss)
    count = len(found) // len(moves)
    return Curvature(found.view(len(moves), count, len(moves), count))


def _low(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype in (torch.bfloat16, torch.float16)


def _wide(leaf: Any) -> Any:
    return leaf.float() if _low(leaf) else leaf


def outputs(model: nn.Module, batch: Any) -> Tensor:
    """The first tensor that a model gives.

    Raises:
        ValueError: It is a loss or not finite.
    """
    found: Tensor = _wide(taps.first(call(model, batch)))
    if found.ndim < 2 or not bool(found.isfinite().all()):
        raise ValueError(
            f"curvature: the first output of {type(model).__name__} has shape {tuple(found.shape)} or is not finite; "
            "expected finite ones for each example, such as logits. Leave labels out of the data."
        )
    return found
