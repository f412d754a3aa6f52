"""How much pairing narrows the difference of two arms, and how the seeds' table decides.

The variance of the difference to plain, with paired noise over with independent seeds, for six arms over 20 seeds; and
false positives and power of looks at 4, 6, 8 and 12 seeds, by simulation. Takes about a quarter of an hour on two cores.
"""

from __future__ import annotations

import numpy as np
import torch

from interlayer.study.arms import parse
from interlayer.study.stats import critical, looks
from interlayer.study.tasks import load
from interlayer.study.train import Job, train

ARMS = ("rezero", "denseformer", "muddformer", "value-residual", "norm=rmsnorm", "mlp=glu")
BASE = "transformer(depth=3, width=32, heads=2)"
SEEDS = 20


def variances() -> None:
    """Train every arm over the seeds and compare the two variances."""
    torch.set_num_threads(1)
    task, job = load("stdlib-bytes"), Job(batch_size=8, steps=60)
    found = {}
    for use in ("plain", *ARMS):
        arm = parse(use, use, BASE)
        found[use] = np.array(
            [train(arm, task, job, seed, lr=3e-3, measure=False).metrics["loss"] for seed in range(SEEDS)]
        )
        print(f"{use}: {found[use].mean():.3f}, SD over seeds {found[use].std(ddof=1):.4f}", flush=True)
    print(f"variance of the difference to plain over {SEEDS} seeds, paired / independent")
    for use in ARMS:
        paired = (found[use] - found["plain"]).var(ddof=1)
        independent = found[use].var(ddof=1) + found["plain"].var(ddof=1)
        print(f"  {use}: {paired / independent:.2f}  (SD {paired**0.5:.4f} against {independent**0.5:.4f})")


def table() -> None:
    """False positives and power under normal differences."""
    at = looks(4, 12)
    for arms in (1, 4, 10):
        factors = critical(at, 0.05 / arms)
        print(f"{arms} arm(s): c = {', '.join(f'{c:.2f}' for c in factors)}")
        for size in (0.0, 0.5, 1.0, 1.5, 2.0):
            x = np.random.default_rng(1).standard_normal((200_000, 12)) + size
            stopped = np.zeros(len(x), dtype=int)
            for n, factor in zip(at, factors, strict=True):
                part = x[:, :n]
                out = np.abs(part.mean(1)) > factor * part.std(1, ddof=1) / np.sqrt(n)
                stopped = np.where((stopped == 0) & out, n, stopped)
            what = "false positives" if not size else "power"
            seeds = np.where(stopped == 0, at[-1], stopped).mean()
            print(f"  effect / SD = {size}: {what} {(stopped > 0).mean():.3f}, {seeds:.1f} seeds on average")


def main() -> None:
    """Both parts."""
    table()
    variances()


if __name__ == "__main__":
    main()
