"""Data that comes with the dependencies: shapes, splits, and nothing random left behind."""

import numpy as np
import pytest
import torch

from interlayer.core import datasets, speech


def test_a_photograph_has_a_name():
    assert datasets.photograph("camera").shape == (512, 512)
    assert datasets.photograph("china").shape == (427, 640, 3)
    with pytest.raises(ValueError, match="no 'chine'; expected one of astronaut"):
        datasets.photograph("chine")


@pytest.mark.parametrize(
    ("name", "train", "held"),
    [
        ("split_digits", (1438, 1, 8, 8), (359, 1, 8, 8)),
        ("photos", (3200, 1, 32, 32), (800, 1, 32, 32)),
        ("series", (1349, 24, 1), (358, 24, 1)),
        ("mnist1d", (4000, 40, 1), (1000, 40, 1)),
    ],
)
def test_splits_are_fixed_and_apart(name, train, held):
    split = getattr(datasets, name)()
    assert split is getattr(datasets, name)()
    assert (split.train[0].shape, split.held[0].shape) == (train, held)
    assert len(split.train[1]) == train[0] and len(split.held[1]) == held[0]
    ours, theirs = ({x.numpy().tobytes() for x in part[0]} for part in split)
    assert not ours & theirs
    again = getattr(datasets, name).__wrapped__()
    assert all(torch.equal(a, b) for p, q in zip(split, again, strict=True) for a, b in zip(p, q, strict=True))


def test_texts_are_whole_files():
    train, held = datasets.stdlib_bytes()
    files = {p.read_bytes() for p in datasets.modules()}
    assert set(train) | set(held) <= files and not set(train) & set(held)
    assert len(held) == (len(train) + len(held)) // 10


def test_spoken_words_are_heard_in_voices_that_were_held_out():
    pytest.importorskip("espeakng_loader")
    (x, y), (v, w) = datasets.speech()
    assert x.shape == (480, 16000) and v.shape == (180, 16000) and x.dtype == torch.float32
    assert y.bincount().tolist() == [48] * 10 and w.bincount().tolist() == [18] * 10
    assert x.abs().amax(1).min() > 0.2 and x.abs().max() <= 1
    features = []
    for waves in (x, v):
        sound = torch.stft(waves[:, :9000], 512, 128, window=torch.hann_window(512), return_complex=True).abs()[
            :, None, :128
        ]
        bands = torch.nn.functional.adaptive_avg_pool2d(sound, (16, 12)).add(0.01).log().flatten(1)
        features.append(bands - bands.mean(1, keepdim=True))
    centres = torch.stack([features[0][y == c].mean(0) for c in range(10)])
    assert (torch.cdist(features[1], centres).argmin(1) == w).float().mean() > 0.7


def test_speech_says_what_it_was_asked_to_and_refuses_the_rest():
    pytest.importorskip("espeakng_loader")
    slow, fast = (speech.say("seven", voice="en-us+f2", speed=s) for s in (120, 240))
    assert 3000 < len(fast) < 0.75 * len(slow) < 16000
    for wrong, says in (
        ({"voice": "nobody"}, "no voice 'nobody'"),
        ({"voice": "en-us+zz"}, r"no voice 'en-us\+zz'"),
        ({"speed": 20}, "speed 20"),
    ):
        with pytest.raises(ValueError, match=says):
            speech.say("no", **wrong)


def test_mnist1d_is_the_authors_data_and_leaves_random_numbers_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = {
        k: np.full((4, 40) if k.startswith("x") else 4, i % 2) for i, k in enumerate(("x", "y", "x_test", "y_test"))
    }
    seen = []

    def make_dataset(args):
        seen.append(args.num_samples)
        np.random.seed(args.seed)
        return made

    monkeypatch.setattr("mnist1d.data.make_dataset", make_dataset)
    before = np.random.get_state()[1].copy()
    for _ in range(2):
        train, _ = datasets.mnist1d.__wrapped__()
    assert seen == [5000]  # made once, read from the file afterwards
    assert (np.random.get_state()[1] == before).all() and train[0].shape == (4, 40, 1)
    monkeypatch.undo()
    x, y = datasets.mnist1d().train
    assert x.shape == (4000, 40, 1) and y.bincount().min() > 380
    assert float(x.double().mean()) == pytest.approx(0.0, abs=0.02) and float(x.std()) == pytest.approx(1.0, abs=0.02)
