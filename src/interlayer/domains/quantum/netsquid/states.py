"""Quantum states behind one interface, whatever the formalism."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Complex

from interlayer.domains.quantum.netsquid.noise import PAULIS, Draw, Noise, Weights

GATES = {
    **PAULIS,
    "H": np.array([[1, 1], [1, -1]]) / math.sqrt(2) + 0j,
    "S": np.diag([1, 1j]),
    "T": np.diag([1, np.exp(0.25j * np.pi)]),
    "CNOT": np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], complex),
}
BELL = {name: np.kron(np.eye(2), pauli) @ np.array([1, 0, 0, 1]) / math.sqrt(2) for name, pauli in PAULIS.items()}


class Qubit:
    """A handle: which state a qubit is part of now."""

    __slots__ = ("state",)
    state: State


class State(ABC):
    """A joint state of some qubits. Operations act in place; those on several qubits merge the states that they meet.

    ``draw`` is the random stream that decides outcomes. Subclasses give the six abstract methods; Bell measurement,
    distillation and pairs follow from them, and the Bell-diagonal formalism gives these directly.
    """

    name: ClassVar[str]
    __slots__ = ("qubits",)
    qubits: list[Qubit]

    @classmethod
    def make(cls, count: int) -> list[Qubit]:
        """New qubits in |0...0>."""
        state = cls.__new__(cls)
        state.qubits = [Qubit() for _ in range(count)]
        for qubit in state.qubits:
            qubit.state = state
        state.reset()
        return state.qubits[:]

    @classmethod
    def pair(cls, weights: Weights, draw: Draw) -> list[Qubit]:
        """Two qubits in the Bell-diagonal mixture of these weights; a formalism of pure states draws one of the four."""
        a, b = cls.make(2)
        a.state.gate("H", a)
        a.state.gate("CNOT", a, b)
        b.state.noise(Noise(paulis=weights), b, draw)
        return [a, b]

    @abstractmethod
    def reset(self) -> None:
        """Put all qubits into |0>."""

    @abstractmethod
    def gate(self, name: str, *at: Qubit) -> None:
        """Apply X, Y, Z, H, S, T or CNOT (control first)."""

    @abstractmethod
    def noise(self, noise: Noise, at: Qubit, draw: Draw) -> None:
        """Apply noise to one qubit."""

    @abstractmethod
    def measure(self, at: Qubit, draw: Draw) -> int:
        """Measure in the Z basis and remove the qubit."""

    @abstractmethod
    def join(self, other: State) -> None:
        """Take another state's qubits in."""

    @abstractmethod
    def density(self) -> Complex[np.ndarray, "D D"]:
        """The density matrix of all qubits, the first the most significant."""

    def weights(self) -> Weights:
        """Overlaps of a state of two qubits with the four Bell states; the first is the fidelity."""
        rho = self.density()
        i, x, y, z = (float((bell.conj() @ rho @ bell).real) for bell in BELL.values())
        return (i, x, y, z)

    def bell(self, a: Qubit, b: Qubit, draw: Draw) -> tuple[int, int]:
        """Measure two qubits in the Bell basis and remove them.

        Returns:
            (x, z): which Paulis X^x and Z^z make up for the outcome on a partner of ``b``.
        """
        together(a, b)
        state = a.state
        state.gate("CNOT", a, b)
        state.gate("H", a)
        z = state.measure(a, draw)
        return state.measure(b, draw), z

    def distil(self, keep: Sequence[Qubit], spend: Sequence[Qubit], draw: Draw) -> bool:
        """DEJMPS: improve the pair ``keep`` by using up the pair ``spend``; return whether it worked."""
        for a, b in (keep, spend):
            for qubit, turns in ((a, 1), (b, 3)):  # a quarter turn about X forwards at one end, backwards at the other
                for name in ("H", *["S"] * turns, "H"):
                    qubit.state.gate(name, qubit)
        for a, b in zip(keep, spend, strict=True):
            together(a, b)
            a.state.gate("CNOT", a, b)
        first, second = (qubit.state.measure(qubit, draw) for qubit in spend)
        return first == second

    def index(self, at: Qubit) -> int:
        """Position of a qubit."""
        return self.qubits.index(at)

    def refuse(self, what: str) -> ValueError:
        """The error for what a formalism cannot hold."""
        return ValueError(f"{self.name}: no {what} in this formalism. Use formalism 'ket' or 'density' for it.")


def together(a: Qubit, b: Qubit) -> None:
    """Make two qubits part of one state."""
    if a.state is not b.state:
        other = b.state
        a.state.join(other)
        for qubit in other.qubits:
            qubit.state = a.state
        a.state.qubits += other.qubits
