"""Terminator against residual convolutional networks, on digits as images and as rows of pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, effect, highest, lowest
from interlayer.claims.training import batches, task
from interlayer.core.cost import parameters
from interlayer.core.fit import fit
from interlayer.core.parts import Same
from interlayer.core.taps import read
from interlayer.layers.hyper.hyperzzw import GroupedStandard, Instance, Local, SlowNet, Terminator


class Unit(nn.Module):
    """``relu(x + norm(conv(relu(norm(conv(x))))))``; a stride halves the places and doubles the channels."""

    def __init__(self, channels: int, stride: int, dims: int) -> None:
        super().__init__()
        conv, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d))[dims - 1]
        side, outputs = 9 if dims == 1 else 3, channels * stride
        self.branch = nn.Sequential(
            conv(channels, outputs, side, stride, side // 2, bias=False), norm(outputs), nn.ReLU(),
            conv(outputs, outputs, side, 1, side // 2, bias=False), norm(outputs),
        )  # fmt: skip
        self.shortcut: nn.Module = conv(channels, outputs, 1, stride, bias=False) if stride > 1 else Same()

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        return F.relu(self.shortcut(x) + self.branch(x))


class Residual(nn.Module):
    """Residual network of He et al.'s first kind with two stages of two units, in one or two dimensions."""

    def __init__(self, width: int, dims: int) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d)[dims - 1]
        self.embed = conv(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            [Unit(width, 1, dims), Unit(width, 1, dims), Unit(width, 2, dims), Unit(2 * width, 1, dims)]
        )
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.flatten(2).mean(2))


def build(arm: str, scale: Scale) -> nn.Module:
    """The network for images."""
    return net(arm, 2)


def net(arm: str, dims: int) -> nn.Module:
    """The network of an arm: 12 000 to 14 000 parameters, the residual one the larger."""
    if arm == "residual":
        return Residual(9, dims)
    size = (8, 8) if dims == 2 else (64,)
    model = Terminator(1, size, widths=(12, 24), hidden=8, omega=0.25)
    for module in list(model.modules()):
        if arm == "no kernels" and isinstance(module, SlowNet):
            for p in module.last.parameters():
                nn.init.zeros_(p.requires_grad_(False))
        for name, child in list(module.named_children()):
            if arm == "no standardisation" and (
                isinstance(child, GroupedStandard | Instance) or (isinstance(module, Local) and name == "standard")
            ):
                setattr(module, name, Same())
    return model


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Validation accuracy, and how far the means of the features between blocks are from zero, in deviations."""
    found = {}
    for dims in (2, 1):
        torch.manual_seed(seed)
        model = net(arm, dims)

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor], dims: int = dims) -> Tensor:
            return F.cross_entropy(model(batch[0] if dims == 2 else batch[0].flatten(2)), batch[1])

        fit(model, batches("digits", seed, 32, scale.steps), loss, steps=scale.steps, lr=2e-3, seed=seed)
        model.eval()
        x, y = next(iter(task("digits").batches(0, 10**4, "validation")))
        with torch.no_grad(), read(model, "blocks.*") as seen:
            right = (model(x if dims == 2 else x.flatten(2)).argmax(1) == y).float().mean()
        means = []
        for name, z in seen.items():
            if name.count(".") == 1:
                by_channel = z.transpose(0, 1).flatten(1)
                means.append((by_channel.mean(1).abs() / by_channel.std(1).clamp_min(1e-6)).mean())
        found[f"accuracy in {dims}-D"] = float(right)
        found[f"mean in {dims}-D"] = float(torch.stack(means).mean())
        found[f"parameters in {dims}-D"] = parameters(model)
    return found


CLAIM = Claim(
    says="At about equal parameters and equal steps a network of hyper-kernels without residuals classifies digits, as images and as "
    "rows of pixels, at least as well (within 1%) as residual convolutional networks, and the means of its features are nearer "
    "to zero.",
    measure=measure,
    build=build,
    arms=("residual", "terminator"),
    statements=(
        effect("", highest("accuracy in 2-D", "terminator", than=("residual",), margin=-0.01), control="no kernels"),
        effect("", highest("accuracy in 1-D", "terminator", than=("residual",), margin=-0.01), control="no kernels"),
        effect("", lowest("mean in 2-D", "terminator", than=("residual",)), control="no standardisation"),
        effect("", lowest("mean in 1-D", "terminator", than=("residual",)), control="no standardisation"),
    ),
    scales={"smoke": {"steps": 1}, "small": {"steps": 150}, "full": {"steps": 10_000}},
)
