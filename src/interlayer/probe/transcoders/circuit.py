"""Circuits through transcoders: what a feature is made of, split into what the weights give and what the input gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from interlayer.core import taps
from interlayer.probe.transcoders.coder import Coder
from interlayer.probe.transcoders.reading import Decoder, Seen, Site


@dataclass(frozen=True)
class Part:
    """A summand of a direction's value: ``contribution = weight * input``.

    Attributes:
        kind: ``feature``, ``head``, ``embedding``, ``bias`` or ``error`` (what the transcoder leaves out).
        block: Which block; -1 for the embedding.
        index: Of the feature or head; -1 for the rest.
        position: Where it comes from.
        weight: The input-invariant factor: the decoder vector times the direction; for a head and the rest the whole contribution.
        input: The input-dependent factor: the feature's activation, with the norm's scale and attention weights so far; else 1.
    """

    kind: str
    block: int
    index: int
    position: int
    weight: float
    input: float

    @property
    def contribution(self) -> float:
        """The product of the two factors."""
        return self.weight * self.input

    def __str__(self) -> str:
        where = {"feature": f"mlp{self.block}[{self.index}]", "head": f"attn{self.block}[{self.index}]"}
        return f"{where.get(self.kind, self.kind if self.block < 0 else f'{self.kind}{self.block}')}@{self.position}"


@dataclass(frozen=True)
class Direction:
    """A direction in the residual stream before a site, at a position; its value there is ``factor * (vector . stream)``.

    ``vector`` holds weights alone; what the input did to it on the way (scales of norms, attention, the activation of the
    feature) is in ``factor``.
    """

    site: Site
    position: int
    vector: Float[Tensor, " D"]
    factor: float = 1.0
    path: tuple[Part, ...] = ()


class Circuit:
    """A decoder with transcoders in the place of its MLPs, on one prompt.

    With the scales of the norms and the attention patterns held fixed, a feature's pre-activation is linear in what came
    before. Along the residual stream, feature j of an earlier transcoder gives ``z_j(x) * (dec_j . enc_i)``: an input-dependent
    times an input-invariant factor; through head h from position s it gives ``z_j(x_s) pattern_h(s) * (dec_j V_h O_h enc_i)``.

    Args:
        decoder: The model on the prompt.
        coders: A transcoder for each MLP, by its name.
    """

    def __init__(self, decoder: Decoder, coders: Mapping[str, Coder]) -> None:
        self.decoder, self.coders = decoder, coders
        self.layers = [s for s in decoder.sites if s.kind == "mlp"]
        self.acts = {s.name: coders[s.name].encode(self.seen(s).input) for s in self.layers}
        self.patterns = {block: decoder.pattern(block) for block in decoder.heads}

    def seen(self, site: Site) -> Seen:
        """What the site saw on the prompt."""
        return self.decoder.seen[site.name]

    def pulled(self, site: Site, v: Tensor, position: int | None = None) -> tuple[Tensor, float]:
        """A direction of the site's input as one of the stream before its norm, and the norm's scale at a position."""
        frozen, seen = self.decoder.frozen[site.name], self.seen(site)
        scale = 1.0 if position is None else float(frozen.scale(seen.stream[position], seen.input[position]))
        return frozen.pull(v), scale

    def feature(self, layer: int, index: int, position: int) -> Direction:
        """The encoder direction of a feature of the ``layer``-th transcoder."""
        site = self.layers[layer]
        vector, scale = self.pulled(site, self.coders[site.name].encoder[index], position)
        return Direction(site, position, vector, scale)

    def parts(self, to: Direction) -> list[Part]:
        """Everything that adds up to ``to.factor * (to.vector . stream)`` at its position, exactly."""
        decoder, v, t = self.decoder, to.vector, to.position
        first = decoder.seen[decoder.sites[0].name].stream
        found = [Part("embedding", -1, -1, t, float(first[t] @ v), to.factor)]
        for site in decoder.sites:
            if site.kind == "head" or not decoder.before(to.site, site):
                continue
            seen = self.seen(site)
            whole = float(seen.output[t] @ v)
            if site.kind == "mlp":
                coder, z = self.coders[site.name], self.acts[site.name][t]
                weights, bias = coder.decoder @ v, float(coder.after @ v)
                live = z.nonzero().flatten()
                pairs = zip(live.tolist(), weights[live].tolist(), (z[live] * to.factor).tolist(), strict=True)
                found += [Part("feature", site.block, i, t, w, x) for i, w, x in pairs]
                rest = whole - bias - float(z @ weights)
                found += [
                    Part("bias", site.block, -1, t, bias, to.factor),
                    Part("error", site.block, -1, t, rest, to.factor),
                ]
            else:
                given = self._given(site, v)
                amounts = self.patterns[site.block][:, t] * given
                shared = zip(given.flatten().tolist(), self.patterns[site.block][:, t].flatten().tolist(), strict=True)
                length = given.shape[1]
                found += [
                    Part("head", site.block, n // length, n % length, g, a * to.factor)
                    for n, (g, a) in enumerate(shared)
                    if a
                ]
                found.append(Part("bias", site.block, -1, t, whole - float(amounts.sum()), to.factor))
        return found

    def _given(self, site: Site, v: Tensor) -> Float[Tensor, "H S"]:
        heads = self.decoder.heads[site.block]
        return torch.einsum("sd,hdk,hke,e->hs", self.seen(site).input, heads.values, heads.outs, v)

    def follow(self, to: Direction, part: Part) -> Direction | None:
        """The direction one step further back along a feature or head; None where the path ends."""
        kinds = {"feature": "mlp", "head": "attention"}
        if part.kind not in kinds:
            return None
        site = next(s for s in self.decoder.sites if (s.kind, s.block) == (kinds[part.kind], part.block))
        if part.kind == "feature":
            vector, factor = self.coders[site.name].encoder[part.index] * part.weight, to.factor
        else:
            heads, h = self.decoder.heads[site.block], part.index
            vector, factor = heads.values[h] @ (heads.outs[h] @ to.vector), part.input
        vector, scale = self.pulled(site, vector, part.position)
        return Direction(site, part.position, vector, factor * scale, (*to.path, part))

    def paths(self, to: Direction, top: int = 5, length: int = 3) -> list[Direction]:
        """The strongest paths that end in a direction: at each step the ``top`` largest contributions, then the ``top`` paths.

        Args:
            to: Where the paths end.
            top: How many are followed.
            length: Steps back.

        Returns:
            Every path that was followed, the shortest first; the last part of ``path`` is where it begins.
        """
        found: list[Direction] = []
        ends = [to]
        for _ in range(length):
            reached = []
            for end in ends:
                parts = [
                    p for p in self.parts(end) if p.contribution > 0 and p.kind in ("feature", "head", "embedding")
                ]
                for part in sorted(parts, key=lambda p: -p.contribution)[:top]:
                    further = self.follow(end, part)
                    reached.append((part.contribution, further, replace(end, path=(*end.path, part))))
            reached = sorted(reached, key=lambda r: -r[0])[:top]
            found += [kept for _, _, kept in reached]
            ends = [further for _, further, _ in reached if further is not None]
        return found

    def connections(self, layer: int, index: int) -> list[tuple[int, str, Float[Tensor, " F"]]]:
        """The input-invariant weights of all earlier features on one feature: (layer, via, weights), without any input.

        ``via`` is ``direct`` or the head ``attn<block>[<head>]`` between them.
        """
        to = self.feature(layer, index, 0)
        found = []
        for number, site in enumerate(self.layers[:layer]):
            decoder = self.coders[site.name].decoder
            found.append((number, "direct", decoder @ to.vector))
            for via, vector in self.through(to.vector, site, to.site):
                found.append((number, via, decoder @ vector))
        return found

    def through(self, v: Tensor, after: Site | None, to: Site) -> list[tuple[str, Float[Tensor, " D"]]]:
        """A direction before ``to``, pulled through each head that lies between ``after`` (or the embedding) and ``to``."""
        found = []
        for site in self.decoder.sites:
            if site.kind != "attention" or not self.decoder.before(to, site):
                continue
            if after is not None and not self.decoder.before(site, after):
                continue
            heads = self.decoder.heads[site.block]
            moved = torch.einsum("hdk,hke,e->hd", heads.values, heads.outs, v)
            found += [(f"attn{site.block}[{h}]", self.pulled(site, moved[h])[0]) for h in range(len(moved))]
        return found

    def embedded(self, v: Float[Tensor, " D"]) -> Float[Tensor, " V"]:
        """De-embedding: how much each token's embedding lies along a direction of the stream."""
        return self.decoder.table.weight.detach().float() @ v

    def unembedded(self, layer: int, index: int) -> Float[Tensor, " V"] | None:
        """How much a feature's decoder vector, straight into the output head, moves each logit; None without such a head."""
        site = self.decoder.sites[-1]
        if site.kind != "head":
            return None
        frozen = self.decoder.frozen[site.name]
        v = frozen.gain * frozen.centre(self.coders[self.layers[layer].name].decoder[index])
        weight = taps.first(self.decoder.model.get_submodule(site.name).weight)
        return weight.detach().float() @ v
