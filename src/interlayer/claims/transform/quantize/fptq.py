"""FPTQ on a small language model at 4-bit weights and 8-bit inputs, beside nearest levels and SmoothQuant; its parts are exact."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, check, effect, fits, lowest, mechanism
from interlayer.claims.harness import Statement
from interlayer.claims.training import built, calibration_texts, task, train
from interlayer.core.kinds import Plan
from interlayer.core.quantizer import Grid, Packed, layers, nearest, simulated, smooth
from interlayer.core.quantizer.grid import By
from interlayer.core.quantizer.smooth import Fold, apply, readers
from interlayer.models import Transformer
from interlayer.transform.quantize.fptq import FPTQ

TASK = "stdlib-bytes"
GROUP = 16
REGIMES = ("as trained", "planted", "grown")
OUTLIERS, FACTOR = 2, 30.0  # features of each norm, and how far they stand out
RANGES: tuple[By, ...] = ("minmax", "mse")  # every baseline takes the best for each seed
ALPHAS = (0.3, 0.5, 0.7)  # of SmoothQuant, which takes the best too


class Misplaced(FPTQ):
    """The control: each feature gets the scale of another. The function stays."""

    def scale(self, tops: Tensor) -> Tensor:
        """The same numbers in another order."""
        return super().scale(tops).roll(1)


class Plain(FPTQ):
    """The mutant: the logarithm is left out."""

    def scale(self, tops: Tensor) -> Tensor:
        """The magnitudes themselves."""
        return tops.clamp_min(1e-5)


FOLDS = ("folded", "norm left", "scales inverted")
EVEN = {"equalised": FPTQ, "misplaced scales": Misplaced, "no logarithm": Plain}
PRODUCTS = ("integers", "one scale", "groups swapped")


def build(arm: str, scale: Scale) -> nn.Module:
    """The language model of all arms."""
    return Transformer(256, scale.length, scale.depth, scale.width, max(1, scale.width // 16))


def norms(model: nn.Module, scale: Scale) -> list[tuple[nn.Module, list[nn.Module]]]:
    """The norms whose outputs linear maps alone read, with the maps."""
    there, _ = layers(model)
    found, _ = readers(model, [torch.zeros(1, scale.length, dtype=torch.long)], there)
    return [(model.get_submodule(n), [there[r] for r in each]) for n, each in found.items()]


@lru_cache(maxsize=2)
def trained(seed: int, scale: Scale, grown: bool) -> nn.Module:
    """The trained model of a seed; with ``grown``, the gains of some features are large from the first step."""
    model = built(lambda: build("", scale), seed)
    if grown:
        for norm, _ in norms(model, scale):
            gain: Any = norm.weight
            with torch.no_grad():
                gain[torch.randperm(len(gain), generator=torch.Generator().manual_seed(seed))[:OUTLIERS]] = FACTOR
    train(model, TASK, seed=seed, steps=scale.steps, lr=3e-3, batch=16, warmup=scale.steps // 10, cut=scale.length)
    return model.eval()


def base(regime: str, seed: int, scale: Scale) -> nn.Module:
    """The model of a seed as it is, the same function with outliers planted, or one that was trained with outliers."""
    model = trained(seed, scale, regime == "grown")
    if regime == "planted":
        model = copy.deepcopy(model)
        draw = torch.Generator().manual_seed(seed)
        for norm, maps in norms(model, scale):
            factor = torch.ones(scale.width)
            factor[torch.randperm(scale.width, generator=draw)[:OUTLIERS]] = 1 / FACTOR
            apply(norm, maps, Fold([], factor))
    return model


def plans(arm: str, regime: str, seed: int, scale: Scale) -> list[Plan]:
    """How an arm rounds; several plans where the best counts."""
    model, data = base(regime, seed, scale), calibration_texts(seed, scale)
    ways = {"fptq": FPTQ(group=GROUP), "one scale a row": FPTQ(group=10**6), "misplaced": Misplaced(group=GROUP)}
    if arm in ways:
        return [ways[arm].plan(model, data)]
    grid = Grid(4, 0, group=GROUP) if "groups" in arm else Grid(4, 0)
    starts = [model]
    if "smoothquant" in arm:
        starts = [smooth(model, data, alpha=alpha).apply() for alpha in ALPHAS[: scale.tries]]
    return [nearest(m, grid, inputs=Grid(8), data=data, by=by) for m in starts for by in RANGES[: scale.tries]]


@lru_cache(maxsize=3)
@torch.no_grad()
def told(regime: str, seed: int, scale: Scale) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Held-out texts, what follows, and the float model's predictions."""
    found, model = [], base(regime, seed, scale).eval()
    for x, y in islice(task(TASK).batches(0, 64, "validation"), scale.judged):
        x, y = x[:, : scale.length], y[:, : scale.length]
        found.append((x, y, model(x).log_softmax(-1)))
    return found


@torch.no_grad()
def scores(model: nn.Module, regime: str, seed: int, scale: Scale) -> tuple[float, float]:
    """Held-out loss in nats a byte, whose exponential is the perplexity; divergence from the float model's predictions in nats."""
    found = []
    for x, y, p in told(regime, seed, scale):
        q = model.eval()(x).log_softmax(-1)
        apart = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
        found.append((float(F.nll_loss(q.flatten(0, -2), y.flatten())), float(apart)))
    return sum(a for a, _ in found) / len(found), sum(b for _, b in found) / len(found)


def layered(seed: int) -> tuple[Any, Tensor]:
    """A norm and the map that reads it, in 64 bits; two features stand out."""
    torch.manual_seed(seed)
    norm, layer = nn.LayerNorm(32), nn.Linear(32, 16)
    with torch.no_grad():
        norm.weight.mul_(torch.randn(32).exp())
        norm.weight[:2] = FACTOR
    return nn.Sequential(norm, layer).double(), torch.randn(64, 32, dtype=torch.float64)


@torch.no_grad()
def moved(arm: str, seed: int) -> float:
    """How far equalisation moves the outputs, relative to the largest."""
    net, x = layered(seed)
    before, norm = net(x), copy.deepcopy(net[0])
    apply(net[0], [net[1]], Fold([], FPTQ().scale(net[0](x).abs().amax(0))))
    if arm == "norm left":
        net[0] = norm
    elif arm == "scales inverted":
        net[0].weight.copy_(norm.weight.square() / net[0].weight)
        net[0].bias.copy_(norm.bias)
    return float((net(x) - before).abs().max() / before.abs().max())


@torch.no_grad()
def uneven(arm: str, seed: int) -> float:
    """How far the largest magnitudes of features in the rounded model are from ``log2(2 + max)``, relative."""
    net, x = layered(seed)
    top = net[0](x).abs().amax(0)
    new: Any = EVEN[arm](group=GROUP).plan(net.float(), x.float()).apply()
    found = new[0](x.float()).abs().amax(0)
    return float((found / (2 + top).log2() - 1).abs().max())


@torch.no_grad()
def product(arm: str, seed: int, scale: Scale) -> float:
    """How far the logits by integer products are from those of the same model in floats, relative to the largest."""
    torch.manual_seed(seed)
    model, x = build("", scale).double().eval(), torch.randint(256, (4, scale.length))
    new = FPTQ(group=scale.width // 2, low=1.0).plan(model, x).apply().eval()
    wanted = simulated(new)(x)
    for each in (m for m in new.modules() if isinstance(m, Packed)):
        held: Any = each.scale
        if arm == "one scale":
            held.copy_(held.mean(-1, keepdim=True).expand_as(held))
        elif arm == "groups swapped":
            held.copy_(held.flip(-1))
    return float((new(x) - wanted).abs().max() / wanted.abs().max())


def measure(arm: str, seed: int, scale: Scale) -> Mapping[str, float]:
    """Held-out loss and divergence; else what an identity is off by."""
    if arm in FOLDS:
        return {"moved": moved(arm, seed)}
    if arm in EVEN:
        return {"uneven": uneven(arm, seed)}
    if arm in PRODUCTS:
        return {"product": product(arm, seed, scale)}
    found = dict[str, float]()
    for regime in REGIMES:
        models = [base(regime, seed, scale)]
        if arm != "float":
            models = [p.apply() for p in plans(arm, regime, seed, scale)]
        losses, apart = zip(*(scores(m, regime, seed, scale) for m in models), strict=True)
        found |= {f"perplexity, {regime}": math.exp(min(losses)), f"divergence, {regime}": min(apart)}
    return found


def better(metric: str, regime: str, than: str, control: str = "misplaced") -> Statement:
    """A lower perplexity or divergence than another way to round."""
    how = {"as trained": "As trained", "planted": "With outliers planted", "grown": "Trained with outliers"}[regime]
    names = {"naive": "with nearest levels", "naive, groups": "with nearest levels in the same groups"}
    whom = names.get(than, "with SmoothQuant in the same groups")
    return effect(
        f"{how}, {metric} at W4A8 is lower than {whom}.",
        lowest(f"{metric}, {regime}", "fptq", than=(than,)),
        control=control,
    )


CLAIM = Claim(
    says="Logarithmic equalisation leaves the function as it was and brings features that reach up to m to log2(2 + m), and the "
    "integer products of groups give the logits of the float twin. With weights of 4 bits and inputs of 8 in a small language model, "
    "FPTQ has a lower perplexity than nearest levels where two features of each norm stand out thirtyfold, and diverges less from "
    "the float model than they do as trained, and than SmoothQuant at its best strength where the model was trained with outliers.",
    measure=measure,
    build=build,
    arms=("float", "naive", "naive, groups", "smoothquant, groups", "fptq", "folded", "equalised", "integers"),
    statements=(
        mechanism(
            "Equalisation leaves the outputs of a norm and the map after it as they were.",
            fits("moved", "folded", high=1e-9),
            control="norm left",
            mutant="scales inverted",
        ),
        mechanism(
            "After it, a feature that reached up to m reaches up to log2(2 + m).",
            fits("uneven", "equalised", high=1e-4),
            control="misplaced scales",
            mutant="no logarithm",
        ),
        mechanism(
            "Packed weights and integer products by group give the logits of the same model in floats.",
            fits("product", "integers", high=1e-6),
            control="one scale",
            mutant="groups swapped",
        ),
        better("perplexity", "planted", "naive"),
        better("perplexity", "planted", "naive, groups"),
        better("divergence", "grown", "naive"),
        better("divergence", "as trained", "naive", control="one scale a row"),
        better("divergence", "grown", "smoothquant, groups"),
    ),
    checks=(
        check("The language model has learned; chance is 256.", fits("perplexity, as trained", "float", high=13.0)),
        check("Nearest levels leave room with outliers.", lowest("perplexity, planted", "float", than=("naive",), margin=0.1)),
    ),
    pilots="Width 32, groups of 16, 400 steps, seeds 1000 to 1002. The claim trains for 300 steps, for time. Perplexity with outliers "
    "planted: float 9.10, 9.30, 9.01; naive 9.58, 10.00, 9.52; naive in groups 9.57, 10.03, 9.50; FPTQ 9.14, 9.33, 9.02; with "
    "misplaced scales 10.3, 11.4, 11.3. Divergence in 1e-3 nats as trained: naive 1.92, 1.68, 2.34; in groups 1.40, 1.28, 1.93; "
    "SmoothQuant at its best of 0.3, 0.5, 0.7 1.79, 1.81, 2.24, in groups 1.50, 1.14, 1.79; FPTQ 1.50, 1.76, 2.05. Planted: naive "
    "43, 63, 53; FPTQ 3.0, 2.6, 3.2; SmoothQuant as it was, because it undoes any such planting exactly, so it is compared where the "
    "model was trained with gains of two features that start at 30: naive 10.7, 8.7, 8.3; in groups 16.6, 8.6, 5.2; SmoothQuant "
    "1.6, 1.2, 1.5, in groups 1.2, 1.2, 1.2; FPTQ 2.5, 2.1, 1.4. So no gain over SmoothQuant is expected. Thresholds are the paper's.",
    scales={
        "smoke": {"depth": 1, "width": 16, "length": 8, "steps": 2, "calibration": 2, "judged": 1, "tries": 1},
        "small": {"depth": 2, "width": 32, "length": 32, "steps": 300, "calibration": 8, "judged": 8, "tries": 3},
        "full": {"depth": 12, "width": 768, "length": 1024, "steps": 100000, "calibration": 32, "judged": 64, "tries": 3},
    },
)  # fmt: skip
