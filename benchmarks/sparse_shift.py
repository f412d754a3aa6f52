"""Inference of a sparse shift, with few channels shifted, as a multiple of all of them and of a depthwise convolution."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.harness import compare
from interlayer.layers.mixing.sparse_shift import SparseShift


def main():
    """One channel in ten is shifted; the others stay where they are."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for channels, size in ((96, 28), (192, 14), (64, 56)):
        x = torch.randn(1, channels, size, size)
        few, all_ = SparseShift(channels, spread=0.0), SparseShift(channels)
        with torch.no_grad():
            few.displacement[: channels // 10] = torch.tensor([1.0, -1.0])
            all_.displacement[:] = torch.tensor([1.0, -1.0])
        deep = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        sparse, dense = few.deployed(), all_.deployed()

        def agree(few=few, all_=all_, sparse=sparse, dense=dense, x=x):
            with torch.no_grad():
                return torch.equal(sparse(x), few(x)) and torch.equal(dense(x), all_(x))

        def run(module, x=x):
            def step():
                with torch.no_grad():
                    return module(x)

            return step

        compare(
            f"inference, {channels} channels of {size} x {size}",
            {"sparse shift": run(sparse), "all shifted": run(dense), "depthwise 3x3": run(deep)},
            agree=agree,
            rounds=25,
            inner=50,
            goal={"all shifted": 0.5},
        )


if __name__ == "__main__":
    main()
