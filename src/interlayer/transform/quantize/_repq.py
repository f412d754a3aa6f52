"""What RepQ-ViT and its successor share: fine grids where they fit, folded into a model whose grids are simple."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.kinds import Plan, Row
from interlayer.core.quantizer import Grid, LogGrid, Packed, Round, Scaled, layers, observe, opening, packs
from interlayer.core.quantizer.attention import operands
from interlayer.core.quantizer.grid import By, LogScaled
from interlayer.core.quantizer.layers import biased, weight_of
from interlayer.core.quantizer.nearest import operand_rows, ran
from interlayer.core.quantizer.smooth import Fold, apply, foldable
from interlayer.core.select import At, put

LEAST = 1e-5  # of the largest scale: a feature that does not move gets no finer one, and keeps a zero point that floats hold
Ranges: TypeAlias = dict[str, Scaled | LogScaled]
Refine: TypeAlias = Callable[[nn.Module, list[Any], Mapping[str, list[str]], Ranges], None]
"""Makes ranges better, in place: gets the opened model, the batches, the readers of each norm, and the ranges."""
Choose: TypeAlias = Callable[[nn.Module, nn.Module, list[Any], Mapping[str, Packed]], Mapping[str, Packed]]
"""Chooses better codes: gets the float model and the folded one, opened, the batches, and the packed layers."""


def merged(held: Scaled, shifts: bool) -> tuple[Scaled, Tensor, Tensor | None]:
    """One grid for all features, with the scale and the shift of each that make it as good as a grid for each.

    Equations 8 to 11: with ``s' = mean(s)`` and ``z' = mean(z)``, ``r1 = s / s'`` and ``r2 = z - z'``, the codes of
    ``(X + s r2) / r1`` at ``s'``, ``z'`` are those of ``X`` at ``s``, ``z``.
    """
    scale = held.scale.clamp_min(LEAST * float(held.scale.max()))
    zero = held.zero * held.scale / scale
    whole = Grid(held.grid.bits, kind=held.grid.kind)
    return (
        Scaled(whole, scale.mean(), zero.mean()),
        scale / scale.mean(),
        scale * (zero - zero.mean()) if shifts else None,
    )


def plan(
    slug: str,
    model: nn.Module,
    data: Any,
    *,
    bits: int,
    by: By,
    at: At | None,
    options: Mapping[str, Any],
    refine: Refine | None = None,
    choose: Choose | None = None,
) -> Plan:
    """Find all ranges in one pass over the data; ``apply`` folds and packs.

    Args:
        slug: The system's.
        model: Any module. It is not changed.
        data: Calibration data.
        bits: Of weights and activations.
        by: How ranges are chosen.
        at: Which layers and attentions.
        options: For the plan and the recipe.
        refine: What makes the ranges better.
        choose: What chooses better codes of the weights.
    """
    batches = taps.batches(data, slug)
    work, opens, rows = opening(model, at)
    there, skipped = layers(work, at)
    found, refused = foldable(work, batches, there)
    shifts = {n: getattr(work.get_submodule(n), "bias", None) is not None for n in found}
    skipped += rows + [Row(n, type(work.get_submodule(n)).__name__, why) for n, why in refused.items()]
    norm_of = {reader: norm for norm, names in found.items() for reader in names}
    grids: dict[str, Grid | LogGrid] = {}
    for name, layer in there.items():
        if name in norm_of:
            grids[name] = Grid(bits, -1, "affine" if shifts[norm_of[name]] else "symmetric")
        else:  # images and the like reach a first convolution in 8 bits, as in the authors' code
            grids[name] = Grid(8 if weight_of(layer).ndim > 2 else bits, kind="asymmetric")
    grids |= operands(opens, Grid(bits, kind="asymmetric"), LogGrid(bits, "sqrt2"))
    ranges: Ranges = observe(work, batches, grids, by=by)
    there, never = ran(there, ranges, slug)
    skipped += never
    touched, idle = operand_rows(opens, ranges, Grid(bits))
    for name, layer in there.items():
        how = f"{bits} bits, inputs {grids[name].bits} bits"
        if name in norm_of:
            parts = "scales and zeros" if shifts[norm_of[name]] else "scales"
            how += f", {parts} by feature folded into {norm_of[name]}"
        touched.append(Row(name, type(layer).__name__, f"{weight_of(layer).numel()} weights, {how}"))

    def build() -> nn.Module:
        held = dict(ranges)
        if refine:
            refine(work, batches, found, held)
        new: dict[str, nn.Module] = {n: Round(held[n]) for n in operands(opens, Grid(bits), Grid(bits)) if n in held}
        grid, norms, folded = Grid(bits, 0, "asymmetric"), dict[str, nn.Module](), dict[str, nn.Module](there)
        for norm, names in found.items():
            names = [n for n in names if n in held]
            if not names:
                continue
            source: Any = held[names[0]]
            whole, scale, shift = merged(source, shifts[norm])
            norms[norm] = copy.deepcopy(work.get_submodule(norm))
            maps = {n: copy.deepcopy(there[n] if shift is None else biased(there[n])) for n in names}
            apply(norms[norm], list(maps.values()), Fold(names, scale, shift))
            folded |= maps
            held |= dict.fromkeys(names, whole)
        packed: dict[str, Packed] = {}
        for n, m in folded.items():
            inputs: Any = held[n]
            packed[n] = Packed(m, grid.fit(weight_of(m), by), inputs=inputs)
        if choose:
            scratch = copy.deepcopy(work)
            for n, m in (folded | norms).items():
                put(scratch, n, m)
            packed = dict(choose(work, scratch, batches, packed))
        return packs(model, new | packed, {"method": slug, **options}, opens=opens, norms=norms)

    return Plan(slug, dict(options), touched, skipped + idle, build)
