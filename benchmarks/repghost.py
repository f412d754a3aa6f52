"""Inference of a fused RepGhost bottleneck and network as a multiple of their concatenating twins at equal FLOPs."""

from __future__ import annotations

import copy

import torch

from benchmarks.harness import compare
from interlayer.core import cost
from interlayer.layers.mixing.repghost import RepGhostNet


def main():
    """The paper's networks, one image; the twin's norms are melted in as well."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for width, side in ((0.5, 224), (1.0, 224), (1.0, 96)):
        x = torch.randn(1, 3, side, side)
        nets = {
            "repghost": RepGhostNet(width=width).eval(),
            "concatenation": RepGhostNet(width=width, concatenate=True).eval(),
        }
        flops = [cost.flops(net, x) for net in nets.values()]
        fused = {name: net.fused() for name, net in nets.items()}
        fused["repghost, not fused"] = copy.deepcopy(nets["repghost"])

        def agree(nets=nets, fused=fused, x=x):
            with torch.no_grad():
                return all(torch.allclose(fused[n](x), nets[n](x), atol=1e-3) for n in nets)

        def run(net, x=x):
            def step():
                with torch.no_grad():
                    return net(x)

            return step

        compare(
            f"inference, width {width}, {side} x {side}, FLOPs {flops[0] / flops[1]:.2f} of the twin's",
            {name: run(net) for name, net in fused.items()},
            agree=agree,
            rounds=21,
            inner=3,
            goal={"concatenation": 1.0, "repghost, not fused": 1.0},
        )


if __name__ == "__main__":
    main()
