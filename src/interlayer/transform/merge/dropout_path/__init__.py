"""Dropout stability and connectivity: two trained networks joined by a piecewise linear path through their halves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from interlayer.core import taps
from interlayer.core.chart import curves
from interlayer.core.example import Example, perturbed
from interlayer.core.kinds import Comparison, Finding
from interlayer.core.paths import Loss, blend, expect_alike, mean_loss
from interlayer.transform.merge.dropout_path.halves import Chain, Halves, State, join

__all__ = ["Chain", "DropoutPath", "Halves", "join"]

STRAIGHT = 11  # points on the straight line


class DropoutPath(Comparison):
    r"""Joins two networks by a piecewise linear path on which the loss is no higher than that of their halves.

    Shevchenko and Mondelli, Landscape Connectivity and Dropout Stability of SGD Solutions for Over-parameterized Neural Networks, ICML
    2020, arXiv:1912.10095. A network is dropout stable if its loss changes little when half of the units of a layer and all
    layers behind it are removed and the outgoing weights of the rest are doubled (by the number of units over that of the
    kept ones). With :math:`\theta_i` the network whose layers from i on are halved, the path of this construction obeys

    .. math:: \max_t L(\pi(t)) \le \max_i \max\{L(\theta_i), L(\theta'_i)\}, \qquad 1 \le i \le d,

    (with the network itself, :math:`i = d`) for any loss that is convex in the output: every segment moves either weights
    of units that nothing reads, or the last layer alone. SGD solutions get closer to dropout stable the wider they are, so
    the increase vanishes. The construction for several layers is that of Kuditipudi et al., arXiv:1906.06247. The theorems' constants
    hold for scaled one-pass SGD and are not computed here: the bound is the one above, of the two networks at hand.

    ``probe(model, data, others=(other,))`` with batches of (inputs, targets), for networks whose hidden units form a chain:
    linear layers or convolutions one after the other, with activations and batch norms between, and nothing behind the last layer.

    The tables: ``path``, the loss at points of every segment; ``halves``, the loss of each halved network and what it adds; and ``bound``:
    the worst loss on the path, the bound, and the barrier of the straight line for comparison.

    Args:
        points: Losses on each segment, both ends included.
        loss: ``loss(output, target)``, convex in the output. Defaults to cross-entropy.

    Which units are kept is drawn from torch's global generator.

    Raises:
        ValueError: ``points`` below 2, networks of different structure or that form no chain, one layer of a single unit, or no data.

    Examples:
        >>> a, b = (nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)) for _ in range(2))
        >>> data = torch.randn(50, 4), torch.randint(3, (50,))
        >>> bound = DropoutPath()(a, data, others=(b,)).tables["bound"]
        >>> bound["worst on the path"][0] <= bound["bound"][0] + 1e-5
        True
    """

    slug: ClassVar[str] = "dropout-path"

    def __init__(self, *, points: int = 5, loss: Loss = F.cross_entropy) -> None:
        if points < 2:
            raise ValueError(f"dropout-path: points was {points}; expected at least both ends of a segment, 2.")
        self.points, self.loss = points, loss

    def __call__(self, model: nn.Module, data: Any, *, others: Sequence[nn.Module] = ()) -> Finding:
        """Build the path and measure the loss on it; both networks are afterwards as they were before."""
        (other,) = self.take(others)
        expect_alike(self.slug, model, other)
        batches = taps.batches(data, self.slug, "no data; expected batches of inputs and targets.")
        with taps.at_rest(model), taps.at_rest(other), torch.no_grad():
            chain = Chain(model, batches[0])
            mine = Halves(chain, chain.split())
            yours = mine.swapped(-1)  # so that nothing has to be permuted
            first, second = dict(model.state_dict()), dict(other.state_dict())
            found = [self._halved(model, *each, batches) for each in ((mine, first), (yours, second))]
            at, losses, moves = self._along(model, chain, join(mine, yours, first, second), batches)
            shares = torch.linspace(0, 1, STRAIGHT).tolist()
            straight = max(self._loss(model, first, second, share, batches) for share in shares)
        worst, highest, ends = max(losses), max(map(max, found)), max(row[0] for row in found)
        bound: dict[str, list[Any]] = {
            "worst on the path": [worst],
            "bound": [highest],
            "rise on the path": [worst - ends],
            "rise on the straight line": [straight - ends],
        }
        halved = ["none", *(f"{g.name} and behind" for g in reversed(chain.groups))]
        halves: dict[str, list[Any]] = {
            "halved": halved * 2,
            "network": [name for name in ("first", "second") for _ in halved],
            "loss": [loss for row in found for loss in row],
            "gap": [abs(loss - row[0]) for row in found for loss in row],
        }
        path: dict[str, list[Any]] = {"at": at, "moves": moves, "loss": losses}
        return Finding(
            {"bound": bound, "halves": halves, "path": path},
            lambda: curves("segment", "loss", at, {"path": losses, "bound": [highest] * len(at)}),
            dict.fromkeys(("at", "loss", "gap", *bound), "1"),
        )

    def _along(
        self, model: nn.Module, chain: Chain, states: Sequence[State], batches: Any
    ) -> tuple[list[float], list[float], list[str]]:
        """Positions on the path, the losses there, and what the segments move."""
        found: list[tuple[float, float, str]] = []
        for n, (start, end) in enumerate(tqdm(list(pairwise(states)), desc="segments", disable=None, leave=False)):
            moves = "last layer" if any(not torch.equal(start[k], end[k]) for k in chain.last) else "unread units"
            for share in torch.linspace(0, 1, self.points).tolist()[min(n, 1) :]:
                found.append((n + share, self._loss(model, start, end, share, batches), moves))
        at, losses, segments = zip(*found, strict=True)
        return list(at), list(losses), list(segments)

    def _loss(self, model: nn.Module, start: State, end: State, share: float, batches: Any) -> float:
        return mean_loss(blend(model, (start, end), (1 - share, share)), batches, self.loss)

    def _halved(self, model: nn.Module, half: Halves, state: State, batches: Any) -> list[float]:
        """Losses of the network, of it with its last hidden layer halved, with the last two, and so on."""
        states = [state, *(half.dropped(state, range(i, half.depth)) for i in reversed(range(half.depth)))]
        return [mean_loss(blend(model, (s,), (1.0,)), batches, self.loss) for s in states]


def _pair() -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
    return model, (torch.randn(20, 4), torch.randint(3, (20,)))


def _found(finding: Finding) -> bool:
    """The path goes from one network to the other and stays under its bound."""
    bound, halves, path = (finding.tables[n] for n in ("bound", "halves", "path"))
    ends = halves["loss"][0], halves["loss"][3]
    met = max(abs(path["loss"][0] - ends[0]), abs(path["loss"][-1] - ends[1])) < 1e-5
    return met and bound["worst on the path"][0] <= bound["bound"][0] + 1e-5


EXAMPLE = Example(make=DropoutPath, inputs=_pair, others=perturbed, planted=_found)
