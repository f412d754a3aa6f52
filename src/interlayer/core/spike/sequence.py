"""Leaky integrate-and-fire over a whole sequence: one operator with a backward pass written by hand.

Autograd would record eight operations at each step. Here a step is three operations on buffers that stay in the cache, forward and
backward; what is kept for the backward pass is the spikes and the potentials.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from interlayer.core.spike.surrogate import Surrogate

AT_ONCE = 1 << 16  # potentials whose slopes are computed together: as many as stay in a processor's cache


@custom_op("interlayer::lif", mutates_args=())
def lif(
    x: Tensor, start: Tensor, decay: float, threshold: float, drop: float, hard: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Charge, fire and reset at each step.

    Args:
        x: Currents [B, T, ...].
        start: Potentials before the first step, [B, ...], in the precision to compute in.
        decay: Share of the potential that is left after a step.
        threshold: Potential above which a neuron fires.
        drop: What a soft reset subtracts.
        hard: Whether the reset is to zero instead.

    Returns:
        Spikes and potentials before the reset [B, T, ...], and the potentials after the last reset [B, ...].
    """
    potentials = torch.empty(x.shape, dtype=start.dtype, device=x.device)
    spikes, kept = torch.empty_like(potentials), start.clone(memory_format=torch.contiguous_format)
    for current, potential, spike in zip(x.unbind(1), potentials.unbind(1), spikes.unbind(1), strict=True):
        torch.add(current, kept, alpha=decay, out=potential)
        torch.gt(potential, threshold, out=spike)
        if hard:
            torch.addcmul(potential, potential, spike, value=-1, out=kept)
        else:
            torch.sub(potential, spike, alpha=drop, out=kept)
    return spikes.to(x.dtype), potentials, kept


@lif.register_fake
def _(x: Tensor, start: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    potentials = torch.empty(x.shape, dtype=start.dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), potentials, torch.empty_like(start)


@custom_op("interlayer::lif_backward", mutates_args=())
def lif_backward(
    spikes: Tensor,
    potentials: Tensor,
    on_spikes: Tensor | None,
    on_potentials: Tensor | None,
    on_kept: Tensor | None,
    decay: float,
    threshold: float,
    drop: float,
    hard: bool,
    detach: bool,
    surrogate: str,
    sharpness: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of currents and first potentials, from those of spikes, potentials and last potentials (None for zero).

    ``surrogate`` is the name in ``Surrogate.known``; with ``detach`` the reset lets no gradient through to the spike.
    """
    shape, length = Surrogate.known[surrogate](sharpness), potentials.shape[1]
    grads = torch.empty_like(potentials)
    later = torch.zeros_like(potentials[:, 0]) if on_kept is None else on_kept.to(potentials.dtype)
    left, work, none = (
        1.0,
        torch.empty_like(later),
        torch.zeros_like(later),
    )  # `left * later` is the gradient of what a step keeps
    at_once = max(1, AT_ONCE // max(1, work.numel()))
    for stop in range(length, 0, -at_once):
        begin = max(0, stop - at_once)
        slopes = shape.slope(potentials[:, begin:stop] - threshold)
        for t in range(stop - 1, begin - 1, -1):
            grad, slope = grads[:, t], slopes[:, t - begin]
            arriving = none if on_spikes is None else on_spikes[:, t]
            if hard:
                work.copy_(arriving)
                if not detach:
                    work.addcmul_(later, potentials[:, t], value=-left)
                work.mul_(slope).add_(later, alpha=left)
                torch.addcmul(work, later, spikes[:, t].to(work.dtype), value=-left, out=grad)
            else:
                torch.sub(arriving, later, alpha=0.0 if detach else drop * left, out=work)
                torch.add(work.mul_(slope), later, alpha=left, out=grad)
            if on_potentials is not None:
                grad.add_(on_potentials[:, t])
            later, left = grad, decay
    return grads.to(spikes.dtype), later * left


@lif_backward.register_fake
def _(spikes: Tensor, potentials: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(spikes), torch.empty_like(potentials[:, 0])


class OverTime(torch.autograd.Function):
    """``lif`` with its gradient; the operator's own registration would not go with ``torch.func``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        start: Tensor,
        decay: float,
        threshold: float,
        drop: float,
        hard: bool,
        detach: bool,
        surrogate: str,
        sharpness: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Spikes, potentials and last potentials; see ``lif``."""
        return lif(x, start, decay, threshold, drop, hard)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep spikes and potentials."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[:2])
        ctx.options = inputs[2:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Those of currents and first potentials; they have no gradient again."""
        with torch.no_grad():
            found = lif_backward(*ctx.saved_tensors, *grads, *ctx.options)
        return (*found, *[None] * len(ctx.options))


def _batched(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """The rule for ``vmap``: neurons know nothing of each other, so a further axis joins the batch."""

    def rule(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        joined = []
        for arg, dim in zip(args, dims, strict=True):
            if isinstance(arg, Tensor):
                arg = arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
                arg = arg.flatten(0, 1)
            joined.append(arg)
        out = op(*joined)
        return tuple(t.unflatten(0, (info.batch_size, -1)) for t in out), (0,) * len(out)

    return rule


lif.register_vmap(_batched(lif))
lif_backward.register_vmap(_batched(lif_backward))
