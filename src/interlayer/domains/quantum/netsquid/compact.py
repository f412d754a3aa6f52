"""The cheap formalisms: stabiliser tableaux and Bell-diagonal pairs."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from functools import reduce
from itertools import accumulate

import numpy as np
from jaxtyping import Complex, Int

from interlayer.domains.quantum.netsquid.dense import Density, Ket
from interlayer.domains.quantum.netsquid.noise import PAULIS, Draw, Noise, Weights, product
from interlayer.domains.quantum.netsquid.states import BELL, Qubit, State


class Stabiliser(State):
    """A pure state given by the Paulis that leave it as it is; noise draws a Pauli.

    Row r of the tableau stands for i^k X^x Z^z, with ``x`` and ``z`` of a bit for each qubit, and ``k`` modulo 4.
    """

    name = "stabiliser"
    x: Int[np.ndarray, "N N"]
    z: Int[np.ndarray, "N N"]
    k: Int[np.ndarray, " N"]

    def reset(self) -> None:
        """Z of each qubit."""
        n = len(self.qubits)
        self.x, self.z, self.k = np.zeros((n, n), int), np.eye(n, dtype=int), np.zeros(n, int)

    def gate(self, name: str, *at: Qubit) -> None:
        """Conjugate every row."""
        q, *rest = [self.index(a) for a in at]
        x, z = self.x, self.z
        if name in PAULIS:
            self.k += 2 * ((name in "XY") * z[:, q] + (name in "YZ") * x[:, q])
        elif name == "H":
            self.k += 2 * x[:, q] * z[:, q]
            x[:, q], z[:, q] = z[:, q].copy(), x[:, q].copy()
        elif name == "S":
            self.k += x[:, q]
            z[:, q] ^= x[:, q]
        elif name == "CNOT":
            x[:, rest[0]] ^= x[:, q]
            z[:, q] ^= z[:, rest[0]]
        else:
            raise self.refuse(f"gate {name}")

    def noise(self, noise: Noise, at: Qubit, draw: Draw) -> None:
        """Draw a Pauli of the twirled noise."""
        self.gate("IXYZ"[bisect(list(accumulate(noise.twirled[:3])), draw.random())], at)

    def _times(self, row: int, by: int) -> None:
        self.k[row] += self.k[by] + 2 * int(self.z[row] @ self.x[by])
        self.x[row] ^= self.x[by]
        self.z[row] ^= self.z[by]

    def measure(self, at: Qubit, draw: Draw) -> int:
        """Random where a row anticommutes with Z, else the sign of Z among the products of rows."""
        q, n = self.index(at), len(self.qubits)
        if (hits := np.flatnonzero(self.x[:, q])).size:
            own = int(hits[0])
            for row in hits[1:]:
                self._times(int(row), own)
            self.x[own], self.z[own] = 0, np.eye(n, dtype=int)[q]
            self.k[own] = 2 * int(2 * draw.random())
        else:
            own = self._alone(q)
        for row in np.flatnonzero(self.z[:, q]):
            if row != own:
                self._times(int(row), own)
        outcome = int(self.k[own] % 4 // 2)
        self.x, self.z = (np.delete(np.delete(m, own, 0), q, 1) for m in (self.x, self.z))
        self.k = np.delete(self.k, own)
        del self.qubits[q]
        return outcome

    def _alone(self, q: int) -> int:
        """Eliminate until one row is Z of a qubit alone, and return that row."""
        n, done = len(self.qubits), 0
        others = [i for i in range(n) if i != q]
        for part, i in [(self.x, i) for i in others] + [(self.z, i) for i in others] + [(self.z, q)]:
            hits = done + np.flatnonzero(part[done:, i])
            if hits.size:
                for m in (self.x, self.z, self.k):
                    m[[done, hits[0]]] = m[[hits[0], done]]
                for row in np.flatnonzero(part[:, i]):
                    if row != done:
                        self._times(int(row), done)
                done += 1
        return done - 1

    def join(self, other: State) -> None:
        """Put both tableaux on one diagonal."""
        assert isinstance(other, Stabiliser)
        n, m = len(self.k), len(other.k)
        for name in ("x", "z"):
            whole = np.zeros((n + m, n + m), int)
            whole[:n, :n], whole[n:, n:] = getattr(self, name), getattr(other, name)
            setattr(self, name, whole)
        self.k = np.concatenate([self.k, other.k])

    def density(self) -> Complex[np.ndarray, "D D"]:
        """The product of the projectors (1 + row) / 2."""
        n = len(self.qubits)
        rho = np.eye(2**n, dtype=complex)
        power = np.linalg.matrix_power
        for x, z, k in zip(self.x, self.z, self.k, strict=True):
            factors = [power(PAULIS["X"], a) @ power(PAULIS["Z"], b) for a, b in zip(x, z, strict=True)]
            rho = rho @ (np.eye(2**n) + 1j ** (k % 4) * reduce(np.kron, factors)) / 2
        return rho


class BellDiagonal(State):
    """A pair in a mixture of the four Bell states: four weights, whatever it has been through.

    Swapping, Pauli noise and distillation are sums of products of weights, so a chain costs a fixed number of operations for
    each node. Other gates and states do not fit in and raise.
    """

    name = "bell-diagonal"
    __slots__ = ("mix",)
    mix: Weights

    @classmethod
    def pair(cls, weights: Weights, draw: Draw) -> list[Qubit]:
        """A pair of these weights."""
        state = cls.__new__(cls)
        a, b = state.qubits = [Qubit(), Qubit()]
        a.state = b.state = state
        state.mix = weights
        return [a, b]

    def reset(self) -> None:
        """A product state is no mixture of Bell states."""
        raise self.refuse("single qubit")

    def gate(self, name: str, *at: Qubit) -> None:
        """A Pauli permutes the weights."""
        if name not in PAULIS:
            raise self.refuse(f"gate {name}")
        i, x, y, z = self.mix
        self.mix = {"I": (i, x, y, z), "X": (x, i, z, y), "Y": (y, z, i, x), "Z": (z, y, x, i)}[name]

    def noise(self, noise: Noise, at: Qubit, draw: Draw) -> None:
        """Mix with the twirled noise's weights."""
        self.mix = product(self.mix, noise.twirled)

    def measure(self, at: Qubit, draw: Draw) -> int:
        """A pair with one end measured is no mixture of Bell states."""
        raise self.refuse("measurement of one qubit")

    def join(self, other: State) -> None:
        """Pairs stay pairs."""
        raise self.refuse("joint state of two pairs")

    def bell(self, a: Qubit, b: Qubit, draw: Draw) -> tuple[int, int]:
        """Swap: the far ends are a pair, its error the product of both errors and the outcome, whose bits are even."""
        left, right = a.state, b.state
        if left is right:
            raise self.refuse("Bell measurement within a pair")
        assert isinstance(left, BellDiagonal) and isinstance(right, BellDiagonal)
        ends = [q for s, used in ((left, a), (right, b)) for q in s.qubits if q is not used]
        left.qubits = ends
        ends[1].state = left
        left.mix = product(left.mix, right.mix)
        outcome = int(4 * draw.random())
        x, z = outcome & 1, outcome >> 1
        left.gate("IXZY"[outcome], ends[1])
        return x, z

    def distil(self, keep: Sequence[Qubit], spend: Sequence[Qubit], draw: Draw) -> bool:
        """DEJMPS on the weights: the quarter turns exchange Y and Z, and both pairs must agree on X."""
        one, two = keep[0].state, spend[0].state
        assert isinstance(one, BellDiagonal) and isinstance(two, BellDiagonal)
        (i, x, z, y), (j, u, w, v) = one.mix, two.mix
        chance = (i + z) * (j + w) + (x + y) * (u + v)
        one.mix = (
            (i * j + z * w) / chance,
            (x * u + y * v) / chance,
            (x * v + y * u) / chance,
            (i * w + z * j) / chance,
        )
        return draw.random() < chance

    def weights(self) -> Weights:
        """The four weights."""
        return self.mix

    def density(self) -> Complex[np.ndarray, "4 4"]:
        """The mixture."""
        return sum(w * np.outer(b, b.conj()) for w, b in zip(self.mix, BELL.values(), strict=True))  # type: ignore[return-value]


FORMALISMS: dict[str, type[State]] = {f.name: f for f in (Ket, Density, Stabiliser, BellDiagonal)}
