"""CLR: a frozen convolutional network is reprogrammed for each task by a 3x3 kernel on each channel."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from interlayer.core import datasets
from interlayer.core.data import Experience
from interlayer.core.example import Example
from interlayer.core.experiences import Learner, by_classes
from interlayer.core.select import exchange

POINTWISE = ("none", "scale", "full")


class CLR(Learner):
    """A frozen network learns each new task by a depthwise convolution after each of its convolutions, and forgets none.

    Paper: Ge, Li, Ni, Zhao, Yang and Itti, "CLR: Channel-wise Lightweight Reprogramming for Continual Learning",
    arXiv:2307.11386.

    For task t each frozen convolution ``W`` is followed by one 3x3 kernel for each of its c output channels,
    ``x'_k = K_(t,k) * (W * x)_k``, k = 1..c, of stride 1, padded with zeros and without a bias. ``K`` begins as a Dirac
    impulse, so that the network begins as the frozen one. The task also trains its own copy of every BatchNorm, running
    statistics included, and its own linear head; nothing else is trained. So a task has ``9 c`` parameters for each
    reprogrammed convolution, ``2 c`` for each BatchNorm, and its head. By default convolutions of 1x1 are not reprogrammed,
    as in the main method of the authors' code.

    The recipe is theirs too: Adam at 0.001 for batches of 32, a tenth of it after each third of the task's steps (where the
    loop follows ``core.schedule.stepped``), and 0.00001 times the Euclidean norm of every trained tensor. (They also keep
    the best epoch by test accuracy, which is left out here.) The paper puts a task of ResNet-50 at 0.59%. Without the head
    this counts 0.37% trained parameters, and 0.60% with the running statistics; how the authors counted could not be
    verified in their code and in what public pages hold of the paper.

    The model itself is only frozen, and shares its weights with the networks of all tasks. ``save`` and ``load`` move the
    parts of one task, and ``model_for`` gives a plain network. A task's network has to be known at test.

    Args:
        model: A trained network with ``nn.Conv2d`` and a linear head. Its parameters stop requiring gradients.
        pointwise: What follows 1x1 convolutions: ``none``, ``scale`` (one factor for each channel) or ``full`` (3x3 kernels).
        lr: Learning rate of Adam at the beginning of a task.
        penalty: Factor of the sum of norms of the trained tensors.
        head: Name of the ``nn.Linear`` that each task replaces. Defaults to the last one.

    Shapes: a batch is (images [B, C, H, W], labels [B]).

    Raises:
        ValueError: Unknown ``pointwise``, or no convolution to reprogram.

    Examples:
        >>> from interlayer.models.classic import ResNet18
        >>> rule = CLR(ResNet18(1, 10, width=4))
        >>> first, second = by_classes(datasets.split_digits(), [[0, 1, 2], [3, 4]])
        >>> for task in (first, second):
        ...     rule.begin(task)
        ...     metrics = rule.step((task.train[0][:8], task.train[1][:8]))
        >>> rule.at(first)
        >>> rule.predict(first.test[0]).shape
        torch.Size([82, 3])
        >>> rule.parameters(second)
        2862
    """

    slug = "clr"

    def __init__(
        self,
        model: nn.Module,
        *,
        pointwise: str = "none",
        lr: float = 1e-3,
        penalty: float = 1e-5,
        head: str | None = None,
    ) -> None:
        if pointwise not in POINTWISE:
            raise ValueError(f"CLR: pointwise {pointwise!r}; expected one of {', '.join(POINTWISE)}.")
        super().__init__(model.requires_grad_(False), lr=lr, penalty=penalty, head=head)
        self.pointwise = pointwise
        if not self.reprogrammed():
            raise ValueError(
                f"CLR: {type(model).__name__} has no convolution to reprogram; expected an nn.Conv2d"
                f"{' larger than 1x1. Choose pointwise=scale or full' if pointwise == 'none' else ''}."
            )

    def reprogrammed(self) -> list[str]:
        """The names of the convolutions that each task reprograms."""
        convolutions = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Conv2d)}
        return [n for n, m in convolutions.items() if self.pointwise != "none" or m.kernel_size != (1, 1)]

    def shared(self) -> Iterable[Tensor]:
        """The parameters outside of BatchNorm; buffers may move in training, so each task has its own."""
        norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm)]
        own = {id(p) for m in norms for p in m.parameters(recurse=False)}
        return [p for p in self.model.parameters() if id(p) not in own]

    def adapt(self, net: nn.Module) -> None:
        """Follow convolutions with kernels of the task's own, and let its BatchNorms learn."""
        exchange(net, self.reprogrammed(), self.reprogram)
        for module in net.modules():
            if isinstance(module, _BatchNorm):
                module.requires_grad_(True)

    def reprogram(self, convolution: nn.Module) -> nn.Module:
        """The frozen convolution with a kernel for each of its output channels."""
        assert isinstance(convolution, nn.Conv2d)
        channels = convolution.out_channels
        side = 1 if convolution.kernel_size == (1, 1) and self.pointwise == "scale" else 3
        kernels = nn.Conv2d(channels, channels, side, padding=side // 2, groups=channels, bias=False)
        nn.init.dirac_(kernels.weight, groups=channels)
        return nn.Sequential(convolution, kernels.to(convolution.weight.device, convolution.weight.dtype))

    def parameters(self, experience: Experience) -> int:
        """How many parameters a task trains and has to itself, its head included."""
        self.at(experience)
        return sum(t.numel() for t in self.own(experience.name).values() if isinstance(t, nn.Parameter))


def _rule() -> CLR:
    layers = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [
        nn.Conv2d(8, 8, 3, 2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    ]
    return CLR(nn.Sequential(*layers), lr=1e-2)


def _tasks() -> list[Experience]:
    return by_classes(datasets.split_digits(), [[0, 1, 2], [3, 4], [5, 6, 7, 8]])


EXAMPLE = Example(make=_rule, inputs=lambda: datasets.drawn(_tasks()[0].train, 20), experiences=_tasks, forgets=False)
