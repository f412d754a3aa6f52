"""A chain of repeaters that swap as soon as they can, or in the order of a tree."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from interlayer.core.events import Entity, World
from interlayer.domains.quantum.netsquid.hardware import Device
from interlayer.domains.quantum.netsquid.network import End, Fibre, Memory, swap
from interlayer.domains.quantum.netsquid.noise import Weights
from interlayer.domains.quantum.netsquid.states import State

Half = tuple[Memory, int]  # one end of a pair, and the node at its other end

ORDERS = ("asap", "nested")


def tree(nodes: int) -> dict[int, tuple[int, int]]:
    """Between which two nodes each repeater joins pairs, where every second node swaps, then every second of those left, ...

    Examples:
        >>> tree(5)
        {1: (0, 2), 3: (2, 4), 2: (0, 4)}
    """
    left = list(range(nodes))
    joins: dict[int, tuple[int, int]] = {}
    while len(left) > 2:
        joins |= {left[i]: (left[i - 1], left[i + 1]) for i in range(1, len(left) - 1, 2)}
        left = left[:-1:2] + left[-1:]
    return joins


class Chain:
    """Two ends and the repeaters between them. Each delivery makes one pair of the ends, at a time of its own.

    All fibres make pairs at once (with one optical interface in a node: even ones first, then odd ones). A node that holds two
    pairs swaps them, and tells both ends the outcome; these take the product of all outcomes as the Pauli correction. In nested
    order it waits until it has heard that they reach as far as the tree wants. A swap that fails loses both pairs, and every fibre
    below them starts again once its ends know.

    Args:
        world: The clock and the random numbers.
        device: The hardware of all nodes.
        nodes: Number of nodes, both ends included.
        length: From end to end in m; the nodes are spaced evenly.
        formalism: What the pairs are made of.
        distillation: Rounds of distillation on every fibre's pairs.
        order: ``asap`` or ``nested``.
    """

    def __init__(
        self,
        world: World,
        device: Device,
        nodes: int,
        length: float,
        formalism: type[State],
        distillation: int = 0,
        order: str = "asap",
    ) -> None:
        self.world, self.device, self.rounds = world, device, distillation
        self.joins = tree(nodes) if order == "nested" else None
        hop = length / (nodes - 1)
        self.delay = hop / device.speed
        self.nodes = [Entity(world, f"node {i}") for i in range(nodes)]
        self.fibres = [Fibre(world, f"fibre {i}", device, hop, formalism) for i in range(nodes - 1)]
        self.one_by_one = device.interfaces == 1 and nodes > 2

    def deliver(self) -> tuple[float, Weights]:
        """Make one pair from end to end.

        Returns:
            The time that it took in s, and its Bell weights.
        """
        start, last = self.world.now, len(self.nodes) - 1
        self.ends = [End(self.world, at, last - 1) for at in (0, last)]
        self.left: list[Half | None] = [None] * (last + 1)
        self.right: list[Half | None] = [None] * (last + 1)
        self.turn = [0] * (last + 1)
        self.ready = [self.world.event() for _ in self.fibres if self.one_by_one]
        made = [self.world.process(self._make(i)) for i in range(last)]
        self.world.run(made[0] if last == 1 else self.ends[0].knows & self.ends[1].knows)
        (a, _), (b, _) = self._half(self.right, 0), self._half(self.left, last)
        a.touch()
        qubit = b.touch()
        self.ends[1].correct(qubit)
        return self.world.now - start, qubit.state.weights()

    @staticmethod
    def _half(side: list[Half | None], node: int) -> Half:
        half = side[node]
        assert half is not None
        return half

    def _make(self, i: int, pause: float = 0.0) -> Generator[Any, Any, None]:
        """Make the pair of fibre i, after a pause."""
        fibre, last = self.fibres[i], len(self.fibres)
        if pause:
            yield self.world.wait(pause)
        late = self.one_by_one and i % 2
        if late:
            yield from self.ready[i - 1 : i + 2 : 2]
        before = fibre.attempts
        a, b = yield from fibre.pair(self.rounds)
        if late:
            for half in (self.left[i], self.right[i + 1]):
                if half is not None:
                    fibre.disturb(half[0], fibre.attempts - before)
        elif self.one_by_one:
            yield from fibre.store([m for m, node in ((a, i), (b, i + 1)) if 0 < node < last])
        self.right[i], self.left[i + 1] = (a, i + 1), (b, i)
        if self.one_by_one:
            self.ready[i].succeed()
        for node in (i, i + 1):
            self._look(node)

    def _look(self, node: int) -> None:
        """Swap if there are two pairs, of the reach that the order wants."""
        left, right = self.left[node], self.right[node]
        if left is not None and right is not None and (not self.joins or self.joins[node] == (left[1], right[1])):
            self._swap(node)

    def _swap(self, node: int) -> None:
        """Swap, and tell both ends of the chain; in nested order also those of the pair."""
        (left, low), (right, high) = self._half(self.left, node), self._half(self.right, node)
        who, device = self.nodes[node], self.device
        self.left[node] = self.right[node] = None
        x, z = swap(device, left, right)
        if device.swap_success < 1 and who.random.random() >= device.swap_success:
            self._fail(node, low, high)
            return
        self._tell(node, (node, self.turn[node], x, z))
        news = [
            (self.right, low, (self._half(self.right, low)[0], high)),
            (self.left, high, (self._half(self.left, high)[0], low)),
        ]
        if self.joins:
            for item in news:
                who.send(item, self._learn, device.swap_time + abs(item[1] - node) * self.delay)
        else:
            for side, end, half in news:
                side[end] = half

    def _learn(self, news: tuple[list[Half | None], int, Half]) -> None:
        """Note at a node how far its pair reaches now."""
        side, node, half = news
        side[node] = half
        self._look(node)

    def _tell(self, node: int, message: Any) -> None:
        """Send word of a swap to both ends of the chain."""
        for end in self.ends:
            self.nodes[node].send(message, end.get, self.device.swap_time + abs(end.at - node) * self.delay)

    def _fail(self, node: int, low: int, high: int) -> None:
        """Undo all between two nodes, and start again once a message from ``node`` has come there."""
        if not self.joins:  # in nested order a node with stale news waits for other pairs anyway
            self.right[low] = self.left[high] = None
        for k in range(low + 1, high):
            self.turn[k] += 1
        self._tell(node, {k: self.turn[k] for k in range(low + 1, high)})
        for i in range(low, high):
            far = max(abs(node - i), abs(node - i - 1))
            self.world.process(self._make(i, self.device.swap_time + far * self.delay))
