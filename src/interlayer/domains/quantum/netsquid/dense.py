"""Ket vectors and density matrices."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Complex

from interlayer.domains.quantum.netsquid.noise import Draw, Noise
from interlayer.domains.quantum.netsquid.states import GATES, Qubit, State


class Ket(State):
    """A vector of amplitudes; noise draws one of its Kraus operators, so that averages over runs are exact."""

    name = "ket"
    array: Complex[np.ndarray, "..."]
    sides = 1

    def reset(self) -> None:
        """|0...0>."""
        self.array = np.zeros([2] * (self.sides * len(self.qubits)), complex)
        self.array[(0,) * self.array.ndim] = 1

    def gate(self, name: str, *at: Qubit) -> None:
        """Multiply by the gate's matrix."""
        self._act(GATES[name], [self.index(q) for q in at])

    def _act(self, matrix: np.ndarray, at: list[int]) -> None:
        n = len(at)
        turned = np.tensordot(matrix.reshape([2] * (2 * n)), self.array, (range(n, 2 * n), at))
        self.array = np.moveaxis(turned, range(n), at)

    def noise(self, noise: Noise, at: Qubit, draw: Draw) -> None:
        """Apply one Kraus operator, drawn by its probability."""
        left, before, spot = draw.random(), self.array, self.index(at)
        for kraus in noise.kraus:
            self.array = before
            self._act(kraus, [spot])
            share = float(np.vdot(self.array, self.array).real)
            if share > 0:
                chosen, left = self.array / math.sqrt(share), left - share
            if left < 0:
                break
        self.array = chosen

    def measure(self, at: Qubit, draw: Draw) -> int:
        """Collapse."""
        spot = self.index(at)
        halves = np.moveaxis(self.array, spot, 0)
        outcome = int(draw.random() >= float(np.vdot(halves[0], halves[0]).real))
        kept = halves[outcome]
        self.array = kept / math.sqrt(float(np.vdot(kept, kept).real))
        del self.qubits[spot]
        return outcome

    def join(self, other: State) -> None:
        """Tensor product."""
        assert isinstance(other, Ket)
        self.array = np.multiply.outer(self.array, other.array)

    def density(self) -> Complex[np.ndarray, "D D"]:
        """|psi><psi|."""
        flat = self.array.reshape(-1)
        return np.outer(flat, flat.conj())


class Density(Ket):
    """A density matrix: noise is applied as a whole, only measurements are random."""

    name = "density"
    sides = 2

    def _act(self, matrix: np.ndarray, at: list[int]) -> None:
        super()._act(matrix, at)
        super()._act(matrix.conj(), [i + len(self.qubits) for i in at])

    def noise(self, noise: Noise, at: Qubit, draw: Draw) -> None:
        """The sum over all Kraus operators."""
        before, spot, total = self.array, self.index(at), np.zeros_like(self.array)
        for kraus in noise.kraus:
            self.array = before
            self._act(kraus, [spot])
            total = total + self.array
        self.array = total

    def measure(self, at: Qubit, draw: Draw) -> int:
        """Collapse."""
        spot, n = self.index(at), len(self.qubits)
        halves = np.moveaxis(self.array, (spot, spot + n), (0, 1))
        size = 2 ** (n - 1)
        chance = [float(np.trace(halves[i, i].reshape(size, size)).real) for i in (0, 1)]
        outcome = int(draw.random() * sum(chance) >= chance[0])
        self.array = halves[outcome, outcome] / chance[outcome]
        del self.qubits[spot]
        return outcome

    def join(self, other: State) -> None:
        """Tensor product; rows first, then columns."""
        assert isinstance(other, Density)
        n, m = len(self.qubits), len(other.qubits)
        outer = np.multiply.outer(self.array, other.array)
        self.array = np.moveaxis(outer, range(n, 2 * n), range(n + m, 2 * n + m))

    def density(self) -> Complex[np.ndarray, "D D"]:
        """Itself."""
        size = 2 ** len(self.qubits)
        return self.array.reshape(size, size)
