"""Retraining of a pruned model by its teacher's output and features, each feature over the size of the teacher's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.data import answer, run
from interlayer.core.select import At, select

STAGES = ["down_blocks.*", "mid_block", "up_blocks.*"]


class Distillation:
    r"""The loss by which a pruned model is retrained: the task's, and the distances to the teacher's output and features.

    .. math:: L = L_{task} + o \, \lVert y - y^T \rVert^2 + f \sum_l \lVert h_l - h_l^T \rVert^2 / \lVert h_l^T \rVert^2

    The division by the teacher's features keeps those with large numbers from deciding alone. (The paper weights the terms by norms of
    the teacher's features too; with these squares, the size of the features of a stage does not matter at all.) It is called as
    ``core.fit.fit`` calls a loss: with the student and a batch of inputs and targets. Targets may be None: then nothing but the
    teacher is learned from. Cost beside a training step: a forward pass of the teacher.

    Args:
        teacher: The model before pruning, on which nothing is changed.
        at: Whose outputs are features, in both models. Defaults to the stages of a U-Net of diffusers.
        output: Weight o of the distance to the teacher's output.
        feature: Weight f of the distances of features; 0 leaves them out.
        normalise: Divide by the teacher's features. False gives BK-SDM's loss (Kim et al., arXiv:2305.15798).

    Raises:
        ValueError: A weight below 0, no features of that name, or, when called, features of other shapes.

    Examples:
        >>> from interlayer.core.fit import fit
        >>> teacher, student = (nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)) for _ in range(2))
        >>> loss = Distillation(teacher, at=["1"])
        >>> told = fit(student, [(torch.randn(64, 2), None)] * 50, loss, steps=50, lr=1e-2)
        >>> told[-1] < told[0]
        True
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        at: At | None = None,
        output: float = 1.0,
        feature: float = 1.0,
        normalise: bool = True,
    ) -> None:
        if output < 0 or feature < 0:
            raise ValueError(f"Distillation: output={output}, feature={feature}; expected none below 0.")
        self.teacher, self.at = teacher, STAGES if at is None else at
        self.output, self.feature, self.normalise = output, feature, normalise
        select(teacher, self.at)  # refuses where there is none

    def __call__(self, student: nn.Module, batch: tuple[Any, Tensor | None]) -> Float[Tensor, ""]:
        """The loss on a batch."""
        inputs, target = batch
        with taps.at_rest(self.teacher), torch.no_grad(), taps.read(self.teacher, self.at) as wanted:
            y = answer(run(self.teacher, inputs))
        with taps.read(student, self.at, detach=False) as found:
            z = answer(run(student, inputs))
        if z.shape != y.shape:
            raise ValueError(
                f"Distillation: the student gives {tuple(z.shape)}, the teacher {tuple(y.shape)}; expected the same shape."
            )
        loss = self.output * F.mse_loss(z, y) + self.feature * self.distance(found, wanted)
        return loss if target is None else loss + F.mse_loss(z, target)

    def distance(self, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """The sum of the distances of features."""
        terms = []
        for name, h in wanted.items():
            if name not in found or found[name].shape != h.shape:
                had = tuple(found[name].shape) if name in found else "nothing"
                raise ValueError(
                    f"Distillation: {name} gives {had} in the student and {tuple(h.shape)} in the teacher; expected the same shape. "
                    "Choose other features with at."
                )
            apart = (found[name] - h).square().mean()
            terms.append(apart / h.square().mean().clamp_min(1e-12) if self.normalise else apart)
        return torch.stack(terms).sum()
