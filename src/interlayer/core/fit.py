"""Training by gradient: one step, and one plain loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.core import aside
from interlayer.core.pairing import Streams, clip_gradients
from interlayer.core.schedule import progress


def fusible(weights: Iterable[Tensor]) -> bool:
    """Whether torch's fused optimizers take these weights: real ones on a CPU or a CUDA device."""
    return all(w.is_floating_point() and w.device.type in ("cpu", "cuda") for w in weights)


def descend(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    *,
    share: float = 0.0,
    clip: float | None = 1.0,
) -> tuple[float, aside.Told]:
    """Take one step down the gradient of a loss.

    Auxiliary losses of layers (``core.aside``) are added, modules that follow the training are informed (``core.schedule``)
    and gradients are clipped by their global norm. Where the loss is not finite, the weights stay.

    Args:
        model: What is trained.
        optimizer: Over its parameters.
        loss: Runs the model and gives the task's loss.
        share: Share of the training that is done, 0 to 1.
        clip: Largest norm of the gradient; None for no clipping.

    Returns:
        The task's loss before the step, and what layers reported.

    Examples:
        >>> net, x = nn.Linear(1, 1), torch.ones(4, 1)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> losses = [descend(net, optimizer, lambda: net(x).square().mean())[0] for _ in range(50)]
        >>> losses[-1] < 0.01
        True
    """
    progress(model, share)
    optimizer.zero_grad(set_to_none=True)
    with aside.collect() as told:
        value = loss()
    (value if told.loss is None else value + told.loss).backward()
    if clip is not None:
        clip_gradients((p for group in optimizer.param_groups for p in group["params"]), clip)
    found = float(value.detach())
    if math.isfinite(found):
        optimizer.step()
    return found, told


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    weight_decay: float = 0.0,
    warmup: int = 0,
    clip: float | None = 1.0,
    watch: Callable[[int, float], bool] | None = None,
) -> list[float]:
    """Train with AdamW: a linear warm-up if asked for, then a constant learning rate.

    Args:
        model: Trained in place, in train mode.
        batches: One for each step; training ends with them.
        loss: The loss of the model on a batch.
        steps: Most steps.
        lr: Learning rate.
        seed: Of dropout and other draws in training (``core.pairing.Streams``).
        weight_decay: AdamW's.
        warmup: Steps until the learning rate is reached.
        clip: Largest norm of the gradient; None for no clipping.
        watch: Called with (step, loss) after each step; True ends the training.

    Returns:
        The loss at every step. Training ends where it is not finite.

    Examples:
        >>> net, x = nn.Linear(1, 1), torch.ones(4, 1)
        >>> losses = fit(net, [x] * 100, lambda net, x: net(x).square().mean(), steps=100, lr=0.1)
        >>> len(losses), losses[-1] < 0.01
        (100, True)
    """
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay, fused=fusible(weights))
    noise, losses = Streams(model, seed), list[float]()
    model.train()
    for step, batch in zip(range(steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / (warmup + 1))
        with noise.step(step):
            found, _ = descend(model, optimizer, lambda batch=batch: loss(model, batch), share=step / steps, clip=clip)
        losses.append(found)
        if not math.isfinite(found) or (watch and watch(step, found)):
            break
    return losses
