"""Quantum networks against closed forms, and the formalisms against each other."""

import itertools
import math

import numpy as np
import pytest

from interlayer.core.events import World
from interlayer.domains.quantum.netsquid import NetSquid
from interlayer.domains.quantum.netsquid.chain import Chain, tree
from interlayer.domains.quantum.netsquid.compact import FORMALISMS, BellDiagonal, Stabiliser
from interlayer.domains.quantum.netsquid.dense import Density, Ket
from interlayer.domains.quantum.netsquid.hardware import DEVICES, NV, Device
from interlayer.domains.quantum.netsquid.known import distilled, slower_of_two, stored_fidelity, swapped_fidelity
from interlayer.domains.quantum.netsquid.network import Fibre
from interlayer.domains.quantum.netsquid.noise import decay, dephasing, depolarising, product, werner
from interlayer.domains.quantum.netsquid.services import AXES, Switch, overlap, store, teleport
from interlayer.domains.quantum.netsquid.states import GATES

JOINT = [Ket, Density, Stabiliser]


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", list(NetSquid().known()))
def test_closed_forms(name):
    value, exact, apart = NetSquid().known(seed=11)[name]
    assert abs(value - exact) <= apart


# States


@pytest.mark.parametrize("formalism", JOINT)
def test_random_clifford_circuits_give_the_state_of_plain_matrices(formalism):
    draw = rng(1)
    for _ in range(5):
        qubits, vector = formalism.make(3), np.eye(8)[0].astype(complex)
        for q in qubits[1:]:
            a, b = qubits[0], q
            if a.state is not b.state:
                a.state.join(b.state)
        for _ in range(25):
            if draw.random() < 0.4:
                i, j = draw.permutation(3)[:2]
                name, at = "CNOT", (i, j)
            else:
                name, at = str(draw.choice(list("XYZHS"))), (draw.integers(3),)
            qubits[0].state.gate(name, *(qubits[k] for k in at))
            vector = naive(name, at, 3) @ vector
        assert np.allclose(qubits[0].state.density(), np.outer(vector, vector.conj()), atol=1e-9)


def naive(name, at, n):
    """The gate's matrix on n qubits, entry by entry."""
    small, whole = GATES[name], np.zeros((2**n, 2**n), complex)
    for row, column in itertools.product(range(2**n), repeat=2):
        r, c = ([(k >> (n - 1 - i)) & 1 for i in range(n)] for k in (row, column))
        if all(r[i] == c[i] for i in range(n) if i not in at):
            whole[row, column] = small[int("".join(str(r[i]) for i in at), 2), int("".join(str(c[i]) for i in at), 2)]
    return whole


@pytest.mark.parametrize("formalism", JOINT)
def test_a_measurement_of_an_entangled_qubit_decides_its_partners(formalism):
    outcomes, draw = [], rng(2)
    for _ in range(40):
        a, b, c = formalism.make(3)
        a.state.gate("H", a)
        a.state.gate("CNOT", a, b)
        a.state.gate("CNOT", b, c)
        a.state.gate("X", c)
        found = [q.state.measure(q, draw) for q in (b, c, a)]
        assert found[0] == found[2] == 1 - found[1] and not a.state.qubits
        outcomes.append(found[0])
    assert 8 < sum(outcomes) < 32


def test_noise_keeps_probability_and_the_twirl_keeps_fidelity():
    for noise in (
        decay(0.3, 1.0, 0.7),
        decay(0.5, math.inf, 0.4),
        depolarising(0.3),
        dephasing(0.2),
        decay(0.2, 1.0, 2.0),
    ):
        assert np.allclose(sum(k.conj().T @ k for k in noise.kraus), np.eye(2))
        assert sum(noise.twirled) == pytest.approx(1) and min(noise.twirled) >= -1e-15
        a, b = Density.pair((1.0, 0.0, 0.0, 0.0), rng())
        b.state.noise(noise, b, rng())
        assert a.state.weights() == pytest.approx(noise.twirled)


@pytest.mark.parametrize("formalism", [Ket, Stabiliser])
def test_drawn_noise_averages_to_the_density_matrix(formalism):
    draw, noise, total = rng(3), decay(0.4, 1.0, 0.8), np.zeros(4)
    for _ in range(1500):
        a, b = formalism.pair(werner(0.9), draw)
        b.state.noise(noise, b, draw)
        total += a.state.weights()
    assert np.allclose(total / 1500, product(werner(0.9), noise.twirled), atol=0.05)


@pytest.mark.parametrize("formalism", list(FORMALISMS.values()))
def test_every_formalism_swaps_to_the_same_pair(formalism):
    u, v = (0.7, 0.15, 0.05, 0.1), (0.8, 0.02, 0.08, 0.1)
    runs, draw, total = 1 if formalism in (Density, BellDiagonal) else 600, rng(4), np.zeros(4)
    for _ in range(runs):
        (a, b), (c, d) = formalism.pair(u, draw), formalism.pair(v, draw)
        x, z = b.state.bell(b, c, draw)
        d.state.gate("IXZY"[x + 2 * z], d)
        assert d.state is a.state and d.state.qubits == [a, d]
        total += a.state.weights()
    assert np.allclose(total / runs, product(u, v), atol=1e-12 if runs == 1 else 0.07)


def test_distillation_of_density_matrices_gives_the_bell_diagonal_formula():
    u, v = (0.7, 0.15, 0.05, 0.1), (0.8, 0.02, 0.08, 0.1)
    for seed in range(5):
        good = []
        for formalism in (Density, BellDiagonal):
            draw = rng(seed)
            keep, spend = formalism.pair(u, draw), formalism.pair(v, draw)
            good.append(keep[0].state.distil(keep, spend, draw) and keep[0].state.weights())
        if good[0] and good[1]:
            assert good[0] == pytest.approx(good[1])
    found = [distil_chance(formalism) for formalism in (Density, Ket)]
    assert found == pytest.approx([distilled(0.8)[0]] * 2, abs=0.09)


def distil_chance(formalism, runs=200):
    draw, good = rng(7), 0
    for _ in range(runs):
        keep, spend = formalism.pair(werner(0.8), draw), formalism.pair(werner(0.8), draw)
        good += keep[0].state.distil(keep, spend, draw)
    return good / runs


def test_what_a_formalism_cannot_hold_is_one_sentence():
    (lone,) = Stabiliser.make(1)
    with pytest.raises(ValueError, match=r"stabiliser: no gate T in this formalism\. Use formalism 'ket' or 'density'"):
        lone.state.gate("T", lone)
    a, b = BellDiagonal.pair(werner(0.9), rng())
    for act in (lambda: a.state.measure(a, rng()), lambda: a.state.gate("H", a), lambda: a.state.bell(a, b, rng())):
        with pytest.raises(ValueError, match=r"bell-diagonal: no .* in this formalism"):
            act()
    with pytest.raises(ValueError, match="bell-diagonal: no single qubit"):
        BellDiagonal.make(1)


# Memories and links


def test_noise_of_a_touched_memory_is_that_of_an_untouched_one():
    device, weights = Device(t1=1.0, t2=0.6), (1.0, 0.0, 0.0, 0.0)
    for formalism in (Density, BellDiagonal):
        often = store(World(), device, formalism, weights, [0.1, 0.15, 0.5, 0.9])
        once = store(World(), device, formalism, weights, [0.9])
        assert often[-1] == pytest.approx(once[0], abs=1e-12)
    assert store(World(), device, Density, weights, [0.9])[0] == pytest.approx(stored_fidelity(0.9, 1.0, 0.6))


def test_attempts_are_geometric():
    fibre = Fibre(World(5), "f", Device(efficiency=0.3, loss=0.0), 1e3, BellDiagonal)
    counts = np.bincount([fibre.tries() for _ in range(6000)], minlength=30)[1:8] / 6000
    assert np.allclose(counts, [0.3 * 0.7**n for n in range(7)], atol=0.02)


def test_links_follow_their_equations():
    double = Device(herald="double-click", efficiency=0.5, visibility=0.9, emission=1e-6).link(20e3)
    assert double.success == pytest.approx((0.5 * 10**-0.2) ** 2 / 2)
    assert double.weights[0] == pytest.approx(0.95) and double.period == pytest.approx(1e-6 + 1e-4)
    single = Device(herald="single-click", efficiency=0.01, bright=0.1, visibility=0.81).link(1.0)
    assert single.success == pytest.approx(2 * 0.1 * 0.01, rel=1e-3)
    assert single.weights[0] == pytest.approx(0.9 * (1 + 0.9) / 2)
    assert Device(efficiency=0.1, modes=3, loss=0.0).link(1e3).success == pytest.approx(1 - 0.9**3)
    noisy = Device(efficiency=1e-3, dark=1e-3, loss=0.0).link(1.0)
    assert noisy.weights[0] == pytest.approx((1 + 2 / 4) / 3)
    assert all(abs(sum(d.link(5e4).weights) - 1) < 1e-12 for d in DEVICES.values())


def test_distillation_on_a_fibre_waits_for_both_pairs_and_for_words():
    fibre = Fibre(World(), "f", Device(pair_fidelity=1.0), 2e3, BellDiagonal)
    fibre.world.run(fibre.world.process(fibre.pair(rounds=2)))
    assert fibre.world.now == pytest.approx(
        4 * 2e-5 + 3 * 1e-5, rel=0.4
    )  # 4 pairs of 20 us on average 1.1 attempts, 3 messages


# Chains


def deliver(device, nodes, hop=10e3, formalism=BellDiagonal, count=1, seed=0, order="asap"):
    chain = Chain(World(seed), device, nodes, hop * (nodes - 1), formalism, order=order)
    return [chain.deliver() for _ in range(count)]


@pytest.mark.parametrize("formalism", list(FORMALISMS.values()))
def test_a_chain_delivers_the_same_pair_in_every_formalism(formalism):
    device, runs = Device(pair_fidelity=0.93, t2=2e-3, swap_noise=0.02), 60 if formalism in (Ket, Stabiliser) else 1
    runs = runs if formalism is not Ket else 200
    mean = np.mean([w for _, w in deliver(device, 4, 100.0, formalism, runs)], axis=0)
    exact = deliver(device, 4, 100.0)[0][1]
    assert np.allclose(mean, exact, atol=1e-3 if runs == 1 else 3.5 * 0.45 / math.sqrt(runs))


def test_noise_of_swaps_multiplies_like_that_of_pairs():
    weights = deliver(Device(pair_fidelity=0.97, swap_noise=0.05, loss=0.0), 6)[0][1]
    assert 4 * weights[0] - 1 == pytest.approx((4 * swapped_fidelity(0.97, 5) - 1) * 0.95**4)


def test_qubits_decohere_while_heralds_and_words_travel():
    device, hop = Device(t2=1e-3, loss=0.0), 10e3 / 2e8
    time, weights = deliver(device, 3)[0]
    assert time == pytest.approx(3 * hop)  # there and back for the herald, then the outcome
    held = 3 * hop + hop + 2 * hop + 2 * hop  # from the left end to the right
    assert 2 * weights[0] - 1 == pytest.approx(math.exp(-held / 1e-3), abs=1e-9)
    single = Device(herald="single-click", t2=1e-3, loss=0.0, bright=0.0, dark=0.5)
    clean = single.link(10e3).weights
    assert deliver(single, 2)[0][1] == pytest.approx(
        product(clean, dephasing((1 - math.exp(-2 * hop / 1e-3)) / 2).paulis)
    )


def test_a_nested_chain_waits_for_the_pairs_below():
    assert tree(7) == {1: (0, 2), 3: (2, 4), 5: (4, 6), 2: (0, 4), 4: (0, 6)}
    for nodes, hops in ((2, 2), (3, 3), (4, 5), (5, 5), (9, 9)):  # two for the herald, then up the tree
        (time, weights), *_ = deliver(Device(loss=0.0, pair_fidelity=0.98), nodes, order="nested")
        assert time == pytest.approx(hops * 5e-5) and weights[0] == pytest.approx(swapped_fidelity(0.98, nodes - 1))
    chance = Device(efficiency=0.3, loss=0.0)
    asap, nested = (np.mean([t for t, _ in deliver(chance, 9, count=150, order=o)]) for o in ("asap", "nested"))
    assert asap < nested


def test_failing_swaps_start_again_and_still_end_correctly():
    sure = deliver(Device(efficiency=0.5, loss=0.0), 4, count=300)
    device = Device(efficiency=0.5, loss=0.0, swap_success=0.5)
    for formalism in (BellDiagonal, Stabiliser):
        for order, nodes in (("nested", 5), ("asap", 4)):
            failing = deliver(device, nodes, count=40, formalism=formalism, seed=3, order=order)
            assert all(w[0] == pytest.approx(1) for _, w in failing)
    times = [t for t, _ in deliver(device, 3, count=1500, seed=4)]
    period, hop = 1e-4, 5e-5
    once = slower_of_two(0.5) * period
    assert np.mean(times) == pytest.approx(2 * once + hop + hop, rel=0.06)  # one failure on average, and its message
    assert np.mean([t for t, _ in sure]) < np.mean([t for t, _ in failing])


def test_one_optical_interface_makes_neighbouring_links_take_turns():
    both, turns = Device(loss=0.0), Device(loss=0.0, interfaces=1, move_time=1e-5)
    assert deliver(both, 3)[0][0] == pytest.approx(1.5e-4)
    assert deliver(turns, 3)[0][0] == pytest.approx(2.5e-4 + 1e-5)
    assert deliver(turns, 7)[0][0] == pytest.approx(2e-4 + 1e-5 + 5 * 5e-5)
    noisy = Device(loss=0.0, interfaces=1, attempt_dephasing=0.01, move_noise=0.1)
    i, *_, z = deliver(noisy, 3)[0][1]
    assert (i, z) == pytest.approx((0.925 * 0.99 + 0.025 * 0.01, 0.925 * 0.01 + 0.025 * 0.99))


def test_a_thousand_nodes_and_the_parameters_of_real_ones():
    (time, weights), hop = deliver(Device(loss=0.0, pair_fidelity=0.9999), 1000, 1e3)[0], 1e3 / 2e8
    assert weights[0] == pytest.approx(swapped_fidelity(0.9999, 999)) and time == pytest.approx((2 + 998) * hop)
    near, far = (deliver(NV, 3, hop, count=20)[0:20] for hop in (1e3, 10e3))
    assert np.mean([t for t, _ in near]) < np.mean([t for t, _ in far])
    assert 0.3 < np.mean([w[0] for _, w in near]) < 0.9


# Services and scenarios


@pytest.mark.parametrize("formalism", JOINT)
def test_teleportation_without_noise_is_perfect(formalism):
    fibre = Fibre(World(2), "f", Device(), 1e3, formalism)
    for axis in range(len(AXES)):
        _, found = fibre.world.run(fibre.world.process(teleport(fibre.world, fibre, axis)))
        assert found == pytest.approx(1)
    (wrong,) = formalism.make(1)
    assert overlap(wrong, 1) == pytest.approx(0) and overlap(wrong, 2) == pytest.approx(0.5)


def test_teleportation_whose_bell_measurement_fails_starts_again():
    def times(success):
        fibre = Fibre(World(2), "f", Device(loss=0.0, swap_success=success), 10e3, Stabiliser)
        got = [fibre.world.run(fibre.world.process(teleport(fibre.world, fibre, 2))) for _ in range(400)]
        assert all(f == pytest.approx(1) for _, f in got)
        return np.mean([t for t, _ in got])

    assert times(1.0) == pytest.approx(3 * 5e-5)  # the herald's way there and back, and the outcome
    assert times(0.5) == pytest.approx((2 * 2 + 1) * 5e-5, rel=0.12)


def test_a_switch_serves_its_users_alike():
    switch = Switch(World(1), Device(efficiency=0.02, loss=0.0, pair_fidelity=0.95), 4, 1e3, BellDiagonal, 1)
    switch.serve(3.0)
    counts = np.bincount([u for first, second, *_ in switch.served for u in (first, second)], minlength=4)
    assert counts.min() > 0.9 * counts.mean() and all(a != b for a, b, *_ in switch.served)
    assert all(w[0] == pytest.approx(swapped_fidelity(0.95, 2)) for *_, w in switch.served)


@pytest.mark.parametrize(
    "scenario",
    [
        {"kind": "switch", "users": [3, 5], "length": [10e3, 20e3], "duration": 0.02},
        {"kind": "teleport", "length": 5e3, "repetitions": 6},
        {"kind": "memory", "device": "ensemble", "times": [0.01, 0.0], "repetitions": 3, "formalism": "ket"},
        {"device": "nv", "nodes": 3, "length": 2e3, "pairs": 2, "distillation": 1, "parameters": {"t2": 2.0}},
    ],
)
def test_every_kind_of_scenario_has_units_and_draws(scenario):
    found = NetSquid().run(scenario, seed=1)
    for name, table in found.tables.items():
        assert len({len(v) for v in table.values()}) == 1 and found.headings(name)
    assert found.units.get("length", "m") == "m"
    if found.figure:
        assert len(found.figure().axes) >= 1


@pytest.mark.parametrize(
    ("scenario", "sentence"),
    [
        ({"kind": "chain"}, r"no scenario of kind 'chain'.*There are repeater-chain, switch"),
        ({"kind": ["switch"]}, r"no scenario of kind"),
        ({"node": 4}, r"repeater-chain has no key 'node'. Did you mean 'nodes'"),
        ({"kind": "switch", "pairs": 4}, r"switch has no key 'pairs'"),
        ({"nodes": 1}, r"nodes of repeater-chain is 1; expected a whole number from 2 to 2000"),
        ({"nodes": [3, 2.5]}, r"is 2.5; expected a whole number"),
        ({"nodes": []}, r"nodes of repeater-chain is empty"),
        ({"pairs": [5]}, r"pairs of repeater-chain is \[5\]"),
        ({"length": float("nan")}, r"length of repeater-chain is nan"),
        ({"length": "far"}, r"length of repeater-chain is 'far'"),
        ({"pairs": True}, r"pairs of repeater-chain is True"),
        ({"order": "tree"}, r"no order 'tree'. There are asap, nested"),
        ({"device": ["nv"]}, r"no device \['nv'\]"),
        ({"device": "ion"}, r"no device 'ion'"),
        ({"formalism": "kett"}, r"no formalism 'kett'. Did you mean 'ket'"),
        ({"kind": "teleport", "formalism": "bell-diagonal"}, r"teleport needs a formalism of single qubits"),
        ({"parameters": {"T2": 1.0}}, r"no parameter 'T2' of a device. Did you mean 't2'"),
        ({"parameters": 3}, r"parameters is 3; expected a table"),
        ({"parameters": {"t1": 1.0, "t2": 3.0}}, r"t2 is 3 s where t1 is 1 s; expected at most 2 t1"),
        ({"parameters": {"efficiency": 1.5}}, r"efficiency is 1.5; expected a number from 0 to 1"),
        ({"parameters": {"speed": "fast"}}, r"speed is 'fast'; expected a number above 0"),
        ({"parameters": {"herald": "triple"}}, r"herald 'triple'; expected one of"),
        ({"parameters": {"interfaces": 1}}, r"interfaces = 1 needs swap_success = 1"),
        ({"kind": "switch", "device": "nv"}, r"nv has one optical interface. Set interfaces = 2 in parameters"),
        ({"parameters": {"efficiency": 0}}, r"nothing would ever be delivered"),
        ({"nodes": 100}, r"100 nodes whose swaps succeed with 0.328 may need 1e47 tries; expected at most 1e7"),
        ({"nodes": 2, "length": 1e8, "device": "ideal"}, r"never succeeds. Use a shorter one, or more nodes"),
    ],
)
def test_bad_scenarios_are_one_sentence(scenario, sentence):
    with pytest.raises(ValueError, match=f"netsquid: .*{sentence}"):
        NetSquid().run(scenario)
