import copy

import families
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

from interlayer import load
from interlayer.cli import app
from interlayer.core import taps
from interlayer.core.process import DDIM, Diffusion, View, sample
from interlayer.core.quantizer import Corrected, Grid, simulated
from interlayer.transform.quantize.ditas import INPUTS, DiTAS

BLOCK = "transformer_blocks.0"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def packed(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, Corrected)}


def test_scales_are_the_authors():
    tops, columns = torch.tensor([8.0, 0.5, 2.0]), torch.tensor([0.1, 0.4, 0.2])
    # their expression gave these at alpha 0.5 and 0.75
    torch.testing.assert_close(
        DiTAS().scale(tops, columns, 0.5), torch.tensor([8.94427, 1.11803, 3.16228]), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        DiTAS().scale(tops, columns, 0.75), torch.tensor([8.45897, 0.74767, 2.51487]), rtol=1e-5, atol=0
    )


def test_without_data_the_model_samples_and_ranges_are_those_of_all_steps():
    net, tops = families.model("dit"), {}
    plan = DiTAS(alphas=1, steps=5, examples=3, seed=2)
    calls = plan.drawn(net)
    assert [c["timestep"][0].item() for c in calls] == sorted({c["timestep"][0].item() for c in calls}, reverse=True)
    assert len(calls) == 5 and calls[0]["hidden_states"].shape == (6, 2, 4, 4)  # with a class and without one
    assert calls[0]["class_labels"][3:].tolist() == [10] * 3
    name = f"{BLOCK}.ff.net.2"
    with taps.watch(net, [name], lambda n, x: tops.setdefault(n, []).append(x.abs().amax((0, 1))), side="input"):
        list(taps.feed(net, calls))
    most = torch.stack(tops[name]).amax(0)
    columns = net.get_submodule(name).weight.detach().abs().amax(0)
    new = plan.plan(net).apply()
    torch.testing.assert_close(new.get_submodule(name).divisor, DiTAS().scale(most, columns, 0.5))
    late = DiTAS(alphas=1).plan(net, [calls[-1]]).apply().get_submodule(name).divisor
    assert bool((late <= new.get_submodule(name).divisor + 1e-6).all()) and not torch.equal(late, most)


def test_smoothing_is_exact_and_only_the_second_map_of_an_mlp_is_divided_in_the_call():
    net, given = families.model("dit"), families.batch("dit")
    new = DiTAS(bits=8, alphas=1, rank=0).plan(net, given).apply()
    assert {n for n, m in packed(new).items() if m.divisor is not None} == {
        f"transformer_blocks.{i}.ff.net.2" for i in range(4)
    }
    floats = copy.deepcopy(new)  # the same scales without any rounding
    for name, layer in packed(new).items():
        exact = nn.Linear(layer.shape[1], layer.shape[0])
        exact.load_state_dict({"weight": layer.weight, "bias": layer.bias})
        floats.set_submodule(name, exact)
        if layer.divisor is not None:
            exact.register_forward_pre_hook(lambda m, x, d=layer.divisor: x[0] / d)
    wanted = families.output(net, given)
    for got, off in ((floats, 0.01), (new, 0.02)):
        assert (families.output(got, given) - wanted).norm() < off * wanted.norm()


def test_the_search_takes_the_alpha_with_the_least_error_over_all_steps():
    net, given = families.model("dit"), families.batch("dit")
    batches = [given, {**given, "hidden_states": 3 * given["hidden_states"]}]
    plan = DiTAS(alphas=5, rank=0).plan(net, batches)
    name = f"{BLOCK}.ff.net.2"
    with taps.read(net, [name], side="input", every=True) as seen:
        list(taps.feed(net, batches))
    xs, w = [x.flatten(0, 1) for x in seen[name]], net.get_submodule(name).weight.detach()
    most, errors = torch.cat(xs).abs().amax(0), []
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        s = DiTAS().scale(most, w.abs().amax(0), alpha)
        q = Grid(4, 0, kind="asymmetric").fit(w * s).fake(w * s)
        errors.append(
            sum(float((F.linear(INPUTS.by_token(x / s).fake(x / s), q) - F.linear(x, w)).square().sum()) for x in xs)
        )
    best = (0.0, 0.25, 0.5, 0.75, 1.0)[torch.tensor(errors).argmin()]
    assert f"alpha {best:.2f}" in {r.name: r.why for r in plan.touched}[name]
    told = {r.name: r.why.partition("alpha ")[2] for r in plan.touched}
    assert told[f"{BLOCK}.attn1.to_q"] == told[f"{BLOCK}.attn1.to_v"]  # they read one tensor


def test_four_bits_are_stored_as_such_and_a_product_of_low_rank_brings_the_model_nearer():
    net, given = families.model("dit"), families.batch("dit")
    wanted, off = families.output(net, given), {}
    for rank in (0, 32):
        new = DiTAS(rank=rank, alphas=3).plan(net, given).apply()
        off[rank] = float((families.output(new, given) - wanted).norm() / wanted.norm())
        assert all(m.left is None if rank == 0 else m.left.shape[1] == 1 for m in packed(new).values())
    assert off[32] < off[0] < 0.1
    layer = packed(new)[f"{BLOCK}.ff.net.2"]
    assert layer.codes.numel() == layer.packed_weights // 2
    torch.testing.assert_close(
        families.output(simulated(new), given), families.output(new, given), rtol=1e-3, atol=1e-4
    )


def test_w8a8_samples_almost_as_the_whole_model_from_end_to_end():
    net = families.model("dit")

    def drawn(model):
        view = View(model, Diffusion(variance="learned"), clip=None)
        return sample(view, view.process, DDIM(), (2, 2, 4, 4), torch.tensor([1, 2]), seed=1, steps=5)

    wanted = drawn(net)
    off = [
        float((drawn(DiTAS(bits=bits, alphas=3, steps=5, examples=2).plan(net).apply()) - wanted).norm())
        for bits in (8, 4)
    ]
    assert off[0] < 0.3 * off[1] and off[1] < 0.5 * wanted.norm()


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit", "t5", "unet", "dit"])
def test_families_are_rounded_saved_and_generate(name, tmp_path):
    families.transformed(DiTAS(alphas=2), name, tmp_path / name, refuses="packed weights")


@pytest.mark.parametrize("name", ["twice", "lstm", "mha", "resnet"])
def test_models_without_blocks_of_tokens_are_refused(name):
    with pytest.raises(ValueError, match="no linear map of a repeated block that reads tokens"):
        DiTAS().plan(families.model(name), families.batch(name))


def test_the_plan_names_every_map_that_stays_in_float():
    net, given = families.model("dit"), families.batch("dit")
    plan = DiTAS(alphas=1, at=[f"{BLOCK}.**", "proj_out_2"]).plan(net, given)
    assert {r.name for r in plan.touched} == {
        f"{BLOCK}.{n}"
        for n in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    }
    why = {r.name: r.why for r in plan.skipped}
    assert why["proj_out_2"] == "in no repeated block, stays in float"
    assert why[f"{BLOCK}.norm1.linear"] == "reads no tokens, stays in float"
    assert all(
        n in why for n, m in net.named_modules() if isinstance(m, nn.Linear) and n not in {r.name for r in plan.touched}
    )


def test_refusals_say_what_is_wrong():
    for options in ({"bits": 9}, {"alphas": 0}, {"rank": -1}, {"steps": 0}, {"examples": 0}):
        with pytest.raises(ValueError, match="ditas: "):
            DiTAS(**options)
    with pytest.raises(ValueError, match="no data for a GPT2LMHeadModel"):
        DiTAS().plan(families.model("gpt2"))
    given = families.batch("dit")
    with pytest.raises(ValueError, match="not finite"):
        DiTAS().plan(families.model("dit"), {**given, "hidden_states": given["hidden_states"] * torch.nan})
    with pytest.raises(ValueError, match="no calibration data"):
        DiTAS().plan(families.model("dit"), [])


def test_another_scheduler_draws_other_times():
    from diffusers import DDIMScheduler

    net = families.model("dit")
    calls = DiTAS(steps=2, examples=1, scheduler=DDIMScheduler(num_train_timesteps=100)).drawn(net)
    assert [int(c["timestep"][0]) for c in calls] == [50, 0]


def test_the_command_needs_no_data_and_leaves_a_folder_that_loads(tmp_path):
    families.model("dit").save_pretrained(tmp_path / "start")
    options = [word for option in ("steps=2", "examples=1", "alphas=1") for word in ("-o", option)]
    out = CliRunner().invoke(
        app, ["apply", "ditas", "--model", f"hf:{tmp_path / 'start'}", *options, "--out", str(tmp_path / "there")]
    )
    assert out.exit_code == 0 and "alpha 0.50, divided in transformer_blocks.0.norm1.linear" in out.output, out.output
    new = load(tmp_path / "there")
    assert len(packed(new)) == 24 and families.output(new, families.batch("dit")).isfinite().all()


def test_half_precision():
    net, given = families.model("dit"), families.batch("dit")
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()}
    new = DiTAS(alphas=2, steps=2, examples=2).plan(net.bfloat16()).apply()
    out = families.output(new, half)
    assert out.dtype == torch.bfloat16 and (out - families.output(net, half)).norm() < 0.1 * out.norm()
