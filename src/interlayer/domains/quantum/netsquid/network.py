"""Nodes, memories whose noise is applied when they are touched, and links that make entanglement."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

from interlayer.core.events import Entity, World
from interlayer.domains.quantum.netsquid.hardware import Device, Link
from interlayer.domains.quantum.netsquid.noise import Draw, decay, dephasing, depolarising
from interlayer.domains.quantum.netsquid.states import Qubit, State


class Memory:
    """A place for a qubit. Nothing happens to it while time passes; ``touch`` applies the noise of all the time since the last touch.

    Args:
        qubit: What it holds.
        world: Whose clock counts.
        t1: Relaxation time in s.
        t2: Coherence time in s.
        draw: Decides about noise in formalisms of pure states.
        held: How long it has held the qubit already, in s.
    """

    __slots__ = ("draw", "qubit", "since", "t1", "t2", "world")

    def __init__(self, qubit: Qubit, world: World, t1: float, t2: float, draw: Draw, held: float = 0.0) -> None:
        self.qubit, self.world, self.t1, self.t2, self.draw = qubit, world, t1, t2, draw
        self.since = world.now - held

    def touch(self) -> Qubit:
        """The qubit as it is now."""
        now = self.world.now
        if now > self.since and (self.t2 < math.inf or self.t1 < math.inf):
            self.qubit.state.noise(decay(now - self.since, self.t1, self.t2), self.qubit, self.draw)
        self.since = now
        return self.qubit


Stored = tuple[Memory, Memory]  # a pair: the memories at its left and right end


class Fibre(Entity):
    """A fibre between two neighbours, with heralded generation over it.

    Attempts are independent, so the number until the first success is drawn at once, from the geometric distribution.

    Args:
        world: Where it lives.
        name: Unique.
        device: The hardware of both ends.
        length: In m.
        formalism: What its pairs are made of.
    """

    def __init__(self, world: World, name: str, device: Device, length: float, formalism: type[State]) -> None:
        super().__init__(world, name)
        self.device, self.length, self.formalism = device, length, formalism
        self.link: Link = device.link(length)
        self.attempts = 0

    def tries(self) -> int:
        """Attempts until one succeeds: P(n) = p (1 - p)^(n - 1)."""
        p = self.link.success
        return 1 if p >= 1 else 1 + int(math.log(1.0 - self.random.random()) / math.log1p(-p))

    def pair(self, rounds: int = 0) -> Generator[Any, Any, Stored]:
        """A process that makes a pair, and returns its two memories.

        Args:
            rounds: Rounds of distillation, each from two pairs of the round before; both ends tell each other their outcomes.
        """
        device, world = self.device, self.world
        if not rounds:
            count = self.tries()
            self.attempts += count
            yield world.wait(count * self.link.period)
            a, b = self.formalism.pair(self.link.weights, self.random)
            left, right = self.link.held
            return (
                Memory(a, world, device.t1, device.t2, self.random, left),
                Memory(b, world, device.t1, device.t2, self.random, right),
            )
        while True:
            keep = yield from self.pair(rounds - 1)
            spend = yield from self.pair(rounds - 1)
            good = keep[0].qubit.state.distil([m.touch() for m in keep], [m.touch() for m in spend], self.random)
            yield world.wait(self.link.delay)
            if good:
                return keep

    def store(self, memories: list[Memory]) -> Generator[Any, Any, None]:
        """A process that moves qubits into storage and so frees the optical interface."""
        yield self.world.wait(self.device.move_time)
        for m in memories:
            m.touch()
            m.qubit.state.noise(depolarising(self.device.move_noise), m.qubit, self.random)
            m.t1, m.t2 = self.device.storage_t1, self.device.storage_t2

    def disturb(self, memory: Memory, attempts: int) -> None:
        """Dephase a stored qubit by the attempts that ran beside it."""
        if self.device.attempt_dephasing:
            odd = (1 - (1 - 2 * self.device.attempt_dephasing) ** attempts) / 2
            memory.qubit.state.noise(dephasing(odd), memory.qubit, self.random)


def swap(device: Device, left: Memory, right: Memory) -> tuple[int, int]:
    """A Bell measurement on two memories of a node; what is left is a pair of their partners.

    Returns:
        (x, z): the Pauli X^x Z^z that the partner of ``right`` still needs.
    """
    a, b = left.touch(), right.touch()
    if device.swap_noise:
        a.state.noise(depolarising(device.swap_noise), a, left.draw)
    return a.state.bell(a, b, left.draw)


def correct(qubit: Qubit, x: int, z: int) -> None:
    """Apply X^x Z^z."""
    if x or z:
        qubit.state.gate({(1, 0): "X", (0, 1): "Z", (1, 1): "Y"}[x, z], qubit)


class End(Entity):
    """One end of the chain, which hears of the swaps.

    A node's ``turn`` rises by one whenever its swap is undone, and word of an older turn does not count.

    Args:
        world: Where it lives.
        at: Its node.
        others: Number of swaps that it has to hear of.
    """

    def __init__(self, world: World, at: int, others: int) -> None:
        super().__init__(world, f"end {at}")
        self.at, self.others = at, others
        self.knows = world.event()
        self.outcomes: dict[int, tuple[int, int, int, int]] = {}  # the newest by node
        self.void: dict[int, int] = {}  # by node: turns below this do not count

    def get(self, message: tuple[int, int, int, int] | dict[int, int]) -> None:
        """Hear of an outcome (node, turn, x, z), or of swaps that were undone (turns that count, by node)."""
        if isinstance(message, dict):
            self.void |= message
            for node, turn in message.items():
                if node in self.outcomes and self.outcomes[node][1] < turn:
                    del self.outcomes[node]
        elif message[1] >= self.void.get(message[0], 0):
            self.outcomes[message[0]] = message
            if len(self.outcomes) == self.others:
                self.knows.succeed()

    def correct(self, qubit: Qubit) -> None:
        """Apply the product of all corrections."""
        x, z = (sum(o[i] for o in self.outcomes.values()) % 2 for i in (2, 3))
        correct(qubit, x, z)
