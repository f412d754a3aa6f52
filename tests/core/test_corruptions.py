"""Corruptions: strengths by their own statistics, levels that grow, seeds, reference implementations, and mistakes."""

import colorsys

import numpy as np
import pytest
import torch
from skimage.util import random_noise

from interlayer.core.datasets import photograph
from interlayer.core.degraded import KINDS, corrupt, decode, encode, psnr, to_tensor

CAT = to_tensor(photograph("cat"))[..., 60:188, 100:228]


@pytest.mark.parametrize("table", ["imagenet", "cifar"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_level_is_worse_than_the_one_before(kind, table):
    x = CAT.repeat(2, 1, 1, 1)
    quality = [float(psnr(corrupt(x, kind, level, 3, table=table), x).mean()) for level in range(1, 6)]
    if kind == "pixelate":  # a grid that does not fit the pixels costs more than one that is a little coarser
        quality = quality[:: 4 if table == "imagenet" else 5]
    assert quality == sorted(set(quality), reverse=True)
    found = corrupt(x, kind, 3, 3, table=table)
    assert found.shape == x.shape and found.dtype == x.dtype and found.min() >= 0 and found.max() <= 1
    assert torch.equal(found, corrupt(x, kind, 3, 3, table=table))
    drawn = not torch.equal(found, corrupt(x, kind, 3, 4, table=table))
    assert drawn == (not torch.equal(found[0], found[1])) == kind.endswith("noise")


def test_noise_has_the_benchmarks_strength():
    grey = torch.full((1, 1, 200, 200), 0.5)
    std = {kind: float((corrupt(grey, kind, 1) - grey).std()) for kind in KINDS if kind.endswith("noise")}
    assert std["gaussian-noise"] == pytest.approx(0.08, rel=0.02)
    assert std["speckle-noise"] == pytest.approx(0.15 * 0.5, rel=0.02)
    assert std["shot-noise"] == pytest.approx((0.5 / 60) ** 0.5, rel=0.02)
    reference = random_noise(grey[0, 0].numpy(), mode="s&p", amount=0.03, rng=0)
    assert std["impulse-noise"] == pytest.approx(float(np.std(reference - 0.5)), rel=0.1)


def test_brightness_raises_the_value_of_hsv_and_contrast_keeps_the_mean():
    x = CAT[..., :4, :4].clone()
    x[..., 0, 0] = 0
    bright = corrupt(x, "brightness", 2)
    for old, new in zip(x[0].flatten(1).T.tolist(), bright[0].flatten(1).T.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*old)
        assert new == pytest.approx(colorsys.hsv_to_rgb(h, s, min(1.0, v + 0.2)), abs=1e-5)
    mean, dull = CAT.mean((2, 3), keepdim=True), corrupt(CAT, "contrast", 3)
    torch.testing.assert_close(dull, (mean + 0.2 * (CAT - mean)).clamp(0, 1))


def test_pixels_are_means_of_areas_and_jpeg_is_real():
    coarse = corrupt(CAT, "pixelate", 2)
    torch.testing.assert_close(coarse[..., ::2, ::2], torch.nn.functional.avg_pool2d(CAT, 2))
    assert torch.equal(coarse[..., ::2, ::2], coarse[..., 1::2, 1::2])
    assert torch.equal(corrupt(CAT, "jpeg", 4), decode(encode(CAT, 10)))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("fog", 1), "kind 'fog'; expected one of gaussian-noise"),
        (("jpeg", 0), "level 0; expected 1"),
        (("jpeg", 1, 0, "mnist"), "table 'mnist'; expected 'imagenet' or 'cifar'"),
    ],
)
def test_mistakes_are_refused(given, says):
    table = {"table": given[3]} if len(given) > 3 else {}
    with pytest.raises(ValueError, match=says):
        corrupt(CAT, *given[:3], **table)
    with pytest.raises(ValueError, match="corrupt: numbers from"):
        corrupt(CAT * 2, "jpeg", 1)
