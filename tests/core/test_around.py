import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer import load, save
from interlayer.core.example import Example
from interlayer.core.quantizer import Around, Grid, Packed, PackedEmbedding, inner, packs
from interlayer.core.quantizer.grid import exponents, next_power, powers
from interlayer.testing import hold

TOKENS = Grid(8, -1, group=16, powers=True)


def test_powers_of_two_are_exact_and_the_next_above():
    torch.manual_seed(0)
    scale = torch.cat([torch.rand(200) * 10.0 ** torch.randint(-12, 8, (200,)), 2.0 ** torch.arange(-30.0, 30)])
    found = next_power(scale)
    assert bool(((found >= scale) & (found / 2 < scale)).all())
    assert torch.equal(found, torch.tensor([2.0 ** float(e) for e in found.log2().round()]))
    assert torch.equal(powers(exponents(found)), found) and exponents(found).dtype == torch.int8
    held = Grid(4, 0, group=4, powers=True).fit(torch.randn(3, 8))
    assert held.scale.shape == (3, 2) and torch.equal(next_power(held.scale), held.scale)
    with pytest.raises(ValueError, match="powers=True with kind 'affine'"):
        Grid(8, kind="affine", powers=True)


def test_groups_of_a_token_have_scales_of_their_own():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 48) * torch.logspace(-2, 2, 48)
    for powers_ in (False, True):
        held = Grid(8, -1, group=16, powers=powers_).by_token(x)
        assert held.scale.shape == (2, 5, 3)
        apart = torch.cat([Grid(8, powers=powers_).by_token(part).fake(part) for part in x.split(16, -1)], -1)
        torch.testing.assert_close(held.fake(x), apart)
        torch.testing.assert_close(held.values(held.codes(x)), held.fake(x))
    once = TOKENS.by_token(x).fake(x)
    assert torch.equal(TOKENS.by_token(once).fake(once), once)  # 8 bits hold what was rounded
    assert Grid(8, -1, group=16).by_token(torch.ones(2, 19)).grid.group is None  # no divisor of 19 from 16 up
    assert [Grid(4, 0, group=g).divided(96).group for g in (96, 64, 16, 8, 5)] == [None, 48, 16, 8, None]


@pytest.mark.parametrize(
    "weights", [Grid(4, 0, group=16, powers=True), Grid(8, 0), Grid(4, 0, "asymmetric", 16), Grid(2)]
)
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_integers_are_multiplied_group_by_group(weights, kind):
    torch.manual_seed(0)
    layer = nn.Linear(48, 8)
    x = torch.randn(3, 4, 48) * torch.logspace(-1, 1, 48)
    packed = Packed(layer, weights, inputs=Grid(8, -1, kind, group=16))
    expected = F.linear(Grid(8, -1, kind, group=16).by_token(x).fake(x), packed.weight, layer.bias)
    torch.testing.assert_close(packed(x), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="groups of 16 weights and of 8 inputs"):
        Packed(layer, Grid(4, 0, group=16), inputs=Grid(8, -1, group=8))
    with pytest.raises(ValueError, match="inputs with axis=-1"):
        Packed(nn.Conv2d(16, 2, 1), Grid(4, 0), inputs=Grid(8, -1, group=8))


def test_a_float_product_of_one_block_is_that_of_the_integers():
    torch.manual_seed(0)
    grid = Grid(8, powers=True)
    x, weight = torch.randn(50, 64), torch.randn(20, 64)
    a, b = grid.by_token(x), grid.fit(weight)
    whole = (a.codes(x).double() @ b.codes(weight).double().T) * a.scale * b.scale
    assert torch.equal((a.fake(x) @ b.fake(weight).T).double(), whole)


def test_scales_that_are_powers_take_a_byte():
    layer = nn.Linear(64, 8)
    packed = Packed(layer, Grid(4, 0, group=16, powers=True))
    assert packed.exponent.dtype == torch.int8 and packed.exponent.shape == (8, 4)
    assert sum(t.numel() * t.element_size() for n, t in packed.state_dict().items() if n != "bias") == 8 * 32 + 8 * 4
    torch.testing.assert_close(packed.weight, Grid(4, 0, group=16, powers=True).fit(layer.weight).fake(layer.weight))
    half = copy.deepcopy(packed).bfloat16()
    assert half(torch.ones(1, 64).bfloat16()).dtype == torch.bfloat16


GRIDS = [Grid(4, 0, group=16, powers=True), Grid(8, 0), Grid(2, None, "midrise"), Grid(2, 0, "ternary")]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_embeddings_are_packed(grid):
    torch.manual_seed(0)
    layer = nn.Embedding(11, 32)
    small, tokens = PackedEmbedding(layer, grid), torch.randint(11, (3, 4))
    wanted = grid.fit(layer.weight).fake(layer.weight.detach())
    torch.testing.assert_close(small.weight, wanted)
    torch.testing.assert_close(small(tokens), wanted[tokens])
    assert small.packed_weights == 352 and small.codes.shape[0] == 11
    with pytest.raises(ValueError, match=r"expected a plain nn\.Embedding"):
        PackedEmbedding(nn.Embedding(3, 4, max_norm=1.0), grid)
    with pytest.raises(ValueError, match="zero stays"):
        PackedEmbedding(layer, Grid(4, 0, "asymmetric"))


def test_a_module_is_rounded_around():
    torch.manual_seed(0)
    norm, x = nn.LayerNorm(32), torch.randn(4, 32)
    rounded = Around(norm, TOKENS)
    fake = lambda t: TOKENS.by_token(t).fake(t)  # noqa: E731
    assert torch.equal(rounded(x), fake(norm(fake(x)))) and torch.equal(rounded(input=x), rounded(x))
    assert rounded.weight is norm.weight and rounded.bias is norm.bias
    assert Around(nn.GELU(), TOKENS).weight is None


@pytest.mark.parametrize("contract", ["autocast", "state_dict", "compile", "export", "deepcopy", "ddp"])
def test_rounded_modules_keep_the_contracts_of_layers(contract):
    def make():
        packed = Packed(nn.Linear(32, 16), Grid(4, 0, group=16, powers=True), inputs=TOKENS)
        return nn.Sequential(Around(packed, TOKENS), Around(nn.GELU(), TOKENS))

    hold(contract, "layer", Example(make=make, inputs=lambda: (torch.randn(3, 32),), gradient="surrogate"))


def test_they_are_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Embedding(9, 32), nn.LayerNorm(32), nn.Linear(32, 4))  # noqa: E731
    net = make()
    new = {
        "0": PackedEmbedding(net[0], Grid(4, 0, group=16, powers=True)),
        "1": Around(copy.deepcopy(net[1]), TOKENS),
        "2": Around(Packed(net[2], Grid(4, 0, group=16, powers=True), inputs=TOKENS), TOKENS),
    }
    small, x = packs(net, new).eval(), torch.randint(9, (2, 5))
    save(small, tmp_path / "there")
    assert torch.equal(load(tmp_path / "there", base=make)(x), small(x))


def test_what_lies_in_lists():
    net = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2)]), "head": nn.Linear(2, 1)})
    assert inner(net, ["blocks.0", "head"]) == ["blocks.0"] and inner(net, ["head"]) == ["head"]
