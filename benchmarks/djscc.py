"""PSNR of `djscc-side-info` by SNR and bandwidth ratio, beside plain DeepJSCC and JPEG at capacity; one seed, no times."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from interlayer.claims import load
from interlayer.claims.domains.wireless.djscc_side_info import OURS, PLAIN, coded, received, task
from interlayer.core.degraded import psnr
from interlayer.domains.wireless.tasks import SNRS


def main() -> None:
    """The small scale of the claim, at the paper's two ratios and at twice the larger."""
    torch.set_num_threads(1)
    small, images = load("djscc-side-info").scales["small"], task().held[0]
    print(f"{'':<24}{'ratio':>8}" + "".join(f"{snr:>9g} dB" for snr in SNRS))
    for ratio in (1 / 8, 1 / 16, 1 / 32):
        scale = SimpleNamespace(**small | {"ratio": ratio})
        for arm in (OURS, PLAIN):
            found = received(arm, 1000, scale)
            print(
                f"{arm:<24}{ratio:>8.4f}" + "".join(f"{found[f'psnr at {snr:g} dB']:>12.2f}" for snr in SNRS),
                flush=True,
            )
        bound = [float(psnr(coded(ratio, snr), images).mean()) for snr in SNRS]
        print(f"{'JPEG at capacity':<24}{ratio:>8.4f}" + "".join(f"{b:>12.2f}" for b in bound), flush=True)


if __name__ == "__main__":
    main()
