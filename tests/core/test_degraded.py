"""Degradations, patches and measures against PIL, SciPy, scikit-image and MATLAB's rules."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from interlayer.core import degraded as d
from interlayer.core.datasets import photograph


@pytest.fixture(scope="module")
def cat():
    return d.modcrop(d.to_tensor(photograph("cat")), 12)[..., :120, :132].contiguous()


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_equals_pil_and_torch_inside_and_comes_near_to_8_bit_pil(cat, scale):
    small = d.shrink(cat, scale)
    size = (cat.shape[3] // scale, cat.shape[2] // scale)
    pil = np.stack([np.array(Image.fromarray(c.numpy()).resize(size, Image.Resampling.BICUBIC)) for c in cat[0]])
    inner = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(small[0].numpy()[inner], pil[inner], rtol=0, atol=1e-6)
    torch.testing.assert_close(small[inner], F.interpolate(cat, size[::-1], mode="bicubic", antialias=True)[inner])
    pixels = (cat[0].permute(1, 2, 0) * 255).byte().numpy()
    rounded = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    gap = np.abs(rounded - d.eight_bit(small)[0].numpy() * 255)[inner]
    assert gap.max() < 2.5 and (gap > 0.5).mean() < 0.2  # PIL rounds after each of its two passes


def test_bicubic_mirrors_borders_as_matlab_does():
    """Figures of a public port of ``imresize`` (numpy, float64) on (7 i^2 + 3 i j + j^2) mod 11 / 10."""
    i, j = torch.arange(8.0, dtype=torch.double)[:, None], torch.arange(12.0, dtype=torch.double)
    image = ((7 * i * i + 3 * i * j + j * j) % 11 / 10)[None, None]
    found = [d.shrink(image, 2)[0, 0, 0], d.shrink(image, 4)[0, 0].flatten(), d.enlarge(image[..., :2, :3], 3)[0, 0, 0]]
    for mine, theirs in zip(found, MATLAB, strict=True):
        torch.testing.assert_close(mine, torch.tensor(theirs, dtype=torch.double), rtol=0, atol=1e-7)


MATLAB = (
    (0.20453491, 0.46093750, 0.37219543, 0.39794617, 0.61013184, 0.28960571),
    (0.35988337, 0.44140661, 0.46561676, 0.54258856, 0.48090174, 0.53460296),
    (-0.09876543, -0.07777778, -0.03168724, 0.03539095, 0.11111111, 0.20411523, 0.30576132, 0.37777778, 0.40740741),
)


def test_noise_blur_and_jpeg(cat):
    torch.testing.assert_close(
        d.blurred(cat, 1.6)[0, 1].numpy(), gaussian_filter(cat[0, 1].numpy(), 1.6), rtol=0, atol=1e-6
    )
    noise = d.noisy(cat, 25 / 255, seed=3) - cat
    assert abs(noise.std() * 255 - 25) < 0.3 and not torch.equal(noise, d.noisy(cat, 25 / 255, seed=4) - cat)
    files = {quality: d.encode(cat, quality) for quality in (10, 50, 90)}
    assert len(files[10]) < len(files[50]) < len(files[90])
    quality = [d.psnr(d.decode(f), cat).item() for f in files.values()]
    assert 20 < quality[0] < quality[1] < quality[2]
    grey = cat[:, :1]
    assert d.decode(d.encode(grey, 90)).shape == grey.shape


def test_measures_equal_scikit_image(cat):
    other = d.eight_bit(d.enlarge(d.shrink(cat, 3), 3))
    one, two = other[0].double().numpy(), cat[0].double().numpy()
    assert d.psnr(other, cat).item() == pytest.approx(peak_signal_noise_ratio(two, one, data_range=1.0))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    assert d.ssim(other, cat).item() == pytest.approx(structural_similarity(one, two, channel_axis=0, **options))
    luma = [65.481, 128.553, 24.966] @ np.stack([one, two]).transpose(0, 2, 1, 3)[..., 3:-3]
    luma = luma[:, 3:-3] / 255  # the constant 16 falls out of differences
    wanted = peak_signal_noise_ratio(luma[1], luma[0], data_range=1.0)
    assert d.psnr(other, cat, border=3, y=True).item() == pytest.approx(wanted, abs=1e-4)
    assert d.psnr(cat, cat).item() == float("inf") and d.ssim(cat, cat, y=True).item() == pytest.approx(1)


def test_si_sdr_is_its_equation_and_ignores_scale():
    torch.manual_seed(0)
    s, e = torch.randn(2, 3, 200, dtype=torch.double)
    a = (e * s).sum(-1, keepdim=True) / s.square().sum(-1, keepdim=True)
    wanted = 20 * torch.log10((a * s).norm(dim=-1) / (a * s - e).norm(dim=-1))
    torch.testing.assert_close(d.si_sdr(e, s), wanted)
    torch.testing.assert_close(d.si_sdr(7 * e, s), wanted)


def test_patches_lie_at_the_same_place_in_every_form():
    """Numbered pixels show where a patch comes from; the degraded image keeps the middle of each 3 x 3 square."""
    number = torch.arange(12.0 * 18).view(1, 1, 12, 18)
    pairs = d.Pairs([number / 216, number.flip(2).mT / 216], lambda x: x[..., 1::3, 1::3], scale=3)
    small, large = (216 * t for t in pairs.patches(99, 3, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(large[..., 1::3, 1::3], small)
    steps = torch.stack([large[:, 0, 0, 1] - large[:, 0, 0, 0], large[:, 0, 1, 0] - large[:, 0, 0, 0]], 1).round()
    assert {tuple(s) for s in steps.tolist()} == {
        (a, b) for s in (1, -1) for t in (18, -18) for a, b in ((s, t), (t, s))
    }
    plain = 216 * pairs.patches(99, 3, torch.Generator().manual_seed(0), augment=False)[1]
    assert len(torch.unique(plain[:, 0, 0, 1] - plain[:, 0, 0, 0], dim=0).round().unique()) == 2
    assert torch.equal(plain.flatten(1).sort(1)[0].round(), large.flatten(1).sort(1)[0].round())


def test_mistakes_are_refused(cat):
    with pytest.raises(ValueError, match=r"height and width that 7 divides. `modcrop`"):
        d.shrink(cat, 7)
    with pytest.raises(TypeError, match=r"image of torch.uint8; expected a tensor"):
        d.shrink((cat * 255).byte(), 2)
    with pytest.raises(TypeError, match=r"psnr .estimate.: image of torch.bfloat16"):
        d.psnr(cat.bfloat16(), cat)
    with pytest.raises(ValueError, match=r"numbers from 0 to 2.*`eight_bit"):
        d.psnr(cat.clamp(0, 0) + torch.linspace(0, 2, cat.shape[3]), cat)
    with pytest.raises(ValueError, match="NaN"):
        d.blurred(cat.where(cat > 0.5, torch.nan), 1.0)
    with pytest.raises(ValueError, match="expected equal shapes"):
        d.ssim(cat, cat[..., :-1])
    with pytest.raises(ValueError, match="at least 11"):
        d.ssim(cat[..., :10], cat[..., :10])
    with pytest.raises(ValueError, match="border 60"):
        d.psnr(cat, cat, border=60)
    with pytest.raises(ValueError, match=r"expected .batch, 3, height, width. in RGB"):
        d.psnr(cat[:, :1], cat[:, :1], y=True)
    with pytest.raises(ValueError, match="silent"):
        d.si_sdr(torch.ones(4), torch.zeros(4))
    with pytest.raises(ValueError, match="scale 1; expected a whole number from 2"):
        d.enlarge(cat, 1)
    with pytest.raises(ValueError, match="no image"):
        d.decode(b"nothing")
    with pytest.raises(ValueError, match="patches of 70 pixels"):
        d.Pairs([cat], lambda x: d.shrink(x, 2), scale=2).patches(1, 70, torch.Generator())
    with pytest.raises(ValueError, match="3 times smaller"):
        d.Pairs([cat], lambda x: d.shrink(x, 2), scale=3)
    with pytest.raises(ValueError, match="is smaller than scale 200"):
        d.modcrop(cat, 200)
