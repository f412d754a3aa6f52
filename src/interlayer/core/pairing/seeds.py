"""Seeds from names, and torch's global generators."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(*parts: object) -> int:
    """A seed of 63 bits from numbers and names, the same in every process.

    Examples:
        >>> seed_of(0, "head.weight") == seed_of(0, "head.weight") != seed_of(1, "head.weight")
        True
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def generators() -> list[torch.Generator]:
    """The global generators: the CPU's, then those of the CUDA devices if CUDA is in use."""
    return [torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ())]


def seed_all(seed: int) -> None:
    """Seed the global generators; ``torch.manual_seed`` also queues a call for every device that is not in use yet."""
    for generator in generators():
        generator.manual_seed(seed)


@contextmanager
def kept() -> Iterator[None]:
    """Leave the global generators as they were, after an exception too."""
    before = [(generator, generator.get_state()) for generator in generators()]
    try:
        yield
    finally:
        for generator, state in before:
            generator.set_state(state)
