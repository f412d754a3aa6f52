"""Inputs that are rounded by the time of the call, calls by groups of times, and attention of diffusers with open operands."""

import copy

import pytest
import torch
from families import batch, model, output
from torch import nn

from interlayer.core.conditioning import AdaLNHead
from interlayer.core.process import View, drawn, times_of
from interlayer.core.quantizer import (
    Clock,
    Grid,
    Learning,
    Packed,
    Scaled,
    Timed,
    TimedRound,
    Tuned,
    observe,
    opening,
    packs,
    simulated,
    split,
)
from interlayer.core.quantizer.attention import Processor


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Net(nn.Module):
    """A linear map and a convolution of what comes with times."""

    def __init__(self):
        super().__init__()
        self.line, self.conv = nn.Linear(5, 6), nn.Conv1d(3, 2, 3, padding=1)

    def forward(self, x, t):
        return self.conv(self.line(x))


def held(bits, axis, scales):
    scales = torch.tensor(scales)
    return Scaled(Grid(bits, axis, "asymmetric"), scales, torch.full_like(scales, 2.0))


def test_each_example_is_rounded_by_the_scale_of_its_own_time():
    net, x, t = Net(), torch.randn(4, 3, 5), torch.tensor([0.0, 3.0, 9.0, 3.0])
    clock = Clock([2.0, 5.0], "t", 1)
    one, each = held(4, None, [0.1, 0.3, 0.7]), held(4, -2, [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])
    new = packs(
        net,
        {
            "line": Timed(net.line, Grid(8, 0), inputs=one, clock=clock),
            "conv": Timed(net.conv, Grid(8, 0), inputs=each, clock=clock),
        },
        clock=clock,
    )
    wanted = []
    for i, g in enumerate([0, 1, 2, 1]):
        fixed = copy.deepcopy(net)
        fixed.line = Packed(net.line, Grid(8, 0), inputs=Scaled(one.grid, one.scale[g], one.zero[g]))
        fixed.conv = Packed(net.conv, Grid(8, 0), inputs=Scaled(each.grid, each.scale[g], each.zero[g]))
        wanted.append(fixed(x[i : i + 1], t[i : i + 1]))
    wanted = torch.cat(wanted)
    torch.testing.assert_close(new(x, t), wanted)
    torch.testing.assert_close(new(x, t=t), wanted)
    torch.testing.assert_close(simulated(new)(x, t), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(new(x[1:2], torch.tensor(3)), wanted[1:2])  # one time without an axis
    torch.testing.assert_close(new(x, torch.tensor([3.0]))[1], wanted[1])  # one time for all
    again = copy.deepcopy(new)
    assert again.line.clock is again.conv.clock is not clock  # a copy has its own
    torch.testing.assert_close(again(x, t), wanted)
    exported = torch.export.export(
        new.eval(), (x, t), dynamic_shapes=({0: (b := torch.export.Dim("batch", min=2))}, {0: b})
    ).module()
    torch.testing.assert_close(exported(x[:3], t[:3]), wanted[:3])
    with torch.autocast("cpu", torch.bfloat16):
        assert new(x, t).isfinite().all()


def test_a_tuned_layer_is_the_packed_one_and_passes_gradients_to_weights_and_scales_of_its_time():
    net, x, t = Net(), torch.randn(2, 3, 5), torch.tensor([0.0, 0.0])
    clock = Clock([2.0], "t", 1)
    weights, inputs = Grid(4, 0, "asymmetric").fit(net.line.weight), held(4, -1, [[0.2] * 5, [0.5] * 5])
    tuned = Tuned(net.line, weights, Learning(inputs, clock))
    clock(net, (x, t), {})
    out = tuned(x)
    torch.testing.assert_close(out, Timed(net.line, weights, inputs=inputs, clock=clock)(x))
    torch.testing.assert_close(out, tuned.found()(x))
    out.square().sum().backward()
    assert net.line.weight.grad.abs().sum() > 0
    assert tuned.inputs.log.grad[0].abs().min() > 0 and not tuned.inputs.log.grad[1].any()
    # a scale's gradient is LSQ's, by differences of the codes held still
    rounding = Learning(held(4, None, [0.3]), Clock([], "t", 1))
    rounding.clock(net, (x, t), {})
    rounding(x).sum().backward()
    exact = x / 0.3 + 2
    inside = (exact >= 0) & (exact <= 15)
    slope = torch.where(inside, exact.round() - exact, exact.clamp(0, 15) - 2).sum() * 0.3
    torch.testing.assert_close(rounding.log.grad, slope[None], rtol=1e-4, atol=1e-4)


def test_calls_are_grouped_by_time_and_taken_apart_where_their_examples_are_at_several():
    calls = [
        {"x": torch.arange(4.0)[:, None], "t": torch.tensor([0, 900, 0, 500]), "note": "kept"},
        ({"x": torch.ones(2, 1), "t": torch.tensor(900)}, "a target"),
    ]
    found, clock = split("me", calls, "t", 1, 2)
    assert clock.edges == (700.0,) and clock.groups == 2
    assert [c["x"].flatten().tolist() for c in found[0]] == [[0, 2, 3]] and found[0][0]["t"].tolist() == [0, 0, 500]
    assert [c["x"].flatten().tolist() for c in found[1]] == [[1], [1, 1]]
    assert found[0][0]["note"] == "kept"
    assert clock.group([699.9, 700.0]).tolist() == [0, 1]
    assert len(split("me", calls, "t", 1, 9)[0]) == 3  # no more groups than times


def test_refusals_say_what_is_wrong():
    with pytest.raises(ValueError, match="me: a call with arguments x; expected mappings of arguments with 't'"):
        split("me", [{"x": torch.zeros(1)}], "t", 1, 2)
    with pytest.raises(ValueError, match="me: a call with Tensor"):
        split("me", [torch.zeros(1)], "t", 1, 2)
    clock = Clock([], "t", 1)
    with pytest.raises(ValueError, match="no time; expected a call of the whole model"):
        clock.pick(torch.ones(1), torch.ones(2, 2))
    clock(nn.Identity(), (0, torch.zeros(2)), {})
    assert clock.pick(torch.ones(1), torch.ones(6, 2)).shape == (6, 1)  # heads of an example stand together
    with pytest.raises(ValueError, match="3 examples in a layer, 2 times"):
        clock.pick(torch.ones(1), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"Timed: scales of inputs \(2,\)"):
        Timed(nn.Linear(2, 2), Grid(4, 0), inputs=held(4, None, [1.0, 1.0]), clock=clock)
    with pytest.raises(ValueError, match=r"which takes \(input\); expected a diffusion model"):
        times_of("me", nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match="me: no data for a UNet2DConditionModel; expected a DiTTransformer2DModel or UNet2DModel"
    ):
        drawn("me", model("unet"), steps=2, examples=1)


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_open_attention_of_diffusers_gives_the_same_outputs(name):
    net, given = model(name), batch(name)
    work, opens, rows = opening(net)
    assert opens and not rows
    torch.testing.assert_close(output(work, given), output(net, given), rtol=1e-4, atol=1e-5)


def test_open_attention_of_diffusers_keeps_masks_norms_and_images():
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    plain = Attention(
        8, cross_attention_dim=6, heads=2, dim_head=4, norm_num_groups=4, residual_connection=True, rescale_output_factor=2.0,
        qk_norm="layer_norm", cross_attention_norm="layer_norm", processor=AttnProcessor2_0(),
    ).eval()  # fmt: skip
    work = opening(nn.Sequential(plain))[0][0]
    assert isinstance(work.processor, Processor)
    image, text = torch.randn(2, 8, 3, 3), torch.randn(2, 5, 6)
    mask = torch.zeros(2, 1, 5).index_fill(2, torch.tensor([4]), -1e4)
    torch.testing.assert_close(work(image, text, mask), plain(image, text, mask))
    assert not torch.allclose(work(image, text, mask), work(image, text))


def test_operands_are_rounded_by_time():
    clock = Clock([0.5], "t", 1)
    each = TimedRound(held(4, None, [0.1, 1.0]), clock)
    clock(each, (0, torch.tensor([0.0, 1.0])), {})
    assert each(torch.full((2, 1, 3), 0.44)).unique().tolist() == pytest.approx([0.0, 0.4])


def test_ranges_by_feature_of_convolutions_suit_every_way_to_choose_them():
    net, x = nn.Sequential(nn.Conv2d(3, 2, 1)), torch.randn(4, 3, 5, 5) * torch.tensor([1.0, 5, 25]).view(1, 3, 1, 1)
    for by in ("minmax", "mse", 99.0):
        found = observe(net, x, {"0": Grid(4, -3, "asymmetric")}, by=by)["0"]
        rows = x.movedim(1, 0).flatten(1)
        torch.testing.assert_close(found.scale, Grid(4, 0, "asymmetric").fit(rows, by).scale)
        assert found.grid.axis == -3 and found.fake(x).shape == x.shape


def test_a_u_net_is_sampled_with_classes_of_its_own():
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=(4, 8), in_channels=1, out_channels=1, block_out_channels=(4,), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), num_class_embeds=3, add_attention=False,
    )  # fmt: skip
    calls = drawn("me", net, steps=2, examples=2, seed=3)
    assert [c["sample"].shape for c in calls] == [(2, 1, 4, 8)] * 2 and "class_labels" in calls[0]
    assert isinstance(View(net, None, clip=None).conditions, tuple)


def test_a_head_of_a_diffusion_transformer_knows_its_packed_convolution():
    head = AdaLNHead(8, nn.Conv2d(8, 2, 3, padding=1))
    torch.nn.init.normal_(head.out.weight)
    x, c = torch.randn(2, 4, 4, 8), torch.randn(2, 8)
    wanted = head(x, c)
    head.out = Packed(head.out, Grid(8, 0))
    torch.testing.assert_close(head(x, c), wanted, rtol=0.1, atol=0.1)
