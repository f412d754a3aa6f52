"""Rate-distortion pruning: sparsities of layers by what each costs the output, and a dynamic programme over all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.allocate import Curve, allocate
from interlayer.core.example import Example, tiny_convnet, tiny_gpt2
from interlayer.core.kinds import Plan
from interlayer.core.select import At
from interlayer.transform.sparsify._pruning import (
    Pruning,
    alive,
    distortion,
    editable,
    largest,
    layers,
    outputs,
    ranked,
)


class RdPrune(Pruning):
    r"""Prune each layer as far as the output tolerates it, by measured curves and a dynamic programme over all layers.

    Xu et al., Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks, ICCV 2023,
    arXiv:2308.10438. The distortion of the output f adds up over the layers that are pruned,

    .. math:: \mathbb{E} \lVert f(x; W) - f(x; \tilde W) \rVert^2 \approx \sum_l \delta_l(p_l),

    where :math:`\delta_l(p)` is measured by pruning the smallest share p of layer l alone. The shares that minimise the sum at
    a given sparsity are found by a dynamic programme (``core.allocate``). What its levels leave of the weights goes to the layers
    whose curves fall most for each of them, so the sparsity is exact, and each layer keeps at least one weight. Which
    weights and parameters count is as in ``Lamp``.

    ``plan`` takes calibration data as ``taps.feed`` takes them, without targets: a few hundred examples do. Without
    any, noise of the same shape will do. It costs a pass over the data for each layer and level, and keeps one output of each
    example. The first tensor of the model's output counts.

    Args:
        sparsity: Share of the selected weights that is zero in the end, above 0 and below 1.
        levels: Points of a layer's curve, evenly spaced in the share of its weights that are left.
        worst: Take the worst example's distortion, as the authors' code does with the arguments in its README. By default the mean,
            as in the equation.
        rounds: Prune in this many rounds, each the same share of what remains; curves are measured anew in each.
        train: Trains the pruned model in place, after every round. Bring your own loop; the plan shows what would be kept
            if nothing were trained.
        rewind: An earlier ``state_dict`` of the model: after every round all weights go back to it before ``train``; the
            masks stay.
        at: Modules whose matrices and kernels are pruned, embeddings and tables among them.
        bake: Return plain weights with zeros in them. False keeps the masks (``weights.masks``), so that further training
            leaves the zeros alone; ``weights.bake`` then makes the weights plain.

    Shapes: any; the output's first axis counts examples.

    Raises:
        ValueError: An option out of range; from ``plan``: no data, an output that is a loss or not finite, nothing to prune, a
            sparsity that prunes nothing or a whole layer, a ``rewind`` of another model, or a mask on a recurrent layer.

    Examples:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> new = RdPrune(sparsity=0.75).plan(net, torch.randn(32, 8)).apply()
        >>> sum(int((p != 0).sum()) for p in new.parameters() if p.ndim > 1)
        20
    """

    slug: ClassVar[str] = "rd-prune"

    def __init__(
        self,
        *,
        sparsity: float = 0.9,
        levels: int = 100,
        worst: bool = False,
        rounds: int = 1,
        train: Callable[[nn.Module], Any] | None = None,
        rewind: Mapping[str, Tensor] | None = None,
        at: At | None = None,
        bake: bool = True,
    ) -> None:
        super().__init__(sparsity=sparsity, rounds=rounds, train=train, rewind=rewind, at=at, bake=bake)
        if levels < 2:
            raise ValueError(f"rd-prune: levels was {levels}; expected at least 2.")
        self.levels, self.worst = levels, worst
        self.options |= {"levels": levels, "worst": worst}

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """Measure the curves on ``data`` and choose what to prune."""
        batches = taps.batches(
            data,
            self.slug,
            "no data; expected at least one batch, to measure with. Noise of the same shape will do too.",
        )
        return super().plan(model, batches, others=others)

    def choose(self, model: nn.Module, names: Sequence[str], keep: int, data: Any) -> list[Tensor]:
        """The largest magnitudes of each layer, as many as the programme gives it."""
        counts = shared(measured(model, names, data, levels=self.levels, worst=self.worst), keep)
        return [largest(w, a, k) for w, a, k in zip(layers(model, names), alive(model, names), counts, strict=True)]


def shared(curves: Sequence[Curve], keep: int) -> list[int]:
    """How many weights each layer keeps, ``keep`` in all: the optimum over levels, and what it leaves where curves fall most."""
    level = list(allocate(curves, keep).choice)
    cost, loss = [c.cost[:, 0] for c in curves], [c.loss for c in curves]
    counts = [int(c[k]) for c, k in zip(cost, level, strict=True)]
    while (rest := keep - sum(counts)) > 0:

        def slope(n: int) -> float:
            k = level[n]
            return float((loss[n][k] - loss[n][k + 1]) / (cost[n][k + 1] - cost[n][k]))

        n = max((n for n, k in enumerate(level) if k + 1 < len(cost[n])), key=slope)
        more = min(rest, int(cost[n][level[n] + 1]) - counts[n])
        counts[n], level[n] = counts[n] + more, level[n] + 1
    return counts


@torch.no_grad()
def measured(model: nn.Module, names: Sequence[str], data: Any, *, levels: int, worst: bool) -> list[Curve]:
    """A curve for each layer: how many weights it keeps, and the distortion of the output where it alone is pruned.

    Args:
        model: Left as it is.
        names: Its weights that are pruned; see ``_pruning.prunable``.
        data: Batches.
        levels: Points of a curve. Small layers have fewer.
        worst: Whether the worst example's distortion counts, or their mean.

    Raises:
        ValueError: The output is a loss, or not finite.
    """
    curves = []
    with taps.at_rest(copy.deepcopy(model)) as work:
        whole = outputs(work, data, "rd-prune")
        for layer, left in zip(editable(work, names), alive(work, names), strict=True):
            before, order, most = layer.clone(), ranked(layer, left), int(left.sum())
            counts = np.unique(np.rint(most * np.arange(levels + 1) / levels).clip(1)).astype(int)
            losses = []
            for count in counts[:-1]:
                layer.copy_(before.flatten().index_fill(0, order[count:], 0).view(layer.shape))
                losses.append(distortion(whole, taps.feed(work, data), worst=worst))
            layer.copy_(before)
            curves.append(Curve(counts, [*losses, 0.0]))
    return curves


EXAMPLE = Example(
    make=lambda: RdPrune(sparsity=0.8, levels=4), inputs=tiny_convnet, hf=lambda: tiny_gpt2(use_cache=False)
)
