"""RepQ-ViT on a small vision Transformer at 4 and 6 bits, beside uniform grids and SmoothQuant; its two changes of scale are exact."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, check, effect, fits, highest, lowest, mechanism
from interlayer.claims.training import batches, built, divergence, judge, train
from interlayer.core.kinds import Plan
from interlayer.core.quantizer import Grid, LogGrid, Scaled, layers, nearest, smooth
from interlayer.core.quantizer.grid import By
from interlayer.core.quantizer.smooth import Fold, apply, readers
from interlayer.models import VisionTransformer
from interlayer.transform.quantize import _repq
from interlayer.transform.quantize.repq_vit import RepQViT

TASK = "digits"
BITS = (4, 6)
SPREADS = (1, 32)  # 1: as trained; 32: the same function, ranges of features up to that factor apart
RANGES: tuple[By, ...] = ("minmax", 99.9, "mse")  # every arm takes the best for each seed
ALPHAS = (0.5, 0.8)
FOLDS = ("folded", "bias left", "scales inverted")
CODES = ("by feature", "one grid", "zero points left")
BASES = ("shifts", "no parity", "other parity")


def build(arm: str, scale: Scale) -> nn.Module:
    """The vision Transformer."""
    return VisionTransformer(1, 8, patch=2, classes=10, depth=scale.depth, width=scale.width, heads=2)


@lru_cache(maxsize=4)
def trained(depth: int, width: int, steps: int, seed: int) -> nn.Module:
    """A trained model, the same for all arms of a seed."""
    model = built(lambda: build("", Scale(depth=depth, width=width)), seed)
    train(model, TASK, seed=seed, steps=steps, lr=3e-3, warmup=steps // 10)
    return model.eval()


def base(seed: int, scale: Scale, spread: int = 1) -> nn.Module:
    """The trained model of a seed; with ``spread``, gains of norms and the columns that read them scaled against each other."""
    model = copy.deepcopy(trained(scale.depth, scale.width, scale.training, seed))
    draw = torch.Generator().manual_seed(seed)
    there, _ = layers(model)
    found, _ = readers(model, [calibration(seed)[:1]], there)
    for norm, names in found.items():
        factor = spread ** -torch.rand(scale.width, generator=draw)
        apply(model.get_submodule(norm), [there[n] for n in names], Fold(names, factor))
    return model


def calibration(seed: int) -> Tensor:
    """32 images, as the authors take."""
    return next(batches(TASK, seed + 700, 32, 1))[0]


def misplaced(work: nn.Module, data: list[Any], found: Mapping[str, list[str]], held: _repq.Ranges) -> None:
    """The control: each feature gets the scale and the zero point of another."""
    for names in found.values():
        for name in names:
            scaled: Any = held[name]
            held[name] = Scaled(scaled.grid, scaled.scale.roll(1), scaled.zero.roll(1))


def plans(arm: str, bits: int, seed: int, scale: Scale, spread: int) -> list[Plan]:
    """How an arm rounds; several plans where the best counts."""
    model, data = base(seed, scale, spread), calibration(seed)
    uniform = partial(
        nearest, grid=Grid(bits, 0, "asymmetric"), inputs=Grid(bits, kind="asymmetric"), attention=True, data=data
    )
    if arm == "uniform":
        return [uniform(model, by=by) for by in RANGES[: scale.tries]]
    if arm == "smoothquant":
        return [
            uniform(smooth(model, data, alpha=alpha).apply(), by=by)
            for alpha in ALPHAS[: scale.tries]
            for by in RANGES[1 : scale.tries]
        ]
    if arm == "misplaced":
        told: dict[str, Any] = {"bits": bits, "at": None, "options": {}, "refine": misplaced}
        return [_repq.plan(arm, model, data, by=by, **told) for by in RANGES[: scale.tries]]
    return [RepQViT(bits=bits, by=by).plan(model, data) for by in RANGES[: scale.tries]]


def features(seed: int) -> tuple[Tensor, Scaled]:
    """Rows whose features differ in range and in place, in 64 bits, and a grid for each."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = draw(200, 16) * draw(16).mul(1.5).exp() + 3 * draw(16)
    held = Grid(4, -1, "affine").fit(x, 99.9)
    return x, Scaled(held.grid, held.scale.double(), held.zero.double())


@torch.no_grad()
def moved(arm: str, seed: int) -> float:
    """How far folding moves the outputs of a norm and a linear map, relative to the largest."""
    torch.manual_seed(seed)
    norm, layer = nn.LayerNorm(16, dtype=torch.float64), nn.Linear(16, 8, dtype=torch.float64)
    for p in norm.parameters():
        p.add_(torch.randn_like(p))
    x = torch.randn(64, 16, dtype=torch.float64)
    before, bias = layer(norm(x)), layer.bias.clone()
    _, scale, shift = _repq.merged(Grid(4, -1, "affine").fit(norm(x), 99.9), True)
    apply(norm, [layer], Fold([], scale.double(), shift.double() if shift is not None else None))
    if arm == "bias left":
        layer.bias.copy_(bias)
    elif arm == "scales inverted":
        layer.weight.div_(scale.double() ** 2)
    return float((layer(norm(x)) - before).abs().max() / before.abs().max())


def differing(arm: str, seed: int) -> float:
    """The share of codes that one scale gives otherwise than a scale for each feature."""
    x, held = features(seed)
    whole, scale, shift = _repq.merged(held, True)
    assert shift is not None
    if arm == "one grid":
        found = Grid(4, kind="affine").fit(x, 99.9).codes(x)
    else:
        found = whole.codes((x if arm == "zero points left" else x + shift) / scale)
    return float((found != held.codes(x)).double().mean())


def other_base(arm: str, seed: int) -> float:
    """How far values by shifts lie from powers of the root of 2, relative."""
    top = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    held = LogGrid(4, "sqrt2").fit(top[None])
    q = torch.arange(15)
    wanted = top * 2 ** (-q.double() / 2)
    if arm == "shifts":
        found = held.values(q).double()
    else:
        parity = (q + 1) % 2 if arm == "other parity" else torch.zeros_like(q)
        found = top * 2.0 ** -((q + 1) // 2) * (1 + (2**0.5 - 1) * parity)
    return float((found / wanted - 1).abs().max())


def measure(arm: str, seed: int, scale: Scale) -> Mapping[str, float]:
    """Held-out accuracy and divergence; else what an identity is off by."""
    if arm in FOLDS:
        return {"moved": moved(arm, seed)}
    if arm in CODES:
        return {"codes": differing(arm, seed)}
    if arm in BASES:
        return {"base": other_base(arm, seed)}
    if arm == "float":
        return {"accuracy, float": judge(base(seed, scale), TASK, batch=64, most=scale.judged)["accuracy"]}
    found: dict[str, float] = {}
    for spread in SPREADS[: 1 if arm == "smoothquant" else 2]:  # it undoes the spread, exactly
        for bits in BITS:
            models = [plan.apply().eval() for plan in plans(arm, bits, seed, scale, spread)]
            what = f"{bits} bits" + (f", ranges {spread} apart" if spread > 1 else "")
            scores = [judge(m, TASK, batch=64, most=scale.judged)["accuracy"] for m in models]
            found[f"{what}, accuracy"] = max(scores)
            whole = base(seed, scale)
            found[f"{what}, divergence"] = min(divergence(m, whole, TASK, most=scale.judged) for m in models)
    return found


OURS, APART = "repq-vit", f"ranges {SPREADS[1]} apart"
CLAIM = Claim(
    says="Folding the scales and zero points of features into a norm and the maps after it leaves the function as it was, one scale then "
    "gives the codes of one for each feature, and the change from the root of 2 to 2 is exact. Weights, activations and "
    "attention's operands of a small vision Transformer at 4 bits diverge less from the float one than on uniform grids "
    "and than with SmoothQuant, each at the best of three ranges; where ranges of features differ 32-fold, accuracy is higher too.",
    measure=measure,
    build=build,
    arms=("float", "uniform", "smoothquant", "repq-vit", "folded", "by feature", "shifts"),
    statements=(
        mechanism(
            "Folding scales and zero points leaves the outputs as they were.",
            fits("moved", "folded", high=1e-6),
            control="bias left",
            mutant="scales inverted",
        ),
        mechanism(
            "After the fold, one scale and zero point give the codes of one for each feature.",
            fits("codes", "by feature", high=1e-3),
            control="one grid",
            mutant="zero points left",
        ),
        mechanism(
            "Shifts and a factor by parity give the powers of the root of 2.",
            fits("base", "shifts", high=1e-6),
            control="no parity",
            mutant="other parity",
        ),
        effect(
            "At 4 bits the model diverges less from the float one than on uniform grids.",
            lowest("4 bits, divergence", OURS, than=("uniform",)),
            control="misplaced",
        ),
        effect(
            "At 4 bits the model diverges less from the float one than with SmoothQuant.",
            lowest("4 bits, divergence", OURS, than=("smoothquant",)),
            control="misplaced",
        ),
        effect(
            "At 4 bits the model is more accurate than on uniform grids.",
            highest("4 bits, accuracy", OURS, than=("uniform",)),
            control="misplaced",
        ),
        effect(
            "At 6 bits the model diverges less from the float one than on uniform grids.",
            lowest("6 bits, divergence", OURS, than=("uniform",)),
            control="misplaced",
        ),
        effect(
            "At 4 bits, with ranges 32 apart, the model is more accurate than on uniform grids.",
            highest(f"4 bits, {APART}, accuracy", OURS, than=("uniform",)),
            control="misplaced",
        ),
        effect(
            "At 6 bits, with ranges 32 apart, the model diverges less from the float one than on uniform grids.",
            lowest(f"6 bits, {APART}, divergence", OURS, than=("uniform",)),
            control="misplaced",
        ),
    ),
    checks=(
        check("The float model has learned; chance is 0.1.", fits("accuracy, float", "float", low=0.8)),
        check("Uniform grids leave room at 4 bits.", fits("4 bits, divergence", "uniform", low=0.01)),
    ),
    pilots="32 calibration images. 2 blocks of width 32, 600 steps at 3e-3, seeds 1000 and 1001, float accuracy 0.900 and 0.930. "
    "Divergence in 1e-3 nats as trained, 4 bits: uniform by minmax, 99.9, mse 85, 61, 50 and 106, 101, 52; SmoothQuant "
    "at 0.5, 0.8 57, 48 and "
    "78, 58; RepQ-ViT by minmax, 99.9, mse 50, 50, 34 and 47, 32, 37. 6 bits: uniform at best 4.8 and 3.3, SmoothQuant 3.0 and 7.4, "
    "RepQ-ViT at 99.9 5.0 and 8.9. Ranges 32 apart, accuracy at 4 bits: uniform at best 0.716 and 0.577, SmoothQuant and RepQ-ViT as "
    "before; divergence at 6 bits: uniform 58.6 and 57.6. 4 blocks after 400 steps at 1e-3 (accuracy 0.62 and 0.78): uniform at best "
    "226 and 69, RepQ-ViT at 99.9 42 and 25 at 4 bits; 3.4 and 3.6 beside 8.3 and 5.9 at 6. On five seeds to 1004, in 1e-3 nats at 4 "
    "bits: uniform at best 50, 52, 48, 53, 40, SmoothQuant 48, 58, 44, 52, 47, RepQ-ViT by minmax, 99.9, mse 50, 47, 60, 61, 40; 50, "
    "32, 52, 29, 24; 34, 37, 60, 25, 28; at 6 bits uniform 4.8, 3.3, 5.1, 4.2, 2.0, RepQ-ViT by mse 5.6, 6.3, 11.0, 4.8, 4.0. The "
    "claim trains for 400 steps, for time. All arms take the best of the same three ranges, and no gain is expected at 6 bits as "
    "trained. With other features' scales (seed 1002) 94 at 4 bits. Ranges of trained features differ 2- to 3-fold here, 33-fold in "
    "the paper's DeiT-S. A first run on seeds 0 to 7 had scales held to at least 1/1000 of the largest, which moved 0.7% of the codes: a "
    "fault, now 1/100000; nothing else was changed, and the other figures do not depend on it.",
    scales={
        "smoke": {"depth": 1, "width": 8, "training": 2, "judged": 1, "tries": 2},
        "small": {"depth": 2, "width": 32, "training": 400, "judged": 8, "tries": 3},
        "full": {"depth": 12, "width": 384, "training": 50000, "judged": 64, "tries": 3},
    },
)  # fmt: skip
