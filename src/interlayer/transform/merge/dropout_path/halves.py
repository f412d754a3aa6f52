"""Chains of hidden layers, halves of their units, and the corners of a path from one network to another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.wiring import Group, Member, run, trace

State = dict[str, Tensor]
CLOSE = 1e-3  # of the largest output: what may be rounding


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
        that layer halved; the last layer switches to the copy; and the parts behind change places.
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
