"""`aespa` beside GPTQ and reconstruction of blocks: held-out loss, and time as a multiple of the model's own forward passes.

One briefly trained model of 6 blocks, 256 wide, on the same calibration texts. Blocks are reconstructed by AdaRound, with steps
doubled until their error falls by less than 1%, or 400 are reached; only the last run counts, which favours it. Time is that of the
process. `gptqmodel` and `llmcompressor` want a GPU or models of a hub and are not timed. Nothing is reported unless the closed form
is the change of scores that it stands for.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.claims.training import batches, judge, train
from interlayer.claims.transform.quantize.aespa import TASK, gap
from interlayer.core import taps
from interlayer.core.blockwise import blockwise
from interlayer.core.kinds import Plan
from interlayer.core.quantizer import AdaRound, Grid, forms, gptq, layers, learned, nearest, reconstruct
from interlayer.core.quantizer.gptq import moments
from interlayer.models import Transformer
from interlayer.transform.quantize.aespa import Aespa

LENGTH, BATCHES, ROUNDING = 64, 4, 100


def took(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the process, and the result."""
    started = time.process_time()
    found = run()
    return time.process_time() - started, found


def passes(model: nn.Module, data: list[Tensor]) -> float:
    """Least time of a forward pass over all the data."""
    with torch.no_grad():
        return min(took(lambda: list(taps.feed(model, data)))[0] for _ in range(5))


def statistics(model: nn.Module, data: list[Tensor], own: float) -> None:
    """Time of the moments of all blocks, beside the model's own passes."""
    for name, gather, goal in (("aespa", forms, 4), ("gptq", moments, 4)):
        spent = 0.0
        for part in blockwise(model, data, into=copy.deepcopy(model)):
            there = {n: m for n, m in part.block.named_modules() if isinstance(m, nn.Linear)}
            if there:
                spent += took(lambda part=part, there=there, gather=gather: gather(part, there))[0]
        print(
            f"statistics of {name}: {spent / own:.2f} forward passes  goal {goal}: {'met' if spent <= goal * own else 'NOT met'}"
        )


def blocks(
    model: nn.Module, data: list[Tensor], bits: int, score: Callable[[nn.Module], float]
) -> tuple[float, float, int]:
    """Seconds, loss and steps of reconstruction, where doubling the steps gains less than 1%."""
    last, steps = torch.inf, 100
    while True:
        solve = learned(AdaRound, steps=steps, lr=0.1, decay=False)
        spent, new = took(
            reconstruct(model, data, Grid(bits, 0, "asymmetric"), solve, packed=False, name="blocks").apply
        )
        with torch.no_grad():
            error = sum(float((new.eval()(x) - model(x)).square().mean()) for x in data)
        if error > 0.99 * last or steps >= 400:
            return spent, score(new), steps
        last, steps = error, 2 * steps


def main() -> None:
    """One thread."""
    torch.set_num_threads(1)
    if max(gap("closed form", seed) for seed in range(3)) > 1e-3:
        raise RuntimeError("aespa: the closed form is not the change of the scores; nothing is reported.")
    torch.manual_seed(0)
    model = Transformer(256, LENGTH, 6, 256, 4)
    train(model, TASK, seed=0, steps=40, lr=1e-3, batch=16, warmup=4, cut=LENGTH)
    model.eval()
    data = [x[:, :LENGTH] for x, _ in batches(TASK, 700, 16, BATCHES)]
    own = passes(model, data)

    def score(new: nn.Module) -> float:
        return judge(new, TASK, batch=16, most=4, cut=LENGTH)["loss"]

    print(
        f"{len(layers(model)[0])} layers, {BATCHES * 16 * LENGTH} tokens, one pass over them {own:.2f} s; loss {score(model):.4f}"
    )
    statistics(model.eval(), data, own)
    for bits in (4, 3, 2):
        grid = Grid(bits, 0, "asymmetric")
        plans: dict[str, Plan] = {
            "nearest": nearest(model, grid, packed=False),
            "gptq": reconstruct(model, data, grid, gptq(), by="minmax", packed=False, name="gptq"),
            "aespa": Aespa(bits=bits, steps=ROUNDING, lr=0.4, packed=False).plan(model, data),
        }
        for name, plan in plans.items():
            spent, new = took(plan.apply)
            print(f"{bits} bits, {name}: {spent / own:.1f} passes, loss {score(new):.4f}")
        spent, loss, steps = blocks(model.eval(), data, bits, score)
        print(f"{bits} bits, blocks, {steps} steps: {spent / own:.1f} passes, loss {loss:.4f}")


if __name__ == "__main__":
    main()
