"""Tasks of image generation: learn what noise hides, and be judged by samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.core.data import Batch, DataShape, answer, moved
from interlayer.core.datasets import digits
from interlayer.core.nano import nano
from interlayer.core.process import DDIM, Diffusion, Flow, Process, distance, mmd, sample
from interlayer.core.task import Subject, Task

Predict = Callable[[Any], Any]


class DiffusionTask(Task):
    """Learn what a process hides in images of known classes.

    A batch's inputs are the arguments ``x`` (noised images), ``t`` (times) and ``y`` (classes) of the model, its targets what the
    process asks for. ``evaluate`` gives

    - ``loss``: the squared error over the validation images, at times and noise that are always the same;
    - ``distance``: the squared maximum mean discrepancy (``core.process.mmd``) of samples drawn with the model from validation
      images, and ``floor``: that of as many of these from the others;
    - ``agreement`` (with ``classify``): the share of the samples that are classified as what was asked for.

    Args:
        name: Name in the report.
        train: Images in [-1, 1], [N, C, H, W], and classes [N].
        validation: The same, to be judged on.
        process: What noise does. Defaults to DDPM's diffusion.
        features: From images to the features in which distances are measured. Defaults to the pixels.
        classify: From images to logits of the classes.
        samples: How many are drawn; at most two fewer than there are validation images.
        steps: Steps of the sampler, ``DDIM``.
        about: One line on the data.

    Examples:
        >>> images, classes = torch.rand(40, 1, 8, 8) * 2 - 1, torch.arange(40) % 4
        >>> task = DiffusionTask("mine", (images, classes), (images, classes), samples=8, steps=2)
        >>> inputs, noise = next(task.batches(0, 6))
        >>> inputs["x"].shape == noise.shape, inputs["y"].shape, task.shape.classes
        (True, torch.Size([6]), 4)
    """

    metric = "distance"
    base = "u-dit"
    unit = "squared error"

    def __init__(
        self,
        name: str,
        train: tuple[Tensor, Tensor],
        validation: tuple[Tensor, Tensor],
        *,
        process: Process | None = None,
        features: Callable[[Tensor], Tensor] = torch.Tensor.float,
        classify: Callable[[Tensor], Tensor] | None = None,
        samples: int = 100,
        steps: int = 10,
        about: str = "",
    ) -> None:
        images, classes = train
        if images.ndim != 4 or images.abs().max() > 1:
            raise ValueError(
                f"DiffusionTask: images {tuple(images.shape)}; expected [N, C, H, W] with values in [-1, 1]."
            )
        if len(validation[0]) < samples + 2:
            raise ValueError(
                f"DiffusionTask: {samples} samples and {len(validation[0])} validation images; expected more images. Draw fewer samples."
            )
        self.name, self.data, self.process = name, {"train": train, "validation": validation}, process or Diffusion()
        self.features, self.classify, self.samples, self.steps = features, classify, samples, steps
        _, channels, height, width = images.shape
        self.shape = DataShape(
            "image", "noise", classes=int(classes.max()) + 1, channels=channels, height=height, width=width
        )
        self.about = about or f"{len(images)} training and {len(validation[0])} validation images."

    def batches(self, seed: int, batch_size: int, split: str = "train") -> Iterator[Batch]:
        """Shuffled epochs without end, with new noise; or the validation images in order, at evenly spread times."""
        images, classes = self.data[split]
        generator = torch.Generator().manual_seed(seed if split == "train" else 0)

        def noised(index: Tensor, t: Tensor) -> Batch:
            x0 = images[index]
            noise = torch.randn(x0.shape, generator=generator)
            inputs = {"x": self.process.noised(x0, t, noise), "t": t, "y": classes[index]}
            return inputs, self.process.target(x0, noise, t)

        if split != "train":
            low, high = max(self.process.end, 0), self.process.start
            times = (low + (high - low) * (torch.arange(len(images)) + 0.5) / len(images)).to(
                self.process.draw(1).dtype
            )
            times = times[torch.randperm(len(images), generator=generator)]
            for index in torch.arange(len(images)).split(256):
                yield noised(index, times[index])
            return
        size = min(batch_size, len(images))
        while True:
            for index in torch.randperm(len(images), generator=generator).split(size):
                if len(index) == size:
                    yield noised(index, self.process.draw(size, generator))

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Mean squared error."""
        outputs = answer(outputs)
        if outputs.shape != targets.shape:
            raise ValueError(
                f"task {self.name!r}: the model gives {tuple(outputs.shape)}; expected {tuple(targets.shape)}."
            )
        return F.mse_loss(outputs, targets)

    @torch.no_grad()
    def error(self, predict: Predict, device: torch.device | str = "cpu") -> float:
        """The loss over the validation images."""
        total = 0.0
        for inputs, targets in moved(list(self.batches(0, 256, "validation")), device):
            total += float(self.loss(predict(inputs), targets)) * len(targets)
        return total / len(self.data["validation"][0])

    def draw(self, predict: Predict, seed: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Samples and their classes."""
        classes = (torch.arange(self.samples) % self.shape.classes).to(device)

        def model(x: Tensor, t: Tensor, y: Tensor) -> Any:
            return predict({"x": x, "t": t, "y": y})

        shape = (self.samples, self.shape.channels, self.shape.height, self.shape.width)
        images = sample(
            model, self.process, DDIM(), shape, classes, seed=seed, steps=self.steps, clip=1.0, device=device
        )  # fmt: skip
        return images.cpu(), classes.cpu()

    def quality(self, images: Tensor, classes: Tensor) -> dict[str, float]:
        """Distance from real images, its floor, and agreement of samples with their classes."""
        if not images.isfinite().all():
            return {"distance": math.inf, "floor": math.inf}
        real = self.data["validation"][0]
        with torch.no_grad():
            found = distance(mmd, self.features(images), self.features(real), splits=5)
            scores = {"distance": found.value, "floor": found.floor}
            if self.classify:
                scores["agreement"] = float((self.classify(images).argmax(-1) == classes).float().mean())
        return scores

    def evaluate(self, predict: Predict, batch_size: int, device: torch.device | str = "cpu") -> dict[str, float]:
        """Loss and what ``quality`` says of samples."""
        return {"loss": self.error(predict, device), **self.quality(*self.draw(predict, 0, device))}

    def judge(self, subject: Subject, seed: int) -> dict[str, float]:
        """As ``evaluate``, with samples from noise of the seed."""
        error = self.error(subject.predict, subject.device)
        return {"loss": error, **self.quality(*self.draw(subject.predict, seed, subject.device))}

    def trivial(self) -> dict[str, float]:
        """Loss of the prediction 0, and distance of the mean image."""
        images = self.data["train"][0]
        mean = images.mean(0).expand(self.samples, *images.shape[1:])
        loss = self.error(lambda inputs: torch.zeros_like(inputs["x"]))
        return {"loss": loss, **self.quality(mean, torch.arange(self.samples) % self.shape.classes)}


def digit_images(scale: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
    """scikit-learn's 8x8 handwritten digits in [-1, 1], enlarged ``scale`` times; every fifth is for validation."""
    x, y = digits()
    x = x / 8 - 1
    if scale > 1:
        x = F.interpolate(x, scale_factor=scale, mode="bilinear")
    held = torch.arange(len(x)) % 5 == 4
    return {"train": (x[~held], y[~held]), "validation": (x[held], y[held])}


@cache
def digit_classifier(scale: int = 1) -> nn.Sequential:
    """An MLP that knows the digits of ``digit_images`` (96% of the held-out ones); its last layer but one gives 32 features."""
    images, classes = digit_images(scale)["train"]

    def train(model: nn.Module) -> None:
        optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
        for _ in range(400):
            index = torch.randint(len(images), (64,))
            optimiser.zero_grad()
            F.cross_entropy(model(images[index]), classes[index]).backward()
            optimiser.step()

    def build() -> nn.Module:
        pixels = images[0].numel()
        body = (nn.Flatten(), nn.Linear(pixels, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        return nn.Sequential(nn.Sequential(*body), nn.Linear(32, 10))

    found = nano(build, train, task="digits", kind="mlp", scale=scale, steps=400, lr=3e-3)
    assert isinstance(found, nn.Sequential)
    return found


@cache
def digits_diffusion(scale: int = 1, *, name: str = "digits-diffusion", **options: Any) -> DiffusionTask:
    """Diffusion of handwritten digits, judged in the features of a classifier of theirs.

    Args:
        scale: How much the 8x8 images are enlarged.
        name: In the report.
        **options: See ``DiffusionTask``.
    """
    data, classifier = digit_images(scale), digit_classifier(scale)
    side = 8 * scale
    about = (
        f"Noise in scikit-learn's handwritten digits, {side}x{side} pixels: {len(data['train'][0])} for training, "
        f"{len(data['validation'][0])} for validation; samples are compared in 32 features of a classifier."
    )
    return DiffusionTask(
        name,
        data["train"],
        data["validation"],
        features=classifier[0],
        classify=classifier,
        about=about,
        **options,
    )


def digits_flow(scale: int = 1, **options: Any) -> DiffusionTask:
    """Rectified flow of handwritten digits, sampled in 25 steps, at whose times solvers of flows act.

    Args:
        scale: How much the 8x8 images are enlarged.
        **options: See ``DiffusionTask``.
    """
    return digits_diffusion(scale, name="digits-flow", process=Flow(), **{"steps": 25, **options})
