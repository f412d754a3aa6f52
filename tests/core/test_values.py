"""Values of attention, recorded and put back."""

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from interlayer.core.values import attentions, record, replay
from interlayer.models import DiT


def model(**changes):
    torch.manual_seed(0)
    new = DiT(1, 8, patch=4, classes=3, depth=2, width=8, heads=2, learned_variance=False, **changes)
    for p in new.parameters():
        nn.init.normal_(p, std=0.5)
    return new.eval()


def test_which_layers_are_self_attention():
    assert attentions(model()) == {f"blocks.{i}.mixer": f"blocks.{i}.mixer.qkv" for i in (0, 1)}
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",), cross_attention_dim=6,
        attention_head_dim=4, mid_block_type=None,
    )  # fmt: skip
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert attentions(unet) == {name: f"{name}.to_v"}  # attn2 reads the text
    sd3 = SD3Transformer2DModel(
        sample_size=4, in_channels=2, out_channels=2, num_layers=2, attention_head_dim=8, num_attention_heads=1,
        joint_attention_dim=6, caption_projection_dim=8, pooled_projection_dim=5, pos_embed_max_size=4,
    )  # fmt: skip
    assert list(attentions(sd3).values()) == [f"transformer_blocks.{i}.attn.to_v" for i in (0, 1)]
    assert attentions(nn.Linear(2, 2)) == {}


def naive(net, x, y, source):
    """Two blocks of attention by hand, the second with the values that it has for another input."""
    t = torch.full((2,), 500.0)

    def until(x, y):
        h, c = net.position.embed(net.patches(x)), net.condition(t, y)
        return net.blocks[0](h, c), c

    def parts(h, c):
        block = net.blocks[1]
        shift, scale, *rest = block.modulation(c, 1)
        return (*block.mixer.qkv(block.norm(h) * (1 + scale) + shift).chunk(3, -1), rest)

    (h, c), other = until(x, y), until(*source)
    block, (q, k, _, (gate, *rest)), v = net.blocks[1], parts(h, c), parts(*other)[2]
    heads = [
        (qh @ kh.transpose(1, 2) / 2).softmax(-1) @ vh
        for qh, kh, vh in zip(q.split(4, -1), k.split(4, -1), v.split(4, -1), strict=True)
    ]
    h = h + gate * block.mixer.out(torch.cat(heads, -1))
    shift, scale, gate = rest
    h = h + gate * block.mlp(block.norm(h) * (1 + scale) + shift)
    out = net.head(h, c).unflatten(1, (2, 2)).unflatten(-1, (4, 4, 1))
    return out.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def test_values_are_exchanged_as_by_hand():
    net, name = model(), ["blocks.1.mixer.qkv"]
    x, other, t = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.full((2,), 500.0)
    zero, one = torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long)
    with torch.no_grad():
        plain = net(x, t, one)
        with record(net, name) as kept:
            net(other, t, zero)
        with replay(net, kept, 1):
            found = net(x, t, one)
        torch.testing.assert_close(found, naive(net, x, one, (other, zero)), rtol=1e-4, atol=1e-4)
        assert (found - plain).abs().max() > 1e-2 and torch.equal(net(x, t, one), plain)  # no hook is left


def test_steps_come_back_in_reverse_order_and_stages_in_their_own():
    net = nn.Sequential()
    net.to_v = nn.Identity()
    with record(net, ["to_v"]) as kept:
        for i in range(6):
            net.to_v(torch.full((1, 2, 3), float(i)))
    with replay(net, kept, 2):
        seen = [net.to_v(torch.zeros(2, 2, 3)) for _ in range(6)]  # twice as many items: guidance
    assert [float(v[1, 0, 0]) for v in seen] == [4, 5, 2, 3, 0, 1] and seen[0].shape == (2, 2, 3)
    with replay(net, kept, 2), pytest.raises(ValueError, match=r"values \(1, 2, 3\) of the source for \(1, 4, 3\)"):
        net.to_v(torch.zeros(1, 4, 3))
