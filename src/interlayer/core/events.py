"""Discrete-event simulation over simpy: a clock with a unit, a stream of random numbers for each entity, messages that take time."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Generator
from functools import cached_property
from typing import Any

import numpy as np

from interlayer.core.extras import need


class World:
    """A simulated world: its clock, its processes and its random numbers.

    A process is a generator that yields what it waits for: ``world.wait(delay)``, ``world.event()``, another process, or two
    of them joined by ``&`` (both) or ``|`` (either). simpy keeps the queue; ``world.simpy`` is its environment, for resources
    and stores.

    Args:
        seed: Decides every random number. The same seed and the same program give the same run.
        unit: Unit of all times, for messages and tables.

    Examples:
        >>> world = World(seed=0, unit="s")
        >>> def blink(times):
        ...     while True:
        ...         yield world.wait(0.5)
        ...         times.append(world.now)
        >>> seen = []
        >>> _ = world.process(blink(seen))
        >>> world.run(until=1.2)
        >>> seen, world.now
        ([0.5, 1.0], 1.2)
    """

    def __init__(self, seed: int = 0, unit: str = "s") -> None:
        self.simpy = need("simpy", "quantum", "World").Environment()
        self.seed = seed
        self.unit = unit

    @property
    def now(self) -> float:
        """The time, in the world's unit."""
        return float(self.simpy.now)

    def wait(self, delay: float, value: Any = None) -> Any:
        """An event that happens after a delay; a process that yields it gets the value.

        Raises:
            ValueError: The delay is negative or not a number.
        """
        if not delay >= 0:
            raise ValueError(f"World: a delay of {delay} {self.unit}; expected 0 or more.")
        return self.simpy.timeout(delay, value)

    def event(self) -> Any:
        """An event that happens when someone calls its ``succeed(value)``."""
        return self.simpy.event()

    def process(self, steps: Generator[Any, Any, Any]) -> Any:
        """Start a process; it is itself an event, which happens when the generator returns."""
        return self.simpy.process(steps)

    def stream(self, name: str) -> np.random.Generator:
        """Random numbers for one name. They depend on the seed and the name alone, not on what else is simulated."""
        key = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=16).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(key, "big")))

    def run(self, until: Any = None) -> Any:
        """Run until a time, until an event (its value is returned), or until nothing is left to happen."""
        often, *rest = gc.get_threshold()
        gc.set_threshold(often and max(often, 100_000), *rest)  # else it scans all that is in flight over and over
        try:
            return self.simpy.run(until)
        finally:
            gc.set_threshold(often, *rest)


class Entity:
    """Something in a world that has a name, its own random numbers, and can get messages.

    Args:
        world: Where it lives.
        name: Unique; picks its random stream.

    Examples:
        >>> world = World()
        >>> alice, bob = Entity(world, "alice"), Entity(world, "bob")
        >>> alice.send("hello", bob.get, delay=2.0)
        >>> bob.get = lambda message: print(message, world.now)
        >>> alice.send("late binding", lambda message: bob.get(message), delay=1.0)
        >>> world.run()
        late binding 1.0
    """

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name

    @cached_property
    def random(self) -> np.random.Generator:
        """The entity's own random numbers."""
        return self.world.stream(self.name)

    def get(self, message: Any) -> None:
        """Receive a message; a subclass says what happens. By default nothing does."""

    def send(self, message: Any, to: Callable[[Any], Any], delay: float) -> None:
        """Call ``to(message)`` after a delay."""
        self.world.wait(delay, (to, message)).callbacks.append(_arrive)


def _arrive(event: Any) -> None:
    to, message = event.value
    to(message)
