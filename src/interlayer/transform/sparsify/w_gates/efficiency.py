"""What is left of a network's cost when filters are closed: exact multiply-adds, or latency as a small network predicts it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.cost import latency
from interlayer.core.fit import fit
from interlayer.core.taps import at_rest
from interlayer.core.wiring import Group, Member, Wiring, normed, take

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


class Multiplications(nn.Module):
    """Share of the multiply-adds that is left, exactly, from the share of units that each group keeps.

    Args:
        model: The network.
        wiring: Its groups.
        names: The groups that have gates.
        inputs: A batch.
    """

    counts: Tensor
    axes: Tensor

    def __init__(self, model: nn.Module, wiring: Wiring, names: list[str], inputs: Tensor) -> None:
        super().__init__()
        layers = {n: m for n, m in model.named_modules() if isinstance(m, LAYERS)}
        counts = dict.fromkeys(layers, 0)

        def seen(name: str, module: Any, args: Any, out: Tensor) -> None:
            """Each weight is used once for each position of what a layer writes, or reads if it is transposed."""
            channels = module.weight.shape[0]
            positions = (args[0] if getattr(module, "transposed", False) else out).numel() // channels
            counts[name] += module.weight.numel() * positions

        hooks = [m.register_forward_hook(partial(seen, n)) for n, m in layers.items()]
        try:
            with at_rest(model), torch.no_grad():
                model(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        found = list(counts.items())
        rows = torch.zeros(len(found), len(names))
        for j, name in enumerate(names):
            for m in wiring.groups[name].members:
                at = next((i for i, (n, _) in enumerate(found) if m.name == f"{n}.weight"), None)
                if at is not None:
                    rows[at, j] += m.index.numel() / model.get_parameter(m.name).shape[m.dim]
        total = sum(count for _, count in found)
        self.register_buffer("counts", torch.tensor([count / total for _, count in found]))
        self.register_buffer("axes", rows)

    def forward(self, shares: Float[Tensor, "*b groups"]) -> Float[Tensor, "*b"]:
        left = 1 - self.axes * (1 - shares.unsqueeze(-2))
        return (self.counts * left.prod(-1)).sum(-1)


class Latency(nn.Module):
    """Share of the latency that is left, as a small network learns it from the measured times of shrunk models.

    Args:
        groups: Groups that have gates.
        width: Hidden features.
    """

    def __init__(self, groups: int, *, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(groups, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )

    def forward(self, shares: Float[Tensor, "*b groups"]) -> Float[Tensor, "*b"]:
        return self.net(shares).squeeze(-1).exp()

    def learn(self, shares: Float[Tensor, "n groups"], times: Float[Tensor, " n"], *, steps: int = 500) -> Latency:
        """Fit measured times, relative to the first; the error counts in per cent of the time."""
        wanted = (times / times[0]).log()
        fit(self, [shares] * steps, lambda net, x: F.mse_loss(net(x).log(), wanted), steps=steps, lr=3e-3)
        return self


def measured(
    model: nn.Module, wiring: Wiring, names: list[str], inputs: Tensor, *, samples: int
) -> tuple[Float[Tensor, "n groups"], Float[Tensor, " n"]]:
    """Shares of units, the whole model's first and then drawn evenly, and the seconds that really shrunk models take."""
    shares, times = [torch.ones(len(names))], [latency(model, inputs)]
    for _ in range(samples):
        keep = {n: range(int(torch.randint(1, wiring.groups[n].size + 1, ()))) for n in names}
        shares.append(torch.tensor([len(keep[n]) / wiring.groups[n].size for n in names]))
        times.append(latency(take(model, keep, wiring, inputs), inputs))
    return torch.stack(shares), torch.tensor(times)


def ends(model: nn.Module, group: Group) -> tuple[list[Member], list[Member]]:
    """The weights of linear layers and convolutions that write a group's units, and those that read them."""
    found: tuple[list[Member], list[Member]] = ([], [])
    for m in group.members:
        path, _, last = m.name.rpartition(".")
        module = model.get_submodule(path)
        if last == "weight" and isinstance(module, LAYERS) and not _depthwise(module):
            found[m.dim != int(getattr(module, "transposed", False))].append(m)
    return found


def removable(model: nn.Module, group: Group) -> bool:
    """Whether gates on a group's readers do what removing its units does."""
    known = all(
        isinstance(model.get_submodule(m.name.rpartition(".")[0]), LAYERS) or model.state_dict()[m.name].ndim < 2
        for m in group.members
    )
    return known and not normed(model, group) and group.parent is None and all(ends(model, group))


def _depthwise(module: nn.Module) -> bool:
    return getattr(module, "groups", 1) > 1
