"""NetSquid: quantum networks by discrete events."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from interlayer.core.events import World
from interlayer.core.example import Example
from interlayer.core.kinds import Finding, Simulator
from interlayer.domains.quantum.netsquid import known, scenarios
from interlayer.domains.quantum.netsquid.chain import Chain
from interlayer.domains.quantum.netsquid.compact import FORMALISMS
from interlayer.domains.quantum.netsquid.hardware import Device
from interlayer.domains.quantum.netsquid.network import Fibre
from interlayer.domains.quantum.netsquid.services import Switch, store, teleport

Table = dict[str, list[Any]]
UNITS = {
    "length": "m", "rate": "1/s", "rate of a direct link": "1/s", "capacity": "1/s", "capacity at random times": "1/s", "key rate": "1/s",
    "time": "s", "mean time": "s", "error of time": "s",
}  # fmt: skip


class NetSquid(Simulator):
    """Simulates quantum networks by discrete events: pairs, memories, swaps and classical messages, each at its time.

    Qubits decohere only when something touches them: a memory keeps the time of the last touch and then applies the noise of all
    the time since, so that a qubit that waits costs nothing. A state is a ket, a density matrix, a stabiliser tableau, or four
    weights of Bell states; with the last, a repeater chain costs a fixed number of operations for each node:

        after a swap   w_k = sum_{i + j = k} u_i v_j        (Pauli errors add up: i + j is their product)
        in a memory    |1> survives with exp(-t / T1), coherence with exp(-t / T2)
        a link         P(n attempts) = p (1 - p)^(n - 1), each as long as emission, flight and herald take

    The Bell-diagonal and stabiliser formalisms apply the Pauli twirl of relaxation; the other two apply it exactly. Dark counts
    leave a fully mixed pair. Everything is in SI units.

    A scenario has a ``kind``, the name of a ``device`` (``ideal``, ``nv`` or ``ensemble``), ``parameters`` that differ from it
    (the finding's table ``device`` lists them all), and a ``formalism`` (``ket``, ``density``, ``stabiliser``, ``bell-diagonal``).
    Further keys, with defaults:

    - ``repeater-chain``: ``nodes`` and ``length`` in m (a number or a list each), ``pairs``, rounds of ``distillation``, and the
      ``order`` of the swaps (``asap`` or ``nested``).
    - ``switch``: ``users`` and ``length`` in m (a number or a list each), ``buffer``, ``duration`` in s.
    - ``teleport``: ``length`` in m (a number or a list), ``repetitions``.
    - ``memory``: ``times`` in s at which a stored pair is looked at, ``repetitions``.

    Paper: Coopmans et al., NetSquid, a NETwork Simulator for QUantum Information using Discrete events, arXiv:2010.12535,
    doi:10.1038/s42005-021-00647-8.

    Raises:
        ValueError: From ``run``: the scenario has an unknown key, or a value out of range.

    Examples:
        >>> found = NetSquid().run({"kind": "repeater-chain", "device": "ideal", "nodes": 1000, "length": 1e6, "pairs": 1})
        >>> found.tables["repeater chain"]["fidelity"]
        [1.0]
        >>> found.headings("repeater chain")[:3]
        ['nodes', 'length [m]', 'pairs']
    """

    slug = "netsquid"

    def run(self, scenario: Mapping[str, Any] | None = None, seed: int = 0) -> Finding:
        """Simulate a scenario; ``None`` is a chain of atomic ensembles over several distances."""
        kind, values, device = scenarios.read(scenario)
        tables, figure = RUN[kind](values, device, seed)
        tables["device"] = device.table()
        columns = {c for table in tables.values() for c, v in table.items() if not isinstance(v[0], str)}
        return Finding(tables, figure, {c: UNITS.get(c, "1") for c in sorted(columns)})

    def known(self, seed: int = 0) -> Mapping[str, tuple[float, float, float]]:
        """Swap fidelity, a stored pair, waiting times, distillation, teleportation and the capacity of a switch."""
        return known.known(seed)


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """A mean and its standard error; of one value, 0."""
    n, mean = len(values), sum(values) / len(values)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n * (n - 1))) if n > 1 else 0.0
    return mean, error if error > 1e-12 * abs(mean) else 0.0


def _entropy(p: float) -> float:
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q > 1e-15)


def _add(table: Table, **row: Any) -> None:
    for name, value in row.items():
        table.setdefault(name.replace("_", " "), []).append(value)


Ran = tuple[dict[str, Table], Callable[[], Any] | None]


def _chain(v: Mapping[str, Any], device: Device, seed: int) -> Ran:
    table: Table = {}
    for nodes, length in scenarios.grid(v, "nodes", "length"):
        chain = Chain(World(seed), device, nodes, length, FORMALISMS[v["formalism"]], v["distillation"], v["order"])
        got = [chain.deliver() for _ in range(v["pairs"])]
        time, apart = _mean([t for t, _ in got])
        fidelity, error = _mean([w[0] for _, w in got])
        bits, phases = (sum(w[i] + w[2] for _, w in got) / len(got) for i in (1, 3))
        secret = max(0.0, 1 - _entropy(bits) - _entropy(phases))
        one = device.link(length)
        _add(
            table, nodes=nodes, length=length, pairs=len(got), mean_time=time, error_of_time=apart,
            rate=1 / time if time else math.inf, rate_of_a_direct_link=one.success / one.period if one.period else math.inf,
            fidelity=fidelity, error_of_fidelity=error, bit_errors=bits, phase_errors=phases,
            key_rate=secret / time if time else math.inf,
        )  # fmt: skip
    return {"repeater chain": table}, lambda: _lines(table, "nodes", {"rate": "rate [1/s]", "fidelity": "fidelity"})


def _switch(v: Mapping[str, Any], device: Device, seed: int) -> Ran:
    table: Table = {}
    pairs: Table = {}
    for users, length in scenarios.grid(v, "users", "length"):
        switch = Switch(World(seed), device, users, length, FORMALISMS[v["formalism"]], v["buffer"])
        switch.serve(v["duration"])
        found = [w[0] for *_, w in switch.served]
        link = device.link(length)
        exact = device.swap_success * known.switch_capacity(users, link.success / link.period, v["buffer"])
        _add(
            table, users=users, length=length, pairs=len(found), capacity=len(found) / v["duration"], capacity_at_random_times=exact,
            fidelity=_mean(found)[0] if found else math.nan,
        )  # fmt: skip
        served = [0] * users
        for first, second, *_ in switch.served:
            served[first] += 1
            served[second] += 1
        for user, count in enumerate(served):
            _add(pairs, users=users, length=length, user=f"user {user}", rate=count / v["duration"])
    return {"switch": table, "users": pairs}, lambda: _lines(
        table, "length", {"capacity": "capacity [1/s]", "fidelity": "fidelity"}, "users"
    )


def _teleport(v: Mapping[str, Any], device: Device, seed: int) -> Ran:
    table: Table = {}
    for (length,) in scenarios.grid(v, "length"):
        world = World(seed)
        fibre = Fibre(world, "fibre", device, length, FORMALISMS[v["formalism"]])
        got = [world.run(world.process(teleport(world, fibre, k % 6))) for k in range(v["repetitions"])]
        fidelity, error = _mean([f for _, f in got])
        _add(
            table, length=length, repetitions=len(got), mean_time=_mean([t for t, _ in got])[0], fidelity=fidelity,
            error_of_fidelity=error,
        )  # fmt: skip
    return {"teleport": table}, lambda: _lines(table, "", {"fidelity": "mean fidelity", "mean time": "mean time [s]"})


def _memory(v: Mapping[str, Any], device: Device, seed: int) -> Ran:
    world = World(seed)
    table: Table = {}
    rows = [
        store(world, device, FORMALISMS[v["formalism"]], (1.0, 0.0, 0.0, 0.0), v["times"], f"pair {k}")
        for k in range(v["repetitions"])
    ]
    for time, found in zip(v["times"], zip(*rows, strict=True), strict=True):
        fidelity, error = _mean(found)
        _add(table, time=time, fidelity=fidelity, error_of_fidelity=error)
    return {"memory": table}, lambda: _lines(table, "", {"fidelity": "fidelity of a stored pair"}, "time")


def _lines(table: Table, by: str, panels: Mapping[str, str], along: str = "length") -> Any:
    """A panel for each column, by ``along``, with a line for each value of ``by``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 4 * len(panels), 3.6), layout="constrained")
    groups = table[by] if by else [""] * len(table[along])
    far = along == "length"
    for axis, (column, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for value in dict.fromkeys(groups):
            rows = [i for i, group in enumerate(groups) if group == value]
            name = {"nodes": f"{value} nodes", "length": f"{float(value or 0) / 1e3:g} km"}.get(by)
            x = [table[along][i] / (1e3 if far else 1) for i in rows]
            axis.plot(x, [table[column][i] for i in rows], marker="o", label=name)
        axis.set_xlabel({"length": "distance [km]", "time": "time [s]"}.get(along, along))
        axis.set_ylabel(label)
        if column == "rate" and all(0 < r < math.inf for r in table[column]):
            axis.set_yscale("log")
        axis.spines[["top", "right"]].set_visible(False)
    if by:
        figure.axes[0].legend(frameon=False)
    return figure


RUN = {"repeater-chain": _chain, "switch": _switch, "teleport": _teleport, "memory": _memory}
EXAMPLE = Example(
    make=NetSquid, inputs=lambda: ({"kind": "repeater-chain", "nodes": [2, 3], "length": 20e3, "pairs": 5},)
)
