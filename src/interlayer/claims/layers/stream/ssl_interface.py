"""Interfaces between a frozen, pretrained Transformer and a linear head, ranked on four probe tasks."""

from __future__ import annotations

import io
import keyword
import token as kinds
import tokenize
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, effect, lowest
from interlayer.core import datasets
from interlayer.core.cost import parameters
from interlayer.layers.stream.ssl_interface import SSLInterface, hidden_states
from interlayer.models import Transformer

TASKS = {"byte": 128, "byte before": 128, "token": 8, "nesting": 4}  # from what the first layers hold to the last
KEYWORD, NAME, NUMBER, STRING, COMMENT, OPERATOR, SPACE = range(1, 8)
BY_TYPE = {kinds.NAME: NAME, kinds.NUMBER: NUMBER, kinds.STRING: STRING, tokenize.COMMENT: COMMENT, kinds.OP: OPERATOR}


@cache
def labelled(count: int) -> tuple[Tensor, Tensor]:
    """Bytes of ``count`` modules of the standard library, and for each byte a label for every probe task."""
    texts: list[Tensor] = []
    labels: list[Tensor] = []
    for path in datasets.modules():
        if path.name.startswith("_"):
            continue
        source = path.read_bytes()
        if len(texts) == count:
            break
        if not source.isascii() or not 4000 < len(source) < 60_000:
            continue
        text = torch.tensor(list(source))
        token, nesting = torch.full_like(text, SPACE), torch.zeros_like(text)
        starts = [0]
        for line in source.split(b"\n"):
            starts.append(starts[-1] + len(line) + 1)
        depth = 0
        for t in tokenize.tokenize(io.BytesIO(source).readline):
            if t.type in BY_TYPE:
                here = slice(starts[t.start[0] - 1] + t.start[1], starts[t.end[0] - 1] + t.end[1])
                token[here] = KEYWORD if keyword.iskeyword(t.string) else BY_TYPE[t.type]
                depth += (t.string in ("(", "[", "{")) - (t.string in (")", "]", "}"))
                nesting[here.start :] = min(depth, 3)
        texts.append(text)
        labels.append(torch.stack([text, text.roll(1), token, nesting], -1))
    return torch.cat(texts), torch.cat(labels)


def windows(count: int, length: int, seed: int, scale: Scale) -> tuple[Tensor, Tensor]:
    """Random windows of the files; odd seeds cut from the last fifth, which nothing is trained on."""
    text, labels = labelled(scale.files)
    border = len(text) * 4 // 5
    low, high = (border, len(text) - length) if seed % 2 else (1, border - length)
    starts = torch.randint(low, high, (count, 1), generator=torch.Generator().manual_seed(seed))
    places = starts + torch.arange(length)
    return text[places], labels[places]


@cache
def features(seed: int, files: int, depth: int, width: int, length: int, steps: int, count: int) -> list[Tensor]:
    """States of all layers of a language model of bytes, and labels: for training, then held out."""
    scale = SimpleNamespace(files=files)
    torch.manual_seed(seed)
    model = Transformer(vocab=256, length=length, depth=depth, width=width, heads=4)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    for step in range(steps):
        text, _ = windows(16, length + 1, 2 * (seed * steps + step), scale)
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20)
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    model.eval()
    found: list[Tensor] = []
    for odd, many in ((0, count), (1, count // 4)):
        text, labels = windows(many, length, 2 * (seed + 10**6) + odd, scale)
        # What enters the blocks: the embedding and the (normed) stream after each block but the last.
        states = [hidden_states(model, part, at=["trunk.blocks.*.mixer"], side="input") for part in text.split(32)]
        found += [torch.cat(states), labels]
    return [*found, loss.detach()]


class OneLayer(nn.Module):
    """No interface: the state of one layer."""

    def __init__(self, width: int, layer: int) -> None:
        super().__init__()
        self.layer, self.outputs = layer, width

    def forward(self, states: Tensor) -> Tensor:
        """[B, L, S, D] to [B, S, D]."""
        return states[:, self.layer]


class Shuffled(SSLInterface):
    """The control: at every call the layers come in another order, so that there are no neighbours to convolve over."""

    def _stacked(self, states: Tensor | Sequence[Tensor]) -> Tensor:
        return super()._stacked(states)[:, torch.randperm(self.layers)]


def build(arm: str, scale: Scale, classes: int = TASKS["byte"]) -> nn.Sequential:
    """An interface and a head."""
    interface: nn.Module
    if arm in ("first layer", "middle layer", "last layer"):
        interface = OneLayer(scale.width, {"f": 0, "m": scale.depth // 2, "l": -1}[arm[0]])
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
    states, labels, held, held_labels, upstream = features(
        seed, scale.files, scale.depth, scale.width, scale.length, scale.steps, scale.windows
    )
    found = {"upstream loss": float(upstream)}
    for task, (name, classes) in enumerate(TASKS.items()):
        torch.manual_seed(seed)
        model = build(arm, scale, classes)
        interface = model[0]
        if isinstance(interface, SSLInterface) and not isinstance(interface, Shuffled):
            interface.fit(states)
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        order = torch.Generator().manual_seed(seed)
        for _ in range(scale.probe_steps):
            rows = torch.randint(len(states), (8,), generator=order)
            loss = F.cross_entropy(model(states[rows]).flatten(0, 1), labels[rows][..., task].flatten())
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
        for name in TASKS
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
