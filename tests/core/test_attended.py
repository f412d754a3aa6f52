import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer.core.blockwise import Part
from interlayer.core.mixer import Attention
from interlayer.core.quantizer import Form, attended, forms
from tests.families import batch, model

WIDTH, HEADS, K, LENGTH = 4, 2, 2, 3


def waves(first, *shape):
    """Numbers that any program gives."""
    return (torch.arange(first, first + math.prod(shape)).double() * 1.7).sin().float().view(*shape)


class Block(nn.Module):
    """Causal attention with separate maps, grouped heads and rotations, as the authors' code is given it."""

    def __init__(self, kv, rotates):
        super().__init__()
        sizes = {"q": HEADS, "k": kv, "v": kv}
        self.rotates = rotates
        self.maps = nn.ModuleDict({n: nn.Linear(WIDTH, h * K, bias=False) for n, h in sizes.items()})
        with torch.no_grad():
            for i, layer in enumerate(self.maps.values()):
                layer.weight.copy_(waves(10 * i, *layer.weight.shape))

    def turn(self, x):
        angle = torch.arange(x.shape[-2]).float()[:, None]
        a, b = x.split(1, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def heads(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, K)).transpose(1, 2) for layer in self.maps.values())
        return (self.turn(q), self.turn(k), v) if self.rotates else (q, k, v)

    def forward(self, x):
        return (
            F.scaled_dot_product_attention(*self.heads(x), is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        )


def part(block, *inputs):
    return Part("", block, [((x,), {}) for x in inputs], [])


# The loss that the authors' code gives for these errors: plain heads, then rotated ones of which two share keys and values. It
# multiplies each mean by 2 and takes the mean over heads that share, where ours is the sum.
THEIRS = {
    (2, False): {"q": 118.942062 / 4, "k": 95.342270 / 4, "v": 13.088747 / 2},
    (1, True): {"q": 66.129433 / 4, "k": 2 * 23.477434 / 4, "v": 2 * 6.532604 / 2},
}


@pytest.mark.parametrize(("kv", "rotates"), THEIRS)
def test_losses_are_those_of_the_authors(kv, rotates):
    block, x = Block(kv, rotates), waves(100, 2, LENGTH, WIDTH)
    found = forms(part(block, x[:1], x[1:]), dict(block.maps.named_children()))
    for name, loss in THEIRS[kv, rotates].items():
        (form,) = found[name]
        error = waves(50, *block.maps[name].weight.shape)[form.rows]
        assert float(form.loss(error)) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("kv", [1, 3])
def test_on_one_text_the_forms_are_the_mean_squared_changes(kv):
    """Of scores by an error in queries or keys, of what the heads read by one in values: by running the layer again."""
    torch.manual_seed(0)
    layer, x = Attention(12, 3, kv_heads=kv, causal=True).requires_grad_(False), torch.randn(1, 7, 12)
    found = forms(part(layer, x), {"qkv": layer.qkv, "out": layer.out})
    assert [tuple(f.rows.shape) for f in found["qkv"]] == [(3, 4), (kv, 4), (kv, 4)]
    start = layer.qkv.weight.clone()
    q, k, v = layer.project(x)
    share = 3 // kv
    later = torch.ones(7, 7).triu(1).bool()
    scores = (q @ k.repeat_interleave(share, 1).mT / 2).masked_fill(later, -torch.inf).softmax(-1)
    for form, role in zip(found["qkv"], "qkv", strict=True):
        error = torch.randn(*form.rows.shape, 12)
        layer.qkv.weight[form.rows] = start[form.rows] + error
        new = dict(zip("qkv", layer.project(x), strict=True))
        layer.qkv.weight.copy_(start)
        if role == "v":
            moved = scores @ (new["v"] - v).repeat_interleave(share, 1)
            wanted = moved.square().sum() / 7
        else:
            moved = new["q"] @ new["k"].repeat_interleave(share, 1).mT - q @ k.repeat_interleave(share, 1).mT
            wanted = moved.square().sum() / 7**2
        torch.testing.assert_close(form.loss(error), wanted, rtol=1e-4, atol=0)
        error.requires_grad_()
        form.loss(error).backward()
        torch.testing.assert_close(error.grad, 2 * form.slope(error.detach()), rtol=1e-4, atol=1e-4)
    (out,) = found["out"]
    error = torch.randn(1, 12, 12)
    read = (scores @ v.repeat_interleave(share, 1)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out.loss(error), (read @ error[0].T).square().sum() / 7, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("name", "layer", "roles", "rows"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn", ["query", "key", "value"], (2, 8)),  # fused
        ("llama", "model.layers.0.self_attn.k_proj", ["key"], (1, 8)),  # rotated, shared by two heads
        ("bert", "bert.encoder.layer.0.attention.self.value", ["value"], (2, 8)),
        ("bart", "model.decoder.layers.0.encoder_attn.k_proj", ["key"], (2, 8)),  # of the encoder's outputs
    ],
)
def test_maps_are_found_by_what_attention_reads(name, layer, roles, rows):
    net = model(name)
    found = [p for p in attended(lambda: net(**batch(name)), {layer: net.get_submodule(layer)}) if p.layer == layer]
    assert not found or len(roles) == 3 or roles == ["value"]  # scores need both queries and keys
    half = layer.rsplit(".", 1)[0]
    there = {n: m for n, m in net.named_modules() if n.startswith(half) and hasattr(m, "weight")}
    found = [p for p in attended(lambda: net(**batch(name)), there) if p.layer == layer]
    assert [p.role for p in found] == roles and {tuple(p.rows.shape) for p in found} == {rows}
    assert torch.equal(
        torch.cat([p.rows.flatten() for p in found]).sort().values, torch.arange(len(roles) * rows[0] * 8)
    )


class Odd(nn.Module):
    """Attention whose queries are sums over positions, whose keys are no linear map's, and a map that is called twice."""

    def __init__(self):
        super().__init__()
        self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        q, v = self.q(x).cumsum(1)[:, None], self.v(self.v(x))[:, None]
        return F.scaled_dot_product_attention(q, x[:, None], v)[:, 0]


def test_other_maps_keep_their_own_output():
    net, x = Odd(), torch.randn(2, 5, 4)
    there = dict(net.named_children())
    assert not attended(lambda: net(x), there)
    for form in (f for each in forms(part(net, x), there).values() for f in each):
        assert form.left is None and torch.equal(form.rows, torch.arange(4)[None])
    assert float(Form(torch.arange(2)[None], None, torch.eye(3)[None]).loss(torch.ones(1, 2, 3))) == 6


def test_hooks_and_gradients_are_gone_afterwards():
    layer, x = Attention(8, 2), torch.randn(1, 3, 8)
    before = layer(x).detach()
    forms(part(layer, x), {"qkv": layer.qkv})
    assert not layer.qkv._forward_hooks and layer.qkv.weight.grad is None and torch.equal(layer(x), before)
