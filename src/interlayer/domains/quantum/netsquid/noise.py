"""Noise on one qubit: amplitude damping followed by random Paulis, exact as Kraus operators or twirled to Paulis."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Complex

Draw = np.random.Generator  # decides outcomes and errors
Weights = tuple[
    float, float, float, float
]  # of I, X, Y, Z: of Pauli errors, or of the Bell states that they make of Phi+
PAULIS = {
    "I": np.eye(2, dtype=complex),
    "X": np.array([[0, 1], [1, 0]], complex),
    "Y": np.array([[0, -1j], [1j, 0]]),
    "Z": np.array([[1, 0], [0, -1]], complex),
}


def product(p: Weights, q: Weights) -> Weights:
    """The weights of two independent Pauli errors one after the other.

    Examples:
        >>> product((0.9, 0.1, 0.0, 0.0), (0.9, 0.1, 0.0, 0.0))[0]
        0.8200000000000001
    """
    i, x, y, z = p
    j, u, v, w = q
    return (
        i * j + x * u + y * v + z * w,
        i * u + x * j + y * w + z * v,
        i * v + y * j + x * w + z * u,
        i * w + z * j + x * v + y * u,
    )


@dataclass(frozen=True)
class Noise:
    """Amplitude damping with probability ``damping``, then a Pauli error with the weights ``paulis``.

    The ket and density-matrix formalisms apply it exactly. The stabiliser and Bell-diagonal formalisms, which cannot hold a
    damped state, apply its Pauli twirl: the same entanglement fidelity, without the drift towards |0>.

    Args:
        damping: Probability that |1> falls to |0>.
        paulis: Probabilities of I, X, Y and Z; they sum to 1.
    """

    damping: float = 0.0
    paulis: Weights = (1.0, 0.0, 0.0, 0.0)

    @property
    def twirled(self) -> Weights:
        """The weights of the Pauli channel that is left when the noise is averaged over Paulis."""
        if not self.damping:
            return self.paulis
        g, root = self.damping, math.sqrt(1 - self.damping)
        return product(((2 - g + 2 * root) / 4, g / 4, g / 4, (2 - g - 2 * root) / 4), self.paulis)

    @property
    def kraus(self) -> list[Complex[np.ndarray, "2 2"]]:
        """Kraus operators: their K†K sum to one."""
        fall = [np.diag([1, math.sqrt(1 - self.damping)]).astype(complex)]
        if self.damping:
            fall.append(np.array([[0, math.sqrt(self.damping)], [0, 0]], complex))
        return [math.sqrt(w) * PAULIS[n] @ k for n, w in zip("IXYZ", self.paulis, strict=True) if w > 0 for k in fall]


def depolarising(p: float) -> Noise:
    """With probability p, forget the state: I keeps the weight 1 - 3p/4.

    >>> depolarising(0.4).paulis
    (0.7, 0.1, 0.1, 0.1)
    """
    return Noise(paulis=(1 - 3 * p / 4, p / 4, p / 4, p / 4))


def dephasing(p: float) -> Noise:
    """Z with probability p."""
    return Noise(paulis=(1 - p, 0.0, 0.0, p))


def decay(time: float, t1: float, t2: float) -> Noise:
    """Relaxation and dephasing of a stored qubit: |1> survives with exp(-t/T1), coherence with exp(-t/T2).

    Args:
        time: How long it was stored, in s.
        t1: Relaxation time T1 in s; may be infinite.
        t2: Coherence time T2 in s, at most 2 T1; may be infinite.
    """
    coherence = math.exp(-time / t2 + time / (2 * t1))  # what damping, which costs exp(-t/2T1), leaves to dephasing
    return Noise(-math.expm1(-time / t1), (1 - (1 - coherence) / 2, 0.0, 0.0, (1 - coherence) / 2))


def werner(fidelity: float) -> Weights:
    """Bell weights of a Werner pair: what is not Phi+ is shared evenly.

    >>> werner(0.7)
    (0.7, 0.1, 0.1, 0.1)
    """
    rest = round((1 - fidelity) / 3, 15)
    return (fidelity, rest, rest, rest)
