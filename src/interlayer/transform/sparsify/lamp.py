"""LAMP, and other ways to share a sparsity over the layers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interlayer.core import delivery, recipe, weights
from interlayer.core.example import Example
from interlayer.core.extras import need
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.select import At, select

Scope = Literal["lamp", "global", "uniform", "erdos-renyi-kernel"]
SCOPES = get_args(Scope)


def lamp_score(weight: Float[Tensor, "*w"]) -> Float[Tensor, "*w"]:
    """``W[u]^2`` over the sum of ``W[v]^2`` of all v no smaller than u (equation 3 of the paper), by one sort.

    Of equal weights the later one counts as the larger. The largest weight of a tensor scores 1.

    >>> lamp_score(torch.tensor([1.0, -2.0, 3.0])).mul(14 * 13).round().tolist()
    [13.0, 56.0, 182.0]
    """
    square = weight.detach().double().flatten().square()
    ordered, order = square.sort(stable=True)
    later = ordered.flip(0).cumsum(0).flip(0)
    score = torch.where(later > 0, ordered / later, ordered)
    return torch.empty_like(score).scatter_(0, order, score).view(weight.shape).to(torch.float64)


def lamp_score_naive(weight: Float[Tensor, "*w"]) -> Float[Tensor, "*w"]:
    """The same, as the paper writes it."""
    square = [float(w) ** 2 for w in weight.flatten()]
    order = sorted(range(len(square)), key=lambda i: square[i])
    score = torch.zeros(len(square), dtype=torch.float64)
    for place, u in enumerate(order):
        total = sum(square[v] for v in order[place:])
        score[u] = square[u] / total if total else 0.0
    return score.view(weight.shape)


def allocate(
    tensors: Sequence[Tensor], keep: int, scope: str = "lamp", alive: Sequence[Tensor] | None = None
) -> list[Bool[Tensor, "..."]]:
    """Masks that keep exactly ``keep`` weights in all, and at least one in each tensor.

    Args:
        tensors: Weight tensors, one for each layer.
        keep: Number of weights to keep.
        scope: ``"lamp"``: the largest LAMP scores of all layers. ``"global"``: the largest magnitudes of all layers.
            ``"uniform"``: the same share in each layer. ``"erdos-renyi-kernel"``: a number that grows with the sum of a
            layer's dimensions (density ``∝ (n_in + n_out + w + h) / (n_in n_out w h)``, Rigging the Lottery, Evci et
            al. 2020); a layer that would need more than it has stays whole.
        alive: Which weights still take part. Defaults to all.

    Raises:
        ValueError: Unknown scope, or ``keep`` is below the number of tensors or above that of weights alive.
    """
    alive = [torch.ones_like(w, dtype=torch.bool) for w in tensors] if alive is None else alive
    counts = [int(a.sum()) for a in alive]
    if scope not in SCOPES:
        raise ValueError(f"lamp: scope was {scope!r}; wanted one of {', '.join(SCOPES)}.")
    if not len(tensors) <= keep <= sum(counts):
        raise ValueError(
            f"lamp: {keep} weights were to be kept, of {sum(counts)} in {len(tensors)} tensors, each of which keeps at "
            "least one. Choose another sparsity."
        )
    held = [w.detach().double().masked_fill(~a, 0) for w, a in zip(tensors, alive, strict=True)]
    if scope in ("lamp", "global"):
        score = [lamp_score(w) if scope == "lamp" else w.abs() for w in held]
        ranked = [s.masked_fill(~a, -torch.inf).flatten() for s, a in zip(score, alive, strict=True)]
        for s in ranked:
            s[s.argmax()] = torch.inf
        best = torch.cat(ranked).sort(descending=True, stable=True).indices[:keep]
        chosen = torch.zeros(sum(len(s) for s in ranked), dtype=torch.bool, device=best.device).index_fill_(
            0, best, True
        )
        return [m.view(w.shape) for m, w in zip(chosen.split([w.numel() for w in tensors]), tensors, strict=True)]
    sizes = counts if scope == "uniform" else [sum(w.shape) for w in tensors]
    masks = []
    for w, a, k in zip(held, alive, shares(sizes, counts, keep), strict=True):
        best = w.abs().masked_fill(~a, -torch.inf).flatten().sort(descending=True, stable=True).indices[:k]
        masks.append(torch.zeros(w.numel(), dtype=torch.bool, device=w.device).index_fill_(0, best, True).view(w.shape))
    return masks


def shares(sizes: Sequence[float], most: Sequence[int], total: int) -> list[int]:
    """Integers in proportion to ``sizes``, between 1 and ``most``, that sum to ``total`` (largest remainders)."""
    full: set[int] = set()
    while True:
        rest = total - sum(most[i] for i in full)
        scale = rest / max(sum(s for i, s in enumerate(sizes) if i not in full), 1)
        over = {i for i, s in enumerate(sizes) if i not in full and s * scale > most[i]}
        if not over:
            break
        full |= over
    exact = [float(most[i]) if i in full else s * scale for i, s in enumerate(sizes)]
    given = [min(max(int(e), 1), m) for e, m in zip(exact, most, strict=True)]
    while (gap := total - sum(given)) != 0:
        sign = 1 if gap > 0 else -1
        room = [i for i in range(len(given)) if (given[i] < most[i] if sign > 0 else given[i] > 1)]
        given[max(room, key=lambda i: sign * (exact[i] - given[i]))] += sign
    return given


class Lamp(Transform):
    """Prune the weights that are small beside the larger ones of their own layer, over all layers at once.

    Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021, arXiv:2010.07611:
    ``score(u; W) = W[u]^2 / sum_{v >= u} W[v]^2`` over ascending magnitudes (3). The largest weight of a layer scores 1,
    so every layer keeps at least one weight and no layer-wise sparsity need be chosen.

    Every matrix and kernel is a layer, under whatever name: also the joint projection of ``nn.MultiheadAttention``, the
    weights of an LSTM, and each expert of a stack ``[experts, out, in]``. Embeddings, shared weights and parameters whose
    name says that they are tables stay; the plan lists them.

    Args:
        sparsity: Share of the selected weights that is zero in the end, above 0 and below 1.
        scope: How the layers share it; see ``allocate``.
        rounds: Prune in this many rounds, each the same share of what remains.
        train: Trains the pruned model in place, after every round. Bring your own loop; the plan shows what would be kept
            if nothing were trained.
        rewind: An earlier ``state_dict`` of the model: after every round all weights go back to it before ``train``; the
            masks stay.
        at: Modules whose matrices and kernels are pruned, embeddings and tables among them.
        bake: Return plain weights with zeros in them. False keeps the masks (``weights.masks``), so that further training
            leaves the zeros alone; ``weights.bake`` then makes the weights plain.

    Shapes: any.

    Raises:
        ValueError: An option out of range; from ``plan``: nothing to prune, a sparsity that prunes nothing or a whole
            layer, a ``rewind`` of another model, or a mask on a recurrent layer.

    Examples:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> new = Lamp(sparsity=0.75).plan(net).apply()
        >>> sum(int((p != 0).sum()) for p in new.parameters() if p.ndim > 1)
        20
    """

    slug: ClassVar[str] = "lamp"

    def __init__(
        self,
        *,
        sparsity: float = 0.9,
        scope: Scope = "lamp",
        rounds: int = 1,
        train: Callable[[nn.Module], Any] | None = None,
        rewind: Mapping[str, Tensor] | None = None,
        at: At | None = None,
        bake: bool = True,
    ) -> None:
        if not 0 < sparsity < 1:
            raise ValueError(
                f"lamp: sparsity was {sparsity}; wanted above 0 (else there is nothing to do) and below 1."
            )
        if rounds < 1:
            raise ValueError(f"lamp: rounds was {rounds}; wanted at least 1.")
        if scope not in SCOPES:
            raise ValueError(f"lamp: scope was {scope!r}; wanted one of {', '.join(SCOPES)}.")
        self.sparsity, self.scope, self.rounds = sparsity, scope, rounds
        self.train, self.rewind, self.at, self.bake = train, rewind, at, bake

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """Choose what to prune. Magnitudes need no data."""
        self.take(others)
        masked = self.train is not None or self.rewind is not None or not self.bake
        names, skipped = _prunable(model, self.at)
        if masked and (stuck := [n for n in names if isinstance(model.get_submodule(_split(n)[0]), nn.RNNBase)]):
            raise ValueError(
                f"lamp: {stuck[0]} belongs to a recurrent layer of torch, which reads its weights past a mask; wanted "
                "layers that can be masked. Prune with bake and without train and rewind, or choose other layers with at."
            )
        if self.rewind is not None:
            _rewind(copy.deepcopy(model), self.rewind)
        layers, alive = _layers(model, names), _alive(model, names)
        total, left = sum(w.numel() for w in layers), sum(int(a.sum()) for a in alive)
        keep = round(total * (1 - self.sparsity))
        if keep >= left:
            raise ValueError(
                f"lamp: {left} of {total} weights are left, {keep} were to be kept: nothing to do. Raise sparsity."
            )
        goals = [round(left * (keep / left) ** (r / self.rounds)) for r in range(1, self.rounds + 1)]
        masks = _joined(model, names, allocate(layers, keep, self.scope, alive))
        touched = [
            Row(n, f"keeps {int(m.sum())} of {m.numel()}", f"{1 - m.double().mean().item():.2%} sparse")
            for n, m in zip(names, masks, strict=True)
        ]
        options = {"sparsity": self.sparsity, "scope": self.scope, "rounds": self.rounds, "bake": self.bake}

        def build() -> nn.Module:
            new = copy.deepcopy(model)
            recipe.record(new, self.slug, options, {"masks": [] if self.bake else names})
            for goal in goals:
                kept = allocate(_layers(new, names), goal, self.scope, _alive(new, names))
                for name, mask in zip(names, _joined(new, names, kept), strict=True):
                    path, last = _split(name)
                    if masked:
                        weights.mask(new.get_submodule(path), last, mask)
                    else:
                        _stored(new, name).data.masked_fill_(~mask, 0)
                if self.rewind is not None:
                    _rewind(new, self.rewind)
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


# Names of parameters with several axes that are no layer: tables, scales, and the logarithms of Mamba's decays.
TABLES = re.compile(r"embed|pos|token|table|latent|bias|scale|gain|mask|_log$")
LAYERS = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def _prunable(model: nn.Module, at: At | None) -> tuple[list[str], list[Row]]:
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
            f"lamp: nothing to prune in {type(model).__name__}: {'; '.join(f'{r.name} {r.why}' for r in skipped[:4])}."
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


def _layers(model: nn.Module, names: Sequence[str]) -> list[Tensor]:
    """The matrices and kernels that count as one layer each."""
    found = ((_weight(model, n), _stacked(model, n)) for n in names)
    return [layer for w, stacked in found for layer in (w.unbind(0) if stacked else (w,))]


def _joined(model: nn.Module, names: Sequence[str], masks: Sequence[Tensor]) -> list[Tensor]:
    """One mask for each weight, from one for each layer."""
    rest = iter(masks)
    return [
        torch.stack([next(rest) for _ in range(len(_weight(model, n)))]) if _stacked(model, n) else next(rest)
        for n in names
    ]


def _alive(model: nn.Module, names: Sequence[str]) -> list[Tensor]:
    """Which weights are left: neither masked nor zero. A layer of zeros alone counts as whole."""
    masked = weights.masks(model)
    alive = []
    for name in names:
        mask = masked.get(name)
        for n, layer in enumerate(_layers(model, [name])):
            left = layer != 0 if mask is None else mask[n] if _stacked(model, name) else mask
            alive.append(left if left.any() else torch.ones_like(left))
    return alive


def _rewind(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state of the model as it was before masks, in place; the masks stay."""
    mine = model.state_dict()
    masks = {k for k in mine if "parametrizations." in k and k.endswith(".mask")}
    plain = {k: k.replace("parametrizations.", "").removesuffix(".original") for k in mine.keys() - masks}
    missing = [p for p in plain.values() if p not in state]
    wrong = [p for k, p in plain.items() if p in state and state[p].shape != mine[k].shape]
    if missing or wrong:
        raise ValueError(
            f"lamp: rewind does not fit {type(model).__name__}: {(missing + wrong)[0]} is missing or of another shape. "
            "Give a state_dict of this model from before pruning."
        )
    model.load_state_dict({k: state[p] for k, p in plain.items()}, strict=False)


def _plain() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)), torch.randn(2, 1, 8, 8)


def _gpt2() -> tuple[nn.Module, Tensor]:
    hf: Any = need("transformers", "hf", "lamp.EXAMPLE")
    config = hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, use_cache=False)
    return hf.GPT2LMHeadModel(config), torch.randint(32, (2, 5))


EXAMPLE = Example(make=lambda: Lamp(sparsity=0.8), inputs=_plain, hf=_gpt2)
