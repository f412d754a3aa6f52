"""The loss barrier between two networks trained apart, by width and training time, and a merge of split data."""

from __future__ import annotations

import copy
from functools import lru_cache
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.claims import Claim, effect, fits, lowest
from interlayer.claims.training import judge, task
from interlayer.core.fit import fit
from interlayer.core.paths import barrier, interpolate
from interlayer.core.wiring import trace
from interlayer.transform.merge.git_rebasin import GitRebasin

METHODS = ("weights", "activations", "straight-through")
Data = tuple[Tensor, Tensor]


def build(arm: str, scale: SimpleNamespace) -> nn.Sequential:
    """A network for digits of the largest width."""
    return net(max(scale.widths))


def net(width: int) -> nn.Sequential:
    """Three hidden layers."""
    hidden = [m for _ in range(2) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), *hidden, nn.Linear(width, 10))


@lru_cache(maxsize=64)
def _trained(width: int, steps: int, seed: int, part: int | None) -> nn.Module:
    torch.manual_seed(seed)
    model = net(width)
    x, y = _train() if part is None else _split(seed // 2)[part]
    chance = torch.Generator().manual_seed(seed)
    rows = (torch.randint(len(x), (64,), generator=chance) for _ in range(steps))
    fit(model, rows, lambda m, at: F.cross_entropy(m(x[at]), y[at]), steps=steps, lr=1e-3, clip=None)
    return model.eval()


def _train() -> Data:
    x, y = task("digits").data["train"]  # type: ignore[attr-defined]
    return x, y


def _split(seed: int) -> tuple[Data, Data]:
    """As the paper splits: a fifth of the classes 0 to 4 and four fifths of 5 to 9, and the rest."""
    x, y = _train()
    first = torch.rand(len(y), generator=torch.Generator().manual_seed(seed)) < torch.where(y < 5, 0.2, 0.8)
    return (x[first], y[first]), (x[~first], y[~first])


def _aligned(a: nn.Module, b: nn.Module, arm: str, seed: int, steps: int) -> nn.Module:
    x, y = _train()
    if arm in METHODS:
        data = list(zip(x.split(256), y.split(256), strict=True))
        transform = GitRebasin(method=arm, merge=None, steps=steps, seed=seed)  # type: ignore[arg-type]
        return transform.plan(a, data, others=(b,)).apply()
    moved = copy.deepcopy(b)
    if arm == "random":
        wiring = trace(a, x[:2])
        moved.load_state_dict(wiring.permute(b.state_dict(), wiring.random(seed)))
    return moved


def _loss(model: nn.Module) -> float:
    return judge(model, "digits")["loss"]


def measure(arm: str, seed: int, scale: SimpleNamespace) -> dict[str, float]:
    """Barriers of the validation loss between two networks trained from different initial weights."""
    found = {}
    pair = 2 * seed, 2 * seed + 1
    for width in scale.widths:
        a, b = (_trained(width, scale.steps, s, None) for s in pair)
        found[f"barrier at width {width}"] = barrier(a, _aligned(a, b, arm, seed, scale.matching), _loss)
    widest = scale.widths[-1]
    for steps in scale.early:
        a, b = (_trained(widest, steps, s, None) for s in pair)
        found[f"barrier at step {steps}"] = barrier(a, _aligned(a, b, arm, seed, scale.matching), _loss)
    found["barrier"] = found[f"barrier at width {widest}"]
    a, b = (_trained(widest, scale.steps, s, None) for s in pair)
    found["barrier left"] = found["barrier"] / max(barrier(a, b, _loss), 1e-9)
    found["fall with width"] = found[f"barrier at width {scale.widths[0]}"] - found["barrier"]
    a, b = (_trained(widest, scale.steps, s, part) for part, s in enumerate(pair))
    merged = _loss(interpolate(a, _aligned(a, b, arm, seed, scale.matching), 0.5))
    found["merged loss"], found["gain over each part"] = merged, min(_loss(a), _loss(b)) - merged
    return found


CLAIM = Claim(
    says="Weight matching removes at least 90% of the barrier of validation loss between two MLPs of three hidden "
    "layers trained apart on digits; the barrier that is left falls with width; and the half-half merge of two "
    "networks that each saw a biased part of the classes has less loss than either.",
    measure=measure,
    build=build,
    arms=("unmatched", *METHODS),
    statements=(
        effect("", lowest("barrier", "weights", than=("unmatched",)), control="random"),
        effect("", fits("barrier left", "weights", high=0.1), control="random"),
        effect("", fits("fall with width", "weights", low=0.0), control="random"),
        effect("", fits("gain over each part", "weights", low=0.0), control="random"),
    ),
    scales={
        "smoke": {"widths": (16, 32), "steps": 60, "early": (), "matching": 3},
        "small": {"widths": (32, 64, 256, 512), "steps": 600, "early": (20, 100), "matching": 30},
        "full": {"widths": (32, 64, 256, 512, 2048), "steps": 6000, "early": (20, 100, 600), "matching": 200},
    },
)
