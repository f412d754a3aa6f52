"""Building a model with paired noise as a multiple of building it plainly."""

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

        candidates = {"paired": partial(paired, build, 0), "plain": build}
        compare(name, candidates, agree=agree, rounds=8 if inner == 1 else 15, inner=inner, goal={"plain": GOAL})


if __name__ == "__main__":
    main()
