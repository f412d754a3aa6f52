"""Accuracy of MLP-Mixer, a vision Transformer and a convolutional net of about equal parameters after the same time of training."""

from __future__ import annotations

import time
from functools import partial

import torch

from interlayer import models
from interlayer.claims import load
from interlayer.claims.layers.mixing.mlp_mixer import SIZES
from interlayer.claims.training import built, judge, task, train
from interlayer.core.cost import parameters

SECONDS, SEEDS = 10.0, 3  # CPU time
NETS = (SIZES["mlp-mixer"], SIZES["vit"], "convnet(depth=14, width=9)")


def main() -> None:
    """The learning rate is the claim's; on digits and on patches of photographs."""
    torch.set_num_threads(1)
    judged = load("mlp-mixer").scales["small"]["judged"]
    for name in ("digits", "photos"):
        print(f"{name}, {SECONDS:g} s of training")
        for net in NETS:
            accuracies, steps = [], 0
            for seed in range(SEEDS):
                model = built(partial(models.build, net, task(name).shape), seed)
                end = time.process_time() + SECONDS
                losses = train(
                    model, name, seed=seed, steps=100_000, lr=2e-3, batch=64, warmup=10,
                    watch=lambda *_, end=end: time.process_time() >= end,
                )  # fmt: skip
                accuracies.append(judge(model, name, most=judged)["accuracy"])
                steps += len(losses)
            shown = ", ".join(f"{a:.3f}" for a in accuracies)
            print(f"  {net}: {parameters(model)} parameters, {steps // SEEDS} steps, accuracy {shown}", flush=True)


if __name__ == "__main__":
    main()
