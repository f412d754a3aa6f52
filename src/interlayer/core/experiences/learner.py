"""What most continual rules share: a network for each experience that has tensors of its own and shares the others."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from interlayer.core import aside, nano, taps
from interlayer.core.data import Experience, answer, run
from interlayer.core.kinds import NotBegun, Rule
from interlayer.core.select import put


class Learner(Rule):
    """Cross-entropy and Adam on one experience after another; all networks share the model's tensors but those of their own.

    Each experience has a linear head of its own in place of the model's (or all use the model's). A subclass says in
    ``shared`` and ``adapt`` what else a network has of its own, and may add to ``loss`` or exchange the ``optimizer``. Every
    trained tensor costs its Euclidean norm times ``penalty``.

    Args:
        model: Any network; its outputs, or their ``logits``, are [B, K].
        lr: Learning rate of Adam at the beginning of an experience.
        penalty: Factor of the sum of norms of the trained tensors.
        head: Name of the ``nn.Linear`` that each experience replaces. Defaults to the last one.
        own_heads: Whether each experience has its own head. Otherwise all use the model's.
        statistics: Whether BatchNorm takes the statistics of the batch in training, and its running statistics follow.
            Otherwise it keeps to the model's.

    Raises:
        ValueError: ``head`` is no linear layer, or there is none.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        penalty: float = 1e-5,
        head: str | None = None,
        own_heads: bool = True,
        statistics: bool = True,
    ) -> None:
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n]
        name = head if head is not None else linear[-1] if linear else ""
        if name not in linear:
            raise ValueError(
                f"{type(self).__name__}: {head!r} is no linear layer of {type(model).__name__}; expected one of "
                f"{linear or 'none, there is none'}. Name the classifier with head=."
            )
        self.model, self.lr, self.penalty, self.head, self.own_heads = model, lr, penalty, name, own_heads
        self.statistics = statistics
        self.nets: dict[str, nn.Module] = {}
        self.classes: dict[str, int] = {}
        self.current = ""
        self.optimiser: torch.optim.Optimizer | None = None

    def shared(self) -> Iterable[Tensor]:
        """The tensors of the model that all networks share; each gets copies of the others."""
        return [*self.model.parameters(), *self.model.buffers()]

    def adapt(self, net: nn.Module) -> None:
        """Give a new network its own parts, in place."""

    def optimizer(self, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        """What an experience is learned with."""
        return torch.optim.Adam(weights, lr=self.lr)

    def loss(self, net: nn.Module, scores: Tensor, labels: Tensor) -> Tensor:
        """What is minimised, without the penalty on norms."""
        return F.cross_entropy(scores, labels)

    def begin(self, experience: Experience) -> None:
        """Make the network of an experience, and an optimiser of what it trains.

        Raises:
            ValueError: An experience of this name was begun before, or the one head has too few outputs for it.
        """
        if experience.name in self.nets:
            raise ValueError(
                f"{type(self).__name__}: {experience.name!r} was begun before; expected a new name. Call at() to return to it."
            )
        self._begin(experience.name, experience.classes)

    def _begin(self, name: str, classes: int) -> None:
        self._add(name, classes)
        self.current = name
        self.optimiser = self.optimizer(self._trained())

    def _add(self, name: str, classes: int) -> None:
        net = copy.deepcopy(self.model, {id(t): t for t in self.shared()})
        self.adapt(net)
        old = net.get_submodule(self.head)
        assert isinstance(old, nn.Linear)
        if self.own_heads:
            put(net, self.head, nn.Linear(old.in_features, classes, device=old.weight.device, dtype=old.weight.dtype))
        elif classes > old.out_features:
            raise ValueError(
                f"{type(self).__name__}: {classes} classes in {name!r}, but the head has {old.out_features} outputs; expected "
                "as many. Build the model with a larger head, or use own_heads."
            )
        self.nets[name], self.classes[name] = net, classes

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self._net().parameters() if p.requires_grad]

    def _net(self) -> nn.Module:
        """The network of the experience that was begun last."""
        return self.nets[next(reversed(self.nets))]

    def at(self, experience: Experience) -> None:
        """Predict with the network of this experience from now on."""
        if experience.name not in self.nets:
            raise NotBegun(f"{type(self).__name__}: {experience.name!r} was never begun; there are {list(self.nets)}.")
        self.current = experience.name

    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimiser of what the experience that was begun last trains."""
        return (self.optimiser,) if self.optimiser else ()

    def step(self, batch: tuple[Any, Tensor]) -> dict[str, float]:
        """Learn from one batch of the experience that was begun last; ``loss`` is without the penalty.

        Where the loss is not finite, the weights stay. Without ``begin`` there is one experience, of as many classes as the
        model's head has outputs.
        """
        if not self.nets:
            self._begin("", self.model.get_submodule(self.head).out_features)  # type: ignore[arg-type]
        net = self.mode(self._net())
        assert self.optimiser is not None
        inputs, labels = batch
        with torch.enable_grad(), aside.collect() as told:
            scores = answer(run(net, inputs))
            loss = self.loss(net, scores, labels)
            total = loss if told.loss is None else loss + told.loss
            norms = [torch.linalg.vector_norm(p) for p in self.optimiser.param_groups[0]["params"]]
            self.optimiser.zero_grad(set_to_none=True)
            (total + self.penalty * torch.stack(norms).sum()).backward()
        if loss.isfinite():
            self.optimiser.step()
        return {"loss": float(loss.detach()), "accuracy": float((scores.argmax(1) == labels).float().mean())}

    def mode(self, net: nn.Module) -> nn.Module:
        """Put a network into the mode in which it learns."""
        net.train()
        for module in () if self.statistics else net.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return net

    @torch.no_grad()
    def predict(self, inputs: Any) -> Tensor:
        """Logits [B, K] of the current experience, in evaluation mode; before the first, those of the model."""
        net = self.nets.get(self.current, self.model)
        with taps.eval_mode(net):
            return answer(run(net, inputs))

    def own(self, name: str) -> dict[str, Tensor]:
        """The tensors that the experience of this name does not share with the model."""
        net = self.nets[name]
        common = {id(t) for t in (*self.model.parameters(), *self.model.buffers())}
        there = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        return {k: there[k] for k in net.state_dict() if k in there and id(there[k]) not in common}

    def model_for(self, experience: Experience) -> nn.Module:
        """A plain copy of an experience's network, in evaluation mode, that shares nothing with the rule."""
        self.at(experience)
        return copy.deepcopy(self.nets[experience.name]).eval()

    def save(self, experience: Experience, path: str | Path) -> None:
        """Write the tensors of one experience alone, as safetensors."""
        self.at(experience)
        nano.keep(Path(path), self.own(experience.name))

    def load(self, experience: Experience, path: str | Path) -> None:
        """Take up an experience that ``save`` wrote for an equal model, ready to predict.

        Raises:
            ValueError: The experience was begun before, or the file holds other tensors.
        """
        self.begin(experience)
        self._fill(experience.name, load_file(path))

    def _fill(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        mine = self.own(name)
        if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in tensors.items()}:
            odd = sorted(mine.keys() ^ tensors.keys()) or [k for k in mine if mine[k].shape != tensors[k].shape]
            raise ValueError(
                f"{type(self).__name__}: {odd[0]!r} of {name!r} does not fit; expected tensors saved by an equal rule."
            )
        with torch.no_grad():
            for key, value in tensors.items():
                mine[key].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Each experience's tensors, and the optimiser's state."""
        return {
            "classes": dict(self.classes),
            "own": {name: {k: v.detach().clone() for k, v in self.own(name).items()} for name in self.nets},
            "current": self.current,
            "optimiser": self.optimiser.state_dict() if self.optimiser else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave; the model's own weights are loaded by the caller."""
        self.nets, self.classes, self.optimiser = {}, {}, None
        for name, classes in state["classes"].items():
            self._add(name, classes)
            self._fill(name, state["own"][name])
        self.current = state["current"]
        if state["optimiser"] is not None:
            self.optimiser = self.optimizer(self._trained())
            self.optimiser.load_state_dict(state["optimiser"])
