"""What each way of running the middle layers costs a trained byte-level language model."""

from __future__ import annotations

import copy
from functools import lru_cache
from statistics import mean
from types import SimpleNamespace

import torch
from torch import nn

from interlayer.claims import Claim, effect, highest, lowest
from interlayer.claims.training import batches, judge, task, train
from interlayer.models import Transformer
from interlayer.probe.painters import VARIANTS, Painters, cost, execution, similarity

DEPTH, LENGTH = 10, 64
FIRST = "looped-parallel-first"
MILD = "reverse-two"  # the second: the mildest change there is, which must not be the costliest


def build(arm: str, scale: SimpleNamespace) -> Transformer:
    """The language model that every arm runs in its own way."""
    return Transformer(length=LENGTH, depth=DEPTH, width=64, heads=4)


@lru_cache(maxsize=4)
def _trained(steps: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = build("trained", SimpleNamespace())
    train(model, "stdlib-bytes", seed=seed, steps=steps, lr=2e-3, batch=16, warmup=20, cut=LENGTH)
    return model.eval()


def _loss(model: nn.Module, scale: SimpleNamespace) -> float:
    return judge(model, "stdlib-bytes", batch=32, most=scale.batches, cut=LENGTH)["loss"]


@torch.no_grad()
def _loops(model: nn.Module, start: int, end: int) -> int:
    """How many loops do best on one training batch; the validation split has no say."""
    x, y = (part[:, :LENGTH] for part in next(batches("stdlib-bytes", 99, 32, 1)))

    def loss(loops: int) -> float:
        new = Painters(variant="looped-parallel", start=start, end=end, loops=loops).plan(model).apply()
        return float(task("stdlib-bytes").loss(new(x), y))

    return min(range(2, end - start + 2), key=loss)


def measure(arm: str, seed: int, scale: SimpleNamespace) -> dict[str, float]:
    """Loss in nats a byte for each number of blocks in the middle, and their mean; steps in depth at the largest."""
    model = copy.deepcopy(_trained(scale.steps, seed))
    if arm == "trained":
        table = similarity(model, next(batches("stdlib-bytes", 99, 16, 1))[0][:, :LENGTH]).tables["similarity"]
        middle = range(DEPTH // 4, DEPTH - DEPTH // 4)
        alike = mean(table[str(i)][j] for i in middle for j in middle if i < j)
        return {
            "loss": _loss(model, scale),
            f"depth_{scale.middles[-1]}": DEPTH,
            "alike_middle": alike,
            "alike_ends": table["0"][DEPTH - 1],
        }
    variant = arm.removesuffix("-first").removesuffix("-two")
    result: dict[str, float] = {}
    for size in scale.middles:
        blocks = 2 if arm == MILD else size
        start = 0 if arm == FIRST else (DEPTH - blocks) // 2
        end, loops = start + blocks, 1
        if variant == "looped-parallel":
            loops = _loops(model, start, end)
            result[f"loops_{size}"] = loops
        draws = range(3) if variant == "random-order" and size > 2 else range(1)
        losses = [
            _loss(Painters(variant=variant, start=start, end=end, loops=loops, seed=s).plan(model).apply(), scale)  # type: ignore[arg-type]
            for s in draws
        ]
        result[f"loss_{size}"] = mean(losses)
        result[f"depth_{size}"] = cost(execution(variant, DEPTH, start, end, loops=loops))["depth"]
    return {"loss": mean(result[f"loss_{size}"] for size in scale.middles), **result}


CLAIM = Claim(
    says="of the ways to run the 2, 4 or 6 middle blocks of a trained 10-block language model otherwise, repeating the "
    "centre block costs the most loss, and random order and looped parallel the least",
    measure=measure,
    build=build,
    arms=("trained", *VARIANTS),
    statements=(
        effect(
            "",
            highest("loss", "middle-repeat", than=("skip", "reverse", "random-order", "parallel", "looped-parallel")),
            control=MILD,
        ),
        effect(
            "", lowest("loss", "random-order", than=("skip", "middle-repeat", "reverse", "parallel")), control=FIRST
        ),
        effect(
            "", lowest("loss", "looped-parallel", than=("skip", "middle-repeat", "reverse", "parallel")), control=FIRST
        ),
    ),
    scales={
        "smoke": {"steps": 2, "middles": (3,), "batches": 1},
        "small": {"steps": 250, "middles": (2, 4, 6), "batches": 4},
        "full": {"steps": 20000, "middles": (2, 4, 6), "batches": 64},
    },
)
