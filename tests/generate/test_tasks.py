import pytest
import torch

from interlayer.core.process import Flow
from interlayer.generate.tasks import DiffusionTask, digits_diffusion
from interlayer.study import compare


def images(count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(count) % 4


def test_batches_follow_the_seed():
    task = DiffusionTask("mine", images(), images(30, 1), samples=9)
    runs = [[next(stream) for _ in range(9)] for stream in (task.batches(0, 8), task.batches(0, 8), task.batches(1, 8))]
    for (a, noise), (b, other) in zip(runs[0], runs[1], strict=True):
        assert all(torch.equal(a[k], b[k]) for k in "xty") and torch.equal(noise, other)
    assert not torch.equal(runs[0][0][1], runs[2][0][1]) and not torch.equal(runs[0][0][1], runs[0][5][1])
    (inputs, noise) = runs[0][0]
    alpha, sigma = task.process.broadcast(inputs["t"], noise)
    assert ((inputs["x"] - sigma * noise) / alpha).abs().max() <= 1 + 1e-3  # what is left are the images


@pytest.mark.parametrize("process", [None, Flow()])
def test_validation_is_always_the_same(process):
    task = DiffusionTask("mine", images(), images(30, 1), process=process, samples=9)
    (inputs, target), (again, _) = next(task.batches(0, 8, "validation")), next(task.batches(0, 99, "validation"))
    assert all(torch.equal(inputs[k], again[k]) for k in "xty") and len(target) == 30
    gaps = inputs["t"].sort().values.diff().float()
    assert gaps.min() > 30 and gaps.max() < 37  # spread evenly over 1000 times


def test_judgement():
    """A model that knows the data is at the floor; one that knows the mean alone, and none at all, are far from it."""
    task = digits_diffusion()
    real, classes = task.data["train"]
    good = task.quality(real[:100], classes[:100])
    assert abs(good["distance"] - good["floor"]) < 0.01 and good["agreement"] > 0.95
    trivial = task.trivial()
    assert trivial["distance"] > 0.05 and 0.95 < trivial["loss"] < 1.05 and abs(trivial["agreement"] - 0.1) < 1e-6
    drawn = [task.draw(lambda inputs: inputs["x"], seed)[0] for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert task.quality(drawn[0] * torch.nan, classes[:100])["distance"] == torch.inf


def test_errors():
    x, y = images()
    with pytest.raises(ValueError, match=r"expected \[N, C, H, W\] with values in \[-1, 1\]"):
        DiffusionTask("mine", (x * 3, y), (x, y))
    with pytest.raises(ValueError, match="100 samples and 40 validation images"):
        DiffusionTask("mine", (x, y), (x, y))
    task = DiffusionTask("mine", (x, y), (x, y), samples=9)
    inputs, noise = next(task.batches(0, 4))
    with pytest.raises(ValueError, match=r"the model gives \(4, 2, 8, 8\); expected \(4, 1, 8, 8\)"):
        task.loss(inputs["x"].repeat(1, 2, 1, 1), noise)


def test_generators_are_compared(tmp_path):
    """Arms of a study: U-DiT, the same with plain attention, and an isotropic DiT, judged by their samples."""
    result = compare(
        model="u-dit(width=8, heads=2, depth=(1, 0, 0, 0, 0))",
        task="digits-diffusion",
        arms=["plain", "down=1", "dit(width=8, heads=2, depth=1)"],
        steps=1, seeds=1, lr=1e-3, evaluations=1, workers=1, out=tmp_path,
    )  # fmt: skip
    assert [run.state for run in result.runs] == ["done"] * 3
    assert all(run.record.metrics.keys() == {"loss", "distance", "floor", "agreement"} for run in result.runs)
