"""Clipping by the global norm of the gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], most: float) -> float:
    """Scale the gradients so that their global norm is at most ``most``, and return the norm that they had.

    Like ``torch.nn.utils.clip_grad_norm_``, but the squared norms are added without rounding (``math.fsum``). torch rounds
    after every addition, in an order that depends on how many there are; one more parameter with a gradient of zero can
    then change the last bit of the scale, which training amplifies. Here a gradient that is zero or None changes nothing.

    Args:
        parameters: Parameters whose gradients are clipped in place.
        most: Largest global norm.

    Returns:
        The norm before clipping. If it is not finite, the gradients are left as they are.

    Raises:
        ValueError: ``most`` is not positive.

    Examples:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> clip_gradients([w], 2.5), w.grad
        (5.0, tensor([1.5000, 2.0000]))
    """
    if not most > 0:
        raise ValueError(f"clip_gradients: most {most}; expected a positive number. Leave the call out not to clip.")
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return 0.0
    norms = [norm.to(gradients[0].device, torch.float64) for norm in torch._foreach_norm(gradients)]
    norm = math.sqrt(math.fsum(n * n for n in torch.stack(norms).tolist()))
    if math.isfinite(norm) and norm > most:
        torch._foreach_mul_(gradients, most / norm)
    return norm
