import pytest
import torch
from torch import nn

from interlayer.core.mixer import Attention
from interlayer.layers.activation.bilinear import Bilinear, evaluate, residual_stack, symmetric_product, with_attention
from interlayer.models import Transformer


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_tensor_and_symmetric_forms_are_the_layer():
    torch.manual_seed(0)
    layer, x = Bilinear(5, hidden=7).double(), draw(4, 5)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(torch.einsum("ijk,bj,bk->bi", layer.tensor(), x, x), layer(x), **exact)
    assert symmetric_product(x).shape == (4, 15) and layer.symmetric().shape == (5, 15)
    torch.testing.assert_close(symmetric_product(x) @ layer.symmetric().T, layer(x), **exact)


def test_symmetric_product_by_hand():
    assert symmetric_product(torch.tensor([2.0, 3.0, 5.0])).tolist() == [4, 6, 10, 9, 15, 25]


def test_antisymmetric_part_of_the_tensor_does_nothing():
    torch.manual_seed(0)
    layer, x = Bilinear(4, hidden=3).double(), draw(4)
    b = layer.tensor()
    odd = (b - b.transpose(1, 2)) / 2
    torch.testing.assert_close(torch.einsum("ijk,j,k->i", odd, x, x), torch.zeros_like(x), rtol=0, atol=1e-12)


def test_attention_before_it_with_a_residual_path():
    torch.manual_seed(0)
    width, heads, length = 6, 2, 5
    attention, layer = Attention(width, heads, causal=True).double(), Bilinear(width, hidden=8).double()
    nn.init.zeros_(attention.qkv.bias)
    nn.init.zeros_(attention.out.bias)
    x = draw(1, length, width)
    q, k, _ = attention.project(x)
    scores = (q @ k.transpose(-1, -2) / 3**0.5).masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf)
    values = attention.qkv.weight[2 * width :].unflatten(0, (heads, -1))  # [H, K, D]
    outs = attention.out.weight.unflatten(1, (heads, -1))  # [D, H, K]
    maps = torch.cat((torch.einsum("ihk,hkj->hij", outs, values), torch.eye(width, dtype=torch.float64)[None]))
    patterns = torch.cat((scores.softmax(-1)[0], torch.eye(length, dtype=torch.float64)[None]))
    c = with_attention(layer, maps)
    ours = torch.einsum("hts,gtr,hgiab,sa,rb->ti", patterns, patterns, c, x[0], x[0])
    torch.testing.assert_close(ours, layer(x + attention(x))[0], rtol=1e-11, atol=1e-11)


def test_residual_stack_is_a_polynomial():
    torch.manual_seed(0)
    layers = [Bilinear(3, hidden=4).double() for _ in range(2)]
    terms = residual_stack(layers)
    assert [t.ndim - 1 for t in terms] == [1, 2, 3, 4]
    x = y = draw(3)
    for layer in layers:
        y = y + layer(y)
    torch.testing.assert_close(evaluate(terms, x), y, rtol=1e-12, atol=1e-12)


def test_it_fills_the_mlp_slot_with_an_mlps_parameters():
    sizes = {"vocab": 20, "length": 8, "depth": 1, "width": 24, "heads": 2}
    plain, two = (Transformer(**sizes, mlp=m) for m in ("mlp", "bilinear"))
    counts = [sum(p.numel() for p in m.trunk.blocks[0].mlp.parameters() if p.ndim > 1) for m in (plain, two)]
    assert counts[0] == counts[1] == 8 * 24**2
    assert two(torch.zeros(1, 5, dtype=torch.long)).shape == (1, 5, 20)


def test_wrong_features_are_refused():
    with pytest.raises(ValueError, match=r"Bilinear: input \(2, 4\); expected \[..., 6\]"):
        Bilinear(6)(torch.zeros(2, 4))
