import copy

import families
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer.core import recipe, taps
from interlayer.core.quantizer import Corrected, Grid, Packed, alternate, packs, simulated
from interlayer.core.quantizer.modulated import Source, divide, sources

INPUTS = Grid(8, kind="asymmetric")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_turns_leave_less_error_than_one_and_are_the_equation():
    w, grid = torch.randn(24, 16), Grid(3, 0)
    held, codes, (left, right) = alternate(w, grid, 4, rounds=1)
    first = grid.fit(w).fake(w)
    torch.testing.assert_close(held.values(codes), first)
    u, s, v = torch.linalg.svd(w - first)
    torch.testing.assert_close(left @ right, u[:, :4] * s[:4] @ v[:4], rtol=1e-4, atol=1e-5)
    errors = []
    for rounds in (1, 3, 10):
        held, codes, (left, right) = alternate(w, grid, 4, rounds=rounds)
        errors.append(float((w - held.values(codes) - left @ right).norm()))
    assert errors[2] <= errors[1] < errors[0] < (w - first).norm()


def test_both_factors_get_the_root_of_the_singular_values_as_the_authors_do():
    i, j = torch.arange(4.0)[:, None], torch.arange(3.0)[None]
    w = torch.sin(1.3 * i + j) + 0.1 * i * j
    *_, (left, right) = alternate(w, Grid(8, 0), 2, rounds=1)
    residual = w - Grid(8, 0).fit(w).fake(w)
    u, s, _ = torch.linalg.svd(residual, full_matrices=False)
    torch.testing.assert_close(left.abs(), (u[:, :2] * s[:2].sqrt()).abs(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(right.norm(dim=1), s[:2].sqrt(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("inputs", [None, INPUTS, INPUTS.fit(torch.tensor([-4.0, 4.0]))])
@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_corrected_map_is_its_equation_in_integers_and_in_floats(inputs, divided, rank):
    layer, x, divisor = nn.Linear(32, 8), torch.randn(2, 5, 32), torch.rand(32) + 0.5
    held, codes, factors = alternate(layer.weight, Grid(4, 0), 3)
    new = Corrected(
        layer, held, codes=codes, inputs=inputs, factors=factors if rank else None, divisor=divisor if divided else None
    )
    near = x / divisor if divided else x
    if inputs is not None:
        near = (INPUTS.by_token(near) if isinstance(inputs, Grid) else inputs).fake(near)
    wanted = F.linear(near, held.values(codes) + (factors[0] @ factors[1] if rank else 0), layer.bias)
    torch.testing.assert_close(new(x), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(simulated(nn.Sequential(new))(x), wanted, rtol=1e-4, atol=1e-4)
    x.requires_grad_()  # floats, so that gradients pass
    torch.testing.assert_close(new(x), wanted, rtol=1e-4, atol=1e-4)


def test_it_is_saved_and_rebuilt(tmp_path):
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(3, 8)
    held, codes, factors = alternate(net[0].weight, Grid(4, 0), 2)
    new = packs(
        net,
        {
            "0": Corrected(net[0], held, codes=codes, inputs=INPUTS, factors=factors, divisor=torch.full((8,), 2.0)),
            "2": Corrected(net[2], Grid(4, 0)),
        },
    )
    recipe.save(new, tmp_path / "new")
    again = recipe.load(tmp_path / "new", base=lambda: copy.deepcopy(net))
    assert torch.equal(again(x), new(x)) and type(again[0]) is Corrected
    plain = packs(net, {"0": Packed(net[0], Grid(4, 0)), "2": Packed(net[2], Grid(4, 0))})
    assert torch.equal(again[2].weight, plain[2].weight)


def test_convolutions_are_refused():
    with pytest.raises(ValueError, match="expected a linear map"):
        Corrected(nn.Conv2d(2, 2, 3), Grid(4, 0))


def test_sources_of_a_dit_are_found_by_trial_and_leave_its_function():
    net, given = families.model("dit"), families.batch("dit")
    block = "transformer_blocks.1"
    groups = {
        "q": [f"{block}.attn1.to_q", f"{block}.attn1.to_k", f"{block}.attn1.to_v"],
        "one of two readers": [f"{block}.attn1.to_q"],
        "o": [f"{block}.attn1.to_out.0"],
        "up": [f"{block}.ff.net.0.proj"],
        "down": [f"{block}.ff.net.2"],
    }
    before = families.output(net, given)
    found = sources(net, groups, given)
    assert torch.equal(families.output(net, given), before)
    linear = f"{block}.norm1.linear"
    assert found == {
        "q": Source(linear, ((0, 0.0), (16, 1.0))),
        "o": Source(f"{block}.attn1.to_v", ((0, 0.0),)),
        "up": Source(linear, ((48, 0.0), (64, 1.0))),
    }
    with taps.read(net, [groups["up"][0]], side="input") as was, torch.no_grad():
        net(**given)
    scale = torch.rand(16) + 0.5
    divide(net, found["up"], scale)
    with taps.read(net, [groups["up"][0]], side="input") as now, torch.no_grad():
        net(**given)
    torch.testing.assert_close(now[groups["up"][0]], was[groups["up"][0]] / scale, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        net.get_submodule(groups["up"][0]).weight.mul_(scale)
    torch.testing.assert_close(families.output(net, given), before, rtol=1e-4, atol=1e-5)
    # the authors' code makes (b + 1 - s) / s of the bias of a gain
    head, b = nn.ModuleDict({"g": nn.Linear(1, 2)}), torch.tensor([0.25, -0.5])
    head["g"].bias.data.copy_(b)
    divide(head, Source("g", ((0, 1.0),)), torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(head["g"].bias.detach(), torch.tensor([-0.375, -0.875]))
