"""What a claim measures, over the depths, variants and sparsities that its small scale leaves out.

    python -m benchmarks.sweeps [slug ...]

One seed for each arm, so nothing is judged; the measure, the arms and their learning rates are those of the claim.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch

from interlayer.claims import load
from interlayer.claims.layers.mixing.x_formers import FULL, LEAVES

SWEEPS = {
    "rezero": {"depths": (32, 64, 128, 256), "limit": 100, "blocks": 24},
    "identity-mappings": {"depths": (20, 56, 110, 164), "more": ()},
    "helu": {},  # leaky ReLU and SiLU, which no statement needs
    "lamp": {"sparsities": (0.5, 0.8, 0.9, 0.95, 0.98)},
    "x-formers": {},
}
ARMS = {"x-formers": (FULL, *LEAVES)}  # every attention leaf


def main() -> None:
    """A line for each arm."""
    torch.set_num_threads(1)
    for slug in sys.argv[1:] or SWEEPS:
        claim = load(slug)
        scale = SimpleNamespace(**{**claim.scales["small"], **SWEEPS[slug]})
        print(f"{slug}: {claim.measure.__doc__}")
        for arm in ARMS.get(slug, claim.arms):
            torch.manual_seed(0)
            found = claim.measure(arm, 0, scale)
            print(f"  {arm}: " + ", ".join(f"{metric} {value:.4g}" for metric, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
