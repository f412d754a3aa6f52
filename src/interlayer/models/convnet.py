"""Residual convolutional network of the CIFAR kind with slots."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.config import configured
from interlayer.core.parts import same_padding_shortcut
from interlayer.core.slots import factory, fill, norms


@configured
class ConvNet(nn.Module):
    """CIFAR-style residual network (He et al., arXiv:1512.03385, section 4.2) whose units are joined by a stream.

    Three stages of (depth - 2) / 6 units with ``width``, 2 ``width`` and 4 ``width`` channels; the second and third
    begin with stride 2. The branch of a unit is conv, norm, act, conv; what comes before and after is the stream's.

    Args:
        channels: Channels C of the image.
        classes: Number of classes K.
        depth: Weighted layers, 6 n + 2.
        width: Channels of the first stage.
        stream: How units are joined; ``"identity-mappings"`` is the pre-activated ResNet.
        norm: Norm inside units and in streams that have norms.
        activation: Called without arguments.

    Shapes: [B, C, H, W] to [B, K].

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
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"ConvNet: depth {depth} is not 6 n + 2; take 8, 14, 20, 32, 56, 110 or 164 and the like.")
        self.channels = channels
        units = (depth - 2) // 6
        outs = [width * 2**stage for stage in range(3) for _ in range(units)]
        ins = [width, *outs[:-1]]
        self.strides = [1 if i == o else 2 for i, o in zip(ins, outs, strict=True)]
        self.embed = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        make_norm, act = norms("ConvNet", norm, "channels"), factory("activation", activation)
        self.stream = fill(
            "stream", stream, depth=len(outs), width=ins, outputs=outs, branches=1, norm=make_norm, activation=act
        )
        if self.stream.needs:
            raise ValueError(f"ConvNet: stream {type(self.stream).__name__} needs attention; a ConvNet has none.")
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(i, o, 3, stride, padding=1, bias=False),
                make_norm(width=o),
                act(),
                nn.Conv2d(o, o, 3, padding=1, bias=False),
            )
            for i, o, stride in zip(ins, outs, self.strides, strict=True)
        )
        self.head = nn.Linear(outs[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        if image.ndim != 4 or image.shape[1] != self.channels:
            raise ValueError(f"ConvNet: image {tuple(image.shape)}; wanted [batch, {self.channels}, height, width].")
        state = self.stream.start(self.embed(image))
        for layer, block in enumerate(self.blocks):
            branch = block(self.stream.read(state, layer))
            if self.strides[layer] > 1:
                state = self.stream.resample(state, layer, lambda x, c=branch.shape[1]: same_padding_shortcut(x, 2, c))
            state = self.stream.write(state, layer, branch)
        return self.head(self.stream.finish(state).mean((2, 3)))
