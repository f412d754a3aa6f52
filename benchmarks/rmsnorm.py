"""Forward and backward of RMSNorm as a multiple of torch's RMSNorm and LayerNorm, eager and compiled, at several widths."""

from __future__ import annotations

import shutil

import torch
from torch import nn

from benchmarks.harness import compare
from interlayer.layers.norm.rmsnorm import RMSNorm

WIDTHS = (128, 512, 768, 1024, 4096)
GOALS = {"torch.nn.RMSNorm": 1.0, "torch.nn.LayerNorm": 1.0}


def case(width: int, rows: int, compiled: bool):
    """A function for each norm that runs it forward and backward, and whether ours and torch's agree."""
    x = torch.randn(rows, width, requires_grad=True)
    dy = torch.randn(rows, width)
    torch._dynamo.reset()
    norms = {
        "interlayer": RMSNorm(width),
        "torch.nn.RMSNorm": nn.RMSNorm(width, eps=1e-6),
        "torch.nn.LayerNorm": nn.LayerNorm(width),
    }
    run = {name: torch.compile(norm, fullgraph=True) if compiled else norm for name, norm in norms.items()}

    def step(name):
        x.grad = None
        for p in norms[name].parameters():
            p.grad = None
        y = run[name](x)
        y.backward(dy)
        return y.detach(), x.grad, norms[name].weight.grad

    def agree():
        pairs = zip(step("interlayer"), step("torch.nn.RMSNorm"), strict=True)
        return all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in pairs)

    return {name: lambda name=name: step(name) for name in norms}, agree


def main():
    """Compiled only where there is a C++ compiler."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for compiled in (False, True) if shutil.which("g++") else (False,):
        for width in WIDTHS:
            rows = 4096 if width <= 1024 else 2048
            candidates, agree = case(width, rows, compiled)
            title = f"RMSNorm forward and backward, {rows} rows of {width}, {'compiled' if compiled else 'eager'}"
            compare(title, candidates, agree=agree, rounds=25, inner=max(1, 2048 // width), goal=GOALS)


if __name__ == "__main__":
    main()
