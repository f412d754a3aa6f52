"""The model with a coder in the place of an MLP."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.data import answer
from interlayer.probe.transcoders.coder import Coder


def prompt(batch: Any) -> Any:
    """The first sequence of a batch without its padding, as a batch of one."""
    args, keywords = taps.arguments(batch)
    mask = keywords.get("attention_mask")
    if not keywords:
        return args[0][:1]
    real = slice(None) if mask is None else mask[0].bool()
    return {k: v[:1, real] if isinstance(v, Tensor) and v.ndim == 2 else v for k, v in keywords.items()}


def spliced_loss(
    model: nn.Module, batches: list[Any], name: str, coder: Coder | None = None, own: bool = False
) -> float | None:
    """Cross-entropy of the next token in nats, with a coder in the place of an MLP; None where the data are not tokens.

    Args:
        model: The model.
        batches: Batches of tokens.
        name: The MLP.
        coder: What takes its place. Defaults to the MLP itself.
        own: Whether the coder reads the MLP's output, as a sparse autoencoder does, not its input.
    """
    total, count = 0.0, 0
    with taps.read(model, [name], side="input") as seen:

        def change(y: Tensor) -> Tensor:
            return y if coder is None else coder((y if own else seen[name]).float()).to(y)

        with taps.patch(model, {name: change}):
            for batch in batches:
                args, keywords = taps.arguments(batch)
                tokens = keywords.get("input_ids", args[0] if args else None)
                if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
                    return None
                logits = answer(model(*args, **keywords))
                if logits.ndim != 3 or tokens.shape[1] < 2:
                    return None
                targets = tokens[:, 1:].clone().long()
                if isinstance(mask := keywords.get("attention_mask"), Tensor):
                    targets[~mask[:, 1:].bool()] = -100
                flat = logits[:, :-1].float().flatten(0, 1)
                total += float(nn.functional.cross_entropy(flat, targets.flatten(), reduction="sum", ignore_index=-100))
                count += int((targets >= 0).sum())
    return total / max(count, 1)
