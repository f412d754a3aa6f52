"""How the time of mixing grows with length: exponents between 512 and 8192, and ratios to softmax attention."""

from __future__ import annotations

import math

import torch

from benchmarks.harness import compare
from interlayer.core.slots import fill

LENGTHS = (512, 8192)
LINEAR = {  # each with its naive twin at a short length in the tests
    "linear-attention": True,
    "performer": True,
    "delta": True,
    "sliding-window(window=64)": True,
    "linformer(rank=64)": False,
    "nystrom(landmarks=64)": False,
}


def main():
    """One head pair of width 64, forward; softmax attention is torch's fused kernel. Near 1: linear; 2: quadratic."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for spec, causal in LINEAR.items():
        parts = {n: [torch.randn(1, 2, n, 32) for _ in range(3)] for n in LENGTHS}
        ours, full = (
            fill("mixer", what, width=64, heads=2, length=LENGTHS[1], causal=causal).eval()
            for what in (spec, "attention")
        )

        def run(layer, length, parts=parts):
            def step():
                with torch.no_grad():
                    return layer.mix(*parts[length])

            return step

        finite = all(torch.isfinite(run(ours, n)()).all() for n in LENGTHS)
        rows = compare(
            f"{spec}, length {LENGTHS[1]}",
            {
                f"{LENGTHS[1]}": run(ours, LENGTHS[1]),
                f"{LENGTHS[0]}": run(ours, LENGTHS[0]),
                "softmax": run(full, LENGTHS[1]),
            },
            agree=lambda ok=finite: ok,
            rounds=7,
            goal={"softmax": 1.0, f"{LENGTHS[0]}": (LENGTHS[1] / LENGTHS[0]) ** 1.2},
        )
        growth = next(row.median for row in rows if row.peer == str(LENGTHS[0]))
        print(f"  exponent {math.log(growth) / math.log(LENGTHS[1] / LENGTHS[0]):.2f}")


if __name__ == "__main__":
    main()
