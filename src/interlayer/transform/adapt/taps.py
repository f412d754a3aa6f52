"""TAPS: each task changes only the layers whose gate stays open, and shares all others with the base."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from interlayer.core import aside, datasets, nano
from interlayer.core.data import Experience, answer, run
from interlayer.core.example import Example
from interlayer.core.experiences import Learner, by_classes
from interlayer.core.fit import fit
from interlayer.core.pairing.seeds import seed_of
from interlayer.core.select import put
from interlayer.core.task import TensorTask

__all__ = ["TAPS", "Gated", "share"]
M = TypeVar("M", bound=nn.Module)
START, THRESHOLD = 0.15, 0.1


class Gated(nn.Module):
    """``W + 1[s >= 0.1] D``: a base weight W with a residual D that a gate s lets in or not, as a parametrization of torch.

    The gradient of s passes the step straight through: it is that of the indicator, ``<dL/dW, D>``. D starts at zero and s at 0.15.
    Below the threshold the weight is W itself, bit by bit.

    Args:
        weight: The base weight.

    Shapes: any, to the same.

    Examples:
        >>> part = Gated(torch.ones(2, 3))
        >>> _ = nn.init.ones_(part.residual)
        >>> part(torch.ones(2, 3))[0, 0].item(), nn.init.zeros_(part.gate).item(), part(torch.ones(2, 3))[0, 0].item()
        (2.0, 0.0, 1.0)
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        dtype = torch.promote_types(weight.dtype, torch.float32)  # half precision is too coarse for small steps
        self.residual = nn.Parameter(torch.zeros_like(weight, dtype=dtype))
        self.gate = nn.Parameter(torch.full((), START, dtype=dtype, device=weight.device))

    @property
    def open(self) -> Tensor:
        """Whether the residual takes part."""
        return self.gate >= THRESHOLD

    def forward(self, weight: Float[Tensor, "*W"]) -> Float[Tensor, "*W"]:
        """The task's weight."""
        indicator = self.open.to(self.gate.dtype) + (self.gate - self.gate.detach())
        return (weight + indicator * self.residual).to(weight.dtype)


class TAPS(Learner):
    """Task Adaptive Parameter Sharing: learn, for each task, which layers of a frozen network change, and how.

    Paper: Wallingford, Li, Achille, Ravichandran, Fowlkes, Bhotika and Soatto, "Task Adaptive Parameter Sharing for Multi-Task
    Learning" (CVPR 2022), arXiv:2203.16708; code MattWallingford/TAPS, by the first author.

    Task t has for each weight ``W_i`` of the base, i = 1..L, a residual ``D_i`` of zeros and a gate ``s_i = 0.15``:
    ``W_(t,i) = W_i + 1[s_i >= 0.1] D_i``. It minimises ``cross-entropy + sparsity / L sum_i |s_i|`` over residuals and gates, with
    the gradient of the indicator passed straight to s. A layer whose gate falls below 0.1 is the base's again, bit by bit.
    The task trains copies of all parameters of one axis too (norms, biases), running statistics included, and a head. So it costs as
    many numbers as its open layers have; others are not in its file.

    Optimiser and defaults are those of the authors' code: SGD of momentum 0.9, and no penalty in the first epochs (there
    ``epoch > 2``). That code divides by 52, the convolutions of a ResNet-50 without the first, whatever the network, and takes one
    step on the summed gradients of eight batches; here L is counted and each batch is a step. Formulas are those of the code: the
    paper's pages beyond its abstract were searched for and could not be opened.

    The joint variant is that code's too: ``share`` first trains the base on all tasks, then each task learns as above.

    Args:
        model: A trained network of any modules, with a linear head. Its parameters stop requiring gradients.
        sparsity: Weight of the penalty; larger values leave fewer layers to a task.
        warmup: Epochs of each task without penalty.
        lr: Learning rate at the beginning of a task.
        adam: Take Adam in place of SGD with momentum, as for Transformers and for short training.
        head: Name of the ``nn.Linear`` that each task replaces. Defaults to the last one.

    Shapes: a batch is (inputs [B, ...], labels [B]).

    Raises:
        ValueError: A number out of range, no weight beside the head, or a weight that has a parametrization already.

    Examples:
        >>> rule = TAPS(nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)))
        >>> task = by_classes(datasets.split_digits(), [[0, 1, 2]])[0]
        >>> rule.begin(task)
        >>> metrics = rule.step((task.train[0][:8].flatten(1), task.train[1][:8]))
        >>> rule.layers(task), rule.parameters(task)  # all of 0.weight; 0.bias; the head
        ({'0.weight': True}, 1091)
        >>> rule.result()
        Sequential(
          (0): Linear(in_features=64, out_features=16, bias=True)
          (1): ReLU()
          (2): Linear(in_features=16, out_features=3, bias=True)
        )
    """

    slug = "taps"

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float = 1.0,
        warmup: float = 3.0,
        lr: float = 1e-2,
        adam: bool = False,
        head: str | None = None,
    ) -> None:
        if sparsity < 0 or warmup < 0:
            raise ValueError(f"TAPS: sparsity={sparsity}, warmup={warmup}; expected 0 or more.")
        if any(parametrize.is_parametrized(m) for m in model.modules()):
            raise ValueError("TAPS: the model has parametrizations. Remove them first (torch.nn.utils.parametrize).")
        super().__init__(model.requires_grad_(False), lr=lr, penalty=0.0, head=head)
        self.sparsity, self.warmup, self.adam = sparsity, warmup, adam
        self.seen, self.free = 0, 0.0  # samples of the current task, and how many of them are without penalty
        if not list(self.shared()):
            raise ValueError(f"TAPS: {type(model).__name__} has no weight beside its head {self.head!r} to share.")

    def _weights(self, net: nn.Module) -> list[tuple[str, nn.Module, str]]:
        """Where the gated weights are: parameters of two axes or more outside of the head."""
        return [
            (name, module, key)
            for name, module in net.named_modules()
            for key, p in module.named_parameters(recurse=False)
            if p.ndim > 1 and p.is_floating_point() and name != self.head
        ]

    def shared(self) -> Iterable[Tensor]:
        """The weights that tasks gate."""
        return [module.get_parameter(key) for _, module, key in self._weights(self.model)]

    def adapt(self, net: nn.Module) -> None:
        """Gate the base's weights, once for all modules that share one, and let everything else learn."""
        places, gates = self._weights(net), dict[int, Gated]()
        common = {id(p) for p in self.shared()}
        for p in net.parameters():
            p.requires_grad_(id(p) not in common and p.is_floating_point())
        for _, module, key in places:
            weight = module.get_parameter(key)
            gate = gates.setdefault(id(weight), Gated(weight))
            parametrize.register_parametrization(module, key, gate)
            if isinstance(module, nn.RNNBase):
                module.register_forward_pre_hook(_flatten)

    def optimizer(self, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        """SGD with momentum, or Adam."""
        if self.adam:
            return super().optimizer(weights)
        return torch.optim.SGD(weights, self.lr, momentum=0.9)

    def begin(self, experience: Experience) -> None:
        """Make the network of a task, which begins with the base's weights, and an optimiser of what it trains."""
        super().begin(experience)
        self.seen, self.free = 0, self.warmup * len(experience.train[1])

    def loss(self, net: nn.Module, scores: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy; after the warm-up the penalty is an auxiliary loss."""
        parts = _gated(net).values()
        if self.seen >= self.free:
            aside.loss(self.sparsity * torch.stack([part.gate for part in parts]).abs().mean())
        if aside.listening():
            aside.metric("specific", torch.stack([part.open for part in parts]).float().mean())
        self.seen += len(labels)
        return super().loss(net, scores, labels)

    def layers(self, experience: Experience) -> dict[str, bool]:
        """Each gated weight, and whether the task has its own."""
        self.at(experience)
        return {name: bool(part.open) for name, part in _gated(self.nets[experience.name]).items()}

    def parameters(self, experience: Experience) -> int:
        """How many trained numbers a task has to itself, without its gates: open residuals, other parameters and its head."""
        self.at(experience)
        closed = self._closed(experience.name)
        own = {k: t for k, t in self.own(experience.name).items() if isinstance(t, nn.Parameter)}
        return sum(t.numel() for k, t in own.items() if k not in closed and not k.endswith(".0.gate"))

    def model_for(self, experience: Experience) -> nn.Module:
        """A plain copy of a task's network, in evaluation mode: its weights are ordinary parameters."""
        self.at(experience)
        return self.result()

    def result(self) -> nn.Module:
        """A plain copy of the current task's network; see ``model_for``."""
        new, net = copy.deepcopy(self.model), self.nets.get(self.current, self.model)
        put(new, self.head, copy.deepcopy(net.get_submodule(self.head)))
        state = {k: t for k, t in net.state_dict().items() if "parametrizations." not in k}
        for name, module in net.named_modules(remove_duplicate=False):
            for key in getattr(module, "parametrizations", ()):
                state[f"{name}.{key}".lstrip(".")] = getattr(module, key)
        new.load_state_dict(state)
        return new.requires_grad_(True).eval()

    def save(self, experience: Experience, path: str | Path) -> None:
        """Write what the task changed, as safetensors: residuals of closed layers are left out."""
        self.at(experience)
        closed = self._closed(experience.name)
        nano.keep(Path(path), {k: t for k, t in self.own(experience.name).items() if k not in closed})

    def _closed(self, name: str) -> set[str]:
        """The names of residuals that take no part."""
        parts = _gated(self.nets[name], whole=True)
        return {f"{key}.residual" for key, part in parts.items() if not part.open}

    def _fill(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Residuals that a file left out are zero."""
        gates = {k: bool(t >= THRESHOLD) for k, t in tensors.items() if k.endswith(".0.gate")}
        mine = self.own(name)
        gone = [k.removesuffix("gate") + "residual" for k, on in gates.items() if not on]
        zeros = {k: torch.zeros_like(mine[k]) for k in gone if k in mine and k not in tensors}
        super()._fill(name, {**tensors, **zeros})

    def state_dict(self) -> dict[str, Any]:
        """That of ``Learner``, and the samples seen."""
        return {**super().state_dict(), "seen": self.seen, "free": self.free}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        super().load_state_dict(state)
        self.seen, self.free = state["seen"], state["free"]


def share(
    model: M,
    stream: Sequence[Experience],
    *,
    steps: int,
    batch: int = 32,
    lr: float = 1e-3,
    head: str | None = None,
    seed: int = 0,
) -> M:
    """Train a base on all tasks at once, in place, a head for each: the first stage of the joint variant, before ``TAPS``.

    Each step takes a batch of every task and sums their losses, by AdamW (the authors' code takes SGD). The heads are dropped.

    Args:
        model: A network with a linear head.
        stream: The tasks.
        steps: Training steps.
        batch: Samples of each task in a step.
        lr: Learning rate.
        head: Name of the ``nn.Linear`` that each task replaces. Defaults to the last one.
        seed: Of the batches and of draws in training.

    Returns:
        The model.

    Raises:
        ValueError: No tasks, two of one name, or no such head.
    """
    if not stream:
        raise ValueError("taps.share: no tasks; expected at least one.")
    rule = Learner(model, head=head)
    for experience in stream:
        rule.begin(experience)
    batches = zip(
        *(TensorTask(e.name, e.train, e.test).batches(seed_of(seed, e.name), batch) for e in stream), strict=False
    )

    def loss(nets: Any, parts: Any) -> Tensor:
        each = [F.cross_entropy(answer(run(net, x)), y) for net, (x, y) in zip(nets, parts, strict=True)]
        return torch.stack(each).sum()

    fit(nn.ModuleList(rule.nets.values()), batches, loss, steps=steps, lr=lr, seed=seed)
    return model


def _gated(net: nn.Module, *, whole: bool = False) -> dict[str, Gated]:
    """The gates by the name of their weight, or by their own; weights that share one come once."""
    found = {name: m for name, m in net.named_modules() if isinstance(m, Gated)}
    return found if whole else {n.replace("parametrizations.", "").removesuffix(".0"): m for n, m in found.items()}


def _flatten(module: Any, inputs: Any = None) -> None:
    """Let a recurrent layer, which keeps a list of its weights, see them as they are now."""
    module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


def _rule() -> TAPS:
    layers = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 3, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)]
    return TAPS(nn.Sequential(*layers), sparsity=0.3, warmup=0.1, lr=0.05)


def _tasks() -> list[Experience]:
    return by_classes(datasets.split_digits(), [[0, 1, 2], [3, 4], [5, 6, 7, 8]])


def _batches() -> tuple[tuple[Tensor, Tensor], ...]:
    return datasets.drawn(_tasks()[0].train, 20)


EXAMPLE = Example(make=_rule, inputs=_batches, experiences=_tasks, forgets=False)
