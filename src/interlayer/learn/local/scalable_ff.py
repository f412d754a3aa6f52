"""Scalable Forward-Forward: convolutional networks trained block by block, with no gradient from block to block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from interlayer.core import datasets
from interlayer.core.example import Example
from interlayer.core.fit import fusible
from interlayer.core.kinds import Rule
from interlayer.core.select import blocks as find_blocks

UNITS = ("blocks", "layers")


class ScalableFF(Rule):
    """Every block learns from a loss of its own: the true class's goodness has to exceed that of all other classes.

    Paper: Krutsylo, "Scalable Forward-Forward Algorithm", arXiv:2501.03176.

    A small auxiliary convolution on a block's output, one output channel for each class, turns one pass into the
    goodness of all classes at once: ``g_c = mean over places of (A x)_c^2``; the true class is the positive sample and
    the others are the negative ones. The block's loss is the log-sum-exp margin
    ``log(1 + sum_{c != y} exp(g_c - g_y + margin))``. What goes on to the next block is layer-normalised and detached.
    With ``unit="blocks"`` ordinary backpropagation runs inside a block, its shortcut included (the paper's hybrid); with
    ``unit="layers"`` each convolution with what follows it learns alone. Prediction is the goodness averaged over the
    blocks (``read="all"``) or that of the last block. The network itself is not changed; its own head is not used.

    A block's graph is freed before the next block runs, so memory grows with the largest block, not with depth.

    The goodness, the normalised and detached blocks and the vote are as on the author's page on the method. No code of the author's
    was found, by name, by title or in the author's account on GitHub. Notes by others give the loss as
    ``log sum_c exp(g_c) - g_y``, which is ``margin=0`` here; the margin of 1, Adam and its rate are choices made here.

    Args:
        model: A convolutional network of repeated blocks, each of them a module.
        classes: Number of classes K.
        unit: ``blocks`` or ``layers``.
        cuts: Names of the modules that begin a new unit, if they are not to be found from the structure.
        lr: Learning rate of Adam.
        margin: Wanted distance of goodness.
        kernel: Side of the auxiliary kernels.
        read: ``all`` or ``last``.

    Shapes: a batch is (images [B, C, H, W], labels [B]).

    Raises:
        ValueError: Unknown ``unit`` or ``read``, a name that is not in the model, labels outside of the classes.

    Examples:
        >>> import torch
        >>> from interlayer.models.classic import ResNet18
        >>> rule = ScalableFF(ResNet18(1, 10, width=8), classes=10)
        >>> batch = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
        >>> sorted(rule.step(batch))
        ['accuracy', 'loss']
        >>> rule.predict(batch[0]).shape
        torch.Size([4, 10])
    """

    slug = "scalable-ff"

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: int = 10,
        unit: str = "blocks",
        cuts: Sequence[str] | None = None,
        lr: float = 2e-3,
        margin: float = 1.0,
        kernel: int = 1,
        read: str = "all",
    ) -> None:
        if unit not in UNITS:
            raise ValueError(f"ScalableFF: unit {unit!r} is not one of {UNITS}.")
        if read not in ("all", "last"):
            raise ValueError(f"ScalableFF: read {read!r} is not 'all' or 'last'.")
        self.model, self.classes, self.margin, self.kernel, self.read, self.lr = (
            model,
            classes,
            margin,
            kernel,
            read,
            lr,
        )
        modules = dict(model.named_modules())
        names = list(cuts) if cuts is not None else self._units(model, unit)
        if wrong := [n for n in names if n not in modules]:
            raise ValueError(
                f"ScalableFF: no module {wrong[0]!r} in {type(model).__name__}; see model.named_modules()."
            )
        self.cuts = {name: modules[name] for name in names}
        self.judges = nn.ModuleDict()
        self.optimiser: torch.optim.Adam | None = None

    @staticmethod
    def _units(model: nn.Module, unit: str) -> list[str]:
        """Where units begin: at each repeated block and after the last, and with ``layers`` at each convolution too."""
        name, found = find_blocks(model)
        starts = [f"{name}.{i}" if name else str(i) for i in range(len(found))]
        if unit == "blocks":
            return starts
        names = []
        for start in starts:
            convs = [n for n, m in model.get_submodule(start).named_modules() if isinstance(m, nn.Conv2d)]
            # The first begins where its block does; 1x1 convolutions belong to the unit that they stand in.
            later = [n for n in convs[1:] if model.get_submodule(f"{start}.{n}").get_parameter("weight").shape[-1] > 1]
            names += [start, *(f"{start}.{n}" for n in later)]
        return names

    @contextmanager
    def _cutting(self, see: Any) -> Iterator[None]:
        """While this is open, ``see(name, x)`` gets what enters a unit, and the unit gets it normalised and detached."""

        def enter(name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            see(name, args[0])
            return (F.layer_norm(args[0].detach(), args[0].shape[1:]), *args[1:])

        last = list(find_blocks(self.model)[1].children())[-1]
        hooks = [m.register_forward_pre_hook(partial(enter, name)) for name, m in self.cuts.items()]

        def leave(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            see("end", out)
            return out.detach()

        hooks.append(last.register_forward_hook(leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _goodness(self, name: str, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        key = name.replace(".", "/")
        if key not in self.judges:
            judge = nn.Conv2d(x.shape[1], self.classes, self.kernel, padding=self.kernel // 2)
            self.judges[key] = judge.to(x.device, x.dtype)
        return self.judges[key](F.layer_norm(x, x.shape[1:])).square().mean((2, 3))

    def loss(self, goodness: Float[Tensor, "B K"], labels: Int[Tensor, " B"]) -> Tensor:
        """The log-sum-exp margin of the true class over all others."""
        margin = goodness - goodness.gather(1, labels[:, None]) + self.margin
        return F.pad(margin.scatter(1, labels[:, None], -torch.inf), (1, 0)).logsumexp(1).mean()

    def _prepare(self, images: Tensor) -> None:
        """Make the auxiliary convolutions, whose widths one pass shows, and the optimiser."""
        training = self.model.training
        with torch.no_grad(), self._cutting(self._goodness):
            self.model.eval()(images[:1])
        self.model.train(training)
        self.optimiser = self._adam()

    def _adam(self) -> torch.optim.Adam:
        head = self._unused()
        own = [p for n, p in self.model.named_parameters() if p.requires_grad and n not in head]
        weights = [*own, *self.judges.parameters()]
        return torch.optim.Adam(weights, lr=self.lr, fused=fusible(weights))

    def _unused(self) -> set[str]:
        """Parameters that come after the last block and so never get a gradient."""
        last = list(find_blocks(self.model)[1].parameters())[-1]
        names = [n for n, _ in self.model.named_parameters()]
        at = next(i for i, (_, p) in enumerate(self.model.named_parameters()) if p is last)
        return set(names[at + 1 :])

    def step(self, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
        """Train every unit on one batch; ``loss`` is the mean over units, ``accuracy`` that of the averaged goodness."""
        images, labels = batch
        if labels.min() < 0 or labels.max() >= self.classes:
            raise ValueError(f"ScalableFF: labels {int(labels.min())} to {int(labels.max())}; classes={self.classes}.")
        if self.optimiser is None:
            self._prepare(images)
        assert self.optimiser is not None
        self.optimiser.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        votes: list[Tensor] = []

        def learn(name: str, x: Tensor) -> None:
            goodness = self._goodness(name, x)
            loss = self.loss(goodness, labels)
            try:
                loss.backward()
            except RuntimeError as error:
                raise ValueError(
                    f"ScalableFF: a path of {type(self.model).__name__} goes round the unit before {name!r} (a shortcut "
                    "outside of the blocks); give cuts= with modules that hold their shortcuts."
                ) from error
            losses.append(loss.detach())
            votes.append(goodness.detach())

        self.model.train()
        with self._cutting(learn), torch.enable_grad():
            self.model(images)
        self.optimiser.step()
        right = self._vote(votes).argmax(1) == labels
        return {"loss": float(torch.stack(losses).mean()), "accuracy": float(right.float().mean())}

    def _vote(self, votes: list[Tensor]) -> Tensor:
        return votes[-1] if self.read == "last" else torch.stack(votes).mean(0)

    @torch.no_grad()
    def predict(self, inputs: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Goodness of each class; the model's mode is as before afterwards."""
        if self.optimiser is None:
            self._prepare(inputs)
        votes: list[Tensor] = []
        training = self.model.training
        self.model.eval()
        with self._cutting(lambda name, x: votes.append(self._goodness(name, x))):
            self.model(inputs)
        self.model.train(training)
        return self._vote(votes)

    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimiser, once the first batch has shown the widths."""
        return (self.optimiser,) if self.optimiser else ()

    def state_dict(self) -> dict[str, Any]:
        """Auxiliary weights and the optimiser's state."""
        return {
            "judges": self.judges.state_dict(),
            "optimiser": self.optimiser.state_dict() if self.optimiser else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave; the model's own weights are loaded by the caller."""
        for name, weight in state["judges"].items():
            if name.endswith(".weight"):
                self.judges[name[: -len(".weight")]] = nn.Conv2d(
                    weight.shape[1],
                    self.classes,
                    self.kernel,
                    padding=self.kernel // 2,
                    device=weight.device,
                    dtype=weight.dtype,
                )
        self.judges.load_state_dict(dict(state["judges"]))
        if state["optimiser"] is not None:
            self.optimiser = self._adam()
            self.optimiser.load_state_dict(state["optimiser"])


def _rule() -> ScalableFF:
    def block(channels: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())

    return ScalableFF(nn.Sequential(block(1), nn.Sequential(block(16), block(16))))


EXAMPLE = Example(make=_rule, inputs=lambda: datasets.digit_batches(32, centred=True))
