"""Weight-dependent gates: filters judged by their own weights, under a budget of multiply-adds or of measured time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core import datasets
from interlayer.core.example import Example
from interlayer.core.kinds import Rule
from interlayer.core.wiring import Wiring, take, trace
from interlayer.transform.sparsify.w_gates.efficiency import Latency, Multiplications, ends, measured, removable

__all__ = ["Gate", "Latency", "Multiplications", "WGates", "ends", "measured", "removable"]

Efficiency = Literal["flops", "latency"]


class Gate(nn.Module):
    """Binary gates from the weights of filters: ``g = 1[s >= 0]`` with the scores ``s = W* w + b`` of the flattened filters.

    The backward pass is that of ``arctan(s) / pi + 1/2``. The best filter's gate is always open. At initialisation all are.

    Args:
        features: Weights of a filter.

    Shapes: ``[filters, features] -> [filters]``

    Examples:
        >>> gate = Gate(3)
        >>> _ = nn.init.constant_(gate.score.weight, 1.0), nn.init.zeros_(gate.score.bias)
        >>> gate(torch.tensor([[0.5, 0.5, 0.5], [-1.0, 0.0, 0.0]])).tolist()
        [1.0, 0.0]
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.score = nn.Linear(features, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.constant_(self.score.bias, 0.5)

    def forward(self, filters: Float[Tensor, "filters features"]) -> Float[Tensor, " filters"]:
        s = self.score(filters).squeeze(1)
        soft = s.atan() / math.pi + 0.5
        hard = ((s >= 0) | (s == s.max())).to(s.dtype)
        return hard + soft - soft.detach()


class WGates(Rule):
    """Train a network together with gates that see its filters' weights and close filters until a budget is met.

    Paper: Li, Liu, Wu, Yao, Zhang, Zhang and Yin, "Weight-dependent Gates for Network Pruning", IEEE TCSVT 2022,
    arXiv:2007.02066, doi:10.1109/TCSVT.2022.3175762; its earlier version is "Weight-dependent Gates for Differentiable Neural Network
    Pruning", doi:10.1007/978-3-030-68238-5_3, with a predictor of latency alone.

    The filters of a layer, flattened to ``W*``, are scored by a linear map and binarised: ``g = step(W* w + b)``. What reads the
    filters' outputs sees them times ``g``, so a closed filter is gone, and may come back as long as training goes on. An
    efficiency module E turns the shares of open gates into the share of the cost that is left: exact multiply-adds, or
    latency as a small network predicts it that was trained on measured times of shrunk models. Both are differentiable, and the loss is
    ``cross entropy + weight * max(0, log(E / target))``. ``result()`` removes the closed filters.

    Units are the groups of ``core.wiring`` (channels, neurons, heads of attention), where linear layers and convolutions
    write and read them and no norm over channels does. Layers that share channels (the stream of a ResNet) share
    gates, which see the filters of all of them. Beside a training step, gates take one pass over the weights.

    No code of the authors was found (repositories, code and papers-with-code were searched), and only abstracts of the
    paper could be read. They say that binary gates are a learned function of the filters' weights, and that the efficiency module
    predicts latency or FLOPs; the linear score, the surrogate gradient, the bias, the hinge at a target and all rates are choices
    made here.

    Args:
        model: The network, trained or not. Its own weights are trained too.
        target: Share of the cost that is to be left, above 0 and below 1.
        efficiency: What the budget counts: ``flops`` or ``latency``.
        weight: Weight of the cost in the loss.
        lr: Learning rate of Adam, for the model's weights.
        gate_lr: Learning rate of the gates.
        samples: Shrunk models whose latency is measured at the first step.

    Shapes: a batch is (inputs [B, ...], labels [B]).

    Raises:
        ValueError: An option out of range, or from the first step: the network has no units that can be removed.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> rule = WGates(net, target=0.5)
        >>> for _ in range(60):
        ...     told = rule.step((torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])))
        >>> 0 < told["cost"] < 1, rule.result()[0].out_channels < 8
        (True, True)
    """

    slug = "w-gates"

    def __init__(
        self,
        model: nn.Module,
        *,
        target: float = 0.5,
        efficiency: Efficiency = "flops",
        weight: float = 2.0,
        lr: float = 1e-3,
        gate_lr: float = 1e-2,
        samples: int = 64,
    ) -> None:
        if not 0 < target < 1 or weight <= 0 or samples < 2:
            raise ValueError(
                f"WGates: target={target}, weight={weight}, samples={samples}; expected a target above 0 and below 1, a positive "
                "weight and at least 2 samples."
            )
        if efficiency not in get_args(Efficiency):
            raise ValueError(
                f"WGates: efficiency was {efficiency!r}; expected one of {', '.join(get_args(Efficiency))}."
            )
        self.model, self.target, self.efficiency, self.weight = model, target, efficiency, weight
        self.rates, self.samples = (lr, gate_lr), samples
        self.gates = nn.ModuleDict()
        self.cost: nn.Module | None = None
        self.optimiser: torch.optim.Adam | None = None
        self.wiring: Wiring | None = None
        self.like: Tensor | None = None

    def _prepare(self, inputs: Tensor) -> None:
        """Find the groups, make their gates and the efficiency module, and the optimiser."""
        if self.wiring is None:
            self.wiring, self.like = trace(self.model, inputs[:2]), inputs[:2]
            self.found = {n: g for n, g in self.wiring.groups.items() if removable(self.model, g)}
            if not self.found:
                raise ValueError(
                    f"WGates: {type(self.model).__name__} has no units between linear layers or convolutions that can be removed; "
                    "expected hidden channels, neurons or heads. Give another network."
                )
            if not self.gates:
                for name in self.found:
                    self.gates[_key(name)] = Gate(self._filters(name).shape[1]).to(self._filters(name))
                self._optimise()
            if self.cost is None or self.efficiency == "flops":
                self.cost = self._efficiency(inputs).to(inputs.device)

    def _optimise(self) -> None:
        own = {"params": [p for p in self.model.parameters() if p.requires_grad], "lr": self.rates[0]}
        self.optimiser = torch.optim.Adam([own, {"params": list(self.gates.parameters()), "lr": self.rates[1]}])

    def _efficiency(self, inputs: Tensor) -> nn.Module:
        assert self.wiring is not None
        names = list(self.found)
        if self.efficiency == "flops":
            return Multiplications(self.model, self.wiring, names, inputs[:2])
        made = measured(self.model, self.wiring, names, inputs, samples=self.samples)
        with torch.enable_grad():
            return Latency(len(names)).learn(*made).requires_grad_(False)

    def _filters(self, name: str) -> Float[Tensor, "filters features"]:
        """The flattened weights of the filters that write the units of a group, those of all its layers side by side."""
        written, _ = ends(self.model, self.found[name])
        return torch.cat([m.rows(self.model.get_parameter(m.name)) for m in written], 1)

    def _gated(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gates by group, and the weights that read through them."""
        opened = {name: self.gates[_key(name)](self._filters(name)) for name in self.found}
        weights: dict[str, Tensor] = {}
        for name, g in opened.items():
            for m in ends(self.model, self.found[name])[1]:
                weight = weights.get(m.name, self.model.get_parameter(m.name))
                factor = torch.ones(weight.shape[m.dim], device=g.device, dtype=g.dtype)
                factor = factor.index_put((m.index.to(g.device),), g[:, None].expand(m.index.shape))
                weights[m.name] = weight * factor.view([-1 if d == m.dim else 1 for d in range(weight.ndim)])
        return opened, weights

    def step(self, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
        """Train weights and gates on one batch; ``cost`` is the share of multiply-adds or latency that is left."""
        inputs, labels = batch
        self._prepare(inputs)
        assert self.cost is not None and self.optimiser is not None
        self.model.train()
        with torch.enable_grad():
            opened, weights = self._gated()
            loss = F.cross_entropy(torch.func.functional_call(self.model, weights, (inputs,)), labels)
            left = self.cost(torch.stack([g.mean() for g in opened.values()]))
            self.optimiser.zero_grad(set_to_none=True)
            (loss + self.weight * (left / self.target).log().relu()).backward()
        self.optimiser.step()
        return {"loss": float(loss.detach()), "cost": float(left.detach())}

    @torch.no_grad()
    def predict(self, inputs: Tensor) -> Tensor:
        """The output through the gates."""
        self._prepare(inputs)
        return torch.func.functional_call(self.model, self._gated()[1], (inputs,))

    @torch.no_grad()
    def keep(self) -> dict[str, list[int]]:
        """The units whose gates are open, by group.

        Raises:
            ValueError: No step was taken yet.
        """
        if self.wiring is None:
            raise ValueError(
                "WGates: no batch was seen, so there are no gates; expected a step before. Call step(batch) first."
            )
        return {name: g.nonzero()[:, 0].tolist() for name, g in self._gated()[0].items()}

    def result(self) -> nn.Module:
        """The network without the closed filters, as a plain model."""
        keep = self.keep()
        assert self.wiring is not None and self.like is not None
        return take(self.model, keep, self.wiring, self.like)

    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimiser of weights and gates, once the first batch has shown the groups."""
        return (self.optimiser,) if self.optimiser else ()

    def state_dict(self) -> dict[str, Any]:
        """Gates, the learned efficiency module and the optimiser's state."""
        learned = self.cost.state_dict() if self.cost is not None and self.efficiency == "latency" else None
        return {
            "gates": self.gates.state_dict(),
            "cost": learned,
            "optimiser": self.optimiser.state_dict() if self.optimiser else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave; the model's own weights are loaded by the caller."""
        for name, value in state["gates"].items():
            if name.endswith("score.weight"):
                self.gates[name.removesuffix(".score.weight")] = Gate(value.shape[1]).to(value.device)
        self.gates.load_state_dict(state["gates"])
        if state["cost"] is not None:
            self.cost = Latency(state["cost"]["net.0.weight"].shape[1])
            self.cost.load_state_dict(state["cost"])
            self.cost.requires_grad_(False)
        if state["optimiser"] is not None:
            self._optimise()
            assert self.optimiser is not None
            self.optimiser.load_state_dict(state["optimiser"])


def _key(name: str) -> str:
    return name.replace(".", "/")


def _digits() -> tuple[tuple[Tensor, Tensor], ...]:
    return datasets.drawn(datasets.split_digits().train, count=12)


def _small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
    )  # fmt: skip


EXAMPLE = Example(make=lambda: WGates(_small(), target=0.7, lr=1e-2), inputs=_digits)
