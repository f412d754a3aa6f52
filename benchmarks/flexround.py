"""`flexround` beside nearest levels, AdaRound and GPTQ at equal calibration: held-out loss, time and memory of reconstruction.

Times are multiples of one forward pass of the model over the same calibration data, in the same process. AdaRound and GPTQ are those of
`core.quantizer`; public packages for them want a GPU or models of their own and are not timed here. Nothing is reported unless the
packed model gives the logits of its float form.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from interlayer.claims.training import batches, divergence
from interlayer.claims.transform.quantize.flexround import CLAIM, ROUNDERS, TASKS, base, score
from interlayer.core import taps
from interlayer.core.cost import peak_bytes, storage_bytes
from interlayer.core.kinds import Plan
from interlayer.core.quantizer import Grid, gptq, learned, nearest, reconstruct, simulated

SCALE = SimpleNamespace(**CLAIM.scales["small"])
SEEDS = range(3)


def planned(method: str, kind: str, bits: int, model: nn.Module, data: list[Tensor]) -> Plan:
    """Each method from the same start of the grid, at the learning rate that the claim's pilots chose."""
    grid = Grid(bits, None, "asymmetric")
    if method == "nearest":
        return nearest(model, grid, by="mse")
    if method == "gptq":
        return reconstruct(model, data, grid, gptq(), name=method)
    make, rates = ROUNDERS[method]
    rate = rates[kind][(4, 3).index(bits)]
    solve = learned(make, steps=SCALE.steps, lr=rate, decay=method != "adaround")
    return reconstruct(model, data, grid, solve, name=method)


def calibration(kind: str, seed: int) -> list[Tensor]:
    """Training inputs without targets."""
    size, cut = (16, SCALE.length) if kind == "language" else (64, None)
    return [x[:, :cut] if cut else x for x, _ in batches(TASKS[kind], seed + 700, size, SCALE.calibration)]


def took(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    started = time.perf_counter()
    found = run()
    return time.perf_counter() - started, found


@torch.no_grad()
def passes(model: nn.Module, data: list[Tensor]) -> float:
    """Median time of a forward pass over all the data."""
    return statistics.median(took(lambda: list(taps.feed(model, data)))[0] for _ in range(5))


def losses() -> None:
    """Loss and time of the four methods."""
    methods = ("nearest", "gptq", "adaround", "flexround")
    for kind in TASKS:
        found: dict[tuple[str, int], list[float]] = {}
        apart: dict[tuple[str, int], list[float]] = {}
        ratios: dict[str, list[float]] = {}
        whole, cut = [], SCALE.length if kind == "language" else None
        for seed in SEEDS:
            model, data = base(kind, seed, SCALE), calibration(kind, seed)
            whole.append(score(model, kind, SCALE)["loss"])
            for bits in (4, 3):
                for method in methods:
                    once = passes(model.eval(), data)
                    seconds, new = took(planned(method, kind, bits, model, data).apply)
                    with torch.no_grad():
                        pair = [m.eval()(data[0]) for m in (new, simulated(new))]
                    if not torch.allclose(*pair, atol=1e-4, rtol=1e-4):
                        raise RuntimeError(f"{method}: packed and float logits do not agree; nothing is reported.")
                    found.setdefault((method, bits), []).append(score(new, kind, SCALE)["loss"])
                    far = divergence(new, model, TASKS[kind], most=SCALE.judged, cut=cut)
                    apart.setdefault((method, bits), []).append(1000 * far)
                    ratios.setdefault(method, []).append(seconds / once)
        print(f"{kind}: held-out loss of the float model {statistics.mean(whole):.4f} (mean of {len(SEEDS)} seeds)")
        for method in methods:
            told = ", ".join(
                f"{bits} bits {statistics.mean(found[method, bits]):.4f} ({statistics.mean(apart[method, bits]):.2f}e-3 nats from float)"
                for bits in (4, 3)
            )
            print(
                f"  {method}: {told}; time over a forward pass of all calibration data: {statistics.median(ratios[method]):.0f}"
            )


def memory() -> None:
    """Peak memory of reconstruction, beside the model that is given and one block's inputs and outputs."""
    torch.manual_seed(0)
    for depth in (8, 16):
        config = GPT2Config(
            n_embd=128,
            n_layer=depth,
            n_head=2,
            vocab_size=256,
            n_positions=64,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = GPT2LMHeadModel(config).eval()
        data = [torch.randint(256, (8, 64)) for _ in range(16)]
        size = storage_bytes(copy.deepcopy(model).parameters())
        block = 2 * 16 * 8 * 64 * 128 * 4  # inputs and outputs of all batches, in 32-bit floats
        for method in ("gptq", "flexround"):
            solve = gptq() if method == "gptq" else learned(ROUNDERS[method][0], steps=3, lr=1e-3)
            plan = reconstruct(model, data, Grid(4, None, "asymmetric"), solve, blocks="transformer.h.*")
            ratio = peak_bytes(plan.apply) / (size + block)
            verdict = "met" if ratio <= 1.5 else "NOT met"
            print(
                f"{method}, {depth} blocks: peak over (model + one block's activations): {ratio:.2f}  goal 1.5: {verdict}"
            )


def main() -> None:
    """Small models, one thread."""
    torch.set_num_threads(1)
    memory()
    losses()


if __name__ == "__main__":
    main()
