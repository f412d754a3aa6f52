"""LAPTOP-Diff: whole layers of a diffusion U-Net removed by how far the output moves without each, and distilled back."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from interlayer.core import delivery, recipe
from interlayer.core.allocate import Curve, allocate
from interlayer.core.example import Example
from interlayer.core.extras import need
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.select import At
from interlayer.transform.sparsify.laptop_diff.distillation import Distillation
from interlayer.transform.sparsify.laptop_diff.removal import Skip, Structure, losses, removable, saves, size, without

__all__ = ["Distillation", "LaptopDiff", "Skip", "losses", "removable", "without"]


class LaptopDiff(Transform):
    r"""Remove the layers of a diffusion U-Net without which its output moves least, for a given share of its parameters.

    Zhang, Li, Chen, Xie and Lu, LAPTOP-Diff: Layer Pruning and Normalized Distillation for Compressing Diffusion Models,
    arXiv:2404.11098. The output loss of a set of removed layers is nearly the sum of each one's own,

    .. math:: \min_r \; \mathbb{E} \lVert \epsilon(r_1, \ldots, r_m) - \epsilon \rVert^2 \approx \min_r \sum_i r_i \,
        \mathbb{E} \lVert \epsilon(r_i) - \epsilon \rVert^2 \quad \text{with} \quad \sum_i r_i p_i \ge P,

    which is a knapsack: here the optimum, by an integer programme (``core.allocate``). A removed layer becomes its input, or its own
    shortcut where it changes the number of channels, so the result has no trace of its branch. Retrain it with ``Distillation``.

    Layers are residual blocks: those of ``UNet2DModel`` and ``UNet2DConditionModel`` of diffusers, and members of lists of any module
    that keep the shape of their input or have a shortcut of their own.

    ``plan`` takes batches as ``taps.feed`` takes them, without targets: noised images at times over the whole range, with their
    conditions; a few hundred do. It costs a pass over them for each layer, and keeps one output of each.

    Args:
        share: Share of the model's parameters that goes, at least, above 0 and below 1.
        at: Which layers may go. By default see ``removable``.

    Shapes: any; the output's first axis counts examples.

    Raises:
        ValueError: A share out of range; from ``plan``: no data, an output that is a loss or not finite, no layer that can go, or
            fewer parameters in those than are to go.

    Examples:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.branch = nn.Linear(8, 8)
        ...     def forward(self, x):
        ...         return x + self.branch(x).tanh()
        >>> net = nn.Sequential(nn.Linear(4, 8), Block(), Block(), Block())
        >>> new = LaptopDiff(share=0.4).plan(net, torch.randn(32, 4)).apply()
        >>> [type(m).__name__ for m in new].count("Skip")
        2
    """

    slug: ClassVar[str] = "laptop-diff"

    def __init__(self, *, share: float = 0.25, at: At | None = None) -> None:
        if not 0 < share < 1:
            raise ValueError(
                f"laptop-diff: share was {share}; expected above 0 (else there is nothing to do) and below 1."
            )
        self.share, self.at = share, at

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """Measure each layer on ``data`` and choose which go."""
        self.take(others)
        there, skipped = removable(model, data, self.at)
        total, found = size(model), self.measured(model, there, data)
        gain = {n: saves(model.get_submodule(n), how) for n, how in there.items() if math.isfinite(found[n])}
        skipped += [Row(n, "stays", "without it the model does not run") for n in there if n not in gain]
        if not there or sum(gain.values()) < self.share * total:
            why = f" ({skipped[0].name} {skipped[0].why})" if skipped else ""
            raise ValueError(
                f"laptop-diff: the layers of {type(model).__name__} that can be removed hold {sum(gain.values())} of {total} "
                f"parameters; expected residual layers with at least {self.share:.0%}{why}. Lower share, or choose layers with at."
            )
        curves = [Curve([most, 0], [0.0, found[n]]) for n, most in gain.items()]
        best = allocate(curves, sum(gain.values()) - self.share * total, method="integer")
        gone = {n: there[n] for n, level in zip(gain, best.choice, strict=True) if level == 1}
        touched = [Row(n, f"removed: {gain[n]} of {total} parameters", f"alone {found[n]:.3g}") for n in gone]
        skipped += [Row(n, "stays", f"without it the output moves by {found[n]:.3g}") for n in gain if n not in gone]
        options = {"share": self.share}

        def build() -> nn.Module:
            new = copy.deepcopy(model)
            recipe.record(new, self.slug, options, {"layers": gone})
            return delivery.guard(without(new, gone), "removed layers")

        return Plan(self.slug, options, touched, skipped, build)

    def measured(self, model: nn.Module, there: Structure, data: Any) -> dict[str, float]:
        """What each layer counts for: how far the output moves without it."""
        return losses(model, there, data)

    def restore(self, model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        """Take the same layers out of a fresh base."""
        return delivery.guard(without(model, structure["layers"]), "removed layers")


class _Block(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(width, out, 3, padding=1), nn.ReLU())
        self.shortcut = nn.Conv2d(width, out, 1) if width != out else None

    def forward(self, x: Tensor) -> Tensor:
        return (x if self.shortcut is None else self.shortcut(x)) + self.branch(x)


def _plain() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(_Block(2, 4), _Block(4, 4), _Block(4, 4)), torch.randn(3, 2, 4, 4)


def _unet() -> tuple[nn.Module, dict[str, Tensor]]:
    diffusers: Any = need("diffusers", "hf", "laptop_diff.EXAMPLE")
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([3, 700])}


EXAMPLE = Example(make=lambda: LaptopDiff(share=0.3), inputs=_plain, hf=_unet)
