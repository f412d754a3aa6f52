"""Latency of a forward pass with the middle blocks run in each of the painters' ways, as a multiple of the whole model's.

Blocks that run side by side are one step in depth, but here they are computed one after another: ``depth`` is the latency, in
blocks, where they cost no time beside each other.
"""

from __future__ import annotations

from functools import partial
from typing import get_args

import torch

import interlayer
from benchmarks.harness import compare
from interlayer.probe.painters import Painters
from interlayer.probe.painters.orders import Variant, cost, execution

DEPTH, START, END, LOOPS = 12, 3, 9, 2


def main() -> None:
    """A Transformer of 12 blocks, width 256; one text, and sixteen."""
    torch.manual_seed(0)
    model = interlayer.Transformer(256, 128, depth=DEPTH, width=256, heads=4).eval()
    for batch in (1, 16):
        text = torch.randint(256, (batch, 128))
        for variant in get_args(Variant):
            new = Painters(variant=variant, start=START, end=END, loops=LOOPS).plan(model).apply().eval()
            blocks = cost(execution(variant, DEPTH, START, END, loops=LOOPS))
            with torch.inference_mode():
                compare(
                    f"{batch} x 128 tokens, blocks {START} to {END - 1} of {DEPTH}: {blocks['work']} blocks, depth {blocks['depth']}",
                    {variant: partial(new, text), "whole model": partial(model, text)},
                    rounds=15,
                )


if __name__ == "__main__":
    main()
