"""The task of two senses: the noise is as stated, and both senses tell the digits apart."""

import torch

from interlayer.study.audiovisual import Audiovisual, senses


def test_noise_has_the_stated_deviation_and_what_is_validated_is_drawn_once():
    sight, sound, clean, digit = senses("train", 0, 1.0)
    assert len(sight) == len(sound) == len(clean) == len(digit)
    assert abs(float((sight - clean).std()) - 1) < 0.01
    assert not torch.equal(senses("train", 1, 1.0)[0], sight) and torch.equal(senses("train", 1, 1.0)[2], clean)
    assert torch.equal(senses("validation", 0, 1.0)[1], senses("validation", 1, 1.0)[1])


def test_each_sense_alone_tells_digits_apart():
    """The nearest class mean is right more often than one time in ten."""
    *given, _, digit = senses("train", 0, 1.0)
    *held, _, truth = senses("validation", 0, 1.0)
    for x, y in zip(given, held, strict=True):
        means = torch.stack([x[digit == d].mean(0) for d in range(10)])
        assert (torch.cdist(y, means).argmin(1) == truth).float().mean() > 0.3


def test_a_batch_is_two_senses_and_the_clean_image():
    task = Audiovisual(noise=0.0)
    (sight, _), clean = next(task.batches(0, 7))
    assert torch.equal(sight, clean)
    assert task.evaluate(lambda inputs: inputs[0], 7)["loss"] == 0
