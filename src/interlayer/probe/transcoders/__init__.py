"""Transcoders: wide sparse stand-ins for MLPs, and circuits through them that the weights give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.example import Example
from interlayer.core.kinds import Finding, Probe
from interlayer.core.select import At
from interlayer.probe.transcoders.circuit import Circuit
from interlayer.probe.transcoders.coder import Coder, Trainer, fit
from interlayer.probe.transcoders.picture import draw
from interlayer.probe.transcoders.planted import greater_than, years
from interlayer.probe.transcoders.reading import Decoder, activations, mlps
from interlayer.probe.transcoders.splice import prompt, spliced_loss

__all__ = [
    "Circuit",
    "Coder",
    "Decoder",
    "Trainer",
    "Transcoders",
    "activations",
    "fit",
    "greater_than",
    "spliced_loss",
    "years",
]

UNITS = {"share active": "1", "unexplained": "1", "dead": "1", "loss": "nat", "position": "token"}


class Transcoders(Probe):
    """Replace MLPs by wide sparse layers trained on (MLP input, MLP output), and read circuits through them off the weights.

    Dunefsky, Chlenski and Nanda, Transcoders Find Interpretable LLM Feature Circuits, NeurIPS 2024, arXiv:2406.11944. A transcoder
    ``z = relu(W_enc (x - b_in) + b_enc)``, ``y' = W_dec z + b_out`` minimises ``mean((y' - y)^2 / |y|) + l1 sum_i z_i``; sparse
    autoencoders of the MLP's output, with as many features, are the baseline. Feature j of an earlier layer then gives feature i
    ``z_j(x) (dec_j . enc_i)``, an input-dependent times an input-invariant factor; through an attention head h from position s,
    ``z_j(x_s) pattern_h(s) (dec_j V_h O_h enc_i)``. Norms are linear once their scale is held fixed.

    The tables: ``frontier`` (active features against what is lost, at each sparsity, at ``layer``), ``features`` (the
    most active ones), and for a pre-norm decoder ``circuit`` (the strongest paths into a feature on the first sequence of
    the data), ``connections`` (weights of earlier features on it, without any input) and ``tokens`` (what its encoder reads
    from token embeddings, straight and through heads, and which logits its decoder raises).

    Args:
        at: The MLPs, as ``select.where`` takes them. Defaults to the one of each block.
        layer: Which of them the frontier and the feature belong to.
        feature: The feature whose circuit is sought. Defaults to the most active one at ``position``.
        position: The token of the first sequence at which its circuit is sought.
        expansion: Features as a multiple of the MLP's output width; the authors' 32.
        sparsity: L1 coefficients times the output width. The authors' 1.4e-4 at width 768 is 0.11. The middle one is used
            for the circuit.
        steps: Training steps of each transcoder; the authors took 14,600.
        batch: Positions of a step; the authors' 4096.
        lr: Learning rate of Adam; the authors' 4e-4.
        top: Paths, and tokens, that are followed and shown.
        length: Most steps of a path.
        circuit: Whether to look for the circuit. Defaults to whether ``at`` is left out.

    Raises:
        ValueError: No MLP is found, an option is out of range, or the model is no decoder that can be read.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> found = Transcoders(at="1", steps=20)(nn.Sequential(nn.Flatten(), net), torch.randn(64, 4))
        >>> list(found.tables)
        ['frontier', 'features']
    """

    slug: ClassVar[str] = "transcoders"

    def __init__(
        self,
        *,
        at: At | None = None,
        layer: int = -1,
        feature: int | None = None,
        position: int = -1,
        expansion: int = 8,
        sparsity: Sequence[float] = (0.03, 0.1, 0.3),
        steps: int = 2000,
        batch: int = 1024,
        lr: float = 4e-4,
        top: int = 5,
        length: int = 3,
        circuit: bool | None = None,
    ) -> None:
        if not sparsity or min(sparsity) < 0 or min(expansion, steps, batch, top, length) < 1 or lr <= 0:
            raise ValueError(
                f"transcoders: sparsity {sparsity}, expansion {expansion}, steps {steps}, batch {batch}, top {top}, length {length}, "
                f"lr {lr}; expected at least one sparsity from 0 up, and the others above 0."
            )
        self.at, self.layer, self.feature, self.position = at, layer, feature, position
        self.expansion, self.sparsity, self.steps, self.batch, self.lr = expansion, tuple(sparsity), steps, batch, lr
        self.top, self.length, self.circuit = top, length, at is None if circuit is None else circuit

    @torch.no_grad()
    def __call__(self, model: nn.Module, data: Any) -> Finding:
        """Train the transcoders and look for the circuit; the model is afterwards as it was before."""
        batches = taps.batches(data)
        with taps.at_rest(model):
            names = mlps(model, self.at)
            layer = self._index("layer", self.layer, len(names))
            decoder = Decoder(model, names, prompt(batches[0])) if self.circuit and batches else None
            pairs = activations(model, names, batches)
            if self.feature is not None:
                self._index("feature", self.feature, self.expansion * pairs[names[layer]][1].shape[-1])
            if decoder is not None:
                self._index("position", self.position, len(decoder.seen[names[layer]].input))
            held, coders = self._frontier(model, batches, names[layer], *pairs[names[layer]])
            finding = Finding({"frontier": held}, units={k: v for k, v in UNITS.items() if k in held})
            middle = coders[len(coders) // 2]
            if decoder is None:
                finding.tables["features"] = self._features(middle, pairs[names[layer]][0], None, layer)
                finding.figure = lambda: draw(held, [])
            else:
                every = {
                    n: middle if n == names[layer] else self._fit(*pairs[n], self.sparsity[len(coders) // 2])
                    for n in names
                }
                self._circuit(finding, Circuit(decoder, every), layer, pairs[names[layer]][0])
        columns = {c for table in finding.tables.values() for c in table}
        finding.units = {k: v for k, v in UNITS.items() if k in columns}
        return finding

    def _index(self, what: str, value: int, count: int) -> int:
        if not -count <= value < count:
            raise ValueError(f"transcoders: {what} {value}; expected one of {count}, from {-count} to {count - 1}.")
        return value % count

    def _fit(self, x: Tensor, y: Tensor, sparsity: float, tied: bool = False) -> Coder:
        width = y.shape[-1]
        return fit(
            x, y, self.expansion * width, sparsity / width, steps=self.steps, batch=self.batch, lr=self.lr, tied=tied
        )

    def _frontier(
        self, model: nn.Module, batches: list[Any], name: str, x: Tensor, y: Tensor
    ) -> tuple[dict[str, list[Any]], list[Coder]]:
        order = torch.randperm(len(x)).to(x.device)
        test, rest = (order, order) if len(x) < 20 else order.tensor_split([len(x) // 10])
        rows: list[dict[str, Any]] = []
        coders = []
        mean = y[rest].mean(0)
        spread = (y[test] - mean).square().sum()
        for kind, inputs in (("transcoder", x), ("sae", y)):
            for sparsity in self.sparsity:
                coder = self._fit(inputs[rest], y[rest], sparsity, tied=kind == "sae")
                z = coder.encode(inputs[test])
                row = {
                    "kind": kind,
                    "sparsity": float(sparsity),
                    "active features": float((z > 0).sum(-1).float().mean()),
                }
                row["unexplained"] = float((coder.decode(z) - y[test]).square().sum() / spread)
                row["dead"] = float((coder.encode(inputs).amax(0) <= 0).float().mean())
                rows.append(row | {"loss": spliced_loss(model, batches, name, coder, own=kind == "sae")})
                coders += [coder] if kind == "transcoder" else []
        edge = {"sparsity": float("nan"), "dead": float("nan")}
        rows.append(
            {
                "kind": "the MLP",
                "active features": float("nan"),
                "unexplained": 0.0,
                **edge,
                "loss": spliced_loss(model, batches, name),
            }
        )
        with taps.patch(model, {name: mean}):
            rows.append(
                {
                    "kind": "its mean",
                    "active features": 0.0,
                    "unexplained": 1.0,
                    **edge,
                    "loss": spliced_loss(model, batches, name),
                }
            )
        kept = [k for k in rows[0] if k != "loss" or rows[0]["loss"] is not None]
        return {k: [row[k] for row in rows] for k in kept}, coders

    def _features(self, coder: Coder, x: Tensor, circuit: Circuit | None, layer: int) -> dict[str, list[Any]]:
        z = coder.encode(x)
        best = z.mean(0).topk(min(4 * self.top, z.shape[1])).indices.tolist()
        table: dict[str, list[Any]] = {
            "feature": best,
            "share active": [float((z[:, i] > 0).float().mean()) for i in best],
            "mean activation": [float(z[:, i].sum() / (z[:, i] > 0).sum().clamp(min=1)) for i in best],
        }
        if circuit is not None:
            reads = [circuit.embedded(circuit.feature(layer, i, 0).vector) for i in best]
            table["reads tokens"] = [" ".join(map(str, r.topk(min(self.top, len(r))).indices.tolist())) for r in reads]
        return table

    def _circuit(self, finding: Finding, circuit: Circuit, layer: int, x: Tensor) -> None:
        site = circuit.layers[layer]
        coder = circuit.coders[site.name]
        t = self._index("position", self.position, len(circuit.acts[site.name]))
        scores = coder.scores(circuit.seen(site).input[t])
        index = int(scores.argmax()) if self.feature is None else self._index("feature", self.feature, len(scores))
        finding.tables["features"] = self._features(coder, x, circuit, layer)
        target = f"mlp{site.block}[{index}]@{t}"
        to = circuit.feature(layer, index, t)
        paths = [path.path for path in circuit.paths(to, self.top, self.length)]
        finding.tables["circuit"] = {
            "path": [" < ".join([target, *map(str, path)]) for path in paths],
            "position": [path[-1].position for path in paths],
            "input-invariant": [path[-1].weight for path in paths],
            "input-dependent": [path[-1].input for path in paths],
            "contribution": [path[-1].contribution for path in paths],
        }
        found = [
            (number, via, w, j)
            for number, via, all_ in circuit.connections(layer, index)
            for w, j in _top(all_, self.top)
        ]
        if found:
            finding.tables["connections"] = {
                "feature": [f"mlp{circuit.layers[number].block}[{j}]" for number, _, _, j in found],
                "via": [via for _, via, _, _ in found],
                "weight": [w for _, _, w, _ in found],
            }
        ways = [
            ("reads directly", to.vector),
            *((f"reads through {via}", v) for via, v in circuit.through(to.vector, None, site)),
        ]
        lists = [(way, _top(circuit.embedded(v), self.top)) for way, v in ways]
        written = circuit.unembedded(layer, index)
        if written is not None:
            lists += [("raises", _top(written, self.top)), ("lowers", [(-w, j) for w, j in _top(-written, self.top)])]
        tokens = [(way, j, w) for way, best in lists for w, j in best]
        finding.tables["tokens"] = {k: [row[i] for row in tokens] for i, k in enumerate(("how", "token", "weight"))}
        finding.figure = lambda: draw(finding.tables["frontier"], paths, target, (site.block, t))


def _top(values: Tensor, count: int) -> list[tuple[float, int]]:
    best = values.topk(min(count, len(values)))
    return list(zip(best.values.tolist(), best.indices.tolist(), strict=True))


def _found(finding: Finding) -> bool:
    """The planted circuit: the last MLP's feature comes from the year, through head 0 of block 0, and raises later years only."""
    circuit, tokens = finding.tables["circuit"], finding.tables["tokens"]
    through = [p.split(" < ")[1] for p in circuit["path"] if " < " in p]
    raised = [t for how, t in zip(tokens["how"], tokens["token"], strict=True) if how == "raises"]
    return "attn0[0]@1" in through and min(raised) > 4


EXAMPLE = Example(
    make=lambda: Transcoders(expansion=1, sparsity=(0.2,), steps=80, batch=64, lr=2e-2, top=3, length=2),
    inputs=lambda: (greater_than(), years()),
    planted=_found,
)
