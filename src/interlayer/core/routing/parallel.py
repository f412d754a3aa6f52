"""Expert parallelism: each process holds a part of the experts, and tokens travel to them and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function

from interlayer.core.routing.routes import Routed


class _AllToAll(Function):
    """Send ``out[r]`` rows to process r and get ``into[r]`` from it; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: list[int], into: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.back = into, out, group
        rows = x.new_empty(sum(into), *x.shape[1:])
        dist.all_to_all_single(rows, x.contiguous(), into, out, group=group)
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _AllToAll.apply(grad, *ctx.back), None, None, None


def share(experts: int, group: dist.ProcessGroup | None = None) -> slice:
    """The experts that this process holds.

    Raises:
        ValueError: The processes do not divide the experts.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if experts % world:
        raise ValueError(
            f"exchange: {experts} experts on {world} processes; expected a number of processes that divides the experts."
        )
    return slice(rank * experts // world, (rank + 1) * experts // world)


def exchange(
    x: Float[Tensor, "P D"], routed: Routed, group: dist.ProcessGroup | None = None
) -> tuple[Float[Tensor, "R D"], Int[Tensor, " L"], Callable[[Tensor], Tensor]]:
    """Send the tokens of all pairs to the processes that hold their experts, by two all-to-all operations.

    Process r of W holds the experts r E / W to (r + 1) E / W - 1. The gradients of its weights are the sums over the tokens of all
    processes.

    Args:
        x: What ``dispatch`` gives: rows sorted by expert.
        routed: The routes of this process's tokens to all E experts.
        group: The processes. Defaults to all.

    Returns:
        The rows for this process's experts, sorted by expert; how many each gets; and a function that sends their outputs back into the
        order of ``x``, for ``combine``.

    Raises:
        ValueError: The processes do not divide the experts.
    """
    share(len(routed.counts), group)
    world = dist.get_world_size(group)
    sent = routed.counts.view(world, -1)
    got = torch.empty_like(sent)  # [source, own expert]
    dist.all_to_all_single(got, sent.contiguous(), group=group)
    out, into = sent.sum(1).tolist(), got.sum(1).tolist()
    rows = _AllToAll.apply(x, out, into, group)
    # Rows come by source and then by expert: sort them by expert, and remember the way back.
    own = torch.arange(got.shape[1], device=x.device).repeat(world).repeat_interleave(got.flatten())
    order = own.argsort(stable=True)
    back = order.argsort()

    def home(y: Tensor) -> Tensor:
        return _AllToAll.apply(y[back], into, out, group)

    return rows[order], got.sum(0), home
