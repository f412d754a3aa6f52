"""Residual convolutional network of the CIFAR kind with slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.config import configured
from interlayer.core.parts import same_padding_shortcut
from interlayer.core.slots import factory, fill, norms

UNITS = {
    "basic": ((3, 3), 1),
    "bottleneck": ((1, 3, 1), 4),
}  # sides of a branch's kernels; its outputs over hidden channels


@configured
class ConvNet(nn.Module):
    """CIFAR-style residual network (He et al., arXiv:1512.03385, section 4.2) whose units are joined by a stream.

    Three stages of (depth - 2) / 6 units with ``width``, 2 ``width`` and 4 ``width`` channels; the second and third
    begin with stride 2. The branch of a unit is conv, norm, act, conv; what comes before and after is the stream's.
    Between stages the shortcut has no parameters: it subsamples and pads with zero channels.

    Bottleneck units (arXiv:1603.05027; ResNet-164 and ResNet-1001 are made of them) have branches of three convolutions,
    1x1, 3x3 and 1x1, and four times as many channels outside as inside; there are (depth - 2) / 9 to a stage. Where
    channels change, the shortcut is a 1x1 convolution of what the branch reads.

    Args:
        channels: Channels C of the image.
        classes: Number of classes K.
        depth: Weighted layers, 6 n + 2, or 9 n + 2 with bottlenecks.
        width: Channels of the first stage, inside its units.
        stream: How units are joined; ``"identity-mappings"`` is the pre-activated ResNet.
        norm: Norm inside units and in streams that have norms.
        activation: Called without arguments.
        unit: ``basic`` or ``bottleneck``.

    Shapes: [B, C, H, W] to [B, K].

    Raises:
        ValueError: Unknown unit, a depth that does not fit it, a norm over features, a stream that needs attention.

    Examples:
        >>> import torch
        >>> ConvNet(1, 10, depth=8, width=8)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int = 3,
        classes: int = 10,
        *,
        depth: int = 20,
        width: int = 16,
        stream: Any = "identity-mappings",
        norm: Any = "batchnorm",
        activation: Any = "relu",
        unit: str = "basic",
    ) -> None:
        super().__init__()
        if unit not in UNITS:
            raise ValueError(f"ConvNet: unit {unit!r} is not one of {list(UNITS)}.")
        kernels, expansion = UNITS[unit]
        each = 3 * len(kernels)  # layers that one more unit in each stage adds
        if depth < each + 2 or (depth - 2) % each:
            raise ValueError(
                f"ConvNet: depth {depth} is not {each} n + 2; take {each + 2}, {2 * each + 2}, {3 * each + 2} and so on."
            )
        self.channels = channels
        units = (depth - 2) // each
        outs = [expansion * width * 2**stage for stage in range(3) for _ in range(units)]
        ins = [width, *outs[:-1]]
        self.strides = [2 if layer in (units, 2 * units) else 1 for layer in range(3 * units)]
        self.embed = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        make_norm, act = norms("ConvNet", norm, "channels"), factory("activation", activation)
        self.stream = fill(
            "stream", stream, depth=len(outs), width=ins, outputs=outs, branches=1, norm=make_norm, activation=act
        )
        if self.stream.needs:
            raise ValueError(f"ConvNet: stream {type(self.stream).__name__} needs attention; a ConvNet has none.")
        self.blocks, self.shortcuts = nn.ModuleList(), nn.ModuleDict()
        for layer, (i, o, stride) in enumerate(zip(ins, outs, self.strides, strict=True)):
            sizes = [i, *[o // expansion] * (len(kernels) - 1), o]
            branch: list[nn.Module] = []
            for at, kernel in enumerate(kernels):
                branch += [make_norm(width=sizes[at]), act()] if at else []
                step = 1 if at else stride
                branch.append(nn.Conv2d(sizes[at], sizes[at + 1], kernel, step, padding=kernel // 2, bias=False))
            self.blocks.append(nn.Sequential(*branch))
            if i != o and unit == "bottleneck":
                self.shortcuts[str(layer)] = nn.Conv2d(i, o, 1, stride, bias=False)
        self.head = nn.Linear(outs[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        if image.ndim != 4 or image.shape[1] != self.channels:
            raise ValueError(f"ConvNet: image {tuple(image.shape)}; expected [batch, {self.channels}, height, width].")
        state = self.stream.start(self.embed(image))
        for layer, block in enumerate(self.blocks):
            inputs = self.stream.read(state, layer)
            branch = block(inputs)
            if str(layer) in self.shortcuts or self.strides[layer] > 1:
                shortcut = self._shortcut(layer, inputs, state.x, branch.shape[1])
                state = self.stream.resample(state, layer, shortcut)
            state = self.stream.write(state, layer, branch)
        return self.head(self.stream.finish(state).mean((2, 3)))

    def _shortcut(self, layer: int, inputs: Any, x: Tensor, channels: int) -> Callable[[Tensor], Tensor]:
        """What brings the residual ``x``, and whatever else a stream carries, to the shape of the next stage."""
        if str(layer) not in self.shortcuts:
            return lambda t: same_padding_shortcut(t, self.strides[layer], channels)
        return lambda t: self.shortcuts[str(layer)](inputs if t is x else t)
