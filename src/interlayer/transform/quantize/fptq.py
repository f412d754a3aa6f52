"""FPTQ: weights of 4 bits in groups, inputs of 8 bits, and for each layer the way to round inputs that its range asks for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.example import Example, tiny_gpt2
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.quantizer import Grid, Packed, Scaled, extremes, layers, packs, weight_of
from interlayer.core.quantizer.attention import attentions
from interlayer.core.quantizer.layers import axis_of
from interlayer.core.quantizer.nearest import ran
from interlayer.core.quantizer.smooth import Fold, apply, foldable
from interlayer.core.select import At
from interlayer.models import Transformer

INPUTS = Grid(8)
LEAST = 1e-5  # magnitude of a feature that never moves


class FPTQ(Transform):
    r"""Round weights to 4 bits in groups and inputs to 8 bits, by ranges alone; products are of 8-bit integers.

    Li et al., FPTQ: Fine-grained Post-Training Quantization for Large Language Models, arXiv:2308.15987. The range
    :math:`v = \max |X|` of a layer's inputs decides how they are rounded:

    - :math:`v \le` ``low``: one scale, found from the data.
    - ``low`` :math:`< v <` ``high``: one scale, after logarithmic equalisation. Feature j is divided by
      :math:`s_j = \max |X_j| / \log_2(2 + \max |X_j|)` in the norm before, and column j of the weight multiplied by it; the function
      stays, and every feature then reaches up to :math:`\log_2(2 + \max |X_j|)`.
    - :math:`v \ge` ``high``: a scale for each token, found in the call. So is an input between the two that no norm gives, or
      whose norm others read too; the plan says so.

    Weights are rounded to the nearest level, symmetric, with a scale for each ``group`` neighbours of a row. A layer sums one
    integer product for each group, times the scales.

    The equation, the thresholds of 15 and 150 and the folding into norms are the paper's, checked in passages that a survey and its
    public reviews quote; the authors published no code. The group of 128, and what happens between the thresholds where no norm can
    be folded, are choices made here.

    Cost: one pass over the data. Memory: two numbers for each feature, and a copy of the model for the trial of its norms.

    Args:
        bits: Of weights, 2 to 8.
        group: Weights with a scale of their own. A row that this does not divide has groups of its largest divisor below it, and a
            row whose largest divisor is below 16 one scale.
        low: Range of inputs, in their own unit, up to which they have one scale.
        high: Range from which tokens have scales of their own.
        at: Which layers. Defaults to all.

    Shapes: any.

    Raises:
        ValueError: An option out of range; from ``plan``: no calibration data, or no layer that runs on it.

    Examples:
        >>> net, x = Transformer(16, 8, 1, 32, 2), torch.randint(16, (4, 8))
        >>> new = FPTQ(group=16, low=1.0).plan(net, x).apply()
        >>> new.trunk.blocks[0].mixer.qkv
        Packed([96, 32], 4 bits symmetric, inputs=8 bits symmetric)
    """

    slug: ClassVar[str] = "fptq"

    def __init__(
        self, *, bits: int = 4, group: int = 128, low: float = 15.0, high: float = 150.0, at: At | None = None
    ) -> None:
        if not (isinstance(bits, int) and 2 <= bits <= 8 and isinstance(group, int) and group >= 1):
            raise ValueError(f"fptq: bits {bits!r}, group {group!r}; expected integers, 2 to 8 and 1 or more.")
        if not 0 <= low <= high:
            raise ValueError(f"fptq: low={low}, high={high}; expected 0 <= low <= high.")
        self.bits, self.group, self.low, self.high, self.at = bits, group, low, high, at

    def scale(self, tops: Float[Tensor, " features"]) -> Float[Tensor, " features"]:
        """What features of these largest magnitudes are divided by."""
        tops = tops.clamp_min(LEAST)
        return tops / (2 + tops).log2()

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """Find the ranges in one pass, and list for each layer how its inputs are rounded."""
        self.take(others)
        batches = taps.batches(data, self.slug)
        there, skipped = layers(model, self.at)
        ends = extremes(model, batches, {n: axis_of(tuple(weight_of(m).shape)) for n, m in there.items()})
        there, never = ran(there, ends, self.slug)
        skipped += never
        tops = {n: e.abs().amax(-1) for n, e in ends.items()}
        middle = {n for n, t in tops.items() if self.low < float(t.max()) < self.high}
        found, refused = foldable(model, batches, {n: there[n] for n in middle}) if middle else ({}, {})
        norm_of = {name: norm for norm, names in found.items() for name in names}
        names, rows = attentions(model)
        skipped += rows + [Row(n, type(model.get_submodule(n)).__name__, "its products stay in float") for n in names]
        scales = {norm: self.scale(torch.stack([tops[n] for n in each]).amax(0)) for norm, each in found.items()}
        inputs: dict[str, Grid | Scaled] = {}
        touched = []
        for n, m in there.items():
            top, norm = tops[n], norm_of.get(n)
            range_ = float(top.max())
            if range_ <= self.low:
                how = "8 bits, one scale"
            elif norm:
                top, how = top / scales[norm], f"8 bits, one scale, equalised by {norm}"
            else:
                why = "" if n not in middle else ", no norm to equalise them in"
                how = f"8 bits by token{why}"
            inputs[n] = INPUTS if "by token" in how else INPUTS.fit(top)
            grid = self.grid(m)
            what = (
                f"{weight_of(m).numel()} weights, {self.bits} bits in groups of {grid.group or weight_of(m)[0].numel()}"
            )
            touched.append(Row(n, type(m).__name__, f"{what}; inputs up to {range_:.3g}, {how}"))
        for norm, why in refused.items():
            skipped.append(Row(norm, type(model.get_submodule(norm)).__name__, why))
        options = {"bits": self.bits, "group": self.group, "low": self.low, "high": self.high}

        def build() -> nn.Module:
            maps, norms = dict(there), dict[str, nn.Module]()
            for norm, each in found.items():
                norms[norm] = copy.deepcopy(model.get_submodule(norm))
                maps |= {n: copy.deepcopy(there[n]) for n in each}
                apply(norms[norm], [maps[n] for n in each], Fold(each, scales[norm]))
            new = {n: Packed(m, self.grid(m).fit(weight_of(m)), inputs=inputs[n]) for n, m in maps.items()}
            return packs(model, new, {"method": self.slug, **options}, norms=norms)

        return Plan(self.slug, options, touched, skipped, build)

    def grid(self, layer: nn.Module) -> Grid:
        """The grid of a layer's weight."""
        return Grid(self.bits, 0, group=self.group).divided(weight_of(layer)[0].numel())


def _plain() -> tuple[nn.Module, Tensor]:
    return Transformer(8, 4, 1, 8, 2), torch.randint(8, (2, 4))


EXAMPLE = Example(
    make=lambda: FPTQ(group=4, low=1.0),
    inputs=_plain,
    hf=lambda: tiny_gpt2(
        1, length=4, named=True, n_embd=8, vocab_size=8, n_positions=8, bos_token_id=0, eos_token_id=0, pad_token_id=0
    ),
)
