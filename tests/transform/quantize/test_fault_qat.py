import copy

import pytest
import torch
from torch import nn

from interlayer import load, save
from interlayer.core import datasets
from interlayer.core.faults import Devices, draw_devices
from interlayer.core.quantizer import Packed
from interlayer.core.spike import LIF, Unrolled
from interlayer.transform.quantize.fault_qat import FaultQAT, Levels, Wells

# What the authors' script computes for these weights, with 3 bits, levels from -0.1 to 0.1, wells half a step wide and devices that are
# dead where ALIVE is 0: the sum over levels and its slopes; and how it reads CODES through cells of these conductances.
WEIGHT = [[0.013, -0.07, 0.099], [-0.031, 0.052, 0.0]]
ALIVE = [[[1, 0, 1], [1, 1, 0]], [[0, 1, 1], [1, 1, 1]], [[1, 1, 0], [0, 1, 1]]]
SUM = -2.990833282470703
SLOPES = [[-16.207143783569336, -3.6221704483032227, 0], [16.810489654541016, 29.878477096557617, -51.451290130615234]]
ONE = [[[1.2, 0.8, 1], [0.9, 1.1, 1]], [[1, 1, 1.3], [0.7, 1, 1]], [[1, 0.6, 1], [1, 1, 1.5]]]
CODES = [[5, 3, 7], [0, 6, 2]]
READ = [
    [0.04857146856409716, -0.01999992066924956, 0.11714285779744385],
    [-0.09999986153440252, 0.07142859168833696, -0.04285704379348936],
]
STEP = 0.04721615151656077  # the first step that it takes for these weights


def ideal(bits=3, limit=0.1):
    return (torch.arange(2.0**bits) - (2**bits - 1) / 2) * 2 * limit / (2**bits - 1)


def images(size=64, seed=0):
    x, labels = datasets.digits()
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:size]
    return x[rows] / 16, labels[rows]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def trained(model=None, steps=4, **options):
    rule = FaultQAT(model or net(), warmup=3, **options)
    for i in range(steps):
        rule.step(images(seed=i))
    return rule


def test_wells_and_first_step_are_those_of_the_authors_script():
    alive = torch.tensor(ALIVE)
    dead = Devices(alive.float(), torch.zeros(3, 2, 3), torch.where(alive > 0, -1, 0).to(torch.int8))
    weight = torch.tensor(WEIGHT, requires_grad=True)
    found = Wells.apply(weight, ideal(), 0.1 / 7, dead)
    found.backward()
    assert float(found.detach()) == pytest.approx(SUM, rel=1e-5)
    torch.testing.assert_close(weight.grad, torch.tensor(SLOPES), rtol=1e-4, atol=1e-4)
    layer = nn.Linear(3, 2)
    layer.weight.data = weight.detach()
    assert float(FaultQAT(nn.Sequential(layer), bits=3).steps["0"]) == pytest.approx(STEP, rel=1e-6)


def test_cells_are_read_as_the_authors_script_reads_them():
    cells = Devices(torch.tensor(ONE), torch.full((3, 2, 3), 399 / 5.74e8), torch.full((3, 2, 3), -1, dtype=torch.int8))
    read = (cells.read(torch.tensor(CODES)) - 3.5) * 0.2 / 7
    torch.testing.assert_close(read, torch.tensor(READ), atol=1e-6, rtol=0)
    codes, values = Levels(ideal(), cells).nearest(torch.tensor(READ))
    assert codes.tolist() == CODES
    torch.testing.assert_close(values, torch.tensor(READ), atol=1e-6, rtol=0)


@pytest.mark.parametrize("devices", [None, draw_devices((4, 3), 3, stuck=0.3, spread=0.3)])
def test_gradients_of_wells_are_those_of_autograd(devices):
    torch.manual_seed(0)
    weight = (0.1 * torch.randn(4, 3, dtype=torch.float64)).requires_grad_()
    values = ideal().double().requires_grad_()
    held = devices and devices.to(weight.detach())
    found = Wells.apply(weight, values, 0.02, held)
    codes = torch.arange(8)
    read, kept = held.table() if held else (codes[:, None].double(), torch.ones(8, 1))
    levels = values[:, None] * (read - 3.5) / (codes[:, None] - 3.5)
    each = kept * torch.exp(-(((weight.flatten() - levels) / 0.02) ** 2))
    torch.testing.assert_close(found, -each.sum())
    by_weight, by_level = torch.autograd.grad(found, (weight, values))
    torch.testing.assert_close(by_weight, torch.autograd.grad(-each.sum(), weight, retain_graph=True)[0])
    codes = Levels(values.detach(), held).nearest(weight.detach())[0]
    own = each.gather(0, codes.flatten()[None].long())
    torch.testing.assert_close(by_level, torch.autograd.grad(-own.sum(), values)[0])


def test_nearest_codes_are_the_nearest_that_cells_can_hold():
    cells = draw_devices((40,), 4, stuck=0.3, spread=0.3, seed=1)
    weight = 0.1 * torch.randn(40, generator=torch.Generator().manual_seed(0))
    held = Levels(ideal(4), cells)
    codes, values = held.nearest(weight)
    step = 0.2 / 15
    read, kept = cells.table()
    table = (read - 7.5) * step
    nearest = (table - weight).abs().masked_fill(~kept, torch.inf).amin(0)
    torch.testing.assert_close((values - weight).abs(), nearest)
    torch.testing.assert_close(table[codes.long(), torch.arange(40)], values)
    assert bool(cells.keeps(codes).all())


@pytest.mark.parametrize("levels", ["fixed", "step", "free"])
@pytest.mark.parametrize("stuck", [0.0, 0.2])
def test_the_result_predicts_what_the_rule_predicts_and_goes_through_a_file(levels, stuck, tmp_path):
    rule, (x, _) = trained(levels=levels, stuck=stuck, snap=0), images(8, 9)
    new = rule.result()
    torch.testing.assert_close(new(x), rule.predict(x), atol=1e-4, rtol=1e-4)
    assert isinstance(new[1], nn.Linear if levels == "free" else Packed)
    assert len(new[1].weight.unique()) <= 16
    if stuck:
        assert all(bool(rule.devices[n].keeps(codes).all()) for n, codes in rule.codes().items())
    save(new, tmp_path / "net")
    assert torch.equal(load(tmp_path / "net", base=net)(x), new(x))


def test_varied_resistances_give_floats_that_the_cells_read():
    rule, (x, _) = trained(spread=0.4), images(8, 9)
    new, codes = rule.result(), rule.codes()["1"]
    read = (rule.devices["1"].read(codes) - 7.5) * rule.steps["1"]
    torch.testing.assert_close(new[1].weight, read)
    torch.testing.assert_close(new(x), rule.predict(x))
    assert rule.model[1].weight.unique().numel() > 16


@pytest.mark.parametrize("levels", ["step", "free"])
def test_levels_are_learned_by_the_wells_alone(levels):
    rule = trained(levels=levels, strength=1e-3)
    start = FaultQAT(net(), levels=levels)
    assert all(not torch.equal(p, start.learned[n]) for n, p in rule.learned.items())
    still = trained(levels=levels, strength=0.0)
    assert all(torch.equal(p, start.learned[n]) for n, p in still.learned.items())


def test_weights_stay_in_range_and_snap_to_levels():
    rule = trained(steps=3, snap=3, stuck=0.2)
    for name in rule.layers:
        weight = rule.model.get_submodule(name).weight.detach()
        torch.testing.assert_close(weight, rule.of(name).nearest(weight)[1])
    assert not rule.optimizer.state
    rule = trained(steps=3, snap=0)
    for name in rule.layers:
        values, weight = rule.of(name).values, rule.model.get_submodule(name).weight
        assert values.min() <= weight.min() and weight.max() <= values.max()


def test_wells_become_narrow_and_strong():
    rule = FaultQAT(net(), warmup=4, strength=1.0)
    name = rule.layers[0]
    weight, values = rule.model.get_submodule(name).weight, rule.of(name).values
    only = FaultQAT(nn.Sequential(rule.model[1]), warmup=4, strength=1.0)
    step = float(values.diff().mean())
    for number, (width, strength) in {0: (2**-0.25, 1e-3), 3: (0.5, 1.0), 9: (0.5, 1.0)}.items():
        only.number = number
        expected = strength * Wells.apply(weight, values, step * width, None)
        torch.testing.assert_close(only.pull(), expected)


def test_training_goes_on_from_its_state():
    rule = trained(levels="step", stuck=0.1)
    other = FaultQAT(copy.deepcopy(rule.model), warmup=3, levels="step", stuck=0.1)
    other.load_state_dict(copy.deepcopy(rule.state_dict()))
    for r in (rule, other):
        r.step(images(seed=7))
    for a, b in zip(rule.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(rule.predict(images()[0]), other.predict(images()[0]))


def test_spiking_nets_and_measured_devices():
    torch.manual_seed(0)
    spiking = Unrolled(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), LIF(steps=2), nn.Linear(8, 10)), 2)
    rule = trained(spiking, stuck=0.2)
    x = images(4)[0]
    torch.testing.assert_close(rule.result()(x), rule.predict(x), atol=1e-4, rtol=1e-4)
    mine = {"1": draw_devices((16, 64), 4, stuck=0.3, seed=5)}
    rule = trained(devices=mine)
    assert list(rule.devices) == ["1"] and torch.equal(rule.devices["1"].held, mine["1"].held)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: FaultQAT(net(), bits=0), "bits 0"),
        (lambda: FaultQAT(net(), levels="learned"), "levels 'learned'.*fixed, step, free"),
        (lambda: FaultQAT(net(), snap=-1), "snap -1"),
        (lambda: FaultQAT(net(), levels="free", spread=0.1), "resistances vary"),
        (lambda: FaultQAT(net(), devices={"2": draw_devices((3,), 4)}), "'2'; expected a quantised layer's name"),
        (lambda: FaultQAT(net(), devices={"1": draw_devices((3,), 4)}), r"\[4, 16, 64\]"),
        (lambda: FaultQAT(net(), stuck=0.1, devices={}), "stuck"),
        (lambda: FaultQAT(nn.Sequential(nn.ReLU())), "no layer of Sequential"),
    ],
)
def test_clear_errors(call, says):
    with pytest.raises(ValueError, match=says):
        call()
