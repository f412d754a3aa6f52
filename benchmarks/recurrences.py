"""Gated linear attention beside attention, simpler decays and a Mamba-style layer: associative recall and language modelling.

    python -m benchmarks.recurrences

Nothing is judged here; the claim of ``gla`` judges the losses of its arms.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.claims import load
from interlayer.claims.layers.sequence.gla import MIXERS, RATE, language
from interlayer.claims.training import built
from interlayer.core.cost import parameters
from interlayer.core.fit import fit
from interlayer.core.recurrent import Recurrent
from interlayer.core.scan import scan
from interlayer.models import Transformer

KEYS, PAIRS, STEPS, SEEDS, RATES = 16, 6, 300, 2, (3e-3, 1e-2)


class Selective(Recurrent):
    """A selective state space as in Mamba (Gu and Dao, arXiv:2312.00752), without its convolution.

    ``h_t = exp(-d_t A) h_{t-1} + d_t B_t x_t`` and ``y_t = C_t' h_t + D x_t``, gated by a swish: ``d``, ``B`` and ``C`` come from the
    token, ``A`` starts at 1, ..., N, and a state of N numbers belongs to each of ``expand`` times the width features.
    """

    def __init__(self, width: int, *, states: int = 16, expand: int = 2, causal: bool = True) -> None:
        super().__init__()
        inner, self.states, self.rank = expand * width, states, max(width // 16, 1)
        self.inputs, self.out = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)
        self.select = nn.Linear(inner, self.rank + 2 * states, bias=False)
        self.rate = nn.Linear(self.rank, inner)
        with torch.no_grad():  # softplus of the bias is between 0.001 and 0.1
            step = torch.exp(torch.empty(inner).uniform_(-6.9, -2.3))
            self.rate.bias.copy_(step + torch.log(-torch.expm1(-step)))
        self.log_decay = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))

    def start(self, batch: int) -> Tensor:
        """Zero."""
        return self.log_decay.new_zeros(batch, *self.log_decay.shape)

    def run(self, x: Tensor, state: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """All positions, by a parallel scan."""
        u, gate = self.inputs(x).chunk(2, -1)
        u = F.silu(u)
        low, into, outof = self.select(u).split([self.rank, self.states, self.states], -1)
        step = F.softplus(self.rate(low)).unsqueeze(-1)
        h, last = scan(torch.exp(-step * self.log_decay.exp()), step * into.unsqueeze(-2) * u.unsqueeze(-1), state)
        y = (h * outof.unsqueeze(-2)).sum(-1) + self.skip * u
        return self.out(y * F.silu(gate)), last


ARMS = {**{name: MIXERS[name] for name in ("gla", "attention", "no decay", "fixed decay")}, "Mamba-style": Selective}


def pairs(count: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One token for each pair of a key and its value, and then the keys in another order; the value of each is asked for."""
    keys = torch.rand(batch, KEYS, generator=generator).argsort(1)[:, :count]
    values = torch.randint(KEYS, (batch, count), generator=generator)
    order = torch.rand(batch, count, generator=generator).argsort(1)
    asked = KEYS * KEYS + keys.gather(1, order)
    return torch.cat((KEYS * keys + values, asked), 1), values.gather(1, order)


def recall(mixer: type[nn.Module], count: int, lr: float, seed: int) -> float:
    """Share of the values that are right after training; chance is 1 / 16."""
    generator = torch.Generator().manual_seed(seed)
    model = built(
        partial(Transformer, vocab=KEYS * KEYS + KEYS, length=2 * count, depth=2, width=32, heads=2, mixer=mixer), seed
    )

    def loss(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(m(x)[:, -count:, :KEYS].flatten(0, 1), y.flatten())

    fit(
        model,
        (pairs(count, 64, generator) for _ in range(STEPS)),
        loss,
        steps=STEPS,
        lr=lr,
        seed=seed,
        warmup=STEPS // 10,
    )
    x, y = pairs(count, 512, generator)
    with torch.inference_mode():
        return float((model.eval()(x)[:, -count:, :KEYS].argmax(-1) == y).float().mean())


def main() -> None:
    """Recall at the best of two learning rates; loss of bytes at the claim's rate, its widths and steps, over its first seeds."""
    torch.set_num_threads(1)
    for name, mixer in ARMS.items():
        best = max(([recall(mixer, PAIRS, lr, seed) for seed in range(SEEDS)] for lr in RATES), key=sum)
        print(f"  {name}: recall of {PAIRS} pairs {', '.join(f'{share:.3f}' for share in best)}", flush=True)
    scale = SimpleNamespace(**load("gla").scales["small"])
    for name, mixer in ARMS.items():
        found = []
        for seed in range(SEEDS):
            make = partial(Transformer, length=scale.long, depth=scale.depth, width=scale.width, heads=4, mixer=mixer)
            model = built(make, seed)
            found.append(language(model, seed, scale, RATE)["loss"])
        print(
            f"  {name}: {parameters(model)} parameters, loss of bytes {', '.join(f'{x:.3f}' for x in found)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
