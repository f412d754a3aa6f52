"""What ways to prune single weights have in common: which weights count, rounds, masks, and plain weights in the end."""

from __future__ import annotations

import copy
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interlayer.core import delivery, recipe, taps, weights
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.select import At, select


class Pruning(Transform):
    """Prunes weights to an exact number over all layers. A subclass says in ``choose`` which of them stay.

    Args:
        sparsity: Share of the selected weights that is zero in the end, above 0 and below 1.
        rounds: Prune in this many rounds, each the same share of what remains.
        train: Trains the pruned model in place, after every round.
        rewind: An earlier ``state_dict`` of the model, to which all weights go back after every round, before ``train``.
        at: Modules whose matrices and kernels are pruned.
        bake: Return plain weights with zeros in them, not masks.

    Raises:
        ValueError: An option out of range; from ``plan``, see ``Lamp``.
    """

    def __init__(
        self,
        *,
        sparsity: float,
        rounds: int,
        train: Callable[[nn.Module], Any] | None,
        rewind: Mapping[str, Tensor] | None,
        at: At | None,
        bake: bool,
    ) -> None:
        if not 0 < sparsity < 1:
            raise ValueError(
                f"{self.slug}: sparsity was {sparsity}; expected above 0 (else there is nothing to do) and below 1."
            )
        if rounds < 1:
            raise ValueError(f"{self.slug}: rounds was {rounds}; expected at least 1.")
        self.sparsity, self.rounds = sparsity, rounds
        self.train, self.rewind, self.at, self.bake = train, rewind, at, bake
        self.options: dict[str, Any] = {"sparsity": sparsity, "rounds": rounds, "bake": bake}

    @abstractmethod
    def choose(self, model: nn.Module, names: Sequence[str], keep: int, data: Any) -> list[Tensor]:
        """Masks that keep exactly ``keep`` weights in all, one for each of ``layers(model, names)``, among those alive."""

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """Choose what to prune."""
        self.take(others)
        masked = self.train is not None or self.rewind is not None or not self.bake
        names, skipped = prunable(model, self.at, self.slug)
        if masked and (stuck := [n for n in names if isinstance(model.get_submodule(_split(n)[0]), nn.RNNBase)]):
            raise ValueError(
                f"{self.slug}: {stuck[0]} belongs to a recurrent layer of torch, which reads its weights past a mask; expected "
                "layers that can be masked. Prune with bake and without train and rewind, or choose other layers with at."
            )
        if self.rewind is not None:
            _rewind(copy.deepcopy(model), self.rewind, self.slug)
        there = layers(model, names)
        total, left = sum(w.numel() for w in there), sum(int(a.sum()) for a in alive(model, names))
        keep = round(total * (1 - self.sparsity))
        if keep >= left:
            raise ValueError(
                f"{self.slug}: {left} of {total} weights are left, {keep} were to be kept: nothing to do. Raise sparsity."
            )
        if keep < len(there):
            raise ValueError(
                f"{self.slug}: {keep} weights were to be kept, of {left} in {len(there)} tensors, each of which keeps at "
                "least one. Choose another sparsity."
            )
        options = dict(self.options)
        goals = [round(left * (keep / left) ** (r / self.rounds)) for r in range(1, self.rounds + 1)]
        first = self.choose(model, names, keep, data)
        touched = [
            Row(n, f"keeps {int(m.sum())} of {m.numel()}", f"{1 - m.double().mean().item():.2%} sparse")
            for n, m in zip(names, _joined(model, names, first), strict=True)
        ]

        def build() -> nn.Module:
            new = copy.deepcopy(model)
            recipe.record(new, self.slug, options, {"masks": [] if self.bake else names})
            for goal in goals:
                kept = first if self.rounds == 1 else self.choose(new, names, goal, data)
                for name, mask in zip(names, _joined(new, names, kept), strict=True):
                    path, last = _split(name)
                    if masked:
                        weights.mask(new.get_submodule(path), last, mask)
                    else:
                        _stored(new, name).data.masked_fill_(~mask, 0)
                if self.rewind is not None:
                    _rewind(new, self.rewind, self.slug)
                if self.train is not None:
                    self.train(new)
            return weights.strip(new) if self.bake else delivery.guard(new)

        return Plan(self.slug, options, touched, skipped, build)

    def restore(self, model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        """Put masks that keep everything where the saved ones belong; with ``bake`` there are none."""
        for name in structure["masks"]:
            path, last = _split(name)
            every = torch.ones_like(_weight(model, name), dtype=torch.bool)
            weights.mask(model.get_submodule(path), last, every)
        return delivery.guard(model) if structure["masks"] else weights.strip(model)


def ranked(weight: Tensor, among: Tensor) -> Int[Tensor, " n"]:
    """Flat indices of all weights, the largest magnitude where ``among`` is true first, all others last."""
    sizes = weight.detach().double().abs().masked_fill(~among, -torch.inf).flatten()
    return sizes.sort(descending=True, stable=True).indices


def largest(weight: Tensor, among: Tensor, keep: int) -> Bool[Tensor, "..."]:
    """A mask of the ``keep`` largest magnitudes where ``among`` is true."""
    best = ranked(weight, among)[:keep]
    return (
        torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        .index_fill_(0, best, True)
        .view(weight.shape)
    )


# Names of parameters with several axes that are no layer: tables, scales, and the logarithms of Mamba's decays.
TABLES = re.compile(r"embed|pos|token|table|latent|bias|scale|gain|mask|_log$")
LAYERS = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def prunable(model: nn.Module, at: At | None, slug: str) -> tuple[list[str], list[Row]]:
    """Names of the weights to prune, and what is left alone with the reason."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for last, p in module._parameters.items():
            owners.setdefault(id(p), []).append(f"{path}.{last}".lstrip("."))
    chosen = select(model, at) if at is not None else None
    names, skipped = [], []
    for path, module in model.named_modules() if chosen is None else chosen:
        if "parametrizations" in path.split("."):
            continue
        computed: dict[str, Any] = dict(getattr(module, "parametrizations", {}))
        own = {n: p for n, p in module._parameters.items() if p is not None} | {n: getattr(module, n) for n in computed}
        for last, weight in own.items():
            name = f"{path}.{last}".lstrip(".")
            if weight.ndim < 2:
                continue
            if not all(isinstance(part, weights.Masked) for part in computed.get(last, ())):
                why = "is computed from others; remove that parametrisation first"
            elif chosen is None and isinstance(module, nn.Embedding | nn.EmbeddingBag):
                why = "an embedding"
            elif chosen is None and last != "weight" and not isinstance(module, LAYERS) and min(weight.shape) == 1:
                why = "is a vector by its shape; choose it with at if it is a layer"
            elif chosen is None and last != "weight" and TABLES.search(last.lower()):
                why = "is a table by its name; choose it with at if it is a layer"
            elif len(shared := owners.get(id(weight), [])) > 1:
                why = f"shared by {' and '.join(shared)}"
            else:
                names.append(name)
                continue
            skipped.append(Row(name, type(module).__name__, why))
        if (own or chosen is not None) and all(weight.ndim < 2 for weight in own.values()):
            skipped.append(Row(path or "(root)", type(module).__name__, "no matrix or kernel"))
    if not names:
        raise ValueError(
            f"{slug}: nothing to prune in {type(model).__name__}: {'; '.join(f'{r.name} {r.why}' for r in skipped[:4])}."
        )
    return names, [*skipped, *(chosen.skipped if chosen else [])]


def _split(name: str) -> tuple[str, str]:
    path, _, last = name.rpartition(".")
    return path, last


def _weight(model: nn.Module, name: str) -> Tensor:
    path, last = _split(name)
    return cast(Tensor, getattr(model.get_submodule(path), last))


def _stored(model: nn.Module, name: str) -> Tensor:
    """The parameter behind a weight, which may be masked already."""
    path, last = _split(name)
    module: Any = model.get_submodule(path)
    return module._parameters[last] if last in module._parameters else module.parametrizations[last].original


def _stacked(model: nn.Module, name: str) -> bool:
    """Whether a weight is a stack of matrices, one an expert, and not a kernel."""
    return _split(name)[1] != "weight" and _weight(model, name).ndim == 3


def layers(model: nn.Module, names: Sequence[str]) -> list[Tensor]:
    """The matrices and kernels that count as one layer each."""
    return [layer for n in names for layer in _apart(model, n, _weight(model, n))]


def editable(model: nn.Module, names: Sequence[str]) -> list[Tensor]:
    """The same, as views of the parameters behind them: what is written there changes the model."""
    return [layer for n in names for layer in _apart(model, n, _stored(model, n).data)]


def _apart(model: nn.Module, name: str, weight: Tensor) -> tuple[Tensor, ...]:
    return weight.unbind(0) if _stacked(model, name) else (weight,)


def _joined(model: nn.Module, names: Sequence[str], masks: Sequence[Tensor]) -> list[Tensor]:
    """One mask for each weight, from one for each layer."""
    rest = iter(masks)
    return [
        torch.stack([next(rest) for _ in range(len(_weight(model, n)))]) if _stacked(model, n) else next(rest)
        for n in names
    ]


def alive(model: nn.Module, names: Sequence[str]) -> list[Tensor]:
    """Which weights are left: neither masked nor zero. A layer of zeros alone counts as whole."""
    masked = weights.masks(model)
    found = []
    for name in names:
        mask = masked.get(name)
        for n, layer in enumerate(layers(model, [name])):
            left = layer != 0 if mask is None else mask[n] if _stacked(model, name) else mask
            found.append(left if left.any() else torch.ones_like(left))
    return found


@torch.no_grad()
def outputs(model: nn.Module, data: Any, slug: str) -> list[Tensor]:
    """The first output of a whole model on each batch, to measure against.

    Raises:
        ValueError: It is a loss, or not finite.
    """
    whole = [taps.first(out).float() for out in taps.feed(model, data)]
    if any(out.ndim == 0 for out in whole) or not all(out.isfinite().all() for out in whole):
        raise ValueError(
            f"{slug}: the first output of {type(model).__name__} is a loss or not finite; expected finite outputs, such as "
            "logits. Leave labels out of the data."
        )
    return whole


@torch.no_grad()
def distortion(whole: Sequence[Tensor], outputs: Any, *, worst: bool) -> float:
    """Mean square by which outputs differ: of all examples, or of the worst one. Outputs that overflow are infinitely bad."""
    errors = [(taps.first(new).float() - old).square() for old, new in zip(whole, outputs, strict=True)]
    each: Float[Tensor, " N"] = torch.cat([e.reshape(len(e), -1).mean(1) for e in errors])
    return float((each.max() if worst else each.mean()).nan_to_num(torch.inf, torch.inf))


def _rewind(model: nn.Module, state: Mapping[str, Tensor], slug: str) -> None:
    """Load a state of the model as it was before masks, in place; the masks stay."""
    mine = model.state_dict()
    masks = {k for k in mine if "parametrizations." in k and k.endswith(".mask")}
    plain = {k: k.replace("parametrizations.", "").removesuffix(".original") for k in mine.keys() - masks}
    missing = [p for p in plain.values() if p not in state]
    wrong = [p for k, p in plain.items() if p in state and state[p].shape != mine[k].shape]
    if missing or wrong:
        raise ValueError(
            f"{slug}: rewind does not fit {type(model).__name__}: {(missing + wrong)[0]} is missing or of another shape. "
            "Give a state_dict of this model from before pruning."
        )
    model.load_state_dict({k: state[p] for k, p in plain.items()}, strict=False)
