"""Fusion of two MLPs: interlayer against direct transcriptions of the paper's algorithm 1 with POT's exact solver.

    python -m benchmarks.ot_fusion [--widths 128 512] [--runs 5]

``broadcast``: distances from a tensor [units, units, values], as the authors' code computes them by default. ``products``:
distances from matrix products in float32, their option for large layers. ``units``: Python loops over pairs of units, at the
smallest width only. Interlayer's time has two parts: finding the axes of both networks (``plan``), which a transcription is given
by hand, and fusing (``apply``). After a warm-up the runs alternate; printed are median times, the median ratios to interlayer's
whole time and to ``apply`` with the smallest and largest values, and the largest difference of a weight, which must be below 1e-4.
"""

from __future__ import annotations

import argparse
import statistics
import time

import ot
import torch
from torch import nn

from interlayer.transform.merge.ot_fusion import OTFusion


def net(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(256, width, bias=False), nn.ReLU(), nn.Linear(width, width, bias=False), nn.ReLU(),
        nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, 10, bias=False),
    )  # fmt: skip


def broadcast(x, y):
    return (x[:, None] - y[None]).abs().pow(2).sum(2).sqrt()


def products(x, y):
    return (x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * x @ y.T).clamp_min(0).sqrt()


def units(x, y):
    return torch.stack([torch.stack([(a - b).norm() for b in y]) for a in x])


@torch.no_grad()
def transcribed(distances, model, other):
    fused, plan = [], None
    for stays, moves in zip(model.parameters(), other.parameters(), strict=True):
        aligned = moves if plan is None else moves @ plan
        if len(stays) > 10:
            masses = [torch.full((len(w),), 1 / len(w), dtype=torch.float64).numpy() for w in (moves, stays)]
            cost = distances(aligned, stays).double().numpy()
            plan = torch.from_numpy(ot.emd(*masses, cost, numItermax=10_000_000)).float()
            plan = plan / plan.sum(0)
            aligned = plan.T @ aligned
        fused.append((aligned + stays) / 2)
    return fused


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for width in args.widths:
        torch.manual_seed(0)
        a, b, x = net(width), net(width), torch.randn(8, 256)
        ways = {"broadcast": broadcast, "products": products}
        if width == min(args.widths):
            ways["units"] = units
        times: dict[str, list[float]] = {way: [] for way in ("plan", "apply", *ways)}
        worst = dict.fromkeys(ways, 0.0)
        for run in range(args.runs + 1):
            start = time.perf_counter()
            plan = OTFusion().plan(a, x, others=(b,))
            middle = time.perf_counter()
            mine = list(plan.apply().parameters())
            if run:
                times["plan"].append(middle - start)
                times["apply"].append(time.perf_counter() - middle)
            for way, distances in ways.items():
                start = time.perf_counter()
                found = transcribed(distances, a, b)
                if run:
                    times[way].append(time.perf_counter() - start)
                gaps = [float((p - q).detach().abs().max()) for p, q in zip(mine, found, strict=True)]
                worst[way] = max(worst[way], *gaps)
        if max(worst.values()) > 1e-4:
            raise SystemExit(f"width {width}: the ways differ by {worst}; no time is reported.")
        whole = [p + q for p, q in zip(times["plan"], times["apply"], strict=True)]
        print(f"width {width}: interlayer {statistics.median(whole):.3f} s", end=" ")
        print(f"(plan {statistics.median(times['plan']):.3f}, apply {statistics.median(times['apply']):.3f})")
        for way in ways:
            told = []
            for part, own in (("whole", whole), ("apply", times["apply"])):
                ratios = [t / o for t, o in zip(times[way], own, strict=True)]
                told.append(f"{part} {statistics.median(ratios):5.2f}x [{min(ratios):.2f}, {max(ratios):.2f}]")
            print(
                f"  {way:<9} {statistics.median(times[way]):7.3f} s   {'   '.join(told)}   differs by {worst[way]:.1g}"
            )


if __name__ == "__main__":
    main()
