"""Building a model with paired noise as a multiple of building it plainly: the first time, and with another seed."""

from __future__ import annotations

from functools import partial

import torch
import transformers

from benchmarks.harness import compare
from interlayer.core.pairing import paired
from interlayer.models import MLP, Transformer
from interlayer.models.transformer import SIZES

GOAL = 2.2
MODELS = {
    "Transformer nano": (partial(Transformer, **SIZES["nano"]), 10),
    "Transformer small": (partial(Transformer, **SIZES["small"]), 1),
    "MLP of 4 layers": (partial(MLP, 64, 10, depth=4, width=64), 20),
    f"GPT-2 of 12 layers (transformers {transformers.__version__})": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()),
        1,
    ),
}


def main() -> None:
    """Each model, with the check that a second paired build gives the same numbers."""
    for name, (build, inner) in MODELS.items():

        def agree(build=build) -> bool:
            one, two = (paired(build, 0).model.state_dict() for _ in range(2))
            return all(torch.equal(t, two[k]) for k, t in one.items())

        rounds, plan = 8 if inner == 1 else 15, paired(build, 0).plan
        for when, given in (("another seed", plan), ("first time", None)):
            candidates = {"paired": partial(paired, build, 1, plan=given), "plain": build}
            compare(f"{name}, {when}", candidates, agree=agree, rounds=rounds, inner=inner, goal={"plain": GOAL})


if __name__ == "__main__":
    main()
