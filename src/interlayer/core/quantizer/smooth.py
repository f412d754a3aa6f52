"""Large activations moved into the weights that read them, so that both round well."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.blockwise import listed
from interlayer.core.kinds import Plan, Row
from interlayer.core.quantizer.layers import weight_of
from interlayer.core.quantizer.nearest import layers, rounds
from interlayer.core.record import QUANTIZE
from interlayer.core.select import At
from interlayer.core.swap import known

CLOSE = 1e-3  # how far outputs may move, relative to the largest


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
    batches = listed(data)
    there, _ = layers(model, at)
    readers, largest = _readers(model, batches, there)
    work = copy.deepcopy(model)
    touched, skipped = list[Row](), list[Row]()
    new: dict[str, Tensor] = {}
    with torch.no_grad(), taps.at_rest(work):
        before = taps.first(next(taps.feed(work, batches[:1])))
        for norm, names in readers.items():
            module: Any = work.get_submodule(norm)
            maps = [weight_of(work.get_submodule(n)) for n in names]
            inputs = largest[norm].clamp_min(1e-5)
            weights = torch.stack([m.abs().amax(0) for m in maps]).amax(0).clamp_min(1e-5)
            scale = (inputs.pow(alpha) / weights.pow(1 - alpha)).clamp_min(1e-5)
            parts = [module.weight, *([module.bias] if getattr(module, "bias", None) is not None else [])]
            held = [p.clone() for p in [*parts, *maps]]
            for p in parts:
                p.div_(scale)
            for m in maps:
                m.mul_(scale)
            after = taps.first(next(taps.feed(work, batches[:1])))
            if float((after - before).abs().max()) > CLOSE * float(before.abs().max()):
                for p, old in zip([*parts, *maps], held, strict=True):
                    p.copy_(old)
                skipped.append(
                    Row(norm, type(module).__name__, "others read its output too, or its gain is no plain factor")
                )
            else:
                touched.append(Row(norm, type(module).__name__, f"scales go to {', '.join(names)}"))
                new |= {n: m.clone() for n, m in zip(names, maps, strict=True)}
                new |= {f"{norm} {i}": p.clone() for i, p in enumerate(parts)}
    if not touched:
        why = f" ({skipped[0].name}: {skipped[0].why})" if skipped else ""
        raise ValueError(f"smooth: {type(model).__name__} has no norm whose output linear maps alone read{why}.")

    def build() -> nn.Module:
        result = rounds(model, {n: v for n, v in new.items() if " " not in n}, {"method": "smooth", "alpha": alpha})
        with torch.no_grad():
            for row in touched:
                norm: Any = result.get_submodule(row.name)
                norm.weight.copy_(new[f"{row.name} 0"])
                if f"{row.name} 1" in new:
                    norm.bias.copy_(new[f"{row.name} 1"])
        return result

    return Plan(QUANTIZE, {"alpha": alpha}, touched, skipped, build)


def _readers(
    model: nn.Module, batches: list[Any], there: dict[str, nn.Module]
) -> tuple[dict[str, list[str]], dict[str, Tensor]]:
    """Linear maps by the norm whose output they get, and the largest magnitude of each feature of that output."""
    norms = {
        n: m for n, m in model.named_modules()
        if known(m) == "norm" and isinstance(getattr(m, "weight", None), Tensor) and not isinstance(m, nn.GroupNorm | nn.BatchNorm2d)
    }  # fmt: skip
    maps = {n: m for n, m in there.items() if getattr(m, "weight", torch.zeros(0)).ndim == 2}
    readers: dict[str, list[str]] = {}
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
                readers.setdefault(norm, []).extend(n for n in names if n not in readers[norm])
    return {n: r for n, r in readers.items() if r}, largest
