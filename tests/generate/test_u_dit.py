import pytest
import torch
import torch.nn.functional as F

import interlayer
from interlayer.core.cost import flops, parameters
from interlayer.core.data import DataShape
from interlayer.core.process import Ancestral, Diffusion, Guided, sample
from interlayer.generate.u_dit import UDiT
from interlayer.generate.u_dit.parts import DownSampledAttention, RepFeedForward, merge, split


def filled(model, seed=3):
    """Every parameter drawn anew, in the order of their names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=generator) * (0.2 if p.ndim > 1 else 0.1))
    return model.eval()


def inputs(channels=2, side=16):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(3, channels, side, side, generator=generator),
        torch.tensor([0, 17, 999]),
        torch.tensor([0, 3, 5]),
    )


def naive_attention(layer, x):
    """One group of pixels after the other: each query against the keys of the pixels that it shares a place in the tile with."""
    _, rows, columns, width = x.shape
    kernel, k = layer.sampler.weight, layer.sampler.weight.shape[-1] // 2
    seen = x.clone()
    for i in range(-k, k + 1):
        for j in range(-k, k + 1):
            shifted = torch.zeros_like(x)
            a, b = slice(max(0, -i), rows - max(0, i)), slice(max(0, -j), columns - max(0, j))
            c, d = slice(max(0, i), rows - max(0, -i)), slice(max(0, j), columns - max(0, -j))
            shifted[:, a, b] = x[:, c, d]
            seen = seen + shifted * kernel[:, 0, i + k, j + k]
    seen = seen + layer.sampler.bias
    q, key, v = layer.qkv(seen).chunk(3, -1)
    out = torch.zeros_like(x)
    size = width // layer.heads
    frequency = 10000.0 ** (-torch.arange(size // 4) / (size // 4))
    for di in range(2):
        for dj in range(2):
            places = [(r, c) for r in range(rows // 2) for c in range(columns // 2)]
            for h in range(layer.heads):
                part = slice(h * size, (h + 1) * size)

                def turned(t, r, c, di=di, dj=dj, part=part):
                    t = F.normalize(t[:, 2 * r + di, 2 * c + dj, part], dim=-1)
                    angle = torch.cat((c * frequency, r * frequency))
                    first, second = t.chunk(2, -1)
                    return torch.cat(
                        (first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()), -1
                    )

                keys = torch.stack([turned(key, *p) for p in places], 1)
                values = torch.stack([v[:, 2 * r + di, 2 * c + dj, part] for r, c in places], 1)
                for r, c in places:
                    scores = (keys @ turned(q, r, c).unsqueeze(-1)).squeeze(-1) * layer.log_scale[h].exp()
                    out[:, 2 * r + di, 2 * c + dj, part] = (scores.softmax(-1).unsqueeze(-1) * values).sum(1)
    return layer.out(out)


def test_attention_is_the_equation():
    layer = DownSampledAttention(8, 2, (4, 6), kernel=3).double()
    x = torch.randn(2, 4, 6, 8, dtype=torch.double)
    found, wanted = layer(x), naive_attention(layer, x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((out * weights).sum(), list(layer.parameters())) for out in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_scores_have_a_limit():
    """The factor of the cosines is at most 100; below, it is learned."""
    layer = DownSampledAttention(8, 2, (4, 4))
    with torch.no_grad():
        layer.log_scale.copy_(torch.tensor([10.0, 2.0]).view(2, 1, 1))
    layer(torch.randn(1, 4, 4, 8)).square().sum().backward()
    assert layer.log_scale.grad[0] == 0 and layer.log_scale.grad[1] != 0


@pytest.mark.parametrize(("factor", "rows", "columns"), [(2, 4, 6), (3, 9, 3), (1, 2, 5), (2, 2, 2)])
def test_no_token_is_lost(factor, rows, columns):
    """Every pixel is in exactly one group, every group has one pixel of each tile, and ``merge`` puts all back."""
    pixels = torch.arange(2 * rows * columns).view(2, rows, columns, 1)
    groups = split(pixels, factor)
    assert groups.shape == (2 * factor**2, rows * columns // factor**2, 1)
    assert groups.flatten().sort().values.equal(torch.arange(2 * rows * columns))
    assert torch.equal(merge(groups, factor, rows, columns), pixels)
    for group in groups:
        place = group.flatten() % (rows * columns)
        assert len({(int(p) // columns % factor, int(p) % columns % factor) for p in place}) == 1


def test_it_computes_what_the_authors_code_computes():
    """Figures of YuchuanTian/U-DiT, commit 7fcce5e, in train mode without class dropout, with these weights and inputs."""
    model = filled(UDiT(2, 16, classes=5, width=16, heads=2, depth=(1, 1, 2, 1, 1)))
    out = model(*inputs())
    torch.testing.assert_close(out[:, 0, 3, 5], torch.tensor([6.8557, -0.8570, -0.2920]), rtol=0, atol=1e-3)
    torch.testing.assert_close(out[:, 3, 15, 0], torch.tensor([-4.4503, -0.2728, -5.4072]), rtol=0, atol=1e-3)
    torch.testing.assert_close(out.square().mean(), torch.tensor(35.6817), rtol=1e-4, atol=0)


def test_published_cost():
    """Multiply-adds for a 32 x 32 latent, of the folded model as the authors count; parameters of their code, unfolded.

    For the larger models the same count gives 22.18 and 84.91 billion; 22.22 and 85.00 are published.
    """
    with torch.device("meta"):
        given = torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long)
        assert abs(flops(UDiT(size="S", ffn="depthwise"), *given) / 6.04e9 / 2 - 1) < 0.005
        assert parameters(UDiT(size="S")) == 58_896_568


def test_folding_changes_nothing():
    layer = filled(RepFeedForward(6, 8)).double()
    x = torch.randn(2, 5, 3, 6, dtype=torch.double)
    h = F.gelu(layer.up(layer.into(x))).movedim(-1, 1)
    branches = (h + layer.conv5(h) + layer.conv3(h) + layer.conv1(h)).movedim(1, -1)
    wanted = layer.out(layer.down(branches))
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer.folded()(x), wanted)
    gradients = [torch.autograd.grad(out.square().sum(), list(layer.parameters())) for out in (layer(x), wanted)]
    torch.testing.assert_close(*gradients)


def test_evaluation_and_folding_leave_the_weights_alone(tmp_path):
    model = filled(UDiT(2, 16, classes=5, width=8, heads=2, depth=(1, 0, 1, 0, 0)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wanted = model(*inputs())
    for _ in range(2):
        folded = model.train().eval().folded()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(folded(*inputs()), wanted, rtol=1e-5, atol=1e-5)
        for p in folded.parameters():
            p.zero_()
    assert torch.equal(model(*inputs()), wanted) and parameters(folded) < parameters(model)
    plain = UDiT(1, 16, classes=5, size="nano", ffn="plain")
    assert plain.folded().config == plain.config
    interlayer.save(model.folded(), tmp_path)
    torch.testing.assert_close(interlayer.load(tmp_path)(*inputs()), wanted, rtol=1e-5, atol=1e-5)


def test_blocks_are_the_identity_at_initialisation():
    model = UDiT(1, 16, classes=5, size="nano")
    x, c = torch.randn(2, 16, 16, 16), torch.randn(2, 16)
    assert torch.equal(model.encoder1[0](x, c), x)
    assert not model(*inputs(1)).any()


def test_samples():
    model = filled(UDiT(1, 8, classes=5, width=8, heads=2, depth=(1, 0, 0, 0, 1)))
    model.train()  # class dropout must not act while sampling
    y = torch.tensor([0, 4])
    runs = [
        sample(
            Guided(model, 1.5, 5),
            Diffusion(variance="learned"),
            Ancestral(),
            (2, 1, 8, 8),
            y,
            seed=s,
            steps=3,
            clip=1.0,
        )
        for s in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_errors():
    with pytest.raises(ValueError, match="image 12 x 16 with down=2; expected multiples of 8"):
        UDiT(1, (12, 16))
    with pytest.raises(ValueError, match="size 'XL'; expected one of"):
        UDiT(1, 16, size="XL")
    with pytest.raises(ValueError, match="UDiT: ffn 'repp' is not one of"):
        UDiT(1, 16, size="nano", ffn="repp")
    with pytest.raises(ValueError, match="five stages"):
        UDiT(1, 16, depth=(1, 1, 1))
    with pytest.raises(ValueError, match="head width 3 is odd"):
        UDiT(1, 16, width=12, heads=4)
    with pytest.raises(ValueError, match="takes image data and gives noise, not image and classes"):
        UDiT.for_task(DataShape("image", "classes", classes=10, channels=1, height=8, width=8))
    model = UDiT(1, 16, classes=5, width=8, heads=2, depth=(1, 0, 0, 0, 0))
    x, t, y = inputs(1)
    with pytest.raises(ValueError, match=r"images \(3, 1, 16, 8\); expected \[batch, 1, 16, 16\]"):
        model(x[..., :8], t, y)
    with pytest.raises(ValueError, match=r"times \(2,\) and classes \(3,\) for 3 images"):
        model(x, t[:2], y)
    with pytest.raises(TypeError, match=r"classes of torch.float32; expected integers from 0 to 5"):
        model(x, t, y.float())
