import copy

import pytest
import torch
from torch import nn

from interlayer import load, save
from interlayer.core.example import Example
from interlayer.core.quantizer import Grid, Packed
from interlayer.core.quantizer.packing import TERNARY
from interlayer.core.schedule import progress
from interlayer.models import Transformer
from interlayer.testing import hold
from interlayer.transform.quantize.paretoq import GRIDS, Elastic, ParetoQ
from tests.families import batch, model, output

BITS = tuple(GRIDS)


def net():
    torch.manual_seed(0)
    return Transformer(16, 8, 2, 16, 2)


def trained(bits=2, steps=3, start=net, **options):
    rule = ParetoQ(start(), bits=bits, lr=1e-2, **options)
    for i in range(steps):
        rule.step(texts(i))
    rule.model.eval()
    return rule


def texts(seed=0):
    tokens = torch.randint(16, (4, 9), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def naive(w, alpha, bits):
    """The paper's grids and derivatives, one weight after the other: value, and the derivatives by the weight and the size."""
    u = w / alpha
    if bits == 1:
        return (alpha if w > 0 else -alpha), float(abs(u) <= 1), (1.0 if w > 0 else -1.0)
    if bits <= 2:
        half, s = (1.5, 0.0) if bits == TERNARY else (2.0, 0.5)
        level, inside = (round(min(max(u, -0.99), 0.99) * half - s) + s) / half, abs(u) <= 0.99
    else:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        level, inside = float(min(max(round(u), low), high)), low <= u <= high
    return alpha * level, float(inside), level - (u if inside else 0)


@pytest.mark.parametrize("bits", BITS)
def test_grids_and_gradients_equal_the_equations(bits):
    torch.manual_seed(0)
    weight, error = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40)
    rounder = Elastic(weight.detach(), bits)
    with torch.no_grad():
        rounder.alpha.mul_(torch.tensor([0.3, 0.7, 1.1]))
    found = rounder.value(weight)
    (found * error).sum().backward()
    sizes = rounder.alpha.tolist()
    rows = [[naive(w, a, bits) for w in row] for row, a in zip(weight.tolist(), sizes, strict=True)]
    value, passes, slope = torch.tensor(rows).unbind(-1)
    torch.testing.assert_close(found.detach(), value)
    torch.testing.assert_close(weight.grad, passes * error)
    most = {1: 1, TERNARY: 1, 2: 1, 3: 3, 4: 7}[bits]
    torch.testing.assert_close(rounder.alpha.grad, (slope * error).sum(1) / (120 * most) ** 0.5, atol=1e-5, rtol=1e-4)
    held, codes = rounder.found(weight.detach())
    assert torch.equal(held.values(codes), found.detach())


def test_first_sizes_are_the_authors():
    weight = torch.tensor([[0.2, -1.4, 0.1], [0.0, 0.0, 0.0]])
    sizes = {bits: Elastic(weight, bits).alpha[0].item() for bits in BITS}
    assert sizes == pytest.approx({1: 1.7 / 3, TERNARY: 1.4, 2: 1.4, 3: 1.4 / 3, 4: 0.2})
    assert all(Elastic(weight, bits).value(weight).isfinite().all() for bits in BITS)  # a row of zeros too


# What the authors' functions gave on these numbers, sizes at 0.7 of their first values: rounded weights, and the gradients of sizes.
WEIGHT, ERROR = [[0.11, -0.42, 0.9, -0.03], [-1.3, 0.05, 0.33, 0.6]], [[1.0, -2, 3, 0.5], [2.0, 1, -1, 4]]
INSIDE = [[1, 1, 0, 1], [0, 1, 1, 1]]
AUTHORS = {
    1: ([0.2555, -0.2555, 0.2555, -0.2555, -0.399, 0.399, 0.399, 0.399], [1.944544, 0.707107]),
    TERNARY: ([0.0, -0.42, 0.42, 0.0, -0.606667, 0.0, 0.606667, 0.606667], [1.007347, -0.823663]),
    2: ([0.1575, -0.4725, 0.4725, -0.1575, -0.6825, 0.2275, 0.2275, 0.6825], [0.845301, -0.293333]),
    3: ([0.21, -0.42, 0.63, -0.0, -1.213333, 0.0, 0.303333, 0.606667], [1.9489, -1.63075]),
    4: ([0.09, -0.45, 0.63, -0.0, -1.04, 0.0, 0.39, 0.65], [2.887906, -2.045577]),
}


@pytest.mark.parametrize("bits", BITS)
def test_grids_and_gradients_are_the_authors(bits):
    weight, error = torch.tensor(WEIGHT, requires_grad=True), torch.tensor(ERROR)
    rounder = Elastic(weight.detach(), bits)
    with torch.no_grad():
        rounder.alpha.mul_(0.7)
    found = rounder.value(weight)
    (found * error).sum().backward()
    value, slope = (torch.tensor(t) for t in AUTHORS[bits])
    torch.testing.assert_close(found.detach().flatten(), value, atol=1e-6, rtol=0)
    if bits == 1:
        assert (weight.grad / error).tolist() == [[1, 0, 0, 1], [0, 1, 1, 0]]
    else:
        assert (weight.grad / error).tolist() == INSIDE
    if bits == TERNARY:  # outside they add 1 where the level is 2/3
        slope = slope - torch.tensor([3.0, -2.0]) / 3 / 8**0.5
    torch.testing.assert_close(rounder.alpha.grad, slope, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", BITS)
def test_the_packed_model_is_the_trained_one(bits, tmp_path):
    rule = trained(bits)
    new, (x, _) = rule.result(), texts(9)
    assert torch.equal(new(x), rule.predict(x))
    assert torch.equal(rule.result(packed=False)(x), rule.predict(x))
    torch.testing.assert_close(new(x[:1, :3]), rule.predict(x[:1, :3]), atol=1e-5, rtol=1e-5)  # few rows, by tables
    save(new, tmp_path / "there")
    again = load(tmp_path / "there")
    assert torch.equal(again(x), new(x))
    layer = again.trunk.blocks[1].mlp.up
    assert isinstance(layer, Packed) and layer.table
    byte = {1: 8, TERNARY: 5, 2: 4, 3: 2, 4: 2}[bits]
    assert layer.codes.shape == (64, -(-16 // byte)) and layer.scale.shape == (64,)
    rule.step(texts(3))  # the rule goes on
    assert not torch.equal(rule.predict(x), new(x))


def test_blocks_alone_are_rounded_unless_at_says_otherwise():
    rule = ParetoQ(net())
    assert len(rule.layers) == 8 and all(n.startswith("trunk.blocks.") for n in rule.layers)
    assert {r.name: r.why for r in rule.skipped}["embed"] == "no linear map or convolution, stays in float"
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert ParetoQ(copy.deepcopy(plain)).layers == ["0", "2"]
    only = ParetoQ(plain, at="0")
    assert only.layers == ["0"] and type(plain[2]) is nn.Linear
    untied = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4)]), "head": nn.Linear(4, 2)})
    assert ParetoQ(untied).layers == ["blocks.0"]


def test_full_precision_first_and_then_few_bits():
    rule = ParetoQ(net(), bits=2, first=0.5, lr=1e-2)
    plain, (x, _) = net(), texts(9)
    assert torch.equal(rule.predict(x), plain.eval()(x))  # nothing is rounded yet
    with pytest.raises(ValueError, match=r"still in full precision, which takes 0\.5 of the training"):
        rule.result()
    optimizer = torch.optim.Adam(plain.parameters(), 1e-2)
    for i in range(5):
        progress(rule.model, i / 10)
        rule.step(texts(i))
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain.train()(texts(i)[0]).flatten(0, 1), texts(i)[1].flatten()).backward()
        optimizer.step()
    assert not rule.on
    torch.testing.assert_close(rule.predict(x), plain.eval()(x))
    name = rule.layers[0]
    weight = rule.weight(name).clone()
    progress(rule.model, 0.5)
    rule.step(texts(5))
    assert rule.on and isinstance(rule.result().get_submodule(name), Packed)
    torch.testing.assert_close(rule.rounders[name].alpha, weight.abs().amax(1), atol=0.02, rtol=0)
    assert {int(s["step"]) for s in rule.optimizer.state.values()} == {1}  # Adam began anew
    other = ParetoQ(net(), bits=2, first=0.5, lr=1e-2)
    other.model.load_state_dict(rule.model.state_dict())
    other.load_state_dict(rule.state_dict())
    assert torch.equal(other.predict(x), rule.predict(x))


@pytest.mark.parametrize("bits", BITS)
def test_all_bits_learn(bits):
    rising = torch.randint(16, (20, 8, 1), generator=torch.Generator().manual_seed(0))
    rule = ParetoQ(net(), bits=bits, lr=1e-2)
    losses = [rule.step((t[:, :-1], t[:, 1:]))["loss"] for t in (rising + torch.arange(9)) % 16]
    assert sum(losses[-4:]) / 4 < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "resnet"])
def test_families_are_trained_packed_and_saved(name, tmp_path):
    start, given = model(name), batch(name)
    heads = [n for n, m in start.named_modules() if n in ("lm_head", "classifier")]
    rule = ParetoQ(start, bits=2)
    assert rule.layers and not set(heads) & set(rule.layers)
    wanted = output(start.eval(), given)
    new = rule.result()
    assert torch.equal(output(new, given), wanted)
    save(new, tmp_path / "there")
    assert torch.equal(output(load(tmp_path / "there"), given), wanted)
    plain = rule.result(packed=False)
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(output(type(plain).from_pretrained(tmp_path / "plain").eval(), given), wanted)


def test_a_model_that_gives_its_own_loss():
    rule = ParetoQ(model("gpt2"), bits=2)
    given = batch("gpt2")
    losses = [rule.step(({**given, "labels": given["input_ids"]}, None))["loss"] for _ in range(3)]
    assert losses[-1] < losses[0]


def test_a_grid_of_two_bits_is_stretched():
    """Each level of a stretched grid is the nearest for an equal part of the range; on the plain grid of two bits one has none."""
    weight = torch.linspace(-1, 1, 4001)[None]
    for bits in (TERNARY, 2):
        held, codes = Elastic(weight, bits).found(weight)
        counts = torch.stack([(codes == c).float().mean() for c in range(held.grid.low, held.grid.high + 1)])
        torch.testing.assert_close(counts, torch.full_like(counts, 1 / len(counts)), atol=1e-3, rtol=0)
    assert (Grid(2, 0).fit(weight).codes(weight) == -2).float().mean() < 0.3


@pytest.mark.parametrize("contract", ["autocast", "state_dict", "compile", "export", "deepcopy", "ddp"])
def test_a_layer_in_training_keeps_the_contracts_of_layers(contract):
    make = lambda: ParetoQ(nn.Sequential(nn.Linear(6, 4))).model  # noqa: E731
    hold(contract, "layer", Example(make=make, inputs=lambda: (torch.randn(3, 6),), gradient="surrogate"))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ParetoQ(net(), bits=5), "bits 5, first 0.0; expected 1, 1.58, 2, 3 or 4 bits"),
        (lambda: ParetoQ(net(), first=1.0), r"first 1.0; expected .* a share of 0 or more below 1"),
        (lambda: ParetoQ(nn.Sequential(nn.LayerNorm(2))), "no layer of Sequential can be quantised"),
    ],
)
def test_clear_errors(call, says):
    with pytest.raises(ValueError, match=says):
        call()
