"""Accuracy of MLP-Mixer, a vision Transformer and a convolutional net of about equal parameters after the same time of training."""

from __future__ import annotations

import time
from functools import partial

import torch

from interlayer import models
from interlayer.claims.layers.mixing.mlp_mixer import RATES, SIZES, net
from interlayer.claims.training import built, judge, task, train
from interlayer.core.cost import parameters

SECONDS, SEEDS = 10.0, 3  # CPU time


def main() -> None:
    """Sizes and learning rates are the claim's; on digits and on patches of photographs."""
    torch.set_num_threads(1)
    for name in ("digits", "photos"):
        print(f"{name}, {SECONDS:g} s of training")
        for arm in SIZES:
            sizes, rate = net(arm, name), RATES[arm].get(name, RATES[arm]["digits"])
            accuracies, steps = [], 0
            for seed in range(SEEDS):
                model = built(partial(models.build, sizes, task(name).shape), seed)
                end = time.process_time() + SECONDS
                losses = train(
                    model, name, seed=seed, steps=100_000, lr=rate, batch=32, warmup=20,
                    watch=lambda *_, end=end: time.process_time() >= end,
                )  # fmt: skip
                accuracies.append(judge(model, name)["accuracy"])
                steps += len(losses)
            shown = ", ".join(f"{a:.3f}" for a in accuracies)
            print(f"  {sizes}: {parameters(model)} parameters, {steps // SEEDS} steps, accuracy {shown}", flush=True)


if __name__ == "__main__":
    main()
