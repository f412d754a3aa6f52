"""Repeater chains: CPU time of one end-to-end pair as a multiple of SeQUeNCe's, and the cost by nodes.

The same protocol on both sides: Barrett-Kok on lossless fibres of 10 km (an attempt works with 1/2), one memory for each fibre, swaps in
nested order, an ideal pair at the end (fidelity 1), as ket vectors. Times are those of the run alone, without set-up. SeQUeNCe simulates
each photon; here the number of attempts is drawn from its distribution. `make bench` installs SeQUeNCe (`benchmarks/peers.txt`).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time

import numpy as np

from interlayer.core.events import World
from interlayer.domains.quantum.netsquid.chain import Chain
from interlayer.domains.quantum.netsquid.compact import FORMALISMS
from interlayer.domains.quantum.netsquid.hardware import Device

HOP = 10_000  # m
LIMIT = 60.0  # s
GOAL, EXPONENT = 0.1, 1.1

PEER = """
import importlib.metadata, json, sys, tempfile, time
from sequence.app.request_app import RequestApp
from sequence.entanglement_management.swapping import EntanglementSwappingA
from sequence.topology.router_net_topo import RouterNetTopo

n, hop, seed = map(int, sys.argv[1:])
EntanglementSwappingA.__init__.__defaults__ = (1, 1.0)  # certain and without degradation; no option reaches these
names = [f"r{i}" for i in range(n)]
memory = {"MemoryArray": {"fidelity": 1.0, "efficiency": 1.0, "coherence_time": -1, "frequency": 1e9}}
config = {
    "stop_time": 10**15, "is_parallel": False, "templates": {"ideal": memory},
    "nodes": [{"name": a, "type": "QuantumRouter", "seed": seed * n + i, "memo_size": 1 if i in (0, n - 1) else 2,
               "template": "ideal"} for i, a in enumerate(names)],
    "qconnections": [{"node1": a, "node2": b, "attenuation": 0.0, "distance": hop, "type": "meet_in_the_middle",
                      "seed": seed * n + i} for i, (a, b) in enumerate(zip(names, names[1:]))],
    "cconnections": [{"node1": names[i], "node2": names[j], "delay": int((j - i) * hop / 2e8 * 1e12)}
                     for i in range(n) for j in range(i + 1, n)],
}

class App(RequestApp):
    def get_memory(self, info):
        kept = self.memo_to_reservation.get(info.index)
        if info.state == "ENTANGLED" and kept and info.remote_node == kept.responder:
            found.append(info.fidelity)
            self.node.timeline.stop()
        super().get_memory(info)

found = []
with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
    json.dump(config, file)
    file.flush()
    net = RouterNetTopo(file.name)
for station in net.get_nodes_by_type("BSMNode"):
    for bsm in station.get_components_by_type("SingleAtomBSM"):
        for detector in bsm.detectors:
            detector.efficiency, detector.dark_count, detector.count_rate = 1.0, 0, 1e12
ends = [App(r) for r in net.get_nodes_by_type("QuantumRouter") if r.name in (names[0], names[-1])]
line = net.get_timeline()
line.init()
first = next(a for a in ends if a.node.name == names[0])
first.start(names[-1], 10**12, 9 * 10**14, 1, 0.1)
started = time.process_time()
line.run()
print(json.dumps({"seconds": time.process_time() - started, "fidelity": found[0], "version": importlib.metadata.version("sequence")}))
"""


def peer(nodes: int, seed: int = 0, limit: float = LIMIT) -> dict | None:
    """SeQUeNCe's run; None if set-up and run take longer than the limit."""
    command = [sys.executable, "-c", PEER, str(nodes), str(HOP), str(seed)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        raise RuntimeError(f"SeQUeNCe failed at {nodes} nodes: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def ours(nodes: int, formalism: str, seed: int = 0, repeats: int = 1, order: str = "nested") -> tuple[float, float]:
    """CPU-seconds of a delivery, the least of some, and its fidelity."""
    device = Device(herald="double-click", loss=0.0)
    chain = Chain(World(seed), device, nodes, HOP * (nodes - 1), FORMALISMS[formalism], order=order)
    best = np.inf
    for _ in range(repeats):
        started = time.process_time()
        _, weights = chain.deliver()
        best = min(best, time.process_time() - started)
    return best, weights[0]


def main():
    """Cost by nodes always; the ratio where SeQUeNCe is there."""
    sizes = (10, 30, 100, 300, 1000)
    seconds = [ours(n, "bell-diagonal", repeats=max(15, 1000 // n), order="asap")[0] for n in sizes]
    slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
    print(
        "Bell-diagonal, swaps as soon as possible, milliseconds of CPU for a pair: "
        + ", ".join(f"{n} nodes {1e3 * s:.2f}" for n, s in zip(sizes, seconds, strict=True))
    )
    print(f"  exponent in nodes: {slope:.2f}  goal {EXPONENT:g}: {'met' if slope <= EXPONENT else 'NOT met'}")
    if importlib.util.find_spec("sequence") is None:
        print("SeQUeNCe is not there, so it was not timed. Run `make bench`, which installs benchmarks/peers.txt.")
        return
    nodes, last = 16, None
    while found := peer(nodes):
        last = (nodes, found)
        mine, fidelity = ours(nodes, "ket")
        light = ours(nodes, "bell-diagonal")[0]
        if abs(fidelity - found["fidelity"]) > 1e-9:
            raise RuntimeError(
                f"{nodes} nodes: fidelity {fidelity} here, {found['fidelity']} in SeQUeNCe; no time is reported."
            )
        print(
            f"{nodes} nodes, ket, against SeQUeNCe {found['version']}: {mine:.4f} s / {found['seconds']:.3f} s = "
            f"{mine / found['seconds']:.3f} (Bell-diagonal here: {light / found['seconds']:.4f})"
        )
        nodes = nodes * 3 // 2
    if last is None:
        raise RuntimeError(f"SeQUeNCe does not finish {nodes} nodes in {LIMIT:g} s.")
    nodes = last[0]
    ratios = sorted(
        ours(nodes, "ket", seed)[0] / run["seconds"] for seed in range(1, 4) if (run := peer(nodes, seed, 3 * LIMIT))
    )
    middle = ratios[len(ratios) // 2]
    verdict = "met" if middle <= GOAL else "NOT met"
    print(
        f"The longest that it sets up and finishes in {LIMIT:g} s has {nodes} nodes; of {len(ratios)} runs the median ratio is"
    )
    print(f"  interlayer / SeQUeNCe: {middle:.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}]  goal {GOAL:g}: {verdict}")


if __name__ == "__main__":
    main()
