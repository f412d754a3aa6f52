"""Linear maps and convolutions of low rank as two smaller ones: plain layers, rebuilt from a saved recipe."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.delivery import guard
from interlayer.core.record import FACTOR, record
from interlayer.core.select import exchange

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Factors = tuple[Float[Tensor, "out rank"], Float[Tensor, "rank inputs"]]


class Pair(nn.Sequential):
    """Two layers in the place of one; code that reads the one's weight, for its type or size, finds their product."""

    @property
    def weight(self) -> Tensor:
        """The whole weight, computed when it is asked for."""
        wide, tall = (layer.weight for layer in self)
        return (tall.flatten(1) @ wide.flatten(1)).view(len(tall), *wide.shape[1:])  # type: ignore[operator, arg-type, index]


def pair(layer: nn.Module, rank: int) -> Pair:
    """Two layers that compute what ``layer`` does with a weight of this rank; their weights are freshly drawn.

    A convolution becomes one with ``rank`` filters of the same kernel, and one of kernel 1. The bias is copied.

    Args:
        layer: A linear map, or a convolution without groups.
        rank: The width between the two.

    Raises:
        ValueError: Another layer, or a rank below 1.

    Examples:
        >>> pair(nn.Conv2d(3, 8, 3, padding=1), 2)
        Pair(
          (0): Conv2d(3, 2, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
          (1): Conv2d(2, 8, kernel_size=(1, 1), stride=(1, 1))
        )
    """
    if rank < 1 or not (isinstance(layer, nn.Linear) or (isinstance(layer, CONVOLUTIONS) and layer.groups == 1)):
        raise ValueError(
            f"factored: {type(layer).__name__} at rank {rank}; expected a linear map or a convolution without groups, and a rank of "
            "at least 1."
        )
    like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    has = layer.bias is not None
    if isinstance(layer, nn.Linear):
        found = Pair(
            nn.Linear(layer.in_features, rank, bias=False, **like),
            nn.Linear(rank, layer.out_features, bias=has, **like),
        )
    else:
        settings: dict[str, Any] = {k: getattr(layer, k) for k in ("stride", "padding", "dilation", "padding_mode")}
        kernel: Any = layer.kernel_size
        found = Pair(
            type(layer)(layer.in_channels, rank, kernel, bias=False, **settings, **like),
            type(layer)(rank, layer.out_channels, 1, bias=has, **like),
        )
    if layer.bias is not None:
        bias: Any = found[1].bias
        bias.data.copy_(layer.bias.data)
    return found.train(layer.training)


def factored(model: nn.Module, factors: Mapping[str, Factors], options: Mapping[str, Any] | None = None) -> nn.Module:
    """A copy of a model whose named layers are pairs of layers with these factors; ``save`` and ``load`` rebuild it.

    A Hugging Face model refuses ``save_pretrained``: its format has no place for them. ``options`` are noted in the recipe.

    Args:
        model: Any module. It is not changed.
        factors: By the layer's name: (tall, wide), whose product is the weight, its axes after the first as one.
        options: What the user chose; for people to read.

    Raises:
        ValueError: No layer is named, or one cannot be a pair.

    Examples:
        >>> net, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), torch.ones(1, 4)
        >>> u, s, v = torch.linalg.svd(net[0].weight.detach(), full_matrices=False)
        >>> torch.allclose(factored(net, {"0": (u * s, v)})(x), net(x), atol=1e-5)
        True
    """
    if not factors:
        raise ValueError("factored: no factors; expected those of at least one layer.")
    new = copy.deepcopy(model)
    record(new, FACTOR, options or {}, {"places": {name: tall.shape[1] for name, (tall, _) in factors.items()}})
    restore(new, {"places": {name: tall.shape[1] for name, (tall, _) in factors.items()}})
    for name, (tall, wide) in factors.items():
        both: Any = new.get_submodule(name)
        for layer, value in zip(both, (wide, tall), strict=True):
            layer.weight.data.copy_(value.detach().reshape(layer.weight.shape))
    return new


def restore(model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
    """Put the pairs that ``factored`` recorded onto a base model, in place; their numbers come from the file.

    Raises:
        ValueError: The structure names no ranks.
    """
    places = structure.get("places")
    if not isinstance(places, dict) or not all(type(r) is int for r in places.values()):
        raise ValueError(f"factored.restore: {str(structure)[:80]!r}; expected the rank of each place.")
    for name, rank in places.items():
        with torch.random.fork_rng(devices=[]):  # the weights that are drawn here are replaced
            exchange(model, [name], lambda old, rank=rank: pair(old, rank))
    return guard(model, "layers of low rank as pairs of layers")
