"""Hopfield networks: patterns stored by dimension, and bags of digits classified by what pools them."""

from __future__ import annotations

import math
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, check, effect, fits, highest, mechanism
from interlayer.claims.training import task
from interlayer.core.fit import fit
from interlayer.layers.mixing.hopfield import HopfieldPooling, update

COLD, LINEAR = "cold start", "weights without the exponential"
STORES = ("hopfield", "classical", COLD, LINEAR)
# Learning rates of what pools a bag; see `pilots`.
RATES = {"mean": 1e-2, "max": 2e-3, "attention": 1e-3, "hopfield": 5e-3, COLD: 5e-3}
COUNTS = (4, 64, 1024)  # patterns that are stored where the error itself is reported


def _recalled(arm: str, count: int, width: int, generator: torch.Generator) -> float:
    """Share of random patterns that one update brings back (of at most 256 that are tried).

    Hopfield: on a sphere of radius 3 sqrt(d - 1) with beta = 1, the setting of the paper's theorem 3, from a start that is
    off by a twentieth of the radius to within a hundredth. Classical: binary patterns, Hebbian weights without diagonal, kept as
    they are from the pattern itself.
    """
    stored = torch.randn(count, width, generator=generator)
    if arm == "classical":
        stored = stored.sign()
        weights = stored.T @ stored / width
        weights.fill_diagonal_(0)
        tried = stored[:256]
        return float(((tried @ weights).sign() == tried).all(1).float().mean())
    radius = 3 * math.sqrt(width - 1)
    stored = radius * F.normalize(stored, dim=-1)
    tried = stored[:256]
    start = tried + 0.05 * radius * F.normalize(torch.randn(tried.shape, generator=generator), dim=-1)
    if arm == LINEAR:
        weights = (start @ stored.T).relu()
        new = weights / weights.sum(-1, keepdim=True) @ stored
    else:
        new = update(start, stored, 0.01 if arm == COLD else 1.0)
    return float(((new - tried).norm(dim=-1) < 0.01 * radius).float().mean())


def capacity(arm: str, width: int, most: int, generator: torch.Generator) -> int:
    """Largest number of patterns, doubling from 1, of which 95% are brought back."""
    count = 1
    while count < most and _recalled(arm, 2 * count, width, generator) >= 0.95:
        count *= 2
    return count


class Pooled(nn.Module):
    """Embed each digit of a bag, pool, decide."""

    def __init__(self, arm: str, width: int = 32) -> None:
        super().__init__()
        self.arm, self.embed = arm, nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width))
        self.pool = HopfieldPooling(width, heads=4, steps=2) if arm in ("hopfield", COLD) else None
        if arm == COLD and self.pool is not None:
            self.pool.beta.fill_(1e-4)  # all instances weigh the same
        self.score = (
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)) if arm == "attention" else None
        )
        self.head = nn.Linear(width, 1)

    def forward(self, bags: Tensor) -> Tensor:
        """[B, N, 64] to a logit each."""
        x = self.embed(bags)
        if self.pool is not None:
            x = self.pool(x)[:, 0]
        elif self.score is not None:
            x = (self.score(x).softmax(1) * x).sum(1)
        else:
            x = x.amax(1) if self.arm == "max" else x.mean(1)
        return self.head(x)[:, 0]


def _bags(images: Tensor, labels: Tensor, count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bags of digits without a 9, half of them with exactly one: positive."""
    others, nines = images[labels != 9], images[labels == 9]
    bags = others[torch.randint(len(others), (count, size), generator=generator)]
    positive = torch.arange(count) % 2 == 0
    bags[positive, 0] = nines[torch.randint(len(nines), (int(positive.sum()),), generator=generator)]
    return bags, positive.float()


def build(arm: str, scale: Scale) -> Pooled:
    """The network that pools a bag."""
    return Pooled(arm)


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Slope of log2 capacity against width, share of patterns that are lost by their number and width, and accuracy of bags."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    if arm in STORES:
        widths = torch.tensor(scale.widths, dtype=torch.float)
        logs = torch.tensor([math.log2(capacity(arm, int(w), scale.most, generator)) for w in widths])
        centred = widths - widths.mean()
        found["doublings for each dimension"] = float((centred * (logs - logs.mean())).sum() / centred.square().sum())
        found[f"capacity at {scale.widths[-1]}"] = 2 ** float(logs[-1])
        own = torch.Generator().manual_seed(seed)
        for width, count in product(scale.widths, COUNTS):
            found[f"retrieval error of {count} patterns in {width} dimensions"] = 1 - _recalled(arm, count, width, own)
    if arm in RATES:
        (x, y), (xv, yv) = (next(iter(task("digits").batches(seed, 10**4, s))) for s in ("train", "validation"))
        torch.manual_seed(seed)
        model = build(arm, scale)
        drawn = (_bags(x.flatten(1), y, 64, scale.bag, generator) for _ in range(scale.steps))
        fit(
            model, drawn, lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), b[1]),
            steps=scale.steps, lr=RATES[arm], clip=None,
        )  # fmt: skip
        bags, labels = _bags(xv.flatten(1), yv, 1000, scale.bag, generator)
        with torch.no_grad():
            found["accuracy of bags"] = float(((model(bags) > 0) == labels.bool()).float().mean())
    return found


CLAIM = Claim(
    says="With patterns on a sphere of radius 3 sqrt(d - 1) and beta 1 the number that one update brings back grows with the dimension "
    "at least as 3.15^(d / 4), 0.41 doublings for each dimension, where the classical network's grows slower; pooled by a "
    "Hopfield layer, bags with one 9 among other digits are classified better than with attention, max or mean pooling.",
    measure=measure,
    build=build,
    arms=("classical", "mean", "max", "attention", "hopfield"),
    statements=(
        mechanism(
            "The number of patterns that are brought back doubles at least 0.41 times for each dimension.",
            fits("doublings for each dimension", "hopfield", low=0.41),
            control=COLD,
            mutant=LINEAR,
        ),
        effect(
            "It grows faster than the classical network's.",
            highest("doublings for each dimension", "hopfield", than=("classical",)),
            control=COLD,
        ),
        effect(
            "A Hopfield layer pools bags of digits better than the mean, the maximum and attention.",
            highest("accuracy of bags", "hopfield", than=("mean", "max", "attention")),
            control=COLD,
        ),
    ),
    checks=(
        check(
            "Pooled by the mean, at least 90% of the bags are classified correctly.",
            fits("accuracy of bags", "mean", low=0.9),
        ),
    ),
    pilots="Seeds 1000 to 1002. Capacity: an earlier form took patterns within a tenth of their length as kept, from starts that are off "
    "by a twentieth; then an update that does nothing keeps all, and the means of crowded patterns pass too (2^18 patterns in 6 "
    "dimensions); seeds 0 to 11 were run in that form. Within a hundredth, 4, 6, 8 and 10 dimensions hold 2^2 to 2^3, 2^2 to 2^5, "
    "2^9 and 2^14 patterns, the classical network 1 to 4 in all of them. Bags of 10, 400 steps, rates 0.001, 0.002, 0.005 and "
    "0.01, mean accuracy: mean .892 .952 .972 .973, max .986 .989 .971 .979, attention .989 .984 .969 .984, Hopfield .979 .968 "
    ".979 .957; 800 steps change little (.977 to .992 at best). Chosen: 0.01, 0.002, 0.001 and 0.005. There is little room above "
    "max and attention; the statement stands as the comparison was asked for.",
    scales={
        "smoke": {"widths": (3, 4), "most": 64, "steps": 2, "bag": 5},
        "small": {"widths": (4, 6, 8, 10), "most": 2**16, "steps": 400, "bag": 10},
        "full": {"widths": (4, 6, 8, 10, 12), "most": 2**22, "steps": 5000, "bag": 20},
    },
)
