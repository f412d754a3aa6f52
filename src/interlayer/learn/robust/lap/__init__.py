"""LAP: adversarial training by one step whose weights are pushed first, early layers the most, so that no shortcut forms."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.core import aside, datasets
from interlayer.core.attack import Loss, errors, inside, movable
from interlayer.core.data import answer, run
from interlayer.core.example import Example
from interlayer.core.kinds import Rule
from interlayer.learn.robust.lap.overfitting import layers


class LAP(Rule):
    """One-step adversarial training with layer-aware weight perturbation.

    Paper: Lin, Yu, Han, Su and Liu, "Layer-Aware Analysis of Catastrophic Overfitting: Revealing the Pseudo-Robust Shortcut
    Dependency", ICML 2024, arXiv:2405.16262; code tmllab/2024_ICML_LAP.

    A step on a batch x, with the optimiser ``opt`` and the weights ``w_1`` to ``w_L`` from the first layer to the last:

    - noise: ``d_0`` uniform in ``[-noise radius, noise radius]``, and the gradients of the loss at ``x + d_0`` for inputs and weights;
    - input: ``d = d_0 + size radius sign(gradient for the input)``;
    - weights: with ``u_l`` the change that ``opt`` would make in ``w_l`` now (its state and all other parameters
      stay), ``w_l <- w_l + beta_l |w_l| u_l / |u_l|`` and ``beta_l = beta (1 - (ln l / ln L)^gamma)``, so that the first
      layer gets ``beta`` and the last nothing;
    - learning: ``opt`` steps from there by the gradient at ``x + d``. The push is not taken back.

    Cost: two forward and backward passes, and a copy of the weights and the optimiser's state.

    The equations are those of the authors' code. Its push is the optimiser's own step, *down* the loss of the noisy inputs, where
    adversarial weight perturbation (AWP) goes up and takes the push back after the step; the paper's formula could not be
    opened beside its abstract (its arXiv pages were searched). They take L as a fixed number: 21 for a ResNet-18, which is its number of
    weights; here it is counted, and every parameter of two axes and more is one, whatever its name. Where L is 1, that layer gets ``beta``.

    ``beta=0`` is plain one-step training: with ``noise=0`` FGSM, with ``noise=1, size=1.25, clip=True`` RS-FGSM (Wong et al.,
    arXiv:2001.03994), with ``noise=2`` N-FGSM (de Jorge et al., arXiv:2202.01181), the authors' default beside ``beta=0.01``.

    Args:
        model: Any classifier; class scores are the last axis of its output.
        loss: From output and targets to the loss of each example.
        radius: Radius of the ball in the infinity norm, in units of the inputs.
        noise: Half-width of the noise, in radii.
        size: Length of the step, in radii.
        clip: Whether the moved input must lie in the ball. The authors clip with RS-FGSM alone.
        bounds: Smallest and largest value of an input, (0, 1) for images that are not normalised; None for no bounds.
        beta: Push of the first layer, as a share of its weight's norm.
        gamma: How the push falls with depth; large values push all layers but the last.
        lr: Learning rate of SGD. The authors' rises to 0.2 and falls again.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.

    Shapes: a batch is (inputs [B, ...], targets).

    Raises:
        ValueError: A number out of range, inputs out of bounds, or a model without weights.
        TypeError: Inputs that are no floating-point tensor.

    Examples:
        >>> rule = LAP(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), radius=0.1)
        >>> sorted(rule.step((torch.rand(6, 4), torch.arange(6) % 3)))
        ['loss', 'noisy_loss']
    """

    slug = "lap"

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Loss = errors,
        radius: float = 8 / 255,
        noise: float = 2.0,
        size: float = 1.0,
        clip: bool = False,
        bounds: tuple[float, float] | None = None,
        beta: float = 0.01,
        gamma: float = 1.0,
        lr: float = 0.2,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ) -> None:
        given = {"radius": radius, "noise": noise, "size": size, "beta": beta}
        if wrong := [f"{k}={v}" for k, v in given.items() if not 0 <= v < math.inf]:
            raise ValueError(f"LAP: {', '.join(wrong)}; expected 0 or more.")
        if not gamma > 0:
            raise ValueError(f"LAP: gamma={gamma}; expected a number above 0.")
        self.model, self.loss, self.bounds, self.clip = model, loss, bounds, clip
        self.radius, self.noise, self.size = radius, noise * radius, size * radius
        self.strengths = strengths(len(layers(model)), beta, gamma)
        self.optimiser = torch.optim.SGD(model.parameters(), lr, momentum=momentum, weight_decay=weight_decay)

    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimiser."""
        return (self.optimiser,)

    def step(self, batch: tuple[Any, Any]) -> dict[str, float]:
        """Attack and push, then learn; the loss is that of the attacked inputs before the step."""
        x, targets = batch
        movable("LAP", x, self.bounds)
        self.model.train()
        delta = inside(x, self.noise * (2 * torch.rand_like(x) - 1), self.bounds)
        noisy = (x + delta).requires_grad_()
        first = self._backward(noisy, targets)
        assert noisy.grad is not None
        delta = delta + self.size * noisy.grad.sign()
        if self.clip:
            delta = delta.clamp(-self.radius, self.radius)
        delta = inside(x, delta, self.bounds)
        if any(self.strengths):
            self._push()
        loss = self._backward(x + delta, targets)
        self.optimiser.step()
        return {"loss": loss, "noisy_loss": first}

    def _backward(self, inputs: Tensor, targets: Any) -> float:
        """The gradients at these inputs."""
        self.optimiser.zero_grad(set_to_none=True)
        with aside.collect() as told:
            loss = self.loss(answer(run(self.model, inputs)), targets).mean()
        (loss if told.loss is None else loss + told.loss).backward()
        return float(loss.detach())

    @torch.no_grad()
    def _push(self) -> None:
        """Move each layer along the change that the optimiser would make."""
        before = [(p, p.detach().clone()) for group in self.optimiser.param_groups for p in group["params"]]
        state = copy.deepcopy(self.optimiser.state_dict())
        self.optimiser.step()
        after = {id(p): p.detach().clone() for p, _ in before}
        for p, old in before:
            p.copy_(old)
        self.optimiser.load_state_dict(state)
        for strength, weight in zip(self.strengths, layers(self.model).values(), strict=True):
            change = after[id(weight)] - weight
            length = change.norm()
            weight.add_(change * torch.where(length > 0, strength * weight.norm() / length, 0.0))

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state."""
        return self.optimiser.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned; the caller loads the model's weights."""
        self.optimiser.load_state_dict(dict(state))


def strengths(count: int, beta: float, gamma: float) -> list[float]:
    """``beta (1 - (ln l / ln L)^gamma)`` for the layers l = 1 to L = ``count``.

    Examples:
        >>> [round(s, 4) for s in strengths(4, 0.01, 1.0)]
        [0.01, 0.005, 0.0021, 0.0]
    """
    if count == 1:
        return [beta]
    return [beta * (1 - (math.log(i) / math.log(count)) ** gamma) for i in range(1, count + 1)]


def _rule() -> LAP:
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    return LAP(net, radius=0.05, bounds=(0, 1), lr=0.05)


EXAMPLE = Example(make=_rule, inputs=lambda: datasets.digit_batches(32))
