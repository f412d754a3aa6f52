"""A task on the states of a frozen model's layers: which kind of token each byte of a Python file belongs to."""

from __future__ import annotations

import io
import keyword
import token as kinds
import tokenize
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.core import datasets
from interlayer.core.data import DataShape
from interlayer.core.nano import nano
from interlayer.core.task import Task, TensorTask
from interlayer.layers.stream.ssl_interface import hidden_states
from interlayer.models import Transformer

PROBES = {"byte": 128, "byte before": 128, "token": 8, "next byte": 128}  # from what the first layers hold to the last
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
        token = torch.full_like(text, SPACE)
        starts = [0]
        for line in source.split(b"\n"):
            starts.append(starts[-1] + len(line) + 1)
        for t in tokenize.tokenize(io.BytesIO(source).readline):
            if t.type in BY_TYPE:
                here = slice(starts[t.start[0] - 1] + t.start[1], starts[t.end[0] - 1] + t.end[1])
                token[here] = KEYWORD if keyword.iskeyword(t.string) else BY_TYPE[t.type]
        texts.append(text)
        labels.append(torch.stack([text, text.roll(1), token, text.roll(-1)], -1))
    return torch.cat(texts), torch.cat(labels)


def windows(count: int, length: int, seed: int, files: int) -> tuple[Tensor, Tensor]:
    """Random windows of the files; odd seeds cut from the last fifth, which nothing is trained on."""
    text, labels = labelled(files)
    border = len(text) * 4 // 5
    low, high = (border, len(text) - length) if seed % 2 else (1, border - length)
    starts = torch.randint(low, high, (count, 1), generator=torch.Generator().manual_seed(seed))
    places = starts + torch.arange(length)
    return text[places], labels[places]


def teach(model: nn.Module, *, seed: int, steps: int, length: int, files: int) -> float:
    """Train a language model on such windows: AdamW with a short warm-up; the last loss."""
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    loss = torch.tensor(torch.nan)
    for step in range(steps):
        text, _ = windows(16, length + 1, 2 * (seed * steps + step), files)
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20)
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return float(loss.detach())


def states(model: nn.Module, count: int, *, seed: int, length: int, files: int) -> list[Tensor]:
    """States of all layers of a language model, and labels: ``count`` windows to train a probe, then a quarter as many held out."""
    found: list[Tensor] = []
    model.eval()
    for odd, many in ((0, count), (1, count // 4)):
        text, labels = windows(many, length, 2 * (seed + 10**6) + odd, files)
        # What enters the blocks: the embedding and the (normed) stream after each block but the last.
        parts = [hidden_states(model, part, at=["trunk.blocks.*.mixer"], side="input") for part in text.split(32)]
        found += [torch.cat(parts), labels]
    return found


HOW = {"seed": 0, "steps": 200, "length": 64, "files": 20}


def upstream() -> nn.Module:
    """A small language model of bytes, trained once (about 15 seconds) and kept in the user's cache."""
    return nano(
        lambda: Transformer(vocab=256, length=64, depth=9, width=64, heads=4),
        lambda model: teach(model, **HOW),
        task="token-kinds", kind="transformer", **HOW,
    )  # fmt: skip


@cache
def token_kinds() -> Task:
    """Keyword, name, number, string, comment, operator or space: read from the layers of a small language model of bytes.

    The model is frozen, and only its states are given. The usual base is the weighted sum of all layers; ``kind=one`` is the
    last layer alone.
    """
    x, y, held, held_y = states(upstream(), 256, seed=0, length=64, files=HOW["files"])
    of = list(PROBES).index("token")
    about = (
        "Which kind of token a byte of Python's standard library belongs to, from the states of the 9 layers of a frozen byte "
        f"model: {len(x)} windows of 64 bytes for training, {len(held)} of other text for validation."
    )
    _, layers, length, width = x.shape
    shape = DataShape("states", "tokens", vocab=PROBES["token"], layers=layers, length=length, features=width)
    return TensorTask(
        "token-kinds", (x, y[..., of]), (held, held_y[..., of]), shape=shape,
        base="ssl-interface(kind='weighted-sum')", about=about,
    )  # fmt: skip


@cache
def keywords() -> Task:
    """Whether a text of 64 bytes of Python's standard library holds a keyword of Python, outside strings and comments.

    For networks that were trained on other texts first: the usual base is a frozen language model of bytes under a linear head.
    """
    (x, y), (held, held_y) = (windows(count, 64, odd, 40) for count, odd in ((1024, 0), (512, 1)))
    about = (
        f"Whether a text of Python's standard library holds a keyword: {len(x)} texts of 64 bytes for training, {len(held)} of "
        "other files for validation."
    )
    holds = ((labels[..., list(PROBES).index("token")] == KEYWORD).any(1).long() for labels in (y, held_y))
    train, validation = zip((x, held), holds, strict=True)
    shape = DataShape("tokens", "classes", classes=2, vocab=256, length=64)
    return TensorTask("keywords", train, validation, shape=shape, base="adapterbias(kind='head')", about=about)
