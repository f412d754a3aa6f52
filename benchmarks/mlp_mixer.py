"""Accuracy of MLP-Mixer, a vision Transformer and a convolutional net of equal parameters after training for the same time."""

from __future__ import annotations

import time
from functools import partial

import torch

from interlayer.claims import load
from interlayer.claims.layers.mixing.mlp_mixer import SIZES, build
from interlayer.claims.training import built, judge, train
from interlayer.core.cost import parameters

SECONDS, SEEDS = 10.0, 3  # CPU time


def main() -> None:
    """The networks and the learning rate of the claim, on digits and on patches of photographs."""
    torch.set_num_threads(1)
    judged = load("mlp-mixer").scales["small"]["judged"]
    for name in ("digits", "photos"):
        print(f"{name}, {SECONDS:g} s of training")
        for arm in SIZES:
            accuracies, steps = [], 0
            for seed in range(SEEDS):
                model = built(partial(build, arm, None, name), seed)
                end = time.process_time() + SECONDS
                losses = train(
                    model, name, seed=seed, steps=100_000, lr=2e-3, batch=64, warmup=10,
                    watch=lambda *_, end=end: time.process_time() >= end,
                )  # fmt: skip
                accuracies.append(judge(model, name, most=judged)["accuracy"])
                steps += len(losses)
            shown = ", ".join(f"{a:.3f}" for a in accuracies)
            print(f"  {arm}: {parameters(model)} parameters, {steps // SEEDS} steps, accuracy {shown}", flush=True)


if __name__ == "__main__":
    main()
