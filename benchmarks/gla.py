"""Gated linear attention against dense attention and against the authors' naive recurrent form: time and memory by length.

    python -m benchmarks.gla [FOLDER]

FOLDER holds a checkout of fla-org/flash-linear-attention. Its file ``fla/ops/gla/naive.py`` is loaded by path, since importing the
package needs triton, which wants a GPU. Without FOLDER the naive form is left out.
"""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.harness import compare
from interlayer.core.cost import peak_bytes
from interlayer.core.mixer import Cache
from interlayer.core.scan import gated
from interlayer.models import Transformer

LENGTHS = (512, 2048, 8192, 16384)
NAIVE = "flash-linear-attention's naive form"


def parts(length):
    """Batch 1, 4 heads of 64; gates as the layer makes them."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, length, 64) for _ in range(3))
    return q, k, v, F.logsigmoid(torch.randn(1, 4, length, 64)) / 16


def ours(q, k, v, log_a):
    return gated(q * q.shape[-1] ** -0.5, k, v, log_a)[0]


def dense(q, k, v, log_a):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@torch.inference_mode()
def main(folder=None):
    """Forward passes; dense attention is torch's fused kernel."""
    torch.set_num_threads(1)
    given = {n: parts(n) for n in LENGTHS}
    longest, shortest = LENGTHS[-1], LENGTHS[0]
    candidates = {
        "interlayer": lambda: ours(*given[longest]),
        f"at {shortest}": lambda: ours(*given[shortest]),
        "dense attention": lambda: dense(*given[longest]),
    }
    agree = [
        lambda: torch.allclose(
            ours(*given[2048]), gated(given[2048][0] / 8, *given[2048][1:], form="step")[0], atol=1e-4
        )
    ]
    if folder:
        naive = runpy.run_path(str(Path(folder) / "fla" / "ops" / "gla" / "naive.py"))["naive_recurrent_gla"]
        turned = [t.transpose(1, 2) for t in given[longest]]
        candidates[NAIVE] = lambda: naive(*turned)[0]
        agree.append(lambda: torch.allclose(ours(*given[longest]), naive(*turned)[0].transpose(1, 2), atol=1e-4))
    else:
        print(f"{NAIVE} is left out: give the folder of a checkout.")
    rows = compare(
        f"forward, batch 1, 4 heads of 64, {longest} tokens",
        candidates,
        agree=lambda: all(check() for check in agree),
        rounds=7,
        goal={"dense attention": 0.2, NAIVE: 0.1, f"at {shortest}": (longest / shortest) ** 1.1},
    )
    growth = next(row.median for row in rows if row.peer == f"at {shortest}")
    print(f"  exponent of the time from {shortest} to {longest}: {math.log(growth, longest / shortest):.2f}  goal 1.1")
    for length in LENGTHS:
        print(
            f"  {length} tokens, peak MB: {peak_bytes(lambda n=length: ours(*given[n])) / 1e6:.0f}, dense attention "
            f"{peak_bytes(lambda n=length: dense(*given[n])) / 1e6:.0f}"
        )
    for mixer in ("gla", "attention"):
        model, kept = Transformer(length=longest, depth=1, width=256, heads=4, mixer=mixer).eval(), []
        for length in (shortest, longest // 4):
            cache = Cache()
            model(torch.zeros(1, length, dtype=torch.int64), cache=cache)
            kept.append(f"{cache.bytes / 1e3:.0f} kB after {length} tokens")
        print(f"  a layer of {mixer} keeps {', '.join(kept)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
