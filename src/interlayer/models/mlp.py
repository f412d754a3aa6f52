"""Fully connected network with slots."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.config import configured
from interlayer.core.slots import factory, fill, norms


@configured
class MLP(nn.Module):
    """Fully connected network of ``depth`` equally wide layers ``act(W x + b)``, joined by a stream.

    Args:
        features: Numbers in one input; inputs of more dimensions are flattened.
        classes: Outputs K.
        depth: Hidden layers.
        width: Features of each.
        stream: How layers are joined; ``"feedforward"`` is the ordinary MLP.
        norm: What the stream normalises with.
        activation: Called without arguments.
        linear: Every linear map.

    Shapes: [B, ...] to [B, K].

    Examples:
        >>> import torch
        >>> MLP(64, 10, depth=3, width=32, stream="rezero")(torch.zeros(5, 64)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        depth: int = 4,
        width: int = 64,
        stream: Any = "feedforward",
        norm: Any = "layernorm",
        activation: Any = "relu",
        linear: Any = "linear",
    ) -> None:
        super().__init__()
        self.features = features
        line = factory("linear", linear)
        self.embed = line(inputs=features, outputs=width)
        self.stream = fill("stream", stream, depth=depth, width=width, branches=1, norm=norms("MLP", norm, "features"))
        if self.stream.needs:
            raise ValueError(f"MLP: stream {type(self.stream).__name__} needs attention; an MLP has none.")
        self.blocks = nn.ModuleList(
            nn.Sequential(line(inputs=width, outputs=width), fill("activation", activation)) for _ in range(depth)
        )
        self.head = line(inputs=width, outputs=classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B K"]:
        """Outputs of the last layer."""
        if x[0].numel() != self.features:
            raise ValueError(f"MLP: input {tuple(x.shape)} has {x[0].numel()} features; expected {self.features}.")
        state = self.stream.start(self.embed(x.flatten(1)))
        for layer, block in enumerate(self.blocks):
            state = self.stream.write(state, layer, block(self.stream.read(state, layer)))
        return self.head(self.stream.finish(state))
