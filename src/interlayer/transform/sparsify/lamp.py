"""LAMP, and the other ways to share a sparsity out over the layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interlayer.core import recipe, weights
from interlayer.core.example import Example
from interlayer.core.extras import need
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.select import At, select

SCOPES = ("lamp", "global", "uniform", "erdos-renyi-kernel")


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
        tensors: Weight tensors, one a layer.
        keep: Number of weights to keep.
        scope: ``"lamp"``: the largest LAMP scores of all layers. ``"global"``: the largest magnitudes of all layers.
            ``"uniform"``: the same share in each layer. ``"erdos-renyi-kernel"``: a number that grows with the sum of a
            layer's dimensions (density ``∝ (n_in + n_out + w + h) / (n_in n_out w h)``, Rigging the Lottery, Evci et
            al. 2020); a layer that would need more than it has stays whole.
        alive: Which weights still take part; all, unless told.

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
    """Whole numbers in proportion to ``sizes``, between 1 and ``most``, that sum to ``total`` (largest remainders)."""
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

    Shapes: any; the result is the model with ``parametrize`` masks (``weights.masks``, ``weights.bake``).

    Examples:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> new = Lamp().plan(net, sparsity=0.75).apply()
        >>> sum(int(m.sum()) for m in weights.masks(new).values())
        20
    """

    slug: ClassVar[str] = "lamp"

    def plan(  # type: ignore[override]
        self,
        model: nn.Module,
        data: Any = None,
        *,
        sparsity: float = 0.9,
        scope: str = "lamp",
        rounds: int = 1,
        train: Callable[[nn.Module], Any] | None = None,
        rewind: Mapping[str, Tensor] | None = None,
        at: At | None = None,
    ) -> Plan:
        """Choose what to prune.

        Args:
            model: Any module.
            data: Not used; magnitudes need none.
            sparsity: Share of the selected weights that is pruned in the end, above 0 and below 1.
            scope: How the layers share it; see ``allocate``.
            rounds: Prune in this many rounds, each the same share of what remains.
            train: Trains the pruned model in place, after every round. Bring your own loop; the plan shows what would
                be kept if nothing were trained.
            rewind: An earlier ``state_dict`` of the model: after every round all weights go back to it before
                ``train``; the masks stay.
            at: Modules whose ``weight`` is pruned; by default all with a matrix or kernel, save embeddings and weights
                that are shared.

        Raises:
            ValueError: A sparsity that prunes nothing or a whole layer, no weights, or a ``rewind`` of another model.
        """
        if not 0 < sparsity < 1:
            raise ValueError(
                f"lamp: sparsity was {sparsity}; wanted above 0 (else there is nothing to do) and below 1."
            )
        if rounds < 1:
            raise ValueError(f"lamp: rounds was {rounds}; wanted at least 1.")
        names, skipped = _prunable(model, at)
        tensors = [_weight(model, n) for n in names]
        if rewind is not None:
            _rewind(copy.deepcopy(model), rewind)
        alive = _alive(model, names)
        total, start = sum(w.numel() for w in tensors), sum(int(a.sum()) for a in alive)
        keep = round(total * (1 - sparsity))
        if keep >= start:
            raise ValueError(
                f"lamp: {start} of {total} weights are left, {keep} were to be kept: nothing to do. Raise sparsity."
            )
        goals = [round(start * (keep / start) ** (r / rounds)) for r in range(1, rounds + 1)]
        masks = allocate(tensors, keep, scope, alive)
        touched = [
            Row(f"{n}.weight", f"keeps {int(m.sum())} of {m.numel()}", f"{1 - m.double().mean().item():.2%} sparse")
            for n, m in zip(names, masks, strict=True)
        ]
        told = {"sparsity": sparsity, "scope": scope, "rounds": rounds}

        def build() -> nn.Module:
            new = copy.deepcopy(model)
            recipe.record(new, self.slug, told, {"modules": names})
            for goal in goals:
                kept = allocate([_weight(new, n) for n in names], goal, scope, _alive(new, names))
                for name, mask in zip(names, kept, strict=True):
                    weights.mask(new.get_submodule(name), "weight", mask)
                if rewind is not None:
                    _rewind(new, rewind)
                if train is not None:
                    train(new)
            return new

        return Plan(self.slug, told, touched, skipped, build)

    def restore(self, model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        """Put masks that keep everything where the saved ones belong."""
        for name in structure["modules"]:
            every = torch.ones_like(_weight(model, name), dtype=torch.bool)
            weights.mask(model.get_submodule(name), "weight", every)
        return model


def _prunable(model: nn.Module, at: At | None) -> tuple[list[str], list[Row]]:
    owners: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), []).append(name)
    names, skipped = [], []
    found = select(model, at if at is not None else lambda n, m: True)
    for name, module in found:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            why = "has no weight"
        elif weight.ndim < 2:
            why = "no matrix or kernel"
        elif at is None and isinstance(module, nn.Embedding):
            why = "an embedding"
        elif len(others := owners.get(id(weight), [])) > 1:
            why = f"shared by {' and '.join(others)}"
        else:
            names.append(name)
            continue
        if next(module.parameters(recurse=False), None) is not None or at is not None:
            skipped.append(Row(name, type(module).__name__, why))
    if not names:
        raise ValueError(
            f"lamp: nothing to prune in {type(model).__name__}: {'; '.join(f'{r.name} {r.why}' for r in skipped[:4])}."
        )
    return names, [*skipped, *found.skipped]


def _weight(model: nn.Module, name: str) -> Tensor:
    return cast(Tensor, model.get_submodule(name).weight)


def _alive(model: nn.Module, names: Sequence[str]) -> list[Tensor]:
    masked = weights.masks(model)
    return [masked.get(f"{n}.weight", torch.ones_like(_weight(model, n), dtype=torch.bool)) for n in names]


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


EXAMPLE = Example(make=Lamp, inputs=_plain, hf=_gpt2, options={"sparsity": 0.8})
