"""DeepJSCC-WZ: the authors' figures and sizes, what is sent and what is shared, the task and the digital bound, and mistakes."""

import math

import pytest
import torch
from torch import nn

from interlayer.core.channel import Channel
from interlayer.core.datasets import photograph
from interlayer.core.degraded import encode, ms_ssim, to_tensor
from interlayer.domains.wireless._parts import GDN
from interlayer.domains.wireless.djscc_side_info import DeepJSCC, Modulation
from interlayer.domains.wireless.tasks import SNRS, Transmission, digital


def filled(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith(("beta", "gamma")):
                p.copy_(noise.abs() * 0.3 + 0.1)
            else:
                p.copy_(noise / (p[0].numel() ** 0.5 if p.ndim > 1 else 10))
    return model


def test_numbers_are_those_of_the_authors_net():
    """src/models/wz/deepjscc_wz.py at commit 33a64b8 over compressai 1.2.8 and kaira's AFModule, width 8, with these weights."""
    generator = torch.Generator().manual_seed(2)
    image, side = (torch.rand(2, 3, 32, 48, generator=generator) for _ in range(2))
    snr, noise = torch.tensor([-3.0, 4.0]), torch.randn(2, 96, 2, 3, generator=generator)
    model = filled(DeepJSCC(3, width=8))
    found = model(image, snr, side, noise)
    some = [found.mean(), found.std(), found[0, 0, 0, 0], found[1, 2, 31, 47]]
    torch.testing.assert_close(
        torch.stack(some).detach(), torch.tensor([-0.07445, 0.14959, -0.02554, -0.11688]), atol=2e-5, rtol=0
    )
    gradients = torch.autograd.grad(found.square().mean(), list(model.parameters()))
    assert sum(float(g.abs().sum()) for g in gradients) == pytest.approx(6.3506, abs=1e-3)


@pytest.mark.parametrize(("ratio", "parameters"), [(1 / 16, 39_806_080), (1 / 32, 38_643_760)])
def test_parameters_of_the_published_sizes(ratio, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in DeepJSCC(3, width=256, ratio=ratio).parameters()) == parameters


@pytest.mark.parametrize("ratio", [1 / 4, 1 / 16])
def test_as_many_symbols_are_sent_as_the_ratio_says_with_mean_power_one(ratio):
    seen = []

    class Spy(Channel):
        def __call__(self, x, *args, **options):
            seen.append(x)
            return super().__call__(x, *args, **options)

    model = DeepJSCC(1, width=4, ratio=ratio, channel=Spy())
    image = torch.rand(3, 1, 32, 48)
    model(image, torch.zeros(3), image)
    symbols = torch.complex(*seen[0].flatten(1).chunk(2, 1))
    assert symbols.shape == (3, model.symbols(image.shape)) == (3, 32 * 48 * ratio)
    torch.testing.assert_close(symbols.abs().square().mean(1), torch.ones(3))


def test_one_encoder_serves_both_and_the_flag_tells_them_apart():
    model, x = filled(DeepJSCC(1, width=4)), torch.rand(1, 1, 16, 16)
    known = torch.zeros(1, 1)
    sent, had = (model._features(x, model._told(known, flag)) for flag in (0.0, 1.0))
    assert torch.equal(sent[0], had[0]) and all(not torch.equal(a, b) for a, b in zip(sent[1:], had[1:], strict=True))
    assert [f.shape[1] for f in had] == [1, 4, 4, 4, 32] and [f.shape[2] for f in had] == [16, 8, 4, 2, 1]
    parts = [m for m in model.encoder if isinstance(m, Modulation)]
    with torch.no_grad():
        for part in parts:
            part.layers[0].weight[:, -1] = 0
    sent, had = (model._features(x, model._told(known, flag)) for flag in (0.0, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(sent, had, strict=True))


def test_without_side_information_it_is_plain():
    model, x = DeepJSCC(1, width=4, side=False), torch.rand(2, 1, 16, 16)
    noise = torch.randn(2, 32, 1, 1)
    assert torch.equal(model(x, torch.zeros(2), None, noise), model(x, torch.zeros(2), torch.rand(2, 1, 16, 16), noise))
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in DeepJSCC(1, width=4).parameters())


def test_normalisation_is_its_equation_and_its_inverse():
    norm, inverse = GDN(3).double(), GDN(3, inverse=True).double()
    x = torch.randn(2, 3, 2, 2, dtype=torch.double)
    wanted = x / (1 + 0.1 * x**2).sqrt()
    torch.testing.assert_close(norm(x), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(inverse(x), x * (1 + 0.1 * x**2).sqrt(), atol=1e-5, rtol=0)
    optimiser = torch.optim.SGD(norm.parameters(), 1e3)
    norm(x).square().sum().backward()
    optimiser.step()
    assert norm(x).isfinite().all()


def test_the_task_pairs_a_scene_with_itself_some_pixels_aside():
    picture = torch.arange(64 * 80).view(1, 1, 64, 80) / (64 * 80)
    task = Transmission("steps", [picture], [picture], shift=3, patch=16, side=48, crops=2)
    inputs, image = next(task.batches(0, 4))
    torch.testing.assert_close(inputs["side"], 0.9 * (image + 3 / (64 * 80)))
    assert -5 <= inputs["snr"].min() < inputs["snr"].max() <= 5
    assert [float(i["snr"][0]) for i, _ in task.batches(0, 8, "validation")] == list(SNRS)
    perfect = task.evaluate(lambda inputs: inputs["image"], 8)
    assert perfect["loss"] == 0 and perfect["psnr"] == math.inf and perfect["ms-ssim"] == pytest.approx(1)
    assert task.trivial()["psnr"] < 20
    with pytest.raises(ValueError, match="patch 15, side 48; expected multiples of 16"):
        Transmission("odd", [picture], [picture], patch=15, side=48)
    with pytest.raises(ValueError, match="is too small for patches of 16, crops of 96"):
        Transmission("small", [picture], [picture], patch=16, side=96)


def test_the_digital_bound_spends_what_capacity_gives():
    image = to_tensor(photograph("cat"))[..., 64:192, 64:192]
    grown = [float((digital(image, 4096, snr) - image).square().mean()) for snr in (-10.0, 0.0, 10.0, 20.0)]
    assert grown == sorted(grown, reverse=True) and torch.equal(
        digital(image, 4, 0.0), torch.full_like(image, float(image.mean()))
    )
    headers = len(encode(image, 5)) - len(encode(image, 1))
    assert headers > 0 and digital(image, 10**6, 20.0).sub(image).abs().mean() < 0.02


def test_similarity_at_several_scales_is_that_of_a_public_implementation():
    """pytorch-msssim 1.0.0 with double precision on this photograph and noise."""
    image, generator = to_tensor(photograph("cat"))[..., :192, :208], torch.Generator().manual_seed(0)
    for noise, wanted in ((0.05, 0.9385140), (0.3, 0.5151158)):
        worse = (image + noise * torch.randn(image.shape, generator=generator)).clamp(0, 1)
        assert float(ms_ssim(worse, image)) == pytest.approx(wanted, abs=2e-6)
    with pytest.raises(ValueError, match="at 5 scales; expected 1 to 5 scales"):
        ms_ssim(image[..., :100, :100], image[..., :100, :100])


@pytest.mark.parametrize(
    ("build", "call", "says"),
    [
        ({"ratio": 1 / 3}, None, "an even width, and a ratio that gives an even number of features"),
        ({"width": 3}, None, "width 3, units 3, ratio"),
        ({}, ((2, 1, 16, 20), (2,), (2, 1, 16, 20)), "height and width multiples of 16"),
        ({}, ((2, 3, 16, 16), (2,), (2, 3, 16, 16)), r"expected \[B, 1, H, W\]"),
        ({}, ((2, 1, 16, 16), (2,), None), "side information is missing"),
        ({}, ((2, 1, 16, 16), (2,), (2, 1, 16, 32)), "expected equal shapes"),
        ({}, ((2, 1, 16, 16), (1,), (2, 1, 16, 16)), r"snr of \(1,\); expected one"),
    ],
)
def test_mistakes_are_refused(build, call, says):
    with pytest.raises(ValueError, match=says):
        model: nn.Module = DeepJSCC(1, **{"width": 4, **build})
        image, snr, side = call
        model(torch.rand(image), torch.zeros(snr), None if side is None else torch.rand(side))
