"""DARTS: the weights of all candidates and the logits that mix them learn in turn, from two halves of the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from interlayer.core.kinds import Rule
from interlayer.core.search import CellNet, Supernet, architecture_gradients, held_out
from interlayer.core.search.space import Point

Mixture = dict[str, Float[Tensor, "E O"]]


class DARTS(Rule):
    """Search by gradient: relax the choice of operations to a softmax, train weights and logits in turn, keep the strongest.

    Paper: Liu, Simonyan and Yang, "DARTS: Differentiable Architecture Search", arXiv:1806.09055.

    Every edge computes ``sum_o softmax(a)_o o(x)`` (equation 2). A step updates the logits a with Adam on the held-out half
    of the batch, then the weights with SGD on the other half; ``core.search.held_out`` says which example belongs where, and
    it is the same in every epoch. Settings are those of the authors' code (quark0/darts): momentum 0.9 and decay 0.0003 for
    weights; betas 0.5 and 0.999 and decay 0.001 for logits. The cosine schedule and the clipping of gradients are the loop's.

    Args:
        model: The supernet.
        lr: Learning rate of the weights.
        arch_lr: Learning rate of the logits.
        unrolled: Whether logits look one step of the weights ahead (second order, four more passes a step).

    Shapes: a batch is (images [B, C, H, W], labels [B]), best of 8 examples or more.

    Raises:
        ValueError: The model is not a supernet, or an empty batch.

    Examples:
        >>> rule = DARTS(Supernet(1, 10, width=4, layers=1, nodes=1, operations=["skip_connect", "sep_conv_3x3"]))
        >>> sorted(rule.step((torch.randn(16, 1, 8, 8), torch.arange(16) % 10)))
        ['held', 'loss']
        >>> sorted(rule.genotype()["normal"]["node2"])
        ['inputs', 'op0', 'op1']
        >>> rule.result()(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    slug = "darts"

    def __init__(self, model: Supernet, *, lr: float = 0.025, arch_lr: float = 3e-4, unrolled: bool = False) -> None:
        if not isinstance(model, Supernet):
            raise ValueError(
                f"{type(self).__name__}: model {type(model).__name__}; expected a core.search.Supernet, which holds all "
                "candidates. On the command line: --model supernet."
            )
        self.model: Supernet = model
        self.unrolled = unrolled
        self.weights = model.weight_parameters()
        self.logits = list(model.architecture.values())
        self.descent = torch.optim.SGD(self.weights, lr, momentum=0.9, weight_decay=3e-4)
        self.search = torch.optim.Adam(self.logits, arch_lr, betas=(0.5, 0.999), weight_decay=1e-3)

    def mix(self, noisy: bool = False) -> Mixture:
        """The weights of the operations, by kind of cell. ``noisy`` asks for what the search uses, if that is random."""
        return {kind: logits.softmax(-1) for kind, logits in self.model.architecture.items()}

    def draw(self) -> None:
        """Draw what is random in a mixture; the passes of one update share it."""

    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """SGD of the weights and Adam of the logits."""
        return self.descent, self.search

    def step(self, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
        """Update the logits on the held-out half, then the weights on the other; ``loss`` and ``held`` are of these halves.

        A half without examples updates nothing, and its loss is left out.
        """
        inputs, targets = batch
        if not len(targets):
            raise ValueError(f"{type(self).__name__}: an empty batch; expected examples. Drop empty batches.")
        side = held_out(inputs)
        train, held = (inputs[~side], targets[~side]), (inputs[side], targets[side])
        self.model.train()
        found = {}
        if len(held[1]):
            self.draw()
            found["held"] = self._search(train, held)
        if len(train[1]):
            self.draw()
            loss = self._loss(train)
            self.descent.zero_grad()
            for weight, slope in zip(self.weights, torch.autograd.grad(loss, self.weights), strict=True):
                weight.grad = slope
            self.descent.step()
            found["loss"] = float(loss.detach())
        return {"loss": found.get("held", 0.0), **found}

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.model(batch[0], self.mix(noisy=True)), batch[1])

    def _search(self, train: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]) -> float:
        seen: list[Tensor] = []

        def loss() -> Tensor:
            seen.append(self._loss(held))
            return seen[0]

        group = self.descent.param_groups[0]
        buffers = [self.descent.state[w].get("momentum_buffer") for w in self.weights]
        slopes = architecture_gradients(
            self.logits,
            self.weights,
            lambda: self._loss(train),
            loss,
            unroll=group["lr"] if self.unrolled and len(train[1]) else 0.0,
            momentum=[0.0 if b is None else group["momentum"] * b for b in buffers],
            decay=group["weight_decay"],
        )
        for logit, slope in zip(self.logits, slopes, strict=True):
            logit.grad = slope
        self.search.step()
        return float(seen[0].detach())

    def predict(self, inputs: Tensor) -> Tensor:
        """The supernet's output with its mixture as it is now, without noise."""
        with torch.no_grad():
            return self.model(inputs, self.mix())

    def genotype(self) -> Point:
        """The architecture that was found, as data."""
        return self.model.derive()

    def result(self) -> CellNet:
        """The plain network that was found, freshly initialised, to be trained from scratch."""
        return self.model.plain(self.genotype())

    def state_dict(self) -> dict[str, Any]:
        """The states of both optimizers."""
        return {"weights": self.descent.state_dict(), "logits": self.search.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave; the model's own weights are loaded by the caller."""
        self.descent.load_state_dict(dict(state["weights"]))
        self.search.load_state_dict(dict(state["logits"]))
