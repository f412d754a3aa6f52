"""D'OH: layers are projections of one code, the file gives back the same signal, and its size is that of the code."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from interlayer.core.data import DataShape
from interlayer.core.fields import grid
from interlayer.layers.hyper.doh import DOH


def test_weights_are_fixed_projections_of_one_code():
    model = DOH(2, 1, latent=7, width=4, depth=2, frequencies=1, seed=3)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {"latent": (7,), "biases": (9,)}
    layers = model.layers()
    assert [(tuple(w.shape), tuple(b.shape)) for w, b in layers] == [((4, 6), (4,)), ((4, 4), (4,)), ((1, 4), (1,))]
    torch.testing.assert_close(layers[0][0], (model.projection[:24] @ model.latent).view(4, 6))
    torch.testing.assert_close(layers[2][0], (model.projection[-4:] @ model.latent).view(1, 4))
    assert torch.equal(torch.cat([b for _, b in layers]), model.biases)
    with torch.no_grad():
        model.latent.mul_(2)
    for (w, b), (w2, b2) in zip(layers, model.layers(), strict=True):
        torch.testing.assert_close(w2, 2 * w)
        assert torch.equal(b2, b)


def test_every_number_of_the_code_moves_every_layer():
    model = DOH(2, 1, latent=7, width=4, depth=2, frequencies=1)
    for w, _ in model.layers():
        (grad,) = torch.autograd.grad(w.sum(), model.latent, retain_graph=True)
        assert (grad != 0).all()


def test_generated_weights_begin_with_the_spread_of_the_ordinary_network():
    torch.manual_seed(0)
    for activation in ("relu", "sine"):
        model = DOH(2, 3, latent=300, width=64, depth=2, activation=activation)
        spreads = [s for s, _ in model.layout.spread()]
        if activation == "sine":
            spreads[-1] = (3 * 64) ** -0.5
        for (w, _), spread in zip(model.layers(), spreads, strict=True):
            assert w.std().item() == pytest.approx(spread, rel=0.25)


def test_projections_come_from_the_seed_alone_and_are_not_stored():
    torch.manual_seed(0)
    a = DOH(seed=1)
    torch.manual_seed(5)
    b, other = DOH(seed=1), DOH(seed=2)
    assert torch.equal(a.projection, b.projection) and not torch.equal(a.projection, other.projection)
    assert not torch.equal(a.latent, b.latent)
    assert list(a.state_dict()) == ["latent", "biases"]


@pytest.mark.parametrize("bits", [1, 5, 8, 12, 16])
def test_the_file_gives_back_the_same_signal(tmp_path: Path, bits):
    model, x = DOH(2, 3, latent=101, width=9, depth=2, activation="sine", seed=11), grid(6, 5)
    stored = model.save(tmp_path / "code.safetensors", bits)
    again = DOH.load(tmp_path / "code.safetensors")
    assert torch.equal(stored(x), again(x))
    for mine, its in ((model.latent, again.latent), (model.biases, again.biases)):
        assert len(its.unique()) <= 2**bits
        span = mine.max() - mine.min()
        assert 0 < (its - mine).abs().max() <= span / (2**bits - 1) / 2 + span * 2**-22  # half a step, and rounding


def test_footprint_is_code_and_biases(tmp_path: Path):
    sizes = {}
    for latent in (400, 800):
        for width in (8, 64):
            model = DOH(latent=latent, width=width)
            assert model.bits(6) == 6 * (latent + 3 * width + 1)
            model.save(path := tmp_path / "code", 6)
            sizes[latent, width] = path.stat().st_size
    # of 64 features a network has 64 times the inner weights, and the file 168 biases more
    assert sizes[400, 64] - sizes[400, 8] == pytest.approx(168 * 6 / 8, abs=16)
    assert sizes[800, 8] - sizes[400, 8] == pytest.approx(400 * 6 / 8, abs=16)
    assert sizes[800, 64] < model.bits(6) / 8 + 550


def test_for_task():
    assert DOH.for_task(DataShape("vector", "values", classes=3, features=4), latent=5)(torch.zeros(2, 4)).shape == (
        2,
        3,
    )
    sized = DOH.for_task(DataShape("vector", "values", classes=3, features=2), size=300)
    assert sum(p.numel() + 8 for p in sized.parameters()) == 300 and sized.layout.activation == "sine"
    with pytest.raises(ValueError, match="latent -83; expected at least 1"):
        DOH.within(30, 2, 1)
    with pytest.raises(ValueError, match="not tokens"):
        DOH.for_task(DataShape("tokens", "tokens", vocab=3, length=4))


def test_errors(tmp_path: Path):
    with pytest.raises(ValueError, match="latent 0"):
        DOH(latent=0)
    with pytest.raises(ValueError, match="bits 17; expected 1 to 16"):
        DOH(latent=3).save(tmp_path / "x", 17)
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"is not a file that DOH\.save"):
        DOH.load(tmp_path / "other")
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 2\]"):
        DOH(latent=3)(torch.zeros(4, 3))


def test_a_saved_code_has_the_ordinary_mode(tmp_path):
    model = DOH(2, 1, latent=20, width=8, depth=1)
    model.save(tmp_path / "code")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "code").stat().st_mode == (tmp_path / "plain").stat().st_mode
