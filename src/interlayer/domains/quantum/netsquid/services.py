"""A switch that serves pairs of users, and teleportation."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import Any

from interlayer.core.events import Entity, World
from interlayer.domains.quantum.netsquid.hardware import Device
from interlayer.domains.quantum.netsquid.network import Fibre, Memory, Stored, correct, swap
from interlayer.domains.quantum.netsquid.noise import Weights
from interlayer.domains.quantum.netsquid.states import Qubit, State


class Switch(Entity):
    """A node with a fibre to each user. Whenever two users hold a pair with it, it swaps them, the oldest pair first.

    Args:
        world: The clock and the random numbers.
        device: The hardware of the switch and its users.
        users: Number of users.
        length: Of each fibre, in m.
        formalism: What the pairs are made of.
        buffer: Pairs that the switch stores for each user; one more is dropped.
    """

    def __init__(
        self, world: World, device: Device, users: int, length: float, formalism: type[State], buffer: int = 1
    ) -> None:
        super().__init__(world, "switch")
        self.device, self.buffer = device, buffer
        self.fibres = [Fibre(world, f"fibre {i}", device, length, formalism) for i in range(users)]
        self.stored: deque[tuple[int, Stored]] = deque()  # of one user only: two would have been swapped
        self.served: list[tuple[int, int, float, Weights]] = []  # users, time in s, Bell weights

    def serve(self, until: float) -> None:
        """Run for a time in s."""
        for user in range(len(self.fibres)):
            self.world.process(self._user(user))
        self.world.run(until)

    def _user(self, user: int) -> Generator[Any, Any, None]:
        while True:
            pair = yield from self.fibres[user].pair()
            other = self.stored[0][0] if self.stored else user
            if other != user:
                self._swap(*self.stored.popleft(), user, pair)
            elif len(self.stored) < self.buffer:
                self.stored.append((user, pair))

    def _swap(self, first: int, one: Stored, second: int, two: Stored) -> None:
        """Swap the switch's halves and tell the users; the pair counts when they know."""
        if self.random.random() >= self.device.swap_success:
            return
        x, z = swap(self.device, one[1], two[1])

        def arrive(memories: Stored) -> None:
            memories[0].touch()
            qubit = memories[1].touch()
            correct(qubit, x, z)
            self.served.append((first, second, self.world.now, qubit.state.weights()))

        self.send((one[0], two[0]), arrive, self.device.swap_time + self.fibres[0].link.delay)


# The states along six axes: |0>, |1>, and those that H and S make of them. Their mean fidelity is that of all pure states.
AXES = ((), ("X",), ("H",), ("X", "H"), ("H", "S"), ("X", "H", "S"))


def teleport(world: World, fibre: Fibre, axis: int) -> Generator[Any, Any, tuple[float, float]]:
    """A process that teleports one of six states over a fibre.

    Alice and Bob make a pair; she measures her qubit and her half in the Bell basis and sends two bits; he corrects. Where the
    measurement fails, they start again.

    Args:
        world: The clock.
        fibre: Between Alice and Bob.
        axis: Which state, 0 to 5.

    Returns:
        The time that it took in s, and the overlap of Bob's qubit with the state.
    """
    start, device, draw = world.now, fibre.device, fibre.random
    while True:
        mine, theirs = yield from fibre.pair()
        (data,) = fibre.formalism.make(1)
        for name in AXES[axis]:
            data.state.gate(name, data)
        x, z = swap(device, Memory(data, world, device.t1, device.t2, draw), mine)
        yield world.wait(device.swap_time)
        if device.swap_success == 1 or draw.random() < device.swap_success:
            break
    yield world.wait(fibre.link.delay)
    qubit = theirs.touch()
    correct(qubit, x, z)
    return world.now - start, overlap(qubit, axis)


def overlap(qubit: Qubit, axis: int) -> float:
    """Overlap of a lone qubit with one of the six states."""
    ideal, state = type(qubit.state).make(1)[0], qubit.state
    for name in AXES[axis]:
        ideal.state.gate(name, ideal)
    return float((state.density() @ ideal.state.density()).trace().real)


def store(
    world: World, device: Device, formalism: type[State], weights: Weights, times: list[float], name: str = "pair"
) -> list[float]:
    """Fidelity of a pair kept at both ends, looked at after each of these times in s; ``name`` picks its random numbers."""
    start, draw, found = world.now, world.stream(name), []
    memories = [Memory(q, world, device.t1, device.t2, draw) for q in formalism.pair(weights, draw)]
    for time in times:
        world.run(world.wait(max(0.0, start + time - world.now)))
        for m in memories:
            m.touch()
        found.append(memories[0].qubit.state.weights()[0])
    return found
