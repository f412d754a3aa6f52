import copy
import math
from itertools import pairwise

import pytest
import torch
from families import NAMES, batch, model, output
from torch import nn

from interlayer.core.faults import (
    Memory,
    access_energy,
    draw,
    draw_naive,
    error_rate,
    expected,
    flip,
    flip_naive,
    positions,
    voltage,
    weight_reads,
)
from interlayer.core.faults.sram import CURVE
from interlayer.core.quantizer import Grid, Scaled


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def codes(bits, dtype, shape=(7, 11)):
    low = -(2 ** (bits - 1)) if dtype == torch.int8 else 0
    return torch.randint(low, low + 2**bits, shape, generator=generator(1)).to(dtype)


CASES = [(bits, dtype) for bits in (1, 2, 3, 4, 5, 8) for dtype in (torch.int8, torch.uint8)]


@pytest.mark.parametrize("kind", ["flip", "stuck"])
def test_drawing_and_flipping_are_those_of_one_bit_after_the_other_and_flipping_twice_is_nothing(kind):
    for bits, dtype in CASES:
        stored = codes(bits, dtype)
        for rate in (0.0, 0.02, 0.4, 1.0):
            mask = draw(stored, bits, rate, generator(2), kind)
            assert torch.equal(mask, draw_naive(stored, bits, rate, generator(2), kind))
            read = flip(stored, mask, bits)
            assert torch.equal(read, flip_naive(stored, mask, bits)) and read.dtype == dtype
            assert torch.equal(flip(read, mask, bits), stored)
            low = int(stored.dtype == torch.int8) * -(2 ** (bits - 1))
            assert low <= int(read.min()) and int(read.max()) < low + 2**bits


def ones(mask):
    return sum(int((mask >> bit & 1).sum()) for bit in range(8))


def test_the_count_of_flips_is_binomial_and_every_bit_is_as_likely():
    stored = codes(8, torch.int8, (1000, 125))
    for kind in ("flip", "stuck"):
        counts = [ones(draw(stored, 8, 0.01, generator(s), kind)) for s in range(20)]
        mean = expected(10**6, 0.01, kind)
        share = mean / 10**6
        error = math.sqrt(10**6 * share * (1 - share) / 20)
        assert abs(sum(counts) / 20 - mean) < 4 * error
        spread = sum((c - mean) ** 2 for c in counts) / 20
        assert 0.3 < spread / (10**6 * share * (1 - share)) < 2.5
    mask = draw(stored, 8, 0.1, generator(9))
    each = [int((mask >> bit & 1).sum()) for bit in range(8)]
    assert all(abs(n - 12500) < 5 * math.sqrt(12500 * 0.9) for n in each)
    assert ones(draw(stored, 8, 1.0, generator())) == 10**6 and expected(10**6, 1.0) == 10**6
    stuck = draw(torch.zeros(1000, dtype=torch.uint8), 8, 1.0, generator(), "stuck")
    assert torch.equal(flip(torch.zeros(1000, dtype=torch.uint8), stuck, 8), stuck) and 3800 < ones(stuck) < 4200


def test_places_are_those_of_independent_trials_also_when_more_must_be_drawn():
    found = positions(40, 0.5, generator(3))
    assert (found.diff() > 0).all() and found.numel() and found[-1] < 40
    seen = torch.zeros(6)
    together = 0
    for seed in range(4000):
        at = positions(6, 0.3, generator(seed))
        seen[at] += 1
        together += int(0 in at and 1 in at)
    assert ((seen / 4000 - 0.3).abs() < 0.03).all() and abs(together / 4000 - 0.09) < 0.02
    assert positions(0, 0.5, generator()).numel() == positions(10, 0.0, generator()).numel() == 0
    assert positions(10**15, 1e-12, generator()).numel() < 2000  # no memory for what does not fail


def test_faulty_codes_have_the_values_of_the_authors_code():
    # Outputs of FaultInject of IBM/NeuralFuse, 8 bits, for cells of its two maps: stuck at 1 and stuck at 0.
    weight = torch.tensor([-0.9, -0.5, -0.01, 0.0, 0.3, 0.64, 1.0, 0.2])
    set_, cleared = torch.tensor([128, 0, 1, 128, 64, 0, 0, 2]), torch.tensor([0, 128, 0, 0, 0, 64, 64, 0])
    theirs = [-0.89763778, 0.50393701, -0.00787402, -1.00787401, 0.80314958, 0.13385826, 0.49606299, 0.21259843]
    held = Grid(8).fit(weight)
    stored = held.codes(weight)
    bits = stored.view(torch.uint8).long()
    mask = ((bits | set_) & ~cleared ^ bits).to(torch.uint8)
    torch.testing.assert_close(held.values(flip(stored, mask, 8)), torch.tensor(theirs))
    # Of 131072 weights of 8 bits its maps of 1% get 10400, 10235, 10627, 10347 cells, of which so many are read wrong:
    theirs = [5206, 5040, 5336, 5164]
    assert abs(sum(theirs) / 4 - expected(2**20, 0.01, "stuck")) < 4 * math.sqrt(5243 / 4)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))


def test_a_memory_reads_what_was_stored_and_leaves_the_model_alone():
    plain, x = net().eval(), torch.randn(3, 1, 4, 4)
    before, out = {k: v.clone() for k, v in plain.state_dict().items()}, plain(x)
    memory = Memory(plain, Grid(8))
    chip, again, other = memory.faulty(0.02, 3), memory.faulty(0.02, 3), memory.faulty(0.02, 4)
    assert torch.equal(chip(x), again(x)) and not torch.equal(chip(x), other(x))
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items()) and torch.equal(plain(x), out)
    assert (memory.faulty(0.0, 0)(x) - out).abs().max() < 0.02
    assert memory.cells == 8 * (36 + 80) and {r.name for r in memory.skipped} == {"1"}
    called = torch.func.functional_call(plain, memory.weights(0.02, 3), (x,))
    torch.testing.assert_close(called, chip(x))
    assert memory.wrong(0.02, 3) == sum(ones(m) for m in memory.masks(0.02, 3).values())
    assert memory.expected(0.02) == 0.02 * memory.cells
    assert Memory(plain, Grid(8), kind="stuck").expected(0.02) == 0.01 * memory.cells
    # the cells of a layer do not depend on which other layers are stored
    alone = Memory(plain, Grid(8), at="4")
    assert torch.equal(alone.masks(0.1, 7)["4"], memory.masks(0.1, 7)["4"])


@pytest.mark.parametrize(
    "grid", [Grid(2), Grid(4, 0), Grid(8, 0, group=4), Grid(3, kind="asymmetric"), Grid(1, kind="midrise")]
)
def test_every_grid_reads_back_its_levels(grid):
    plain = nn.Sequential(nn.Linear(8, 6))
    memory, weight = Memory(plain, grid), plain[0].weight.detach()
    torch.testing.assert_close(memory.read()["0"], grid.fit(weight).fake(weight))
    held: Scaled = grid.fit(weight)
    levels = held.values(held.codes(weight).fill_(grid.low)), held.values(held.codes(weight).fill_(grid.high))
    read = memory.read(0.3, 1)["0"]
    assert (
        (read >= levels[0] - 1e-6).all()
        and (read <= levels[1] + 1e-6).all()
        and not torch.equal(read, memory.read()["0"])
    )
    assert memory.cells == grid.bits * 48


@pytest.mark.parametrize("name", NAMES)
def test_families(name):
    plain = model(name).eval()
    before, same = copy.deepcopy(plain.state_dict()), output(plain, batch(name))
    try:
        memory = Memory(plain, Grid(8, 0))
    except ValueError as error:
        assert name == "unnamed" and "made of no layers" in str(error)
        return
    chip = memory.faulty(0.05, 0)
    assert type(chip) is type(plain) and not torch.equal(output(chip, batch(name)), same)
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())


def test_the_voltage_curve_goes_through_what_was_measured_and_back():
    for volts, rate in CURVE:
        assert error_rate(volts) == pytest.approx(rate) and voltage(rate) == pytest.approx(volts)
    assert error_rate(1.0) == error_rate(1.3) == 0.0 and voltage(0.0) == 1.0
    volts = [0.75 + 0.01 * n for n in range(25)]
    rates = [error_rate(v) for v in volts]
    assert all(a > b > 0 for a, b in pairwise(rates))
    assert [error_rate(voltage(r)) for r in (0.2, 0.01, 0.005, 1e-5)] == pytest.approx([0.2, 0.01, 0.005, 1e-5])
    assert access_energy(20 / 24) == pytest.approx(0.694444444)  # as plotted beside the curve


def vgg11():
    layers, inputs = [], 3
    for size in (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"):
        layers += [nn.MaxPool2d(2)] if size == "M" else [nn.Conv2d(inputs, size, 3, padding=1)]
        inputs = inputs if size == "M" else size
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def test_weight_reads_are_those_of_scale_sim():
    with torch.device("meta"):
        found = weight_reads(vgg11(), torch.empty(1, 3, 32, 32))
    assert found == 1_334_656  # table 6 of arXiv:2306.16869, from SCALE-Sim, for the same array and words
    x = torch.zeros(2, 3, 8)
    assert weight_reads(nn.Sequential(nn.Linear(8, 16)), x) == 16  # 3 tokens are one fold
    assert weight_reads(nn.Sequential(nn.Linear(8, 16)), x, bits=4, array=2, word=32) == 32
    shared = nn.Linear(8, 8)
    assert weight_reads(nn.Sequential(shared, shared), torch.zeros(1, 8)) == 16  # read at each call


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: positions(5, 1.5, generator()), r"rate 1.5; expected a probability"),
        (lambda: positions(5, float("nan"), generator()), "rate nan"),
        (lambda: draw(torch.zeros(3), 8, 0.1, generator()), "torch.float32; expected int8 or uint8"),
        (
            lambda: draw(torch.zeros(3, dtype=torch.int8), 9, 0.1, generator()),
            "bits 9; expected an integer from 1 to 8",
        ),
        (
            lambda: draw(torch.zeros(3, dtype=torch.int8), 8, 0.1, generator(), "open"),
            "kind 'open'; expected one of flip",
        ),
        (lambda: flip(torch.zeros(3), torch.zeros(3, dtype=torch.uint8), 8), "expected int8 or uint8"),
        (lambda: Memory(net(), Grid(8), kind="open"), "kind 'open'"),
        (lambda: Memory(nn.Sequential(nn.ReLU()), Grid(8)), "no layer of Sequential can be quantised"),
        (lambda: error_rate(0.6), "error_rate: 0.6 .*at least 0.75"),
        (lambda: voltage(0.5), "voltage: rate 0.5; expected 0, or 1.9"),
        (lambda: weight_reads(nn.Sequential(nn.ReLU()), torch.zeros(1)), "has no linear map or convolution"),
    ],
)
def test_clear_errors(call, says):
    with pytest.raises(ValueError, match=says):
        call()
