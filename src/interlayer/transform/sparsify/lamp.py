"""LAMP, and other ways to share a sparsity over the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interlayer.core.example import Example, tiny_convnet, tiny_gpt2
from interlayer.core.select import At
from interlayer.transform.sparsify._pruning import Pruning, alive, largest, layers

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
        raise ValueError(f"lamp: scope was {scope!r}; expected one of {', '.join(SCOPES)}.")
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
    return [largest(w, a, k) for w, a, k in zip(held, alive, shares(sizes, counts, keep), strict=True)]


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


class Lamp(Pruning):
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
        super().__init__(sparsity=sparsity, rounds=rounds, train=train, rewind=rewind, at=at, bake=bake)
        if scope not in SCOPES:
            raise ValueError(f"lamp: scope was {scope!r}; expected one of {', '.join(SCOPES)}.")
        self.scope = scope
        self.options["scope"] = scope

    def choose(self, model: nn.Module, names: Sequence[str], keep: int, data: Any) -> list[Tensor]:
        """Magnitudes need no data."""
        return allocate(layers(model, names), keep, self.scope, alive(model, names))


EXAMPLE = Example(make=lambda: Lamp(sparsity=0.8), inputs=tiny_convnet, hf=lambda: tiny_gpt2(use_cache=False))
