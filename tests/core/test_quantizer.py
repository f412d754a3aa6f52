import copy

import pytest
import torch
import torch.nn.functional as F
from families import batch, model, output
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from interlayer import load, save
from interlayer.core import quantizer
from interlayer.core.quantizer import (
    BitMap,
    Bound,
    Grid,
    Packed,
    Scaled,
    bit_product,
    extremes,
    fake,
    nearest,
    observe,
    ones,
    pack,
    planes,
    simulated,
    unpack,
)
from interlayer.core.quantizer.packing import TERNARY, table_product

KINDS = ("symmetric", "unsigned", "asymmetric", "midrise")
GRIDS = [
    Grid(bits, axis, kind, group)
    for bits in (1, 2, 3, 4, 8)
    for axis, group in ((None, None), (0, None), (0, 5))
    for kind in KINDS
    if not (bits == 1 and kind == "symmetric")
] + [Grid(2, axis, "ternary", group) for axis, group in ((None, None), (0, None), (0, 5))]


def unsigned(bits, high=1.0):
    return Scaled(Grid(bits, kind="unsigned"), torch.tensor(high / (2**bits - 1)), torch.tensor(0.0))


def test_rounding_equals_that_of_one_value_after_the_other():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 2)
    for grid in GRIDS:
        held = grid.fit(x)
        rows, scales, zeros = grid.rows(x), held.scale.reshape(-1), held.zero.reshape(-1)
        each = [
            quantizer.fake_naive(r, float(s), float(z), grid.low, grid.high)
            for r, s, z in zip(rows, scales, zeros, strict=True)
        ]
        expected = torch.cat(each).view(x.shape)
        torch.testing.assert_close(held.fake(x), expected)
        torch.testing.assert_close(held.values(held.codes(x)), held.fake(x))
    wide = Grid(4, axis=1).fit(x)
    assert wide.scale.shape == (5,)
    torch.testing.assert_close(wide.values(wide.codes(x)), wide.fake(x))


def test_ranges():
    x = torch.cat([torch.linspace(-1, 1, 999), torch.tensor([100.0])])
    for kind, low in (("symmetric", -1.0), ("asymmetric", -1.0), ("midrise", -100.0), ("unsigned", 0.0)):
        grid = Grid(8, kind=kind)
        held = grid.fit(x)
        ends = held.values(torch.tensor([grid.low, grid.high]))
        slack = 1e-4 + (float(held.scale) / 2 if kind == "asymmetric" else 0)  # its zero is rounded to an integer
        assert ends[0] <= low + slack and ends[1] >= 100 - slack
        near = grid.fit(x, 99.0)
        assert float(near.values(torch.tensor([grid.high]))) == pytest.approx(0.98, abs=0.02)
    torch.manual_seed(0)
    normal = torch.randn(4, 4000)
    for grid in (Grid(4, 0), Grid(2, 0, "asymmetric"), Grid(1, 0, "midrise")):
        errors = [float((grid.fit(normal, by).fake(normal) - normal).square().mean()) for by in ("mse", "minmax")]
        assert errors[0] < 0.6 * errors[1]
    best = Grid(1, None, "midrise").fit(normal, "mse").scale / 2  # of +-s the best is the mean magnitude
    assert float(best) == pytest.approx(float(normal.abs().mean()), rel=0.03)
    assert torch.equal(Grid(4).fit(torch.zeros(3)).fake(torch.zeros(3)), torch.zeros(3))


def test_gradients_pass_inside_the_range_and_scales_learn_as_lsq_says():
    x = torch.tensor([-9.0, -0.7, 0.2, 1.4, 9.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    grid = Grid(3)
    fake(x, grid, scale, rounding="learned").sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    v = x.detach() / 0.5
    each = [-4.0, float(v[1].round() - v[1]), float(v[2].round() - v[2]), float(v[3].round() - v[3]), 3.0]
    assert float(scale.grad) == pytest.approx(sum(each) / (5 * 3) ** 0.5, rel=1e-5)
    scale.grad = None
    fake(x, grid, scale).sum().backward()
    assert scale.grad is None
    for dtype in (torch.bfloat16, torch.float64):
        assert fake(x.detach().to(dtype), grid, scale.detach()).dtype == dtype


def test_stochastic_rounding_is_right_on_average_and_stays_in_range():
    torch.manual_seed(0)
    x = torch.tensor([-20.0, -0.83, 0.3, 2.9, 20.0]).expand(20_000, 5)
    found = fake(x, Grid(3), torch.tensor(1.0), rounding="stochastic")
    assert torch.equal(found, found.round()) and found.min() == -4 and found.max() == 3
    torch.testing.assert_close(found.mean(0), torch.tensor([-4, -0.83, 0.3, 2.9, 3.0]), atol=0.015, rtol=0)


def test_a_learned_scale_ends_near_that_of_the_least_squared_error():
    torch.manual_seed(0)
    x = torch.randn(2000)
    scale = nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.Adam([scale], 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        (fake(x, Grid(3), scale, rounding="learned") - x).square().sum().backward()
        optimizer.step()
    best = Grid(3).fit(x, "mse").scale
    assert float(scale.detach()) == pytest.approx(float(best), rel=0.1)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_gives_every_code_back(bits):
    torch.manual_seed(0)
    for n in (1, 7, 8, 17):
        codes = torch.randint(2**bits, (3, n))
        packed = pack(codes, bits)
        assert packed.shape == (3, -(-n * quantizer.stored(bits) // 8)) and packed.dtype == torch.uint8
        assert torch.equal(unpack(packed, bits, n).long(), codes)
    with pytest.raises(ValueError, match="codes from 0 to"):
        pack(torch.tensor([0, 2**bits]), bits)


def test_three_levels_take_a_fifth_of_a_byte():
    torch.manual_seed(0)
    for n in (1, 5, 6, 17):
        codes = torch.randint(3, (4, n))
        packed = pack(codes, TERNARY)
        assert packed.shape == (4, -(-n // 5)) and torch.equal(unpack(packed, TERNARY, n).long(), codes)
    with pytest.raises(ValueError, match=r"expected 0 to 2 for 1\.58 bits"):
        pack(torch.tensor([3]), TERNARY)
    with pytest.raises(ValueError, match="ternary grid of 3 bits"):
        Grid(3, kind="ternary")
    layer = nn.Linear(20, 8)
    small = Packed(layer, Grid(2, 0, "ternary"))
    assert small.codes.shape == (8, 4) and len(small.weight[0].unique()) <= 3
    torch.testing.assert_close(small.weight, Grid(2, 0, "ternary").fit(layer.weight).fake(layer.weight))


@pytest.mark.parametrize("bits", [1, TERNARY, 2, 3, 4])
def test_products_by_tables_are_those_of_the_unpacked_codes(bits):
    torch.manual_seed(0)
    for rows, n in ((1, 5), (2, 64), (7, 33)):
        x, codes = torch.randn(rows, n, dtype=torch.float64), torch.randint(3 if bits == TERNARY else 2**bits, (6, n))
        found = table_product(x, pack(codes, bits), bits)
        torch.testing.assert_close(found, x @ codes.double().T)


TABLED = [
    Grid(1, 0, "midrise"),
    Grid(2, 0, "ternary"),
    Grid(2),
    Grid(2, 0, "asymmetric"),
    Grid(3, 0),
    Grid(4, 0, "unsigned"),
]


@pytest.mark.parametrize("grid", TABLED, ids=str)
def test_few_rows_are_multiplied_by_tables(grid, monkeypatch):
    torch.manual_seed(0)
    layer = nn.Linear(30, 7)
    plain, tabled = Packed(layer, grid), Packed(layer, grid, table=True)
    calls = []
    monkeypatch.setattr(
        type(tabled), "by_table", lambda self, x, do=Packed.by_table: calls.append(len(x)) or do(self, x)
    )
    for x in (torch.randn(30), torch.randn(2, 2, 30), torch.randn(5, 30)):
        torch.testing.assert_close(tabled(x), plain(x), atol=1e-5, rtol=1e-5)
    assert len(calls) == 2
    assert tabled(torch.randn(1, 30).bfloat16()).dtype == torch.bfloat16
    compiled = torch.compile(tabled, backend="eager", fullgraph=True)
    x = torch.randn(3, 30)
    torch.testing.assert_close(compiled(x), plain(x))


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (nn.Linear(8, 2), {"weights": Grid(8, 0)}),
        (nn.Linear(8, 2), {"weights": Grid(2, 0, group=4)}),
        (nn.Linear(8, 2), {"weights": Grid(2, 0), "inputs": Grid(8)}),
        (nn.Conv1d(2, 2, 1), {"weights": Grid(2, 0)}),
    ],
)
def test_tables_are_refused_where_they_would_do_nothing(layer, options):
    with pytest.raises(ValueError, match=r"table=True with .*; expected a linear map of at most 4 bits"):
        Packed(layer, **options, table=True)


def test_bit_products_are_exact():
    torch.manual_seed(0)
    words = torch.randint(-(2**63), 2**63 - 1, (50,))
    assert ones(words).tolist() == [bin(w & (2**64 - 1)).count("1") for w in words.tolist()]
    for k, m, n in ((1, 1, 3), (2, 3, 64), (8, 8, 130)):
        a, b = torch.randint(2**k, (4, n)), torch.randint(2**m, (5, n))
        assert torch.equal(bit_product(planes(a, k)[:, None], planes(b, m)), a @ b.T)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": (2, 1), "groups": 2},
        {"kernel_size": 3, "padding": "same", "bias": False},
        {"stride": (1, 2)},
    ],
)
def test_the_bit_convolution_equals_the_float_one(settings):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, **{"kernel_size": (3, 2), **settings})
    x = torch.rand(2, 6, 9, 8) * 1.3 - 0.1
    for bits, inputs in ((1, 1), (1, 2), (3, 2), (8, 8)):
        weights = Grid(bits, 0, "midrise").fit(layer.weight)
        made = BitMap(layer, weights, inputs=unsigned(inputs))
        codes = unsigned(inputs).codes(x)
        integers = weights.codes(layer.weight).double() - float(weights.grid.middle)
        settled = {k: v for k, v in settings.items() if k not in ("bias", "kernel_size")}
        assert torch.equal(made.count(codes).double(), F.conv2d(codes.double(), integers, **settled))
        torch.testing.assert_close(made.weight, weights.values(weights.codes(layer.weight)))
        torch.testing.assert_close(made(x), layer._conv_forward(unsigned(inputs).fake(x), made.weight, layer.bias))


def test_the_bit_linear_map_and_the_integer_one_equal_the_float_one():
    torch.manual_seed(0)
    layer, x = nn.Linear(70, 5), torch.randn(2, 3, 70)
    for grid in GRIDS:
        for kind in KINDS:
            grid = Grid(grid.bits, grid.axis, grid.kind, grid.group)
            inputs = Grid(8, kind=kind).fit(x)
            made = Packed(layer, grid, inputs=inputs)
            expected = F.linear(inputs.fake(x), made.weight, layer.bias)
            torch.testing.assert_close(made(x), expected, atol=2e-5, rtol=1e-4)
    bits = BitMap(layer, Grid(2, 0, "midrise"), inputs=unsigned(3))
    torch.testing.assert_close(bits(x), F.linear(unsigned(3).fake(x), bits.weight, layer.bias), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["twice", "functional", "gpt2", "bert", "t5", "resnet", "vit", "unet"])
def test_packed_simulated_and_loaded_models_agree(name, tmp_path):
    start = model(name)
    for grid in (Grid(4, 0), Grid(4, 0, "asymmetric")):
        plan = nearest(start, grid)
        packed = plan.apply()
        found = output(packed, batch(name))
        torch.testing.assert_close(found, output(nearest(start, grid, packed=False).apply(), batch(name)))
        torch.testing.assert_close(found, output(simulated(packed), batch(name)))
        assert not torch.equal(found, output(start, batch(name)))
    save(packed, tmp_path / "there")
    base = None if hasattr(start, "config") else (lambda: model(name))
    assert torch.equal(output(load(tmp_path / "there", base=base), batch(name)), found)
    if hasattr(start, "save_pretrained"):
        with pytest.raises(ValueError, match=r"packed weights.*interlayer\.save"):
            packed.save_pretrained(tmp_path / "no")


def test_rounded_floats_leave_as_a_plain_hugging_face_model(tmp_path):
    rounded = nearest(model("gpt2"), Grid(4, 0), packed=False).apply()
    rounded.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(output(again.eval(), batch("gpt2")), output(rounded.eval(), batch("gpt2")))


def test_a_language_model_with_rounded_inputs_generates_as_its_float_twin_does():
    start, text = model("gpt2"), {"input_ids": torch.randint(1, 32, (2, 5), generator=torch.Generator().manual_seed(0))}
    packed = nearest(start, Grid(4, 0), inputs=Grid(8, kind="asymmetric"), data=[text]).apply().eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(packed.generate(**text, **options), simulated(packed).generate(**text, **options))


def test_every_weight_is_quantised_or_listed_with_the_reason():
    for name in ("gpt2", "tied", "vit"):
        start = model(name)
        plan = nearest(start, Grid(4, 0, group=2))
        listed = {r.name for r in [*plan.touched, *plan.skipped]}
        for place, m in start.named_modules():
            if next(m.parameters(recurse=False), None) is not None and place:
                assert place in listed, place
        assert all(r.why for r in plan.skipped)
    skipped = {r.name: r.why for r in nearest(model("tied"), Grid(4)).skipped}
    assert "its weight is also embed.weight" in skipped["head"]
    unnamed = model("unnamed")
    unnamed.head = nn.Linear(3, 3)
    assert [r.name for r in nearest(unnamed, Grid(4)).skipped] == ["kernel", "readout", "gain"]
    odd = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 8), nn.ConvTranspose1d(1, 1, 2), nn.MultiheadAttention(8, 1))
    skipped = {r.name: r.why for r in nearest(odd, Grid(4, 0, group=8)).skipped}
    assert "no multiple of 8" in skipped["0"] and "never calls it" in skipped["3.out_proj"]
    assert {"2", "3"} <= set(skipped)


def test_four_bits_take_at_most_three_tenths_of_half_precision(tmp_path):
    config = GPT2Config(n_embd=128, n_layer=2, n_head=2, vocab_size=16, n_positions=8)
    start = GPT2LMHeadModel(config).half()
    for grid in (Grid(4, 0), Grid(4, 0, group=32), Grid(4, 0, "asymmetric", 64)):
        plan = nearest(start, grid)
        new = plan.apply()
        matrices = [r.name for r in plan.touched]
        save(new, tmp_path / "there")
        held = sum(
            b.numel() * b.element_size() for n in matrices for b in new.get_submodule(n).buffers() if b is not None
        )
        before = sum(2 * start.get_submodule(n).weight.numel() for n in matrices)
        assert held <= 0.30 * before
        whole = (tmp_path / "there" / "model.safetensors").stat().st_size
        rest = sum(p.numel() * 2 for p in new.parameters())  # everything else stays at 16 bits
        assert whole - rest <= 0.30 * before + 10_000  # names and shapes


def test_ranges_of_all_layers_come_from_one_pass():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2), nn.Dropout())
    data = [torch.randn(20, 6), torch.randn(3, 6)]
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    found = observe(net, data, Grid(8, kind="asymmetric"), at=nn.Linear)
    assert len(calls) == 2 and net.training and list(found) == ["0", "2", "4"]
    x = net[1](net[0](torch.cat(data)))
    torch.testing.assert_close(found["2"].scale, (x.max() / 255).detach())
    whole = observe(net, data, Grid(4), at="0", by="mse")["0"].scale
    torch.testing.assert_close(whole, Grid(4).fit(torch.cat(data), "mse").scale)
    outputs = observe(net, data, Grid(8, kind="unsigned"), at="1", side="output")["1"].scale
    torch.testing.assert_close(outputs, (x.max() / 255).detach())
    quantised = nearest(net, Grid(8, 0), inputs=Grid(8, kind="asymmetric"), data=data).apply().eval()
    torch.testing.assert_close(quantised(data[0]), simulated(quantised)(data[0]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(quantised(data[0]), net.eval()(data[0]), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Packed(nn.Linear(6, 3), Grid(4, 0)),
        lambda: Packed(nn.Linear(6, 3), Grid(4, 0), inputs=unsigned(8)),
        lambda: BitMap(nn.Linear(6, 3), Grid(1, 0, "midrise"), inputs=unsigned(2)),
    ],
)
def test_packed_layers_are_copied_compiled_and_exported(make):
    torch.manual_seed(0)
    layer, x = make(), torch.rand(4, 6)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    torch.testing.assert_close(exported(x[:3]), expected[:3])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).isfinite().all()


def test_packed_layers_pass_gradients_and_take_other_types():
    torch.manual_seed(0)
    x = torch.rand(4, 6)
    given = x.clone().requires_grad_()
    inside = Packed(nn.Linear(6, 3), Grid(4, 0), inputs=unsigned(8))
    inside(given).sum().backward()
    torch.testing.assert_close(given.grad, inside.weight.sum(0).expand(4, 6))
    rounded = Packed(nn.Linear(6, 3), Grid(4, 0, "asymmetric"), inputs=Grid(8).fit(x))
    for shape in ((6,), (0, 6), (2, 0, 6), (1, 1, 1, 6)):
        assert rounded(torch.ones(shape)).shape == (*shape[:-1], 3)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        empty = nn.Linear(6, 3).to(dtype)
        nn.init.zeros_(empty.weight)  # as pruning leaves it
        assert not Packed(empty, Grid(4, 0)).weight.any()
    low = nn.Linear(6, 3).to(torch.bfloat16)
    assert Packed(low, Grid(4, 0))(x.bfloat16()).dtype == torch.bfloat16
    halved = nn.Sequential(Packed(nn.Linear(6, 3), Grid(4, 0), inputs=unsigned(8))).bfloat16()
    torch.testing.assert_close(halved(x.bfloat16()), simulated(halved)(x.bfloat16()), atol=0.05, rtol=0.05)
    assert Packed(nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), Grid(4, 0))(torch.randn(1, 2, 5)).shape == (
        1,
        3,
        5,
    )


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Grid(9), "bits 9; expected an integer from 1 to 8"),
        (lambda: Grid(0), "bits 0"),
        (lambda: Grid(1), "expected kind='midrise'"),
        (lambda: Grid(4, kind="odd"), "kind 'odd'"),
        (lambda: Grid(4, group=8), "group 8 with axis None"),
        (lambda: Grid(4, 0, group=4).fit(torch.ones(2, 6)), "multiple of group=4"),
        (lambda: Grid(4).fit(torch.tensor([torch.nan])), "not finite"),
        (lambda: Grid(4).fit(torch.ones(0)), "no values"),
        (lambda: Grid(4).fit(torch.ones(2), 40.0), r"by=40\.0"),
        (lambda: fake(torch.ones(1), Grid(4), torch.ones(()), rounding="up"), "rounding 'up'"),
        (lambda: fake(torch.ones(1), Grid(4, kind="asymmetric"), torch.ones(())), "needs zero="),
        (lambda: Packed(nn.Linear(4, 2), Grid(4))(torch.ones(2, 3)), r"input \(2, 3\); expected 4 features"),
        (lambda: Packed(nn.Linear(4, 2), Grid(4, 1)), "axis=1"),
        (lambda: Packed(nn.LayerNorm(4), Grid(4)), "LayerNorm; expected a linear map"),
        (lambda: Packed(nn.Linear(4, 2), Grid(4), inputs=Grid(8, 0).fit(torch.ones(2))), "inputs with axis=0"),
        (lambda: BitMap(nn.Conv1d(4, 2, 1), Grid(1, kind="midrise"), inputs=unsigned(1)), "Use Packed"),
        (lambda: BitMap(nn.Linear(4, 2), Grid(2), inputs=unsigned(1)), "Use Packed"),
        (lambda: nearest(nn.Linear(2, 2), Grid(4)), "Put a single layer into nn.Sequential"),
        (lambda: nearest(nn.Sequential(nn.LayerNorm(2)), Grid(4)), "no layer of Sequential can be quantised"),
        (lambda: nearest(nn.Sequential(nn.Linear(2, 2)), Grid(4), inputs=Grid(8)), "expected both or neither"),
        (
            lambda: nearest(
                nn.Sequential(nn.Linear(2, 2)), Grid(4), inputs=Grid(8), data=torch.ones(1, 2), packed=False
            ),
            "expected packed=True",
        ),
        (lambda: observe(nn.Sequential(nn.Linear(2, 2)), [], Grid(4), at="0"), "no batch"),
        (lambda: observe(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2), Grid(4, 0), at="0"), "axis=0"),
        (
            lambda: observe(nn.Sequential(nn.Embedding(2, 2)), torch.zeros(1, dtype=torch.long), Grid(4), at="0"),
            "expected floating-point",
        ),
        (lambda: quantizer.restore(nn.Sequential(nn.Linear(2, 2)), {}), "expected places"),
        (
            lambda: quantizer.restore(
                nn.Sequential(nn.Linear(2, 2)), {"places": {"0": {"kind": "x", "grid": {"bits": 4}, "inputs": None}}}
            ),
            "kind 'x'",
        ),
    ],
)
def test_clear_errors(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_bounds():
    x = torch.tensor([-0.25, 0.5, 3.0])
    assert Bound()(x).tolist() == [0, 0.5, 1] and Bound(fold=True)(x).tolist() == [0.25, 0.5, 1]


def test_extremes_of_features_come_from_one_pass_and_shared_inputs_are_read_once():
    torch.manual_seed(0)

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            y = self.a(x) + self.b(x)
            x.mul_(2)  # the same memory, other values
            return self.c(x) + self.c(y)

    net, data = Three().train(), [torch.randn(5, 3, 4), torch.randn(2, 3, 4)]
    x = torch.cat([d.flatten(0, -2) for d in data])
    y = (net.a(x) + net.b(x)).detach()
    found = extremes(net, [d.clone() for d in data], {"a": -1, "b": None, "c": -1})
    assert net.training and torch.equal(found["a"], torch.stack((x.amin(0), x.amax(0)), -1))
    assert torch.equal(found["b"], torch.stack((x.min(), x.max())))
    both = torch.cat((2 * x, y))
    torch.testing.assert_close(found["c"], torch.stack((both.amin(0), both.amax(0)), -1))
    with pytest.raises(ValueError, match="holds no batch"):
        extremes(net, [], {"a": -1})
