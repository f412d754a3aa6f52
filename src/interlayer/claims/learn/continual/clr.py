"""CLR on a stream of eight image tasks: what stays the same to the last bit, what a task costs, and accuracy against baselines."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, check, effect, fits, highest, mechanism
from interlayer.claims.training import built
from interlayer.core import datasets, taps
from interlayer.core.data import Experience
from interlayer.core.datasets import Split
from interlayer.core.experiences import Learner, by_classes, in_a_row, rotated, run_stream
from interlayer.learn.continual import EWC, FineTune, Joint, LinearProbe
from interlayer.learn.continual.clr import CLR

SIDE, KNOWN, TESTED = 16, 6, 150  # pixels; photographs that the net knows before the stream; test images of a task


class SharedNorms(CLR):
    """All tasks share the model's BatchNorms and train them."""

    def shared(self) -> Iterable[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]


class Thawed(CLR):
    """The convolutions learn too."""

    def adapt(self, net: nn.Module) -> None:
        super().adapt(net)
        net.requires_grad_(True)


class Random(CLR):
    """Kernels as torch initialises them."""

    def reprogram(self, convolution: nn.Module) -> nn.Module:
        new: Any = super().reprogram(convolution)
        new[1].reset_parameters()
        return new


class OneImpulse(CLR):
    """The impulse of a whole convolution, which only the first channel gets where each has a kernel of its own."""

    def reprogram(self, convolution: nn.Module) -> nn.Module:
        new: Any = super().reprogram(convolution)
        nn.init.dirac_(new[1].weight)
        return new


class Dense(CLR):
    """Kernels between all channels."""

    def reprogram(self, convolution: nn.Module) -> nn.Module:
        channels: Any = convolution.out_channels
        return nn.Sequential(convolution, nn.Conv2d(channels, channels, 3, padding=1, bias=False))


class Biased(CLR):
    """A bias for each channel too."""

    def reprogram(self, convolution: nn.Module) -> nn.Module:
        channels: Any = convolution.out_channels
        return nn.Sequential(convolution, nn.Conv2d(channels, channels, 3, padding=1, groups=channels))


NEXT = "next task's parts"
ARMS: dict[str, tuple[type[Learner], dict[str, Any]]] = {
    "clr": (CLR, {"lr": 6e-2}),
    "fine-tune": (FineTune, {"lr": 1e-3}),
    "ewc": (EWC, {"lr": 1e-2, "strength": 300.0, "statistics": False}),
    "linear probe": (LinearProbe, {"lr": 1e-1}),
    "joint": (Joint, {"lr": 1e-2, "statistics": False}),
}
SHORT = {"shared norms": SharedNorms, "thawed": Thawed, "random kernels": Random, "one impulse": OneImpulse, "dense": Dense,
         "biased": Biased}  # fmt: skip


def build(arm: str, scale: Scale) -> nn.Module:
    """A plain convolutional net for 16x16 pixels, with a pointwise convolution that CLR passes over."""

    def stage(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    w = scale.width
    return nn.Sequential(
        *stage(1, w), *stage(w, 2 * w, stride=2), *stage(2 * w, 2 * w, 1), *stage(2 * w, 4 * w, stride=2), *stage(4 * w, 4 * w),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, KNOWN),
    )  # fmt: skip


@cache
def tasks() -> list[Experience]:
    """Six photographs to know before the stream; then eight tasks, of other photographs and of digits, whole and distorted."""
    parts = in_a_row({"photos": datasets.photos(), "digits": datasets.split_digits()}, side=SIDE)
    photos, digits = (Split(e.train, e.test) for e in parts)
    known, first, second = by_classes(photos, [range(KNOWN), range(KNOWN, 11), range(11, 16)], name="photos")
    low, high = by_classes(digits, [range(5), range(5, 10)], name="digits")
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(SIDE**2, generator=draw)

    def permuted(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return part[0].flatten(1)[:, order].view_as(part[0]), part[1]

    def on_photos(part: tuple[Tensor, Tensor], behind: Tensor) -> tuple[Tensor, Tensor]:
        return part[0] + 0.5 * behind[torch.arange(len(part[0])) % len(behind)], part[1]

    def distorted(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, rows = part[0], torch.arange(len(part[0]))
        ways = torch.stack([x, -x, F.avg_pool2d(x, 3, 1, 1), x + 0.5 * torch.randn(x.shape, generator=draw)])
        return ways[rows % 4, rows], rows % 4

    found = [
        first, low, second, high,
        Experience("which distortion", distorted(second.train), distorted(second.test), 4),
        *rotated(digits, [90]),
        Experience("digits on photos", on_photos(digits.train, first.train[0]), on_photos(digits.held, first.test[0]), 10),
        Experience("permuted digits", permuted(digits.train), permuted(digits.held), 10),
    ]  # fmt: skip
    return [known, *(_tested(e) for e in found)]


def _tested(e: Experience) -> Experience:
    rows = torch.linspace(0, len(e.test[1]) - 1, TESTED).long()
    return Experience(e.name, e.train, (e.test[0][rows], e.test[1][rows]), e.classes)


@lru_cache(maxsize=1)
def before(seed: int, width: int, steps: int) -> tuple[nn.Module, float]:
    """A net that knows six photographs, the same for all arms of a seed, and its accuracy on them."""
    model = built(lambda: build("", Scale(width=width)), seed)
    rule = FineTune(model, own_heads=False, lr=3e-3)
    return model, run_stream(rule, tasks()[:1], steps=steps, seed=seed).average


def measure(arm: str, seed: int, scale: Scale) -> Mapping[str, float]:
    """Accuracies after the stream; for CLR and its twins also what changes of earlier tasks, the first features, and parameters."""
    base, known = before(seed, scale.width, scale.known_steps)
    make, options = ARMS.get(arm, (SHORT.get(arm, CLR), ARMS["clr"][1]))
    rule, stream = make(copy.deepcopy(base), **options), tasks()[1:]
    short = arm in SHORT
    learned: dict[str, list[Tensor]] = {}

    def watch(experience: Experience) -> None:
        learned[experience.name] = [t.clone() for t in remembered(rule, experience)]

    steps = 4 if short else scale.steps
    result = run_stream(rule, stream[:3] if short else stream, steps=steps, seed=seed, watch=watch)
    found = {} if short else {
        "average accuracy": result.average, "backward transfer": result.backward, "forgetting": result.forgetting,
        "accuracy when learned": float(result.accuracy.diagonal().mean()), "known photographs": known,
    }  # fmt: skip
    if arm == NEXT:
        found["average accuracy"] = exchanged(rule, stream)
    elif isinstance(rule, CLR):
        found |= mechanics(rule, make, base, stream[: len(learned)], learned, scale.width)
    return found


def remembered(rule: Learner, experience: Experience) -> list[Tensor]:
    """All that must not change of an earlier task: logits of its test images, and its tensors, running statistics included."""
    rule.at(experience)
    return [rule.predict(experience.test[0]), *rule.model_for(experience).state_dict().values()]


def mechanics(
    rule: CLR,
    make: type[Learner],
    base: nn.Module,
    stream: list[Experience],
    learned: Mapping[str, list[Tensor]],
    width: int,
) -> dict[str, float]:
    """Numbers of earlier tasks that changed; distance of the first features; parameters of a task beside the closed form."""
    changed = [
        int((a != b).sum()) for e in stream[:-1] for a, b in zip(learned[e.name], remembered(rule, e), strict=True)
    ]
    fresh, task = make(copy.deepcopy(base)), stream[0]
    fresh.begin(task)
    features = []
    for net in (base, fresh.model_for(task)):
        with torch.no_grad(), taps.read(net.eval(), fresh.head, side="input") as seen:
            net(task.test[0])
        features.append(seen[fresh.head])
    # 9 for each channel after a 3x3 convolution (w, 2w, 4w, 4w), 2 for each normed channel (also 2w after the pointwise one).
    closed = 9 * 11 * width + 2 * 13 * width + (4 * width + 1) * task.classes
    whole = sum(p.numel() for p in base.parameters())
    return {
        "numbers changed": float(sum(changed)),
        "distance at the start": float((features[1] - features[0]).abs().max() / features[0].abs().max()),
        "parameters beside the closed form": float(abs(rule.parameters(task) - closed)),
        "share of the net": rule.parameters(task) / whole,
    }


def exchanged(rule: Learner, stream: list[Experience]) -> float:
    """Average accuracy with each task's head on the next task's kernels and norms."""
    parts = {e.name: {k: t.clone() for k, t in rule.own(e.name).items()} for e in stream}
    found = []
    for e, other in zip(stream, [*stream[1:], stream[0]], strict=True):
        with torch.no_grad():
            for k, t in rule.own(e.name).items():
                if not k.startswith(f"{rule.head}."):
                    t.copy_(parts[other.name][k])
        rule.at(e)
        found.append(float((rule.predict(e.test[0]).argmax(1) == e.test[1]).float().mean()))
    return sum(found) / len(found)


CLAIM = Claim(
    says="On a stream of eight image tasks CLR keeps every earlier task to the last bit, begins each as the frozen net, adds as many "
    "parameters as its closed form says, and ends with a higher average accuracy than fine-tuning, EWC and linear probes.",
    measure=measure,
    build=build,
    arms=ARMS,
    statements=(
        mechanism(
            "Later tasks change no bit of an earlier task's logits and tensors, running statistics included.",
            fits("numbers changed", "clr", high=0.5),
            control="shared norms",
            mutant="thawed",
        ),
        mechanism(
            "Before training a reprogrammed net has the features of the frozen one, but for rounding.",
            fits("distance at the start", "clr", high=1e-5),
            control="random kernels",
            mutant="one impulse",
        ),
        mechanism(
            "A task has 9 parameters for each reprogrammed channel, 2 for each normed one, and a head.",
            fits("parameters beside the closed form", "clr", high=0.5),
            control="dense",
            mutant="biased",
        ),
        *(
            effect(
                f"After the stream CLR is more accurate, on average over the tasks, than {name}.",
                highest("average accuracy", "clr", than=(arm,)),
                control=NEXT,
            )
            for arm, name in (("fine-tune", "fine-tuning"), ("ewc", "EWC"), ("linear probe", "linear probes"))
        ),
    ),
    checks=(
        check("The net knows its photographs: at least 40% of them, where one in six is chance.",
              fits("known photographs", "clr", low=0.4)),
        check("Fine-tuning learns: at least 60% on each task when it is learned.",
              fits("accuracy when learned", "fine-tune", low=0.6)),
        check("EWC forgets less than fine-tuning.", highest("backward transfer", "ewc", than=("fine-tune",))),
        check("There is room: training on all data seen so far beats fine-tuning.",
              highest("average accuracy", "joint", than=("fine-tune",))),
    ),
    pilots="",
    scales={
        "smoke": {"width": 4, "known_steps": 2, "steps": 1},
        "small": {"width": 8, "known_steps": 300, "steps": 80},
        "full": {"width": 64, "known_steps": 3000, "steps": 2000},
    },
)  # fmt: skip
