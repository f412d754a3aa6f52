"""What continual rules are measured against: fine-tuning, EWC, linear probes, and joint training as the upper bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from interlayer.core.data import Experience, answer
from interlayer.core.experiences import Learner


class FineTune(Learner):
    """The whole model goes on learning with each experience, and nothing is done against forgetting.

    Examples:
        >>> from interlayer.core.datasets import split_digits
        >>> from interlayer.core.experiences import by_classes, run_stream
        >>> stream = by_classes(split_digits(), [[0, 1], [2, 3]])
        >>> rule = FineTune(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)))
        >>> run_stream(rule, stream, steps=20).accuracy.shape
        torch.Size([2, 2])
    """

    slug = "fine-tune"


class LinearProbe(Learner):
    """The model stays frozen, in evaluation mode; each experience learns a linear head on its features."""

    slug = "linear-probe"

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model.requires_grad_(False), **options)

    def mode(self, net: nn.Module) -> nn.Module:
        """Evaluation mode, so that no running statistics move."""
        return net.eval()


class EWC(Learner):
    """Elastic weight consolidation: weights that mattered to earlier experiences are held by springs.

    Paper: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", arXiv:1612.00796, equation 3:
    ``L(theta) = L_B(theta) + sum_i strength / 2 F_i (theta_i - theta*_i)^2``, with one such sum for each earlier experience.
    ``F`` is the diagonal of the Fisher information at the end of that experience,
    ``F_i = mean over x of (d log p(y | x) / d theta_i)^2`` with y drawn from the model's own p(y | x).

    Args:
        model: See ``Learner``.
        strength: The factor ``lambda``.
        samples: Training inputs, the first of the experience's, over which the Fisher information is averaged.
        **options: Those of ``Learner``.
    """

    slug = "ewc"

    def __init__(self, model: nn.Module, *, strength: float = 100.0, samples: int = 256, **options: Any) -> None:
        super().__init__(model, **options)
        self.strength, self.samples = strength, samples
        self.springs: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []  # Fisher information, weights

    def _weights(self) -> dict[str, nn.Parameter]:
        """The weights that experiences share."""
        name = next(reversed(self.nets))
        own = self.own(name)
        return {k: p for k, p in self.nets[name].named_parameters() if k not in own and p.requires_grad}

    @torch.no_grad()
    def fisher(self, inputs: Tensor) -> dict[str, Tensor]:
        """The diagonal of the Fisher information of the shared weights at their values now, from these inputs."""
        net, there = self._net().eval(), {k: p.detach() for k, p in self._weights().items()}

        def log_likelihood(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            scores = answer(functional_call(net, weights, (x[None],)))
            return F.log_softmax(scores, 1)[0].gather(0, y[None]).sum()

        drawn = torch.multinomial(answer(net(inputs)).softmax(1), 1).squeeze(1)
        gradients = vmap(grad(log_likelihood), (None, 0, 0), chunk_size=64)(there, inputs, drawn)
        return {k: g.square().mean(0) for k, g in gradients.items()}

    def end(self, experience: Experience) -> None:
        """Fix springs at the weights as they are."""
        self.springs.append(
            (
                self.fisher(experience.train[0][: self.samples]),
                {k: p.detach().clone() for k, p in self._weights().items()},
            )
        )

    def loss(self, net: nn.Module, scores: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy and the springs."""
        loss = super().loss(net, scores, labels)
        if self.springs:
            weights = self._weights()
            pulls = [(f[k] * (p - at[k]).square()).sum() for f, at in self.springs for k, p in weights.items()]
            loss = loss + self.strength / 2 * torch.stack(pulls).sum()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """That of ``Learner``, and the springs."""
        return {**super().state_dict(), "springs": [list(pair) for pair in self.springs]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        super().load_state_dict(state)
        self.springs = [({**fisher}, {**at}) for fisher, at in state["springs"]]


class Joint(Learner):
    """All data are kept, and each step learns from an earlier experience too: the upper bound where keeping is allowed.

    Each batch of the current experience comes with one of as many samples of an earlier one, drawn at random.
    """

    slug = "joint"

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}

    def begin(self, experience: Experience) -> None:
        """Keep the data of the experience."""
        super().begin(experience)
        self.kept[experience.name] = experience.train

    def _trained(self) -> list[nn.Parameter]:
        """The earlier heads too."""
        return list({id(p): p for net in self.nets.values() for p in net.parameters() if p.requires_grad}.values())

    def loss(self, net: nn.Module, scores: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of both batches."""
        loss = super().loss(net, scores, labels)
        earlier = list(self.kept)[:-1]
        if not earlier:
            return loss
        name = earlier[int(torch.randint(len(earlier), ()))]
        inputs, targets = self.kept[name]
        rows = torch.randint(len(targets), (len(labels),))
        return loss + F.cross_entropy(answer(self.mode(self.nets[name])(inputs[rows])), targets[rows])

    def state_dict(self) -> dict[str, Any]:
        """That of ``Learner``, and the data."""
        return {**super().state_dict(), "kept": {name: list(data) for name, data in self.kept.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        super().load_state_dict(state)
        self.kept = {name: (data[0], data[1]) for name, data in state["kept"].items()}
