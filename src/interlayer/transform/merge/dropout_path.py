"""Dropout stability and connectivity: two trained networks joined by a piecewise linear path through their halves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from interlayer.core import taps
from interlayer.core.chart import curves
from interlayer.core.example import Example, perturbed
from interlayer.core.kinds import Comparison, Finding
from interlayer.core.paths import Loss, blend, expect_alike, mean_loss
from interlayer.core.wiring import Group, Member, run, trace

State = dict[str, Tensor]
CLOSE = 1e-3  # of the largest output: what may be rounding
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
        batches = [data] if isinstance(data, Tensor | Mapping | tuple) else list(data)
        if not batches:
            raise ValueError(f"{self.slug}: no data; expected batches of inputs and targets.")
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


@dataclass(frozen=True)
class Link:
    """The units of one hidden layer: what belongs to each, what reads them."""

    group: Group
    own: tuple[Member, ...]  # rows of the weights before it, bias, batch norm
    read: Member  # columns of the weight behind it


class Chain:
    """The hidden layers of a network in which each reads the one before it alone, found by tracing.

    Args:
        model: Any network that ``wiring.trace`` can follow.
        batch: One batch, as ``taps.feed`` takes it.

    Raises:
        ValueError: The hidden units form no chain.
    """

    def __init__(self, model: nn.Module, batch: Any) -> None:
        args, kwargs = taps.arguments(batch)
        wiring = trace(model, *args, **kwargs)
        sizes = {n: t.ndim for n, t in model.state_dict().items() if isinstance(t, Tensor)}
        who = type(model).__name__

        def fail(why: str) -> ValueError:
            return ValueError(
                f"dropout-path: {who} is no chain of hidden layers: {why}. Expected linear layers or convolutions one after the other."
            )

        by_weight: dict[str, dict[int, Group]] = {}
        for g in wiring.groups.values():
            if g.parent is not None:
                raise fail(f"{g.name} lies inside other units")
            for m in g.members:
                if m.dim in by_weight.setdefault(m.name, {}):
                    raise fail(f"{m.name} has units of two layers on one axis")
                by_weight[m.name][m.dim] = g
        if not wiring.groups:
            raise fail("no units of it can be permuted")
        links: dict[str, Link] = {}
        following: dict[str, str | None] = {}
        for g in wiring.groups.values():
            reading = [m for m in g.members if m.dim == 1 and sizes[m.name] > 1]
            writing = [m for m in g.members if m.dim == 0 and sizes[m.name] > 1]
            if (
                len(reading) != 1
                or len(writing) != 1
                or len(reading) + len(writing) + sum(m.dim == 0 and sizes[m.name] == 1 for m in g.members)
                != len(g.members)
            ):
                raise fail(f"{g.name} is written by {len(writing)} weights and read by {len(reading)}")
            if g.size < 2:
                raise fail(f"{g.name} has a single unit")
            links[g.name] = Link(g, tuple(m for m in g.members if m is not reading[0]), reading[0])
            behind = by_weight[reading[0].name].get(0)
            following[g.name] = behind.name if behind else None
        first = [n for n in links if n not in following.values()]
        order = first[:1]
        while order and following[order[-1]] is not None and len(order) <= len(links):
            order.append(following[order[-1]] or "")
        if len(first) != 1 or len(order) != len(links):
            raise fail("its layers do not follow each other")
        self.links = [links[n] for n in order]
        self.groups = [link.group for link in self.links]
        head = self.links[-1].read.name
        self.last = [n for n in sizes if n.rpartition(".")[0] == head.rpartition(".")[0]]
        known = {m.name for link in self.links for m in link.own} | {*self.last, *wiring.aliases}
        if odd := [n for n, _ in model.named_parameters() if n not in known]:
            raise fail(f"{odd[0]} belongs to no hidden unit")
        self.inputs = (args, kwargs)
        self._check(model, fail)

    def _check(self, model: nn.Module, fail: Any) -> None:
        """Unread units do not show, and the output is linear in the last layer: norms over units or a softmax at the end break that."""
        state = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
        half = Halves(self, self.split())
        once, noise = half.dropped(state, range(half.depth)), dict(state)
        noisy = dict(once)
        for link, (_, free) in zip(self.links, half.parts, strict=True):
            for m in link.own:
                _put(noisy, m, free, _get(noisy, m, free) + 1)
        for name in self.last:
            noise[name] = state[name] + torch.linspace(-1, 1, state[name].numel()).to(state[name]).view(
                state[name].shape
            )
        middle = {n: (v + noise[n]) / 2 if n in self.last else v for n, v in state.items()}
        outputs = [
            taps.first(run(model, s, *self.inputs[0], **self.inputs[1])) for s in (once, noisy, state, noise, middle)
        ]
        size = CLOSE * max(float(o.abs().max()) for o in outputs)
        if (outputs[0] - outputs[1]).abs().max() > size:
            raise fail("units that no weight reads still change the output, as with a norm over units")
        if ((outputs[2] + outputs[3]) / 2 - outputs[4]).abs().max() > size:
            raise fail(f"something that is not linear follows {self.links[-1].read.name}; remove a softmax at the end")

    def split(self) -> list[tuple[Tensor, Tensor]]:
        """For each layer two random halves of its units; of an odd number one unit is in neither."""
        found = []
        for g in self.groups:
            order = torch.randperm(g.size)
            found.append((order[: g.size // 2], order[g.size // 2 : 2 * (g.size // 2)]))
        return found


class Halves:
    """Two parts of the units of each layer of a chain, the first of which is kept, and the second free."""

    def __init__(self, chain: Chain, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.chain, self.parts, self.depth = chain, list(parts), len(chain.links)

    def swapped(self, layer: int) -> Halves:
        """The same with the parts of all layers behind ``layer`` exchanged."""
        return Halves(self.chain, [p if n <= layer else (p[1], p[0]) for n, p in enumerate(self.parts)])

    def dropped(self, state: State, layers: Iterable[int]) -> State:
        """The network in which of these layers the kept units alone are read, scaled up."""
        out = dict(state)
        for n in layers:
            link, kept = self.chain.links[n], self.parts[n][0]
            _reads(out, link, kept, _get(out, link.read, kept) * (link.group.size / len(kept)))
        return out

    def path(self, state: State) -> tuple[list[State], Halves]:
        """From a network to its half in straight segments, and where the kept units are in the end.

        First the last hidden layer is halved. Then, for each layer before it, what lies behind is copied into the free units, with
        that layer halved; the last layer goes over to the copy; and the parts behind change places.
        """
        half, states = self, [state, self.dropped(state, [self.depth - 1])]
        for layer in reversed(range(self.depth - 1)):
            target = half.dropped(states[-1], [layer])
            states.append(half._copied(states[-1], target, layer + 1))
            last, (kept, free) = self.chain.links[-1], half.parts[-1]
            turned = dict(states[-1])
            _reads(turned, last, free, _get(target, last.read, kept))
            states.append(turned)
            half = half.swapped(layer)
        return states, half

    def _copied(self, state: State, target: State, first: int) -> State:
        """``state`` with the kept units of ``target``, from layer ``first`` on, in the place of the free ones."""
        out = dict(state)
        for n in range(first, self.depth):
            kept, free = self.parts[n]
            source = dict(target)
            if n > first:  # copies read copies
                before = self.chain.links[n - 1]
                _reads(source, before, self.parts[n - 1][1], _get(target, before.read, self.parts[n - 1][0]))
            for m in self.chain.links[n].own:
                _put(out, m, free, _get(source, m, kept))
        return out


def join(mine: Halves, yours: Halves, first: State, second: State) -> list[State]:
    """The corners of a path from one network to another whose kept units are the free ones of the first.

    Both go to their halves. In between, the half of the second is put into the units that the first does not read, the last
    layer goes over to it, and what nothing reads any more becomes the second's.
    """
    there, _ = mine.path(first)
    back, other = yours.path(second)
    held = dict(there[-1])
    for link, (units, _) in zip(mine.chain.links, other.parts, strict=True):
        for m in link.own:
            _put(held, m, units, _get(back[-1], m, units))
    over = held | {name: back[-1][name] for name in mine.chain.last}
    return [*there, held, over, *reversed(back)]


def _index(member: Member, units: Tensor) -> Tensor:
    return member.index[units].flatten()


def _get(state: Mapping[str, Tensor], member: Member, units: Tensor) -> Tensor:
    weight = state[member.name]
    return weight.index_select(member.dim, _index(member, units).to(weight.device))


def _put(state: State, member: Member, units: Tensor, values: Tensor) -> None:
    weight = state[member.name]
    state[member.name] = weight.index_copy(member.dim, _index(member, units).to(weight.device), values.to(weight.dtype))


def _reads(state: State, link: Link, units: Tensor, values: Tensor) -> None:
    """Let the layer behind read these units, and no others of the layer."""
    state[link.read.name] = torch.zeros_like(state[link.read.name])
    _put(state, link.read, units, values)


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
