"""Task-aware layer-wise distillation: a student matches its teacher layer by layer, through filters that keep what the task needs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core import aside, taps
from interlayer.core.data import answer, run
from interlayer.core.example import Example
from interlayer.core.kinds import Rule
from interlayer.core.order import behind
from interlayer.core.select import blocks

__all__ = ["Ted", "divergence", "shallow"]

NOWHERE = -100  # the target of a position that is not judged, as in torch's cross-entropy
TEMPERATURE = 2.0


def shallow(teacher: nn.Module, depth: int) -> nn.Module:
    """A model like the teacher with fewer blocks, evenly spaced ones of the teacher's; a plain model of its configuration.

    Args:
        teacher: A model of ``transformers``, or a backbone of ``interlayer.models`` made with plain options.
        depth: Blocks, at least 1 and fewer than the teacher's.

    Raises:
        ValueError: The number of blocks is out of range, or no configuration counts them.

    Examples:
        >>> from interlayer.models import VisionTransformer
        >>> big = VisionTransformer(1, 8, patch=4, depth=4, width=16, heads=2)
        >>> small = shallow(big, 2)
        >>> len(small.trunk.blocks), torch.equal(small.trunk.blocks[1].mlp.up.weight, big.trunk.blocks[3].mlp.up.weight)
        (2, True)
    """
    at, held = blocks(teacher)
    config: Any = getattr(teacher, "config", None)
    if not 0 < depth < len(held):
        raise ValueError(
            f"shallow: depth {depth}; expected 1 to {len(held) - 1}, below the {len(held)} of the teacher."
        )
    with torch.random.fork_rng(devices=[]):  # its first weights are replaced
        if isinstance(config, dict) and config.get("depth") == len(held):
            student = type(teacher)(**{**config, "depth": depth})
        elif getattr(config, "num_hidden_layers", None) == len(held):
            config = copy.deepcopy(config)
            config.num_hidden_layers = depth
            student = type(teacher)(config)
        else:
            raise ValueError(
                f"shallow: no configuration of {type(teacher).__name__} counts its {len(held)} blocks; expected depth or "
                "num_hidden_layers. Build the student yourself."
            )
    given, state = teacher.state_dict(), student.state_dict()
    for name in state:
        own = name
        if name.startswith(f"{at}."):
            number, _, rest = name[len(at) + 1 :].partition(".")
            own = f"{at}.{_matched(int(number), depth, len(held))}.{rest}"
        if own in given and given[own].shape == state[name].shape:
            state[name] = given[own]
    student.load_state_dict(state)
    return student.to(next(teacher.parameters()).device).train(teacher.training)


def _matched(block: int, depth: int, whole: int) -> int:
    """The teacher's block that a student's block stands for: the last of its share."""
    return (block + 1) * whole // depth - 1


def divergence(
    student: Float[Tensor, "B C"], teacher: Float[Tensor, "B C"], temperature: float = TEMPERATURE
) -> Float[Tensor, ""]:
    """``T^2 KL(softmax(teacher / T) | softmax(student / T))``, averaged over the batch."""
    log, soft = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    return F.kl_div(log, soft, reduction="batchmean") * temperature**2


class Ted(Rule):
    """Distil a trained teacher into a student whose layers match the teacher's as far as filters trained for the task see them.

    Paper: Liang, Zuo, Zhang, He, Chen and Zhao, "Less is More: Task-aware Layer-wise Distillation for Language Model Compression",
    ICML 2023, arXiv:2210.01351.

    Stage one: each matched block of the teacher and of the student gets a filter, a linear map of its hidden states, and a head
    that predicts the task's targets from them. Filters and heads learn by the mean of the heads' losses; both models stay as they
    are. Stage two: the heads go, and the student and its filters learn by
    ``task loss + kl * KL + mse * mean over blocks |student filter(h) - teacher filter(h')|^2``, the square averaged over all
    numbers, KL that of the outputs at temperature 2. Teacher and teacher's filters stay as they are.

    For fine-tuning, targets are labels. For continual pre-training by masked language modelling they are the tokens [B, S] that were
    masked, and -100 elsewhere. Where outputs have no positions, heads read the mean over positions, so that any encoder fits; the authors
    read the first position through a further layer. Their weights for both losses are 0 unless given; here neither is.

    Cost beside a step of training: a forward pass of the teacher in both stages.

    Args:
        model: The student: ``shallow(teacher, depth)``, or any model with the teacher's targets. It is trained in place.
        teacher: The trained teacher, which is copied. Defaults to the model as it is.
        filter_steps: Steps of stage one.
        width: Features D of the filters' outputs. Defaults to the teacher's.
        nonlinear: Filters of two layers with a GELU between them.
        kl: Weight of the divergence of the outputs; 0 leaves it out.
        mse: Weight of the distance of the filtered states; 0 leaves it out, and stage one too.
        filter_lr: Learning rate of AdamW in stage one.
        lr: Learning rate of AdamW in stage two.

    Shapes: a batch is (inputs, targets [B] or [B, S]); blocks give hidden states [B, S, D] or [B, D].

    Raises:
        ValueError: An option out of range, a model without a list of blocks, or, from the first step, hidden states that differ in more
            than their features.

    Examples:
        >>> from interlayer.models import VisionTransformer
        >>> teacher = VisionTransformer(1, 8, patch=4, depth=4, width=16, heads=2)
        >>> rule = Ted(shallow(teacher, 2), teacher=teacher, filter_steps=1)
        >>> batch = torch.randn(4, 1, 8, 8), torch.arange(4)
        >>> sorted(rule.step(batch)), sorted(rule.step(batch))
        (['loss'], ['kl', 'loss', 'mse'])
    """

    slug = "ted"

    def __init__(
        self,
        model: nn.Module,
        *,
        teacher: nn.Module | None = None,
        filter_steps: int = 100,
        width: int | None = None,
        nonlinear: bool = False,
        kl: float = 1.0,
        mse: float = 1.0,
        filter_lr: float = 1e-3,
        lr: float = 1e-3,
    ) -> None:
        if filter_steps < 0 or kl < 0 or mse < 0 or (width is not None and width < 1):
            raise ValueError(
                f"Ted: filter_steps={filter_steps}, kl={kl}, mse={mse}, width={width}; expected none below 0, and a width of at least 1."
            )
        self.model, self.teacher = (
            model,
            copy.deepcopy(model if teacher is None else teacher).eval().requires_grad_(False),
        )
        at, own = blocks(model)
        there, held = blocks(self.teacher)
        if len(own) > len(held):
            raise ValueError(
                f"Ted: {len(own)} blocks in the student and {len(held)} in the teacher; expected at most as many. Take a smaller student."
            )
        self.mine, self.theirs, self.count = at, there, len(own)
        self.filter_steps, self.width, self.nonlinear = filter_steps if mse else 0, width, nonlinear
        self.weights, self.rates, self.done = (kl, mse), (filter_lr, lr), 0
        self.sizes: list[int] = []
        self.filters: Any = nn.ModuleDict()
        self.first: torch.optim.Optimizer | None = None
        self.second: torch.optim.Optimizer | None = None

    def step(self, batch: tuple[Any, Tensor]) -> dict[str, float]:
        """Learn filters from a batch, or from ``filter_steps`` on the student; the loss is the task's."""
        x, targets = batch
        told: dict[str, float] = {}
        if not self.sizes:
            self._prepare(x)
        assert self.first is not None and self.second is not None
        with torch.no_grad():
            wanted, states = self._run(self.teacher, x, self.theirs)
        if self.done < self.filter_steps:
            self.model.eval()
            with torch.no_grad():
                outputs, mine = self._run(self.model, x, self.mine)
            losses = [
                _task(_pooled(head(filter_(h)), outputs), targets)
                for side, seen in (("student", mine), ("teacher", states))
                for filter_, head, h in zip(self.filters[side], self.filters[f"{side} heads"], seen, strict=True)
            ]
            value = loss = torch.stack(losses).mean()
            optimizer = self.first
        else:
            kl, mse = self.weights
            self.model.train()
            with aside.collect() as extra:
                outputs, mine = self._run(self.model, x, self.mine)
                value = loss = _task(outputs, targets)
            loss = loss if extra.loss is None else loss + extra.loss
            if kl:
                judged = targets.flatten() != NOWHERE
                apart = divergence(outputs.flatten(0, -2)[judged], wanted.flatten(0, -2)[judged])
                loss, told["kl"] = loss + kl * apart, float(apart.detach())
            if mse:
                far = self._distance(mine, states)
                loss, told["mse"] = loss + mse * far, float(far.detach())
            optimizer = self.second
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        self.done += 1
        return {"loss": float(value.detach()), **told}

    def _distance(self, mine: list[Tensor], states: list[Tensor]) -> Tensor:
        """The mean squared distance of the filtered states, averaged over the blocks."""
        pairs = zip(self.filters["student"], self.filters["teacher"], mine, states, strict=True)
        return torch.stack([F.mse_loss(own(h), its(t).detach()) for own, its, h, t in pairs]).mean()

    def _run(self, model: nn.Module, x: Any, at: str) -> tuple[Tensor, list[Tensor]]:
        """Outputs, and the hidden states behind the blocks, of the teacher the matched ones."""
        with behind(model, at) as seen:
            outputs = answer(run(model, x))
        if missing := [f"{at}.{i}" for i, states in enumerate(seen) if len(states) != 1]:
            raise ValueError(f"Ted: block {missing[0]} does not run once in a pass; expected blocks one after another.")
        return outputs, [seen[_matched(i, self.count, len(seen))][0] for i in range(self.count)]

    def _prepare(self, x: Any) -> None:
        """Make filters and heads for the sizes that a batch shows."""
        with torch.no_grad(), taps.at_rest(self.model):
            outputs, mine = self._run(self.model, x, self.mine)
            wanted, states = self._run(self.teacher, x, self.theirs)
        shapes = {(h.shape[:-1], t.shape[:-1]) for h, t in zip(mine, states, strict=True)}
        if outputs.shape != wanted.shape or any(a != b for a, b in shapes):
            raise ValueError(
                f"Ted: outputs {tuple(outputs.shape)} and states {tuple(mine[0].shape)} in the student, {tuple(wanted.shape)} and "
                f"{tuple(states[0].shape)} in the teacher; expected equal shapes but for the states' features."
            )
        self._make([mine[0].shape[-1], states[0].shape[-1], outputs.shape[-1]], outputs)

    def _make(self, sizes: list[int], like: Tensor) -> None:
        self.sizes, width = sizes, self.width or sizes[1]

        def filter_(features: int) -> nn.Module:
            last = nn.Linear(features, width)
            return nn.Sequential(nn.Linear(features, features), nn.GELU(), last) if self.nonlinear else last

        for side, features in (("student", sizes[0]), ("teacher", sizes[1])):
            self.filters[side] = nn.ModuleList(filter_(features) for _ in range(self.count))
            self.filters[f"{side} heads"] = nn.ModuleList(nn.Linear(width, sizes[2]) for _ in range(self.count))
        self.filters.to(like.device, like.dtype)
        ours = [p for p in self.model.parameters() if p.requires_grad]
        self.first = torch.optim.AdamW(self.filters.parameters(), self.rates[0], weight_decay=0.0)
        self.second = torch.optim.AdamW([*ours, *self.filters["student"].parameters()], self.rates[1], weight_decay=0.0)

    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """Those of the two stages; none before the first step."""
        return (self.first, self.second) if self.first and self.second else ()

    def predict(self, inputs: Any) -> Tensor:
        """The student's outputs in evaluation mode; the mode is restored."""
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            found = answer(run(self.model, inputs))
        self.model.train(training)
        return found

    def result(self) -> nn.Module:
        """A copy of the student: a plain model, without filters."""
        return copy.deepcopy(self.model).eval()

    def state_dict(self) -> dict[str, Any]:
        """The stage, teacher, filters and optimizers."""
        found: dict[str, Any] = {"done": self.done, "sizes": self.sizes, "teacher": self.teacher.state_dict()}
        if self.first and self.second:
            found |= {
                "filters": self.filters.state_dict(), "first": self.first.state_dict(), "second": self.second.state_dict(),
            }  # fmt: skip
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        self.done = state["done"]
        self.teacher.load_state_dict(state["teacher"])
        if state["sizes"]:
            self._make(list(state["sizes"]), next(self.model.parameters()))
            assert self.first is not None and self.second is not None
            self.filters.load_state_dict(state["filters"])
            self.first.load_state_dict(state["first"])
            self.second.load_state_dict(state["second"])


def _pooled(x: Tensor, like: Tensor) -> Tensor:
    """The mean over positions where the outputs have none."""
    return x.mean(1) if x.ndim > like.ndim else x


def _task(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), ignore_index=NOWHERE)


def _student() -> Ted:
    from interlayer.models import VisionTransformer

    teacher = VisionTransformer(1, 8, patch=4, depth=2, width=16, heads=2)
    return Ted(shallow(teacher, 1), teacher=teacher, filter_steps=4, lr=3e-3)


def _digits() -> tuple[tuple[Tensor, Tensor], ...]:
    from interlayer.core import datasets

    return datasets.drawn(datasets.split_digits().train)


EXAMPLE = Example(make=_student, inputs=_digits)
