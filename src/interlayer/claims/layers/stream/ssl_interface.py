"""Interfaces between a frozen, pretrained Transformer and a linear head, ranked on four probe tasks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, effect, lowest
from interlayer.core.cost import parameters
from interlayer.layers.stream.ssl_interface import SSLInterface
from interlayer.models import Transformer
from interlayer.study.token_kinds import PROBES, states, teach


@cache
def features(seed: int, files: int, depth: int, width: int, length: int, steps: int, count: int) -> list[Tensor]:
    """States of all layers of a language model of bytes, and labels: for training, then held out."""
    how = {"seed": seed, "length": length, "files": files}
    torch.manual_seed(seed)
    model = Transformer(vocab=256, length=length, depth=depth, width=width, heads=4)
    loss = teach(model, steps=steps, **how)
    return [*states(model, count, **how), torch.tensor(loss)]


class Shuffled(SSLInterface):
    """The control: at every call the layers come in another order, so that there are no neighbours to convolve over."""

    def _stacked(self, states: Tensor | Sequence[Tensor]) -> Tensor:
        return super()._stacked(states)[:, torch.randperm(self.layers)]


def build(arm: str, scale: Scale, classes: int = PROBES["byte"]) -> nn.Sequential:
    """An interface and a head."""
    interface: nn.Module
    if arm in ("first layer", "middle layer", "last layer"):
        index = {"f": 0, "m": scale.depth // 2, "l": -1}[arm[0]]
        interface = SSLInterface(scale.width, scale.depth, kind="one", index=index)
    elif arm == "shuffled hconv":
        interface = Shuffled(scale.width, scale.depth, normalize=True)
    else:
        interface = SSLInterface(scale.width, scale.depth, kind=arm.removesuffix(", larger head"), normalize=True)
    head: nn.Module = nn.Linear(int(interface.outputs), classes)
    if arm.endswith("larger head"):  # as many parameters as hconv has
        more = parameters(SSLInterface(scale.width, scale.depth)) // (2 * scale.width)
        head = nn.Sequential(nn.Linear(scale.width, more), nn.ReLU(), nn.Linear(more, scale.width), head)
    return nn.Sequential(interface, head)


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Held-out loss and accuracy of a head on each interface, and what the interface costs."""
    given, labels, held, held_labels, upstream = features(
        seed, scale.files, scale.depth, scale.width, scale.length, scale.steps, scale.windows
    )
    found = {"upstream loss": float(upstream)}
    for task, (name, classes) in enumerate(PROBES.items()):
        torch.manual_seed(seed)
        model = build(arm, scale, classes)
        interface = model[0]
        if isinstance(interface, SSLInterface) and not isinstance(interface, Shuffled):
            interface.fit(given)
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        order = torch.Generator().manual_seed(seed)
        for _ in range(scale.probe_steps):
            rows = torch.randint(len(given), (8,), generator=order)
            loss = F.cross_entropy(model(given[rows]).flatten(0, 1), labels[rows][..., task].flatten())
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            logits = torch.cat([model(part) for part in held.split(16)]).flatten(0, 1)
        truth = held_labels[..., task].flatten()
        found[f"{name}: loss"] = float(F.cross_entropy(logits, truth))
        found[f"{name}: accuracy"] = float((logits.argmax(-1) == truth).float().mean())
        found["interface parameters"] = parameters(interface)
    return found


CLAIM = Claim(
    says="On a frozen Transformer that was trained to predict the next byte, the convolution over layers has a lower held-out "
    "loss than the weighted sum, against a head of the same parameters too, on four probes: this byte, the byte before, the "
    "kind of token, nesting.",
    measure=measure,
    build=build,
    arms=(
        "weighted-sum",
        "weighted-sum, larger head",
        "grouped",
        "concat",
        "hconv",
        "cls",
        "pca",
        "first layer",
        "middle layer",
        "last layer",
    ),
    statements=tuple(
        effect(
            "",
            lowest(f"{name}: loss", "hconv", than=("weighted-sum", "weighted-sum, larger head")),
            control="shuffled hconv",
        )
        for name in PROBES
    ),
    scales={
        "smoke": {"files": 3, "depth": 4, "width": 16, "length": 16, "steps": 2, "windows": 16, "probe_steps": 2},
        "small": {"files": 40, "depth": 9, "width": 64, "length": 64, "steps": 200, "windows": 256, "probe_steps": 100},
        "full": {
            "files": 160,
            "depth": 24,
            "width": 512,
            "length": 256,
            "steps": 20000,
            "windows": 4096,
            "probe_steps": 3000,
        },
    },
)
