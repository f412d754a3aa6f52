import math
from functools import partial

import pytest
import torch
from scipy.integrate import solve_ivp

from interlayer.core.mixer import Cache
from interlayer.core.stream import State
from interlayer.layers.stream.shaped_transformer import (
    CovarianceSDE,
    ShapedAttention,
    ShapedReLU,
    ShapedTransformer,
    correlations,
)
from interlayer.models import Encoder, Transformer

SHAPED = {"stream": "shaped-transformer", "mixer": ShapedAttention, "hidden": 16, "activation": partial(ShapedReLU, 16)}


def covariance(m=3):
    x = torch.randn(m, 2 * m, dtype=torch.double)
    return x @ x.T / (2 * m) + 0.3


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_centred_at_the_identity(causal, masked):
    """The matrix of the equation, row by row, over the tokens that are seen."""
    torch.manual_seed(0)
    layer = ShapedAttention(12, 4, kv_heads=2, causal=causal, temperature=0.3).double()
    q, k, v = (torch.randn(2, h, 5, 3, dtype=torch.double, requires_grad=True) for h in (4, 2, 2))
    mask = torch.arange(5) < torch.tensor([[5], [3]]) if masked else None
    rows = []
    for b in range(2):
        for h in range(4):
            for i in range(5):
                seen = [j for j in range(i + 1 if causal else 5) if mask is None or mask[b, j]]
                weights = (k[b, h // 2, seen] @ q[b, h, i] / (0.3 * math.sqrt(12 * 3))).softmax(0) - 1 / len(seen)
                rows.append(v[b, h // 2, i] + weights @ v[b, h // 2, seen])
    wanted = torch.stack(rows).view(2, 4, 5, 3)
    got = layer.mix(q, k, v, mask)
    torch.testing.assert_close(got, wanted)
    probe = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad((y * probe).sum(), (q, k, v)) for y in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b)


def test_decoding_with_a_cache_equals_the_full_pass():
    torch.manual_seed(0)
    model = Transformer(vocab=20, length=16, depth=3, width=16, heads=4, kv_heads=2, **SHAPED).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        tokens, cache = torch.randint(0, 20, (2, 9)), Cache()
        steps = [model(tokens[:, :4], cache=cache), *(model(tokens[:, i : i + 1], cache=cache) for i in range(4, 9))]
        torch.testing.assert_close(torch.cat(steps, 1), model(tokens), rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing_in_an_encoder():
    encoder = Encoder(20, 3, 16, depth=3, width=16, heads=2, **SHAPED)
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    tokens = torch.randint(0, 20, (2, 9))
    torch.testing.assert_close(encoder(tokens, mask=mask)[1:], encoder(tokens[1:, :5]), rtol=1e-4, atol=1e-5)


def test_slopes_tend_to_one_and_the_mean_square_is_kept():
    x = torch.tensor([-2.0, 3.0], dtype=torch.double)
    norm = math.sqrt((1 + 0.75**2) / 2)
    torch.testing.assert_close(ShapedReLU(16)(x), torch.tensor([-1.5, 3.0], dtype=torch.double) / norm)
    torch.testing.assert_close(ShapedReLU(10**8)(x), x, rtol=2e-4, atol=0)
    torch.testing.assert_close(ShapedReLU(9, minus=-3.0)(x), math.sqrt(2) * x.relu())
    grid = torch.linspace(-9, 9, 20001, dtype=torch.double)
    density = torch.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)
    square = torch.trapezoid(ShapedReLU(4, plus=1.0, minus=-0.5)(grid).square() * density, grid)
    assert square.item() == pytest.approx(1, abs=1e-6)


def test_residual_weights_keep_the_variance():
    torch.manual_seed(0)
    stream = ShapedTransformer(20, gamma=0.6)
    state = State(torch.tensor(5.0))
    assert stream.write(state, 0, torch.tensor(10.0)).x.item() == pytest.approx(0.8 * 5 + 0.6 * 10)
    state = stream.start(torch.randn(50000))
    for layer in range(20):
        state = stream.write(state, layer, torch.randn(50000))
    assert stream.finish(state).var().item() == pytest.approx(1, abs=0.03)


def test_drift_of_attention_is_that_of_the_layer():
    """``n gamma^2 E[A V A' - V]`` over the key and query maps; odd orders cancel between logits of opposite sign."""
    torch.manual_seed(0)
    m, n, draws = 3, 400, 100000
    sde = CovarianceSDE(gamma=0.6, temperature=0.7, plus=0.0, minus=0.0)
    v = covariance(m)
    root = torch.linalg.cholesky(v)
    logits = root @ torch.randn(draws, m, m, dtype=torch.double) @ root.T * math.sqrt(n)  # of q k' with n features each
    layer = ShapedAttention(n, 1, temperature=0.7)
    total = torch.zeros(m, m, dtype=torch.double)
    eye = torch.eye(m, dtype=torch.double).expand(draws, 1, m, m)
    for sign in (1, -1):
        a = layer.mix(sign * logits.unsqueeze(1), eye, eye)[:, 0]
        total += (a @ v @ a.mT - v).mean(0) / 2
    torch.testing.assert_close(n * 0.36 * total, sde.drift(v), rtol=0.03, atol=0.003)


def test_drift_of_the_relu_is_that_of_the_layer():
    """``n (c E[s(g) s(h)] - rho)`` by quadrature over g and h with correlation rho."""
    n, rho = 10**6, 0.4
    nodes = torch.linspace(-8, 8, 1601, dtype=torch.double)
    g, z = torch.meshgrid(nodes, nodes, indexing="ij")
    weight = torch.exp(-(g**2 + z**2) / 2) / (2 * math.pi) * (nodes[1] - nodes[0]) ** 2
    relu = ShapedReLU(n, plus=0.5, minus=-1.5)
    h = rho * g + math.sqrt(1 - rho**2) * z
    numeric = n * ((relu(g) * relu(h) * weight).sum() - rho * (g**2 * weight).sum())
    v = torch.tensor([[4.0, 2 * rho], [2 * rho, 1.0]], dtype=torch.double)
    sde = CovarianceSDE(gamma=1.0, temperature=1e9, plus=0.5, minus=-1.5)
    assert sde.drift(v)[0, 1].item() == pytest.approx(2 * numeric.item(), rel=1e-3)
    torch.testing.assert_close(sde.drift(v).diagonal(), torch.zeros(2, dtype=torch.double))


def test_noise_has_the_covariance_of_the_equation():
    torch.manual_seed(0)
    m, draws = 3, 200000
    sde, v = CovarianceSDE(gamma=0.8, temperature=0.5), covariance(m)
    root = torch.linalg.cholesky(v)
    noise = (root @ sde.noise(root.expand(draws, -1, -1), torch.Generator().manual_seed(0)) @ root.T).flatten(1)
    c = torch.eye(m, dtype=torch.double) - 1 / m
    k, g2 = v @ c @ v @ c @ v / m**2, 0.64
    wanted = torch.zeros(m, m, m, m, dtype=torch.double)
    for i in range(m):
        for j in range(m):
            for p in range(m):
                for q in range(m):
                    maps = v[i, p] * v[j, q] + v[i, q] * v[j, p]
                    logits = v[i, p] * k[j, q] + v[i, q] * k[j, p] + v[j, p] * k[i, q] + v[j, q] * k[i, p]
                    wanted[i, j, p, q] = (g2 * (2 - g2) + 2 * g2) * maps + g2**2 / 0.25 * logits
    torch.testing.assert_close(noise.T @ noise / draws, wanted.view(m * m, m * m), rtol=0.03, atol=0.05)


def test_one_block_moves_as_the_sde_says():
    """Variance of the covariance of one token after one block with Gaussian maps, times n: 2 V^2 (2 g^2 + g^2 (2 - g^2))."""
    torch.manual_seed(0)
    n, draws, g = 64, 6000, 0.7
    x, keep = math.sqrt(n) * torch.nn.functional.normalize(torch.randn(draws, n), dim=1), math.sqrt(1 - g * g)

    def mapped(x):
        return torch.einsum("bn,bnk->bk", x, torch.randn(draws, n, n) / math.sqrt(n))

    z = keep * x + g * mapped(x)  # attention with a single token is its value map
    y = keep * z + g * mapped(ShapedReLU(n)(mapped(z)))
    v = y.square().mean(1)
    assert (n * v.var()).item() == pytest.approx(2 * (2 * g**2 + g**2 * (2 - g**2)), rel=0.08)
    noise = CovarianceSDE(gamma=g).noise(torch.ones(50000, 1, 1), torch.Generator().manual_seed(1))
    assert noise.var().item() == pytest.approx(2 * (2 * g**2 + g**2 * (2 - g**2)), rel=0.03)


def test_paths_are_reproducible_and_correlations_stay_correlations():
    start = 0.8 * torch.eye(4, dtype=torch.double) + 0.2
    one, two = (
        CovarianceSDE().simulate(start, 0.5, paths=50, steps=50, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(one, two)
    rho = correlations(one)
    torch.testing.assert_close(rho.diagonal(dim1=1, dim2=2), torch.ones(50, 4, dtype=torch.double))
    assert rho.abs().max() < 1 + 1e-9
    assert rho[:, 0, 1].std() > 0.05


def test_without_drift_the_mean_stays():
    sde = CovarianceSDE(temperature=1e9, plus=0.0, minus=0.0)
    v = 0.8 * torch.eye(3, dtype=torch.double) + 0.2
    end = sde.simulate(v, 0.2, paths=40000, steps=10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(end.mean(0), v, rtol=0, atol=0.03)


def test_without_noise_it_is_the_differential_equation_of_the_drift():
    class Quiet(CovarianceSDE):
        def noise(self, root_BMM, generator=None):
            return torch.zeros_like(root_BMM)

    sde, v = Quiet(temperature=0.5), 0.7 * torch.eye(3, dtype=torch.double) + 0.3
    y = solve_ivp(lambda _, y: sde.drift(torch.tensor(y).view(1, 3, 3)).flatten(), (0, 0.5), v.flatten(), rtol=1e-8).y
    torch.testing.assert_close(
        sde.simulate(v, 0.5, paths=1, steps=500)[0], torch.tensor(y[:, -1]).view(3, 3), rtol=1e-3, atol=1e-4
    )


def test_what_cannot_be_is_refused_and_explosions_are_nan():
    with pytest.raises(ValueError, match="gamma 1"):
        ShapedTransformer(2, gamma=1.0)
    with pytest.raises(ValueError, match="temperature 0"):
        ShapedAttention(8, 2, temperature=0)
    with pytest.raises(ValueError, match="width 0"):
        ShapedReLU(0)
    with pytest.raises(ValueError, match=r"start \(2, 3\)"):
        CovarianceSDE().simulate(torch.ones(2, 3), 1.0, paths=1)
    exploded = CovarianceSDE(temperature=0.1).simulate(9.0 * torch.eye(3), 9.0, paths=8)
    assert exploded.isnan().all()
