"""Forward and backward of activations as a multiple of a plain one's, eager and compiled."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.harness import compare
from interlayer.core.slots import fill

# name, peer that it is near, greatest difference of their outputs, goal compiled, goal eager, whether backward too
GOALS = (
    ("rational-activation(like='gelu')", "gelu", 0.1, 2.0, 4.0, True),
    ("helu", "relu", 0.0, 1.05, 1.05, False),
    ("helu", "relu", 0.0, None, None, True),
    ("smelu", "silu", 0.5, None, None, True),
)


def main():
    """A million numbers, as in the MLP of a small Transformer."""
    x, dy = torch.randn(512, 2048), torch.randn(512, 2048)

    def passes(module, training):
        inputs = x.clone().requires_grad_(training)

        def both():
            module(inputs).backward(dy)
            inputs.grad = None

        def forward():
            with torch.inference_mode():
                module(inputs)

        return both if training else forward

    for spec, peer, near, compiled_goal, eager_goal, training in GOALS:
        what = "forward and backward" if training else "inference"
        for mode, goal in (("eager", eager_goal), ("compiled", compiled_goal)):
            pair = [fill("activation", name) for name in (spec, peer)]
            agree = torch.allclose(*(each(x) for each in pair), rtol=0, atol=near)
            if mode == "compiled":
                pair = [torch.compile(nn.Sequential(each)) for each in pair]
            runs = {name: passes(each, training) for name, each in zip((spec, peer), pair, strict=True)}
            compare(
                f"{what}, {mode}, {tuple(x.shape)}",
                runs,
                agree=lambda a=agree: a,
                rounds=31,
                goal={peer: goal} if goal else None,
            )


if __name__ == "__main__":
    main()
