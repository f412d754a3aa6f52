"""How alike the hidden states after the blocks of a model are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interlayer.core import taps
from interlayer.core.kinds import Finding
from interlayer.core.order import behind
from interlayer.core.select import blocks
from interlayer.probe.painters.places import check_order, find


@torch.no_grad()
def similarity(model: nn.Module, data: Any, *, at: str | None = None) -> Finding:
    """The cosine of the hidden states after each pair of blocks, averaged over all tokens (or pixels).

    The paper finds the middle blocks alike and the first and last ones unlike them. Where a model's blocks differ in the
    shape of their states (the stages of a ResNet), the blocks inside the heaviest of them are compared.

    Args:
        model: Any model with repeated blocks; it is as before afterwards.
        data: What ``taps.feed`` takes.
        at: Name of the list of blocks, or of a part that holds it. Defaults to the list that holds the most weights.

    Returns:
        Table ``similarity``: a column ``layer`` and one column for each layer; and a figure.

    Raises:
        ValueError: No list of blocks whose states have one shape.
    """
    at, found = blocks(model) if at is None else find(model, at)
    states = _states(model, data, at)
    while len({x.shape for x in states}) > 1:
        heaviest = max(range(len(found)), key=lambda i: sum(p.numel() for p in found[i].parameters()))
        inner, found = blocks(found[heaviest])
        at = f"{at}.{heaviest}.{inner}"
        states = _states(model, data, at)
    units = torch.stack([F.normalize(x.double(), dim=-1) for x in states])
    matrix = torch.einsum("itd,jtd->ij", units, units) / units.shape[1]
    columns: dict[str, list[Any]] = {"layer": list(range(len(found)))}
    columns |= {str(i): row for i, row in enumerate(matrix.tolist())}

    def figure() -> Any:
        from matplotlib.figure import Figure

        drawn = Figure(layout="constrained")
        axes = drawn.subplots()
        drawn.colorbar(axes.imshow(matrix.numpy(), vmax=1.0), label="mean cosine of hidden states")
        axes.set(xlabel="after block", ylabel="after block", title=f"{type(model).__name__}: {at}")
        return drawn

    return Finding({"similarity": columns}, figure)


def _states(model: nn.Module, data: Any, at: str) -> list[Tensor]:
    """The hidden states after each block: ``[tokens or pixels, features]``."""

    def flat(x: Tensor) -> Tensor:
        return (x.movedim(1, -1) if x.ndim == 4 else x).flatten(0, -2)

    check_order(model, at, [])
    with taps.at_rest(model), behind(model, at) as seen:
        for _ in taps.feed(model, data):
            pass
    return [torch.cat([flat(x) for x in states]) for states in seen]
