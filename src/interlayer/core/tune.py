"""Train some weights of a frozen model on a few batches, as fine-tuning does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.data import answer
from interlayer.core.fit import descend
from interlayer.core.pairing import Streams


def rate(step: int, steps: int, warmup: float = 0.03) -> float:
    """The learning rate as a part of its peak: a linear warm-up over a share of the steps, then a cosine from 1 to 0.

    Examples:
        >>> [round(rate(step, 5, warmup=0.2), 2) for step in range(5)]
        [0.5, 1.0, 0.85, 0.5, 0.15]
    """
    first = math.ceil(warmup * steps)
    if step < first:
        return (step + 1) / (first + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(steps - first, 1)))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """The cross-entropy of a batch: of its targets, of its ``labels`` (a Hugging Face model's own loss), or else of the next tokens.

    Args:
        model: Gives logits [B, S, V], or [B, K] where there are targets.
        batch: Tokens; a mapping of keyword arguments; or a pair of one of these and targets (None for none). A token that
            ``attention_mask`` leaves out is no target.

    Raises:
        ValueError: Neither targets nor tokens.

    Examples:
        >>> table = nn.Embedding(3, 3)  # the logits of the next token
        >>> _ = nn.init.zeros_(table.weight)
        >>> round(loss_of(table, torch.tensor([[0, 1, 2]])).item(), 4)  # log 3
        1.0986
    """
    args, named = taps.arguments(batch)
    config: Any = getattr(model, "config", None)
    out = model(*args, **named, **({"use_cache": False} if hasattr(config, "use_cache") else {}))
    if getattr(out, "loss", None) is not None:
        return out.loss
    logits, targets = answer(out), batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    if targets is None:
        tokens, mask = named.get("input_ids", args[0] if args else None), named.get("attention_mask")
        if tokens is None or tokens.is_floating_point():
            raise ValueError("tune: a batch without targets or tokens; expected tokens, pairs with targets, or labels.")
        targets = tokens[:, 1:] if mask is None else tokens[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        logits = logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


@torch.enable_grad()
def tune(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    weights: Iterable[nn.Parameter] | None = None,
    modules: Iterable[nn.Module] = (),
    lr: float,
    epochs: int = 1,
    seed: int = 0,
) -> list[float]:
    """Train with AdamW without weight decay; the learning rate follows ``rate``. Modes and ``requires_grad`` are then as before.

    Args:
        model: Trained in place.
        batches: See ``loss_of``; in this order, ``epochs`` times.
        weights: What learns; the model is in eval mode. Defaults to all weights, in train mode.
        modules: Modules that are in train mode nevertheless; modules inside them are not.
        lr: Peak learning rate.
        epochs: Passes over the batches.
        seed: Seed of random draws in training, such as dropout.

    Returns:
        The loss before each step.

    Raises:
        ValueError: No batches, or a loss that is not finite.

    Examples:
        >>> net = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 2))
        >>> before, x, y = net[0].weight.clone(), torch.randn(8, 1), torch.ones(8, dtype=torch.long)
        >>> losses = tune(net, [(x, y)], weights=net[1].parameters(), lr=0.1, epochs=50)
        >>> losses[-1] < 0.5 * losses[0], torch.equal(net[0].weight, before)
        (True, True)
    """
    if not batches:
        raise ValueError("tune: no batches; expected at least one.")
    modes = [(m, m.training) for m in model.modules()]
    asked = [(p, p.requires_grad) for p in model.parameters()]
    model.train(weights is None).requires_grad_(weights is None)
    for module in modules:
        module.training = True
    learning = list(model.parameters() if weights is None else weights)
    for p in learning:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(learning, lr=lr, weight_decay=0.0)
    steps, noise, losses = epochs * len(batches), Streams(model, seed), list[float]()
    try:
        for step in range(steps):
            batch = batches[step % len(batches)]
            optimizer.param_groups[0]["lr"] = lr * rate(step, steps)
            with noise.step(step):
                found, _ = descend(model, optimizer, lambda batch=batch: loss_of(model, batch), share=step / steps)
            if not math.isfinite(found):
                raise ValueError(
                    f"tune: the loss of step {step} is {found}; expected a number. Lower lr, or look at the data."
                )
            losses.append(found)
    finally:
        optimizer.zero_grad(set_to_none=True)
        for module, mode in modes:
            module.training = mode
        for p, asks in asked:
            p.requires_grad_(asks)
    return losses
