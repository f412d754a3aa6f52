import pytest
import torch
import torch.nn.functional as F

from interlayer.layers.mixing.hopfield import (
    Association,
    Hopfield,
    HopfieldLayer,
    HopfieldPooling,
    energy,
    retrieve,
    update,
)
from interlayer.models import Transformer

torch.manual_seed(0)


def patterns(n, d, seed=0):
    return F.normalize(torch.randn(n, d, dtype=torch.double, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("beta", [0.5, 4.0, 30.0])
def test_an_update_never_raises_the_energy(beta):
    stored, state = patterns(20, 12), torch.randn(50, 12, dtype=torch.double)
    before = energy(state, stored, beta)
    assert (before >= 0).all()
    for _ in range(30):
        state = update(state, stored, beta)
        after = energy(state, stored, beta)
        assert (after <= before + 1e-12).all()
        before = after


def test_a_fixed_point_is_where_the_energy_has_no_slope():
    stored, beta = patterns(20, 12), 3.0
    state = retrieve(torch.randn(5, 12, dtype=torch.double), stored, beta, steps=2000, tolerance=1e-13).requires_grad_()
    slope = torch.autograd.grad(energy(state, stored, beta).sum(), state)[0]
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-9, rtol=0)


def test_the_update_is_the_equation():
    stored, state = patterns(4, 3), patterns(2, 3, seed=1)
    for xi, new in zip(state, update(state, stored, 2.0), strict=True):
        weights = torch.stack([(2.0 * x @ xi).exp() for x in stored])
        torch.testing.assert_close(new, sum(w / weights.sum() * x for w, x in zip(weights, stored, strict=True)))


def test_three_kinds_of_fixed_points():
    far = patterns(8, 64)
    near = F.normalize(far[:1] + 0.05 * patterns(3, 64, seed=1), dim=-1)
    stored = torch.cat([near, far[1:]])
    single = retrieve(stored[5:6] + 0.02, stored, beta=40.0)
    torch.testing.assert_close(single, stored[5:6], atol=1e-6, rtol=0)
    metastable = retrieve(stored[:1], stored, beta=40.0)
    torch.testing.assert_close(metastable, near.mean(0, keepdim=True), atol=2e-3, rtol=0)
    assert (metastable - stored[:1]).norm() > 0.01
    average = retrieve(stored[5:6], stored, beta=0.01)
    torch.testing.assert_close(average, stored.mean(0, keepdim=True), atol=1e-2, rtol=0)


def test_one_step_is_attention():
    layer = Hopfield(12, heads=3, normalise=False)
    x = torch.randn(2, 7, 12)
    q = layer.split(layer.state_map(x))
    k, v = (layer.split(t) for t in layer.stored_map(x).chunk(2, -1))
    y = layer.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), y)


def test_more_steps_are_updates_in_the_associative_space():
    layer = Association(8, heads=2, steps=3, beta=1.7).double()
    state, stored = torch.randn(2, 3, 8, dtype=torch.double), torch.randn(2, 5, 8, dtype=torch.double)
    q, k, v = layer.project(state, stored)
    moved = update(update(q, k, 1.7), k, 1.7)
    y = (1.7 * moved @ k.transpose(-1, -2)).softmax(-1) @ v
    torch.testing.assert_close(
        layer.associate(state, stored), layer.out(y.transpose(1, 2).flatten(2)), atol=1e-6, rtol=1e-6
    )


def test_pooling_ignores_order_and_padding_and_learns():
    pool = HopfieldPooling(8, heads=2, queries=3, steps=2, learn_beta=True)
    bag = torch.randn(2, 6, 8)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    out = pool(bag, mask)
    assert out.shape == (2, 3, 8)
    torch.testing.assert_close(pool(bag.flip(1), mask.flip(1)), out)
    torch.testing.assert_close(pool(bag[1:, :4]), out[1:])
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pool.parameters())
    assert pool.beta.grad.abs().sum() > 0


def test_lookup_finds_the_prototype():
    layer = HopfieldLayer(16, prototypes=5, normalise=False, beta=60.0)
    with torch.no_grad():
        layer.prototypes.copy_(F.normalize(layer.prototypes, dim=-1))
        layer.state_map.weight.copy_(torch.eye(16))
        layer.stored_map.weight.copy_(torch.eye(16).repeat(2, 1))
        layer.out.weight.copy_(torch.eye(16))
        for m in (layer.state_map, layer.stored_map, layer.out):
            m.bias.zero_()
    found = layer(layer.prototypes + 0.01)
    torch.testing.assert_close(found, layer.prototypes, atol=1e-3, rtol=0)


def test_gradients():
    layer = Association(4, heads=2, steps=3, learn_beta=True).double()
    state, stored = (torch.randn(1, n, 4, dtype=torch.double, requires_grad=True) for n in (2, 3))
    assert torch.autograd.gradcheck(layer.associate, (state, stored))


@pytest.mark.parametrize("spec", ["hopfield", "hopfield(steps=3, learn_beta=True)"])
def test_as_a_mixer_it_does_not_look_ahead(spec):
    model = Transformer(vocab=20, length=16, depth=2, width=16, heads=2, mixer=spec)
    tokens = torch.randint(0, 20, (2, 9))
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 20
    torch.testing.assert_close(model(tokens)[:, :-1], model(changed)[:, :-1])
    torch.testing.assert_close(
        model.generate(tokens, 5)[:, 9:], torch.stack([model.generate(t[None], 5)[0, 9:] for t in tokens])
    )
    long = model.generate(tokens, 5)
    torch.testing.assert_close(long[:, 9:], model(long[:, :-1]).argmax(-1)[:, 8:])


def test_clear_errors():
    with pytest.raises(ValueError, match="not a multiple of heads"):
        Hopfield(10, heads=3)
    with pytest.raises(ValueError, match="steps 0"):
        Hopfield(4, steps=0)
    with pytest.raises(ValueError, match=r"patterns \(2, 4\); expected \[batch, count, 4\]"):
        Hopfield(4)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="needs a mixer that offers"):
        Transformer(mixer="hopfield", stream="value-residual")


def test_nothing_that_was_asked_for_is_ignored():
    with pytest.raises(ValueError, match="causal=True has no effect on separate stored patterns"):
        Hopfield(8, 2, causal=True).associate(torch.randn(1, 3, 8), torch.randn(1, 5, 8))
    for wrong in (
        lambda: HopfieldPooling(8, queries=0),
        lambda: HopfieldLayer(8, prototypes=0),
        lambda: Hopfield(8, 0),
    ):
        with pytest.raises(ValueError, match=r"at least 1|below 1"):
            wrong()
