"""The network that makes the weights of HyperFormer's adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Hypernetwork(nn.Module):
    """From a task, a layer and a place (feed-forward or attention) to the weights of an adapter and of its norm.

    ``v = LN(P2 relu(P1 [task; layer; place]))`` and each weight is a linear map of v, the same for all layers and places. Without
    ``shared``, each layer and place has linear maps of its own, and ``v = P2 relu(P1 task)``.

    Args:
        width: Features D that an adapter reads and gives.
        layers: Layers L.
        shared: Whether all layers and places share the maps (HyperFormer++), or each has its own (HyperFormer).
        embedding: Features E of the embeddings of tasks, layers and places.
        hidden: Hidden features of the projection P.
        projected: Features of v.
        reduction: The bottleneck has ``D // reduction`` features, at least one.

    Shapes: none to the six tensors of ``HyperFormer``.

    Examples:
        >>> net = Hypernetwork(32, 2)
        >>> net.add("a")
        >>> {name: tuple(t.shape) for name, t in net("a", layer=1, place=0).items()}  # doctest: +NORMALIZE_WHITESPACE
        {'down_weight': (1, 32), 'down_bias': (1,), 'up_weight': (32, 1), 'up_bias': (32,), 'norm_weight': (32,),
         'norm_bias': (32,)}
    """

    def __init__(
        self,
        width: int,
        layers: int,
        *,
        shared: bool = True,
        embedding: int = 64,
        hidden: int = 128,
        projected: int = 64,
        reduction: int = 32,
    ) -> None:
        super().__init__()
        if min(width, layers, embedding, hidden, projected, reduction) < 1:
            raise ValueError(
                f"Hypernetwork: width={width}, layers={layers}, embedding={embedding}, hidden={hidden}, projected={projected}, "
                f"reduction={reduction}; expected at least 1 of each."
            )
        self.bottleneck, self.shared = max(width // reduction, 1), shared
        self.shapes = shapes(width, self.bottleneck)
        self.tasks = nn.ParameterDict()
        self.embedding = embedding
        self.layers = nn.Embedding(layers, embedding) if shared else None
        self.places = nn.Embedding(2, embedding) if shared else None
        self.project = nn.Sequential(
            nn.Linear((3 if shared else 1) * embedding, hidden),
            nn.ReLU(),
            nn.Linear(hidden, projected),
            nn.LayerNorm(projected, eps=1e-6) if shared else nn.Identity(),
        )
        self.makers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(projected, shape.numel()) for name, shape in self.shapes.items()})
            for _ in range(1 if shared else 2 * layers)
        )
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(linear.weight, std=1e-2)
            nn.init.zeros_(linear.bias)

    def add(self, task: str, like: str | None = None) -> None:
        """Add a task: a random embedding, or that of another task."""
        start = torch.randn(self.embedding) if like is None else self.tasks[like].detach().clone()
        self.tasks[task] = nn.Parameter(start.to(next(self.makers.parameters())))

    def forward(self, task: str, layer: int, place: int) -> dict[str, Tensor]:
        """The weights of one adapter."""
        given = [self.tasks[task]]
        if self.layers is not None and self.places is not None:
            given += [self.layers.weight[layer], self.places.weight[place]]
        v = self.project(torch.cat(given))
        maker: Any = self.makers[0 if self.shared else 2 * layer + place]
        return {name: maker[name](v).view(shape) for name, shape in self.shapes.items()}


def shapes(width: int, bottleneck: int) -> dict[str, torch.Size]:
    """The shapes of an adapter's weights."""
    return {
        "down_weight": torch.Size([bottleneck, width]),
        "down_bias": torch.Size([bottleneck]),
        "up_weight": torch.Size([width, bottleneck]),
        "up_bias": torch.Size([width]),
        "norm_weight": torch.Size([width]),
        "norm_bias": torch.Size([width]),
    }
