"""Scales and shifts of activations moved between norms and the weights that read them, so that both round well."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from interlayer.core import taps
from interlayer.core.kinds import Plan, Row
from interlayer.core.quantizer.layers import weight_of
from interlayer.core.quantizer.nearest import layers, rounds
from interlayer.core.record import QUANTIZE
from interlayer.core.select import At
from interlayer.core.swap import known

CLOSE = 1e-3  # how far outputs may move, relative to the largest


class Fold(NamedTuple):
    """A change of what a norm gives, made up for in all that reads it: ``X' = (X + shift) / scale``, ``W' = W scale``,
    ``b' = b - W shift``, by features."""

    readers: list[str]
    scale: Tensor
    shift: Tensor | None = None


def smooth(model: nn.Module, data: Any, *, alpha: float = 0.5, at: At | None = None) -> Plan:
    """Plan to divide the outputs of norms by scales, and to multiply the weights that read them by the same; the function stays.

    Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models, arXiv:2211.10438:
    ``s_j = max |X_j|^alpha / max |W_j|^(1 - alpha)``. A norm counts if all that reads its output are linear maps; whether others read
    it too is found by trial, one pass over the first batch for each norm. Use it before ``nearest`` or any other method that
    rounds inputs.

    Args:
        model: Any module. It is not changed.
        data: Calibration data as ``taps.feed`` takes them.
        alpha: How much of the range goes to the weights, 0 to 1.
        at: Which linear maps may be multiplied. Defaults to all.

    Raises:
        ValueError: ``alpha`` out of range, no data, or no such norm.

    Examples:
        >>> net, x = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)), torch.randn(9, 4)
        >>> new = smooth(net, x).apply()
        >>> torch.allclose(new(x), net(x), atol=1e-5), torch.equal(new[1].weight, net[1].weight)
        (True, False)
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"smooth: alpha={alpha}; expected 0 to 1.")
    batches = taps.batches(data, "smooth")
    there, _ = layers(model, at)
    found, largest = readers(model, batches, there)
    tried: dict[str, Fold] = {}
    for norm, names in found.items():
        maps = [weight_of(there[n]).detach() for n in names]
        weights = torch.stack([m.abs().amax(0) for m in maps]).amax(0).clamp_min(1e-5)
        scale = (largest[norm].clamp_min(1e-5).pow(alpha) / weights.pow(1 - alpha)).clamp_min(1e-5)
        tried[norm] = Fold(names, scale)
    refused = fold(copy.deepcopy(model), batches, tried)
    skipped = [Row(n, type(model.get_submodule(n)).__name__, why) for n, why in refused.items()]
    kept = {n: f for n, f in tried.items() if n not in refused}
    touched = [
        Row(n, type(model.get_submodule(n)).__name__, f"scales go to {', '.join(f.readers)}") for n, f in kept.items()
    ]
    if not touched:
        why = f" ({skipped[0].name}: {skipped[0].why})" if skipped else ""
        raise ValueError(f"smooth: {type(model).__name__} has no norm whose output linear maps alone read{why}.")

    def build() -> nn.Module:
        result = rounds(model, {}, {"method": "smooth", "alpha": alpha})
        for norm, each in kept.items():
            apply(*_modules(result, norm, each), each)
        return result

    return Plan(QUANTIZE, {"alpha": alpha}, touched, skipped, build)


def fold(model: nn.Module, data: Any, folds: Mapping[str, Fold]) -> dict[str, str]:
    """Apply folds in place, as far as the model's outputs stay as they were; the norms where they did not, with the reason.

    Two passes over the first batch, and one more for each norm where together they move the outputs.
    """
    refused: dict[str, str] = {}
    touched = {id(p): p for n, f in folds.items() for p in _parts(model, n, f)}
    old = {i: p.detach().clone() for i, p in touched.items()}
    with taps.at_rest(model), torch.no_grad():

        def run() -> Tensor:
            return taps.first(next(taps.feed(model, taps.batches(data, "smooth")[:1])))

        def moved() -> bool:
            return float((run() - before).abs().max()) > CLOSE * float(before.abs().max())

        before = run()
        for norm, each in folds.items():
            apply(*_modules(model, norm, each), each)
        if moved():
            for i, p in touched.items():
                p.copy_(old[i])
            for norm, each in folds.items():
                mine = [(p, p.clone()) for p in _parts(model, norm, each)]
                apply(*_modules(model, norm, each), each)
                if moved():
                    for p, value in mine:
                        p.copy_(value)
                    refused[norm] = "others read its output too, or its gain is no plain factor"
    return refused


def one(batch: Any) -> Any:
    """The first example of a batch, or the whole batch where its parts have no common first axis."""
    sizes = {t.shape[0] if t.ndim else None for t in tree_leaves(batch) if isinstance(t, Tensor)}
    return tree_map(lambda t: t[:1] if isinstance(t, Tensor) else t, batch) if len(sizes - {None}) == 1 else batch


def foldable(
    model: nn.Module, batches: list[Any], there: Mapping[str, nn.Module]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Norms whose outputs these linear maps alone read, with the maps, and other norms with the reason. Found by trial.

    A few passes over one example.

    Args:
        model: Any module. It is not changed.
        batches: Of which the first is used.
        there: The linear maps, by name.
    """
    first = [one(batches[0])]
    found, _ = readers(model, first, there)
    trial = {n: Fold(names, torch.full((weight_of(there[names[0]]).shape[1],), 2.0)) for n, names in found.items()}
    refused = fold(copy.deepcopy(model), first, trial)
    return {n: names for n, names in found.items() if n not in refused}, refused


def _modules(model: nn.Module, norm: str, each: Fold) -> tuple[nn.Module, list[nn.Module]]:
    return model.get_submodule(norm), [model.get_submodule(n) for n in each.readers]


def _parts(model: nn.Module, norm: str, each: Fold) -> list[Tensor]:
    """The parameters that a fold changes."""
    source, maps = _modules(model, norm, each)
    return [t for m in (source, *maps) for t in (m.weight, getattr(m, "bias", None)) if t is not None]


@torch.no_grad()
def apply(norm: nn.Module, maps: Sequence[nn.Module], each: Fold) -> None:
    """Carry one fold out on a norm and on the linear maps that read it, in place.

    Raises:
        ValueError: A shift, where the norm or a map has no bias.
    """
    source: Any = norm
    scale = each.scale.to(source.weight)
    if each.shift is not None:
        if any(getattr(m, "bias", None) is None for m in (norm, *maps)):
            raise ValueError(
                f"fold: {type(norm).__name__} or what reads it ({', '.join(each.readers)}) has no bias; expected scales alone."
            )
        shift = each.shift.to(source.weight)
        source.bias.add_(shift)
        for m in maps:
            m.bias.sub_(weight_of(m) @ shift)  # type: ignore[operator]
    for p in (source.weight, getattr(source, "bias", None)):
        if p is not None:
            p.div_(scale)
    for m in maps:
        weight_of(m).mul_(scale)


def readers(
    model: nn.Module, batches: list[Any], there: Mapping[str, nn.Module]
) -> tuple[dict[str, list[str]], dict[str, Tensor]]:
    """Linear maps by the norm whose output they get, and the largest magnitude of each feature of that output."""
    norms = {
        n: m for n, m in model.named_modules()
        if known(m) == "norm" and isinstance(getattr(m, "weight", None), Tensor) and not isinstance(m, nn.GroupNorm | nn.BatchNorm2d)
    }  # fmt: skip
    maps = {n: m for n, m in there.items() if getattr(m, "weight", torch.zeros(0)).ndim == 2}
    found: dict[str, list[str]] = {}
    if not norms or not maps:
        return {}, {}
    largest: dict[str, Tensor] = {}
    with torch.no_grad(), taps.at_rest(model):
        for batch in batches:
            with (
                taps.read(model, lambda n, m: n in norms) as out,
                taps.read(model, lambda n, m: n in maps, side="input") as into,
            ):
                next(taps.feed(model, [batch]))
            for norm, value in out.items():
                top = value.abs().flatten(0, -2).amax(0)
                largest[norm] = torch.maximum(largest[norm], top) if norm in largest else top
                names = [
                    n for n, x in into.items() if x.data_ptr() == value.data_ptr() and x.shape[-1] == value.shape[-1]
                ]
                found.setdefault(norm, []).extend(n for n in names if n not in found[norm])
    return {n: r for n, r in found.items() if r}, largest
