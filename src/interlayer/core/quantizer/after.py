"""What is measured and set right in a whole model once its layers are quantised: errors by module, and biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.blockwise import Part, fit


def tune(new: nn.Module, model: nn.Module, batches: list[Any], *, steps: int, lr: float, seed: int = 0) -> None:
    """Train all biases of a model, in place, towards the softmax of another model; nothing else changes.

    Args:
        new: The model.
        model: What it should be like.
        batches: As ``taps.feed`` takes them.
        steps: One batch each.
        lr: First learning rate of Adam.
        seed: Of the order of the batches.

    Raises:
        ValueError: It has no bias.
    """
    biases = [p for n, p in new.named_parameters() if n.split(".")[-1] == "bias"]
    if not biases:
        raise ValueError(f"tune: {type(new).__name__} has no bias; expected a model with one.")
    part = Part("", new, [taps.arguments(b) for b in batches], logits(model, batches))
    with taps.at_rest(new):
        for p in new.parameters():
            p.requires_grad_(False)
        for p in biases:
            p.requires_grad_(True)
        fit(part, biases, steps=steps, lr=lr, seed=seed, loss=divergence)


def logits(model: nn.Module, batches: list[Any]) -> list[Tensor]:
    """The first tensor that the model gives for each batch."""
    with taps.at_rest(model), torch.no_grad():
        return [taps.first(out) for out in taps.feed(model, batches)]


def lost(model: nn.Module, new: nn.Module, batches: Any, names: Sequence[str]) -> dict[str, float]:
    """How far the outputs of modules lie from those in another model: the squared error over the squared size.

    Args:
        model: What it should be like.
        new: The model, with modules of the same names.
        batches: As ``taps.feed`` takes them; both models run once on each.
        names: Of the modules.

    Examples:
        >>> net, twin = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
        >>> lost(net, twin, torch.ones(1, 2), ["0"])["0"] > 0, lost(net, net, torch.ones(1, 2), ["0"])
        (True, {'0': 0.0})
    """
    off, size = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    with taps.at_rest(model), taps.at_rest(new), torch.no_grad():
        for batch in taps.batches(batches, "lost"):
            with taps.read(model, list(names)) as wanted, taps.read(new, list(names)) as found:
                for each in (model, new):
                    for _ in taps.feed(each, [batch]):
                        pass
            for name in names:
                off[name] += float((found[name] - wanted[name]).float().square().sum())
                size[name] += float(wanted[name].float().square().sum())
    return {name: off[name] / size[name] if size[name] else off[name] for name in names}


def divergence(found: Float[Tensor, "... classes"], wanted: Float[Tensor, "... classes"]) -> Float[Tensor, ""]:
    """Mean Kullback-Leibler divergence of the softmax of ``found`` from that of ``wanted``, in nats.

    >>> divergence(torch.zeros(3, 2), torch.zeros(3, 2))
    tensor(0.)
    """
    mine, theirs = (x.float().flatten(0, -2).log_softmax(-1) for x in (found, wanted))
    return F.kl_div(mine, theirs, log_target=True, reduction="batchmean")
