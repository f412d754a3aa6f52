"""Scores of neurons, and how dormant ones are recycled, in any training loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interlayer.core.rl import Update
from interlayer.core.wiring import Member
from interlayer.learn.local.redo.neurons import axes_of, hidden, home

Draw = Callable[[Tensor], Any]


def scores(model: nn.Module, inputs: Any) -> dict[str, Float[Tensor, " N"]]:
    """The score of each neuron on a batch, by the module that writes it (eq. 1); the mean of a layer is 1.

    Examples:
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = nn.init.zeros_(net[0].bias), net[0].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
        >>> scores(net, torch.tensor([[1.0], [2.0]]))
        {'0': tensor([2., 0.])}
    """
    return {layer.name: layer.scores for layer in hidden(model, inputs)}


def dormant(model: nn.Module, inputs: Any, *, threshold: float = 0.1) -> float:
    """The share of neurons, over all hidden layers together, whose score on a batch is ``threshold`` at most."""
    every = torch.cat(list(scores(model, inputs).values()))
    return float((every <= threshold).float().mean())


@torch.no_grad()
def recycle(
    model: nn.Module,
    inputs: Any,
    optimiser: torch.optim.Optimizer | None = None,
    *,
    threshold: float = 0.1,
    draw: Draw = nn.init.xavier_uniform_,
) -> dict[str, Int[Tensor, " K"]]:
    """Recycle the neurons of a model, in place, whose score on a batch is ``threshold`` at most; see ``ReDo``.

    Args:
        model: Any module that ``core.wiring.trace`` can follow.
        inputs: The batch.
        optimiser: Its moments of the changed weights become zero; its step count stays.
        threshold: The score at and below which a neuron is dormant.
        draw: Fills a weight as at initialisation, from torch's global generator.

    Returns:
        The recycled neurons of each hidden layer.

    Raises:
        ValueError: As ``hidden``.
    """
    weights, found = model.state_dict(keep_vars=True), {}
    layers = hidden(model, inputs)

    def put(member: Member, units: Tensor, new: Tensor) -> None:
        old = weights[member.name]
        at = member.index.to(old.device)[units].flatten()
        old.index_copy_(member.dim, at, new.to(old).index_select(member.dim, at))
        moments = optimiser.state.get(old, {}) if optimiser else {}
        for moment in moments.values():
            if isinstance(moment, Tensor) and moment.shape == old.shape:
                moment.index_fill_(member.dim, at, 0)

    for layer in layers:
        units = found[layer.name] = (layer.scores <= threshold).nonzero()[:, 0]
        for member in layer.writers:
            new = torch.empty_like(weights[member.name]).movedim(member.dim, 0).contiguous()
            draw(new)
            put(member, units, new.movedim(0, member.dim))
        for member in layer.own:
            put(member, units, _fresh(model.get_submodule(home(member)), member.name.rpartition(".")[2]))
    for layer in layers:  # last, since a weight between two recycled neurons is zero
        for member in layer.readers:
            put(member, found[layer.name], torch.zeros_like(weights[member.name]))
    return found


def _fresh(module: nn.Module, name: str) -> Tensor:
    """A bias is zero; what a norm has for each unit is as when it was built, and else stays."""
    value = module.state_dict()[name]
    if axes_of(module):
        return torch.zeros_like(value)
    if not hasattr(module, "reset_parameters"):
        return value
    module = copy.deepcopy(module)
    module.reset_parameters()  # type: ignore[operator]
    return module.state_dict()[name]


@dataclass(frozen=True)
class Recycler:
    """ReDo for another loop: a hook that the algorithms of ``core.rl`` call after each gradient step.

    Args:
        threshold: The score at and below which a neuron is dormant.
        period: Gradient steps from one recycling to the next.
        batch: Observations that scores are taken on.
        draw: Fills a weight as at initialisation.

    Raises:
        ValueError: A threshold below 0, or a period or batch below 1.

    Examples:
        >>> from interlayer.core.rl import DQN
        >>> from interlayer.models import MLP
        >>> q = MLP(4, 2, depth=1, width=16)
        >>> _ = DQN(steps=400, warm=80).train(q, "CartPole-v1", seed=0, after=Recycler(period=10))
    """

    threshold: float = 0.1
    period: int = 1000
    batch: int = 64
    draw: Draw = nn.init.xavier_uniform_

    def __post_init__(self) -> None:
        if self.threshold < 0 or self.period < 1 or self.batch < 1:
            raise ValueError(
                f"ReDo: threshold={self.threshold}, period={self.period}, batch={self.batch}; expected 0, 1 and 1 at least."
            )

    def __call__(self, update: Update) -> None:
        """Recycle where it is due."""
        if update.count % self.period == 0:
            self.recycle(update.network, update.observe(self.batch), update.optimiser)

    def recycle(self, model: nn.Module, inputs: Any, optimiser: torch.optim.Optimizer) -> int:
        """Recycle now, and give the number of neurons."""
        found = recycle(model, inputs, optimiser, threshold=self.threshold, draw=self.draw)
        return sum(map(len, found.values()))
