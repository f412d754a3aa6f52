"""The two levels of a differentiable search: which examples train the weights, and the gradient of the architecture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor


def held_out(inputs: Tensor) -> Bool[Tensor, " B"]:
    """Which examples of a batch belong to the architecture's half of the data; the others train the weights.

    An example's own bits decide, so that it falls on the same side in every batch and epoch, whatever the loop's order. Randomly
    augmented copies of an example are examples of their own, and fall on both sides.

    Args:
        inputs: Examples [B, ...], of any type.

    Examples:
        >>> images = torch.rand(1000, 1, 8, 8)
        >>> side = held_out(images)
        >>> bool((held_out(images.flip(0)) == side.flip(0)).all()), 400 < int(side.sum()) < 600
        (True, True)
    """
    rows = inputs.detach().reshape(len(inputs), -1).contiguous().view(torch.uint8).reshape(len(inputs), -1).long()
    place = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    # Integer sums are exact in any order; the multiplications spread every byte over the high bits (overflow wraps).
    mixed = ((rows + 1) * (place * 0x9E3779B97F4A7C1)).sum(1) * 0x2545F4914F6CDD1D
    return (mixed >> 40) % 2 == 1


def architecture_gradients(
    architecture: Sequence[Tensor],
    weights: Sequence[Tensor],
    train: Callable[[], Tensor],
    held: Callable[[], Tensor],
    *,
    unroll: float = 0.0,
    momentum: Sequence[Tensor | float] | None = None,
    decay: float = 0.0,
) -> list[Tensor]:
    """The gradient of the held-out loss by the architecture, after one step of the weights if ``unroll`` is their rate.

    With ``unroll`` = r the weights move first, ``w' = w - r (m + grad_w L_train + decay w)``, and the gradient is
    ``grad_a L_held(w', a) - r d/da [grad_w L_train(w, a) . v]`` with ``v = grad_w' L_held(w', a)`` (DARTS, arXiv:1806.09055,
    equations 7 and 8); the second term is the difference of two gradients at ``w +- e v``, ``e = 0.01 / |v|``. It costs four
    more passes. With 0 it is the first-order gradient. The weights are afterwards as before.

    Args:
        architecture: Parameters a.
        weights: Parameters w.
        train: The loss of the weights' half of the data; not called where ``unroll`` is 0.
        held: The loss of the architecture's half.
        unroll: Learning rate r of the weights' step.
        momentum: What the optimizer adds to the gradient, m, for each weight.
        decay: Weight decay of the optimizer.

    Raises:
        ValueError: ``unroll`` is negative.
    """
    if unroll < 0:
        raise ValueError(f"architecture_gradients: unroll={unroll}; expected a learning rate, or 0 for first order.")
    if not unroll:
        return list(torch.autograd.grad(held(), architecture))
    before = [w.detach().clone() for w in weights]
    moves = momentum or [0.0] * len(before)

    def put(values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for w, value in zip(weights, values, strict=True):
                w.copy_(value)

    try:
        slope = torch.autograd.grad(train(), weights, allow_unused=True, materialize_grads=True)
        put([w - unroll * (m + g + decay * w) for w, m, g in zip(before, moves, slope, strict=True)])
        found = torch.autograd.grad(held(), (*architecture, *weights), allow_unused=True, materialize_grads=True)
        direct, v = found[: len(architecture)], found[len(architecture) :]
        norm = torch.stack([each.norm() for each in v]).norm()
        small = 0.01 / norm.clamp(min=1e-12)
        put([w + small * each for w, each in zip(before, v, strict=True)])
        above = torch.autograd.grad(train(), architecture)
        put([w - small * each for w, each in zip(before, v, strict=True)])
        below = torch.autograd.grad(train(), architecture)
    finally:
        put(before)
    return [d - unroll * (a - b) / (2 * small) for d, a, b in zip(direct, above, below, strict=True)]
