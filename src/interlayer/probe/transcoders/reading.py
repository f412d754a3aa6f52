"""What the analysis reads in a decoder: residual stream, sublayers with their norms, value-output maps, attention patterns."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.select import At, blocks, select
from interlayer.probe.transcoders.norms import freeze

MLP = ("mlp", "ffn", "ff", "feed_forward", "feedforward")
ATTENTION = ("attn", "self_attn", "attention", "self_attention", "mixer")
VALUE = ("v_proj", "value", "v")
FUSED = ("c_attn", "qkv", "qkv_proj")  # all queries, then all keys, then all values
INTERLEAVED = ("query_key_value",)  # query, key and value of each head
OUT = ("c_proj", "o_proj", "out_proj", "dense", "out", "o")


@dataclass
class Site:
    """A sublayer that reads the residual stream through a norm and adds to it."""

    kind: Literal["attention", "mlp", "head"]
    block: int
    name: str
    norm: nn.Module | None


@dataclass
class Heads:
    """Value and output maps of an attention: what head h adds is ``pattern_h (y values_h) outs_h``."""

    values: Float[Tensor, "H D K"]
    outs: Float[Tensor, "H K D"]
    site: str
    source: str
    rows: Tensor


@dataclass
class Seen:
    """A site on one prompt: the residual stream before the norm, the sublayer's input and output, all [S, D]."""

    stream: Tensor
    input: Tensor
    output: Tensor


def named(model: nn.Module, under: str, names: tuple[str, ...]) -> str | None:
    """The first module below ``under`` with one of the names."""
    prefix = f"{under}." if under else ""
    inside = (n for n, _ in model.get_submodule(under).named_modules() if n.rpartition(".")[2] in names)
    found = next(inside, None)
    return None if found is None else prefix + found


def mlps(model: nn.Module, at: At | None) -> list[str]:
    """The names of the selected MLPs, by default one in each block.

    Raises:
        ValueError: A block has none with a usual name.
    """
    if at is not None:
        return [name for name, _ in select(model, at)]
    name, found = blocks(model)
    names = [named(model, f"{name}.{i}", MLP) for i in range(len(found))]
    if None in names:
        raise ValueError(
            f"transcoders: {name}.{names.index(None)} of {type(model).__name__} has no part named {', '.join(MLP)}; "
            "expected an MLP in each block. Name the MLPs with at."
        )
    return [n for n in names if n]


def activations(model: nn.Module, names: list[str], data: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs of the modules over all batches, a row for each position that is not padding."""
    kept: dict[str, tuple[list[Tensor], list[Tensor]]] = {n: ([], []) for n in names}
    for batch in taps.batches(data):
        _, keywords = taps.arguments(batch)
        mask = keywords.get("attention_mask")
        with taps.read(model, names, side="input") as inputs, taps.read(model, names) as outputs:
            list(taps.feed(model, [batch]))
        for name in names:
            if name not in inputs:
                raise ValueError(f"transcoders: {name} was not called. Leave it out of at.")
            for rows, value in zip(kept[name], (inputs[name], outputs[name]), strict=True):
                real = value[mask.bool()] if mask is not None and value.ndim == 3 else value
                rows.append(real.reshape(-1, real.shape[-1]).float())
    if not kept[names[0]][0]:
        raise ValueError("transcoders: data gave no batch; expected at least one.")
    found = {n: (torch.cat(a), torch.cat(b)) for n, (a, b) in kept.items()}
    for name, pair in found.items():
        if not all(bool(t.isfinite().all()) for t in pair):
            raise ValueError(f"transcoders: activations of {name} hold NaN or infinity. Check the model and the data.")
    return found


def linear(module: nn.Module, width: int, like: Tensor) -> Float[Tensor, "D O"]:
    """The matrix of any affine module."""
    eye = torch.eye(width, dtype=like.dtype, device=like.device).unsqueeze(0)
    return (module(eye) - module(torch.zeros_like(eye)))[0].float()


class Decoder:
    """A pre-norm decoder, read on one prompt.

    Args:
        model: The model, in eval mode.
        names: Its MLPs.
        batch: The prompt, a batch of one.

    Raises:
        ValueError: The model does not add attention and MLP to a residual stream.
    """

    def __init__(self, model: nn.Module, names: list[str], batch: Any) -> None:
        self.model, self.batch = model, batch
        stem, found = blocks(model)
        attention = [named(model, f"{stem}.{i}", ATTENTION) for i in range(len(found))]
        tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        if not tables or None in attention or len(names) != len(found):
            raise ValueError(
                f"transcoders: {type(model).__name__} is not a decoder that can be read; expected token embeddings and, in each "
                f"block of {stem}, an attention ({', '.join(ATTENTION)}) and an MLP. Pass circuit=False."
            )
        self.table = max(tables, key=lambda m: m.num_embeddings)
        heads = [
            n
            for n, m in model.named_modules()
            if isinstance(m, nn.Linear) and m.out_features == self.table.num_embeddings
        ]
        norms = [
            n for n, m in model.named_modules() if "norm" in f"{n} {type(m).__name__}".lower() and not any(m.children())
        ]
        at: list[Any] = [*attention, *names, *heads[-1:], *norms]
        with taps.read(model, at, side="input") as inputs, taps.read(model, at) as outputs:
            list(taps.feed(model, [batch]))
        made = {y.data_ptr(): n for n, y in outputs.items() if n in norms and inputs[n].data_ptr() != y.data_ptr()}
        self.sites: list[Site] = []
        self.seen: dict[str, Seen] = {}
        layers = [
            (k, i, n)
            for i, pair in enumerate(zip(attention, names, strict=True))
            for k, n in zip(("attention", "mlp"), pair, strict=True)
        ]
        for kind, block, name in [*layers, *(("head", len(found), n) for n in heads[-1:])]:
            assert name is not None
            norm = made.get(inputs[name].data_ptr())
            self.sites.append(Site(kind, block, name, model.get_submodule(norm) if norm else None))  # type: ignore[arg-type]
            before = inputs[norm] if norm else inputs[name]
            self.seen[name] = Seen(before[0].float(), inputs[name][0].float(), outputs[name][0].float())
        self.parallel = torch.equal(self.seen[attention[0]].stream, self.seen[names[0]].stream)  # type: ignore[index]
        self._check()
        self.frozen = {s.name: freeze(s.norm, self.seen[s.name].input) for s in self.sites}
        self.heads = {s.block: self._heads(s) for s in self.sites if s.kind == "attention"}

    def _check(self) -> None:
        streams = [self.seen[s.name] for s in self.sites if s.kind != "head"]
        for i, (a, b) in enumerate(pairwise(streams)):
            if self.parallel:
                expected = a.stream if i % 2 == 0 else a.stream + a.output + streams[i - 1].output
            else:
                expected = a.stream + a.output
            if not torch.allclose(expected, b.stream, rtol=1e-3, atol=1e-3 * float(b.stream.abs().max())):
                raise ValueError(
                    f"transcoders: {self.sites[i + 1].name} does not read the sum of what came before it; expected a pre-norm "
                    "decoder, in which attention and MLP add to a residual stream. Pass circuit=False."
                )

    def before(self, site: Site, other: Site) -> bool:
        """Whether ``other`` adds to the stream before ``site`` reads it."""
        if self.parallel or site.block != other.block:
            return other.block < site.block
        return site.kind == "mlp" and other.kind == "attention"

    def _heads(self, site: Site) -> Heads:
        model, seen = self.model, self.seen[site.name]
        out = named(model, site.name, OUT)
        value, fused, mixed = (named(model, site.name, names) for names in (VALUE, FUSED, INTERLEAVED))
        source = value or fused or mixed
        part: Any = model.get_submodule(site.name)
        config: Any = getattr(model, "config", None)
        count = getattr(part, "heads", None) or getattr(config, "num_attention_heads", None)
        if out is None or source is None or count is None:
            raise ValueError(
                f"transcoders: {site.name} ({type(part).__name__}) has no value and output maps with a usual name; expected "
                f"{', '.join((*VALUE, *FUSED, *INTERLEAVED))} and {', '.join(OUT)}. Pass circuit=False."
            )
        width = seen.input.shape[-1]
        like = next(model.parameters())
        w = linear(model.get_submodule(source), width, like)
        with taps.read(model, [out], side="input") as inner:
            list(taps.feed(model, [self.batch]))
        size = inner[out].shape[-1] // count
        rows = torch.arange(w.shape[1], device=w.device)
        if source == fused:
            rows = rows[w.shape[1] - (w.shape[1] - count * size) // 2 :]
        elif source == mixed:
            rows = rows.view(count, 3, size)[:, 2].flatten()
        values = w[:, rows].unflatten(1, (-1, size)).transpose(0, 1)
        values = values.repeat_interleave(count // len(values), 0)
        outs = linear(model.get_submodule(out), count * size, like).unflatten(0, (count, size))
        return Heads(values, outs, out, source, rows)

    def pattern(self, block: int) -> Float[Tensor, "H S S"]:
        """How much each head reads from each position: the model runs with one-hot values in place of its own."""
        heads = self.heads[block]
        length, (count, _, size) = len(self.seen[self.sites[0].name].stream), heads.values.shape
        parts = []
        for start in range(0, length, size):
            hot = torch.eye(length, device=heads.rows.device)[:, start : start + size]
            hot = nn.functional.pad(hot, (0, size - hot.shape[1])).repeat(1, len(heads.rows) // size)
            change = taps.clamp(heads.rows, hot)
            with (
                taps.patch(self.model, {heads.source: change}),
                taps.read(self.model, [heads.site], side="input") as read,
            ):
                list(taps.feed(self.model, [self.batch]))
            parts.append(read[heads.site][0].float().unflatten(-1, (count, size)))
        return torch.cat(parts, -1)[..., :length].transpose(0, 1)
