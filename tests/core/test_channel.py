"""Channels: power, signal-to-noise ratio, error rates and capacities with closed forms, gradients, and mistakes."""

import math

import pytest
import torch
from scipy.special import erfc

from interlayer.core.channel import Channel, normalised


def qpsk(count):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, (1, 2 * count), generator=generator).double() * 2 - 1


@pytest.mark.parametrize("snr", [-3.0, 3.0, 6.0])
@pytest.mark.parametrize(
    ("channel", "rate"),
    [
        (Channel(), lambda bit: 0.5 * erfc(math.sqrt(bit))),
        (Channel("fast"), lambda bit: 0.5 * (1 - math.sqrt(bit / (1 + bit)))),
    ],
)
def test_error_rates_of_qpsk_are_the_closed_forms(channel, rate, snr):
    """With the energy of a bit half of a symbol's; over Rayleigh fading the mean over exponential power."""
    sent = normalised(qpsk(200_000))
    torch.manual_seed(1)
    received = channel(sent, torch.tensor([snr], dtype=torch.double))
    found = float(((received > 0) != (sent > 0)).double().mean())
    assert found == pytest.approx(rate(10 ** (snr / 10) / 2), rel=0.03)


def test_symbols_have_the_power_and_the_noise_its_ratio():
    x = normalised(torch.randn(3, 4, 50, 50) * torch.tensor([0.1, 1.0, 30.0]).view(3, 1, 1, 1), power=2.0)
    symbols = torch.complex(*x.flatten(1).chunk(2, 1))
    torch.testing.assert_close(symbols.abs().square().mean(1), torch.full((3,), 2.0))
    snr = torch.tensor([-10.0, 0.0, 20.0])
    x = normalised(torch.randn(3, 2, 200, 200))
    noise = (Channel()(x, snr) - x).flatten(1)
    found = -10 * (2 * noise.square().mean(1)).log10()
    torch.testing.assert_close(found, snr, atol=0.1, rtol=0)


@pytest.mark.parametrize("line", [0.0, 4.0])
def test_gains_have_mean_power_one_and_rician_ones_a_direct_path(line):
    x = torch.cat((torch.ones(1, 100_000), torch.zeros(1, 100_000)), 1)
    real, imaginary = Channel("fast", line, known=False)(x, torch.tensor([200.0])).chunk(2, 1)
    assert float((real**2 + imaginary**2).mean()) == pytest.approx(1.0, rel=0.02)
    assert float(real.mean()) == pytest.approx(math.sqrt(line / (1 + line)), abs=0.01)
    assert float(imaginary.mean()) == pytest.approx(0.0, abs=0.01)


def test_block_fading_is_one_gain_for_each_item_and_a_receiver_that_knows_it_undoes_it():
    x = normalised(torch.randn(5, 2, 8, 8))
    far = torch.full((5,), 200.0)
    torch.testing.assert_close(Channel("block")(x, far), x, atol=1e-4, rtol=0)
    y = torch.complex(*Channel("block", known=False)(x, far).flatten(1).chunk(2, 1))
    gains = y / torch.complex(*x.flatten(1).chunk(2, 1))
    assert gains.std(1).max() < 1e-3 < gains[:, 0].std()


def test_seeds_given_noise_and_gradients():
    x, snr = normalised(torch.randn(2, 4, dtype=torch.double)).requires_grad_(), torch.tensor([0.0, 10.0])
    one, two = (Channel("fast")(x, snr, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, Channel("fast")(x, snr))
    noise = torch.randn(2, 4, dtype=torch.double)
    torch.testing.assert_close(Channel()(x, snr, noise)[1], (x[1] + math.sqrt(0.05) * noise[1]))
    assert torch.autograd.gradcheck(lambda x: Channel()(normalised(x), snr, noise), (x,))


def test_capacities():
    assert Channel().capacity(10.0) == pytest.approx(math.log2(11))
    gains = -torch.rand(400_000, dtype=torch.double).log()
    mean = float((1 + gains * 10**0.5).log2().mean())
    assert Channel("fast").capacity(5.0) == pytest.approx(mean, rel=0.01)
    assert Channel("fast").capacity(5.0) < Channel().capacity(5.0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Channel("slow"), "fading 'slow'; expected one of none, block, fast"),
        (lambda: Channel("fast", -1.0), "line -1.0; expected 0"),
        (lambda: Channel(line=2.0), "line 2.0 without fading has no effect"),
        (lambda: Channel("fast", 2.0).capacity(0.0), "line 2.0; expected 0"),
        (lambda: normalised(torch.ones(1, 3)), "3 real numbers in an item; expected an even number"),
        (lambda: normalised(torch.ones(1, 2), power=0), "power 0; expected above 0"),
        (lambda: Channel()(torch.ones(2, 3), torch.zeros(2)), "expected an even number of real numbers"),
        (lambda: Channel()(torch.ones(2, 4), torch.zeros(3)), r"snr of \(3,\); expected one .* each of 2 items"),
        (lambda: Channel()(torch.ones(2, 4), torch.zeros(2), torch.ones(2, 2)), r"noise \(2, 2\) for symbols \(2, 4\)"),
    ],
)
def test_mistakes_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
