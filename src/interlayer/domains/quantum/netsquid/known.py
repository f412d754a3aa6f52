"""Quantities of quantum networks that have a closed form, and the simulation of each."""

from __future__ import annotations

import math
from collections.abc import Mapping

from interlayer.core.events import World
from interlayer.domains.quantum.netsquid.chain import Chain
from interlayer.domains.quantum.netsquid.compact import BellDiagonal
from interlayer.domains.quantum.netsquid.dense import Density
from interlayer.domains.quantum.netsquid.hardware import Device
from interlayer.domains.quantum.netsquid.network import Fibre
from interlayer.domains.quantum.netsquid.noise import werner
from interlayer.domains.quantum.netsquid.services import Switch, store, teleport


def swapped_fidelity(fidelity: float, links: int) -> float:
    """Fidelity after swapping equal Werner pairs: their parameters (4F - 1)/3 multiply."""
    return (1 + 3 * ((4 * fidelity - 1) / 3) ** links) / 4


def stored_fidelity(time: float, t1: float, t2: float) -> float:
    """Fidelity of Phi+ with both halves stored for a time: <11| decays with 2t/T1, coherence with 2t/T2."""
    alive = math.exp(-time / t1)
    return (1 + (1 - alive) ** 2 + alive**2) / 4 + math.exp(-2 * time / t2) / 2


def slower_of_two(p: float) -> float:
    """Expected attempts until both of two links with success probability p have succeeded."""
    return (3 - 2 * p) / (p * (2 - p))


def distilled(fidelity: float) -> tuple[float, float]:
    """Success probability and output fidelity of distilling two Werner pairs (Bennett et al., 1996)."""
    rest = (1 - fidelity) / 3
    chance = fidelity**2 + 2 * fidelity * rest + 5 * rest**2
    return chance, (fidelity**2 + rest**2) / chance


def switch_capacity(users: int, rate: float, buffer: int) -> float:
    """Pairs a second that a switch swaps where each of its links makes ``rate`` pairs a second at random times.

    Pairs of only one user wait at any time: from none to one with ``users`` times the rate, then up with the rate of this user and
    down with that of the others. In the steady state of this birth-death chain each step down serves a pair of users.
    """
    waiting = [1.0]
    for stored in range(buffer):
        waiting.append(waiting[-1] * (users if stored == 0 else 1) / (users - 1))
    return (users - 1) * rate * sum(waiting[1:]) / sum(waiting)


def known(seed: int = 0) -> Mapping[str, tuple[float, float, float]]:
    """(simulated, exact, how far apart they may be) by name; where chance decides, that is 4 standard deviations."""
    found: dict[str, tuple[float, float, float]] = {}
    chain = Chain(World(seed), Device(pair_fidelity=0.98), 6, 50e3, BellDiagonal)
    found["fidelity after 4 swaps"] = (chain.deliver()[1][0], swapped_fidelity(0.98, 5), 1e-12)

    device = Device(t1=2.0, t2=1.5)
    (kept,) = store(World(seed), device, Density, (1.0, 0.0, 0.0, 0.0), [0.7])
    found["fidelity of a pair stored for 0.7 s"] = (kept, stored_fidelity(0.7, 2.0, 1.5), 1e-12)

    runs, device = 1500, Device(efficiency=0.4, loss=0.0)
    p, period = 0.4, 2 * 10e3 / device.speed
    for nodes, name, exact in (
        (2, "attempts of a link", 1 / p),
        (3, "attempts of the slower of two links", slower_of_two(p)),
    ):
        chain = Chain(World(seed), device, nodes, 10e3 * (nodes - 1), BellDiagonal)
        messages = 10e3 / device.speed if nodes == 3 else 0.0
        mean = sum(chain.deliver()[0] - messages for _ in range(runs)) / runs / period
        found[name] = (mean, exact, 4 * math.sqrt(1 - p) / p / math.sqrt(runs))

    chance, better = distilled(0.8)
    world = World(seed)
    fibre = Fibre(world, "fibre", Device(pair_fidelity=0.8, loss=0.0), 1e3, BellDiagonal)
    pair = world.run(world.process(fibre.pair(rounds=1)))
    found["fidelity after distillation"] = (pair[0].qubit.state.weights()[0], better, 1e-12)
    draw, good = world.stream("distillation"), 0
    for _ in range(runs):
        keep, spend = (BellDiagonal.pair(werner(0.8), draw) for _ in range(2))
        good += keep[0].state.distil(keep, spend, draw)
    found["success of distillation"] = (good / runs, chance, 4 * math.sqrt(chance * (1 - chance) / runs))

    fibre = Fibre(world, "link", Device(pair_fidelity=0.9), 1e3, Density)
    mean = sum(world.run(world.process(teleport(world, fibre, axis)))[1] for axis in range(6)) / 6
    found["fidelity of teleportation"] = (mean, (2 * 0.9 + 1) / 3, 1e-12)

    switch = Switch(World(seed), Device(efficiency=0.005, loss=0.0), 5, 10e3, BellDiagonal, buffer=2)
    switch.serve(20.0)
    exact = 20 * switch_capacity(5, 0.005 / period, 2)
    found["pairs served by a switch in 20 s"] = (len(switch.served), exact, 4 * math.sqrt(exact))
    return found
