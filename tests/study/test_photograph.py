"""The task of a photograph: judged as it comes back from 8-bit numbers, in the stated bytes."""

import math
from types import SimpleNamespace

import pytest
import torch

from interlayer.core.fields import Implicit, grid
from interlayer.layers.hyper.doh import DOH
from interlayer.models import build
from interlayer.study.photograph import Photograph, china


def subject(model):
    return SimpleNamespace(model=model, predict=model, batch_size=16, device=torch.device("cpu"))


def test_what_is_judged_is_the_model_after_rounding():
    task, model = china(), DOH.for_task(china().shape, size=300)
    before = [p.clone() for p in model.parameters()]
    found = task.judge(subject(model), 0)
    given = model.quantized(8)(grid(64, 64)).detach().clamp(0, 1)
    assert found["psnr"] == pytest.approx(-10 * math.log10(float((given - task.y).square().mean())), rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("size", [600, 1800])
def test_both_arms_use_the_bytes_that_they_are_given(size):
    task = china()
    doh, field = (build(name, task.shape, size=size) for name in ("doh", "field"))
    assert isinstance(field, Implicit)
    assert task.judge(subject(doh), 0)["bytes"] == size
    wider = Implicit(2, 1, width=field.weights[0].shape[0] + 1, activation="sine")
    assert task.judge(subject(field), 0)["bytes"] <= size < task.judge(subject(wider), 0)["bytes"]


def test_a_field_too_small_is_refused():
    with pytest.raises(ValueError, match="size 20 bytes; a network of width 1 takes 73"):
        build("field", china().shape, size=20)


def test_a_perfect_picture_has_no_error_and_rows_come_first():
    image = torch.arange(6.0).view(1, 1, 2, 3) / 5
    task = Photograph("mine", image)
    x, y = next(task.batches(0, 8, "validation"))
    assert x[1].tolist() == [-1.0, 0.0] and torch.equal(y.flatten(), image.flatten())
    assert task.evaluate(lambda x: y, 8)["psnr"] == math.inf
    assert math.isnan(task.evaluate(lambda x: y * math.nan, 8)["psnr"])
