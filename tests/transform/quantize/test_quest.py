import copy
import functools

import families
import pytest
import torch
from torch import nn

from interlayer.core import taps
from interlayer.core.process import DDIM, adapt, drawn, sample
from interlayer.core.quantizer import Clock, Grid, Learning, Packed, Scaled, Timed, TimedRound, observe, simulated
from interlayer.transform.quantize.quest import QuEST, moved, split

SHORT = {"steps": 2, "examples": 2, "epochs": 0}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@functools.cache
def planned():
    """A U-Net that reads text, a batch, and its plan."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    net = UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None, cross_attention_dim=8,
        attention_head_dim=4,
    ).eval()  # fmt: skip
    given = families.batch("unet")
    return net, given, QuEST(**SHORT, share=0.3).plan(net, given)


def kinds(plan):
    return {r.name: r.why.rpartition("; ")[2] for r in plan.touched if r.what != "attention"}


def test_grids_of_times_and_gradients_of_scales_are_the_authors():
    draw = torch.Generator().manual_seed(0)
    early, late = (
        torch.randn(2, 4, 3, generator=draw) * torch.tensor([1.0, 3, 9]),
        0.25 * torch.randn(2, 4, 3, generator=draw),
    )
    net, grid = nn.Sequential(nn.Linear(3, 2)), Grid(4, -1, "asymmetric")
    found = [observe(net, x, {"0": grid})["0"] for x in (late, early)]
    held = Scaled(grid, *(torch.stack([getattr(f, k) for f in found]) for k in ("scale", "zero")))
    # their quantiser of times 900 and 0, by channel, ranges by "max"
    wanted = [[0.0432186, 0.0699427, 0.0392809], [0.2087214, 0.7117759, 2.1450307]]
    torch.testing.assert_close(held.scale, torch.tensor(wanted), rtol=1e-5, atol=0)
    assert held.zero.tolist() == [[9, 6, 7], [5, 9, 10]]
    learning = Learning(held, Clock([450], "t", 1))
    learning.clock(net, (0, torch.tensor([0, 900])), {})
    out = learning(torch.tensor([[[0.7, -2.0, 30.0]]]).expand(2, 1, 3))
    wanted = [[0.2593114, -0.4196559, 0.3142473], [0.6261641, -2.1353278, 10.7251539]]
    torch.testing.assert_close(out[:, 0], torch.tensor(wanted), rtol=1e-5, atol=0)
    out[1].sum().backward()
    torch.testing.assert_close(  # of the logarithm of the scale
        learning.log.grad[1], torch.tensor([-0.3537536, -0.1901269, 5.0]) * held.scale[1], rtol=1e-4, atol=1e-6
    )


def test_layers_with_temporal_information_are_found_by_what_moves_their_inputs():
    net, given = families.model("unet"), families.batch("unet")
    found = {n for n, kind in kinds(QuEST(**SHORT).plan(net, given)).items() if kind.startswith("temporal")}
    assert found == {
        n for n, _ in net.named_modules() if "time_emb" in n and isinstance(net.get_submodule(n), nn.Linear)
    }
    assert not any("attn2.to_k" in n for n in found)  # it reads the text
    found = {
        n
        for n, kind in kinds(
            QuEST(**SHORT, at=["transformer_blocks.1.norm1.**", "proj_out_1"]).plan(families.model("dit"))
        ).items()
        if kind.startswith("temporal")
    }
    maps = ("norm1.emb.timestep_embedder.linear_1", "norm1.emb.timestep_embedder.linear_2", "norm1.linear")
    assert found == {f"transformer_blocks.1.{n}" for n in maps} | {"proj_out_1"}
    there = {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear)}
    for t in (5, 0):  # found too where all calls are at one time
        one = [{**given, "timestep": torch.tensor([t, t])}]
        by_time, by_item = moved(net, *split("me", one, "timestep", 1, 4), there)
        assert set(by_time) - set(by_item) == {n for n in there if "time_emb" in n}


def test_sensitive_layers_are_those_that_harm_the_output_most_alone_within_the_share():
    net, given, plan = planned()
    what, sizes = kinds(plan), {n: net.get_submodule(n).weight.numel() for n in kinds(plan)}
    harm = {
        r.name: float(r.why.partition("error ")[2].partition(" ")[0]) for r in plan.touched if r.what != "attention"
    }
    sensitive = [n for n, k in what.items() if k.startswith("sensitive")]
    rest = [n for n, k in what.items() if k == "rounded only"]
    spent = sum(sizes[n] for n in sensitive)
    assert sensitive and rest and spent <= 0.3 * sum(sizes.values())
    room = 0.3 * sum(sizes.values()) - spent
    for n in rest:  # a layer that was passed over harms less, or had no room when its turn came
        before = sum(sizes[s] for s in sensitive if harm[s] >= harm[n])
        assert harm[n] <= min(harm[s] for s in sensitive) or before + sizes[n] > 0.3 * sum(sizes.values())
    assert room >= 0
    name = sensitive[0]  # its error, by hand
    calls, clock = split("me", [given], "timestep", 1, 10)
    new = plan.apply()
    alone, off = copy.deepcopy(net), []
    layer = copy.deepcopy(new.get_submodule(name))
    layer.clock = clock
    alone.register_forward_pre_hook(clock, with_kwargs=True)
    alone.set_submodule(name, layer)
    for (call,) in calls:
        whole = families.output(net, call)
        off.append(float((families.output(alone, call) - whole).square().sum() / whole.square().sum()))
    assert harm[name] == pytest.approx(sum(off) / len(off), rel=0.02)


def test_fine_tuning_moves_only_what_the_plan_names_and_brings_the_outputs_nearer():
    net = families.model("dit")
    calls = drawn("me", net, steps=4, examples=2)
    built = {
        e: QuEST(epochs=e, groups=2, share=0.1, at=["transformer_blocks.3.**", "proj_out_*"]).plan(net, calls)
        for e in (0, 4)
    }
    plain, tuned = (built[e].apply() for e in (0, 4))
    moved = set()
    for n, m in plain.named_modules():
        if isinstance(m, Timed):
            other = tuned.get_submodule(n)
            assert torch.equal(m.scale, other.scale)  # grids of weights stay
            if not torch.equal(m.codes, other.codes) or not torch.equal(m.bias, other.bias):
                moved.add(n)
            assert not torch.equal(m.input_scale, other.input_scale) and torch.equal(m.input_zero, other.input_zero)
    named = {r.name for r in built[4].touched if "fine-tuned" in r.why}
    assert moved <= named and len(moved) > 0.8 * len(named)
    count = sum(p.numel() for n in named for p in net.get_submodule(n).parameters())
    assert built[4].options["trained"] == round(count / sum(p.numel() for p in net.parameters()), 4)
    with torch.no_grad():
        error = [
            sum(float((taps.first(m(**c)) - taps.first(net(**c))).square().sum()) for c in calls)
            for m in (plain, tuned)
        ]
    assert error[1] < 0.8 * error[0]


def test_all_weights_have_four_bits_and_inputs_a_grid_for_each_time_and_feature():
    net, given = families.model("dit"), families.batch("dit")
    new = QuEST(**SHORT).plan(net, given).apply()
    packed = {n: m for n, m in new.named_modules() if isinstance(m, Packed)}
    assert set(packed) == {n for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    ends = {"pos_embed.proj", "proj_out_2"}
    for n, m in packed.items():
        assert m.codes.numel() == m.packed_weights // 2
        assert m.inputs.bits == (8 if n in ends else 4)
        assert m.input_scale.shape == ((2,) if n in ends else (2, m.shape[1]))
    assert all(
        m.input_scale.shape == (2,)
        for m in QuEST(**SHORT, inputs=8, at="transformer_blocks.0.**").plan(net, given).apply().modules()
        if isinstance(m, Timed)
    )
    torch.testing.assert_close(
        families.output(simulated(new), given), families.output(new, given), rtol=1e-3, atol=1e-4
    )
    for call in split("me", [given], "timestep", 1, 9)[0]:  # an example of a batch is rounded as it is alone
        which = (given["timestep"] == call[0]["timestep"]).nonzero()[0, 0]
        torch.testing.assert_close(
            families.output(new, call[0])[0], families.output(new, given)[which], rtol=1e-3, atol=1e-4
        )


def test_probabilities_of_attention_have_bits_of_their_own_or_stay_in_float():
    net, given = families.model("dit"), families.batch("dit")
    for softmax, wanted in ((6, 6), (16, None)):
        new = QuEST(**SHORT, softmax=softmax, at="transformer_blocks.0.attn1.**").plan(net, given).apply()
        attend = new.transformer_blocks[0].attn1.attend
        assert isinstance(attend.queries, TimedRound) and attend.queries.grid.bits == 4
        assert (attend.probabilities.grid.bits if isinstance(attend.probabilities, TimedRound) else None) == wanted


def test_without_data_a_u_net_is_drawn_rounded_and_samples():
    from diffusers import DDIMScheduler, UNet2DModel

    net = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("AttnDownBlock2D",), up_block_types=("UpBlock2D",), attention_head_dim=4,
    ).eval()  # fmt: skip
    view = adapt(net, DDIMScheduler())
    new = QuEST(steps=4, groups=4, examples=2, epochs=1, scheduler=DDIMScheduler()).plan(net).apply()
    small, shape = adapt(new, DDIMScheduler()), (2, 1, 8, 8)
    a, b = (sample(v, v.process, DDIM(), shape, seed=1, steps=4, clip=v.clip) for v in (view, small))
    assert 0 < (a - b).norm() < 0.3 * a.norm() and b.abs().max() <= 1  # the scheduler's bound


def test_a_u_net_that_reads_text_is_rounded_and_saved(tmp_path):
    quest = QuEST(epochs=1, at="up_blocks.0.attentions.0.**")
    new = families.transformed(quest, "unet", tmp_path / "new", refuses="packed weights")
    assert any(isinstance(m, TimedRound) for m in new.modules())


@pytest.mark.parametrize("name", ["gpt2", "vit", "twice"])
def test_models_that_take_no_times_are_refused(name):
    with pytest.raises(ValueError, match=r"quest: .*expected a diffusion model"):
        QuEST().plan(families.model(name), families.batch(name))


def test_refusals_say_what_is_wrong():
    for options in (
        {"bits": 9},
        {"inputs": 1},
        {"softmax": 12},
        {"groups": 0},
        {"share": 2},
        {"epochs": -1},
        {"lr": 0},
        {"steps": 0},
    ):
        with pytest.raises(ValueError, match="quest: "):
            QuEST(**options)
    with pytest.raises(ValueError, match="no data for a UNet2DConditionModel"):
        QuEST().plan(families.model("unet"))
    with pytest.raises(ValueError, match="no calibration data"):
        QuEST().plan(families.model("dit"), [])
    given = families.batch("dit")
    with pytest.raises(ValueError, match="expected mappings of arguments with 'timestep'"):
        QuEST().plan(families.model("dit"), given["hidden_states"])
    with pytest.raises(ValueError, match="not finite"):
        QuEST(**SHORT).plan(families.model("dit"), {**given, "hidden_states": given["hidden_states"] * torch.nan})
