"""Git Re-Basin: permute the units of one network to those of another, and merge the two."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.core import recipe
from interlayer.core.example import Example
from interlayer.core.extras import need
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.wiring import trace
from interlayer.transform.merge.git_rebasin.interpolation import barrier, estimate_statistics, interpolate
from interlayer.transform.merge.git_rebasin.matching import (
    Loss,
    agreement,
    match_activations,
    match_straight_through,
    match_weights,
    match_weights_naive,
)

__all__ = [
    "GitRebasin",
    "agreement",
    "barrier",
    "estimate_statistics",
    "interpolate",
    "match_activations",
    "match_straight_through",
    "match_weights",
    "match_weights_naive",
]

Method = Literal["weights", "activations", "straight-through"]


class GitRebasin(Transform):
    r"""Permutes a network's hidden units to line up with another's, so that the two can be merged by averaging weights.

    Git Re-Basin: Merging Models modulo Permutation Symmetries, https://arxiv.org/abs/2209.04836. Weight matching
    (algorithm 1) is coordinate descent on

    .. math:: \arg\max_\pi \langle \mathrm{vec}(\Theta_A), \mathrm{vec}(\pi(\Theta_B)) \rangle .

    Activation matching solves one linear assignment for each group on the correlations of activations;
    straight-through matching (algorithm 2) learns the permutation from the loss at the midpoint. Which axes are tied is
    found by ``interlayer.core.wiring``, so any network that can be run can be matched: also attention heads.

    ``plan(model, data, other=...)`` takes:

    Args:
        model: The model that stays. Neither model is changed.
        data: Batches as ``taps.feed`` takes them; the first one is used for tracing. Activation matching, the loss of
            straight-through matching (targets needed) and batch-norm statistics use all of them.
        other: A model of the same structure; its units are permuted.
        method: ``"weights"``, ``"activations"`` or ``"straight-through"``.
        merge: Weight of ``other`` in the merged model; None returns the aligned ``other``, the same function as before.
        loss: Straight-through matching: ``loss(output, target)``; cross-entropy if not given.
        steps: Straight-through matching: gradient steps.
        lr: Straight-through matching: step size.
        seed: Order in which groups are visited.

    Raises:
        ValueError: No data, models of different structure, or no units that can be permuted.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2))
        >>> x = torch.randn(5, 4)
        >>> aligned = GitRebasin().plan(a, x, other=b, merge=None).apply()
        >>> torch.allclose(aligned(x), b(x), atol=1e-6)
        True
    """

    slug: ClassVar[str] = "git-rebasin"

    def plan(  # type: ignore[override]
        self,
        model: nn.Module,
        data: Any = None,
        *,
        other: nn.Module,
        method: Method = "weights",
        merge: float | None = 0.5,
        loss: Loss | None = None,
        steps: int = 100,
        lr: float = 0.01,
        seed: int = 0,
    ) -> Plan:
        """See the class."""
        if method not in ("weights", "activations", "straight-through"):
            raise ValueError(f"GitRebasin: unknown method {method!r}; wanted weights, activations or straight-through.")
        batches = [data] if isinstance(data, Tensor | Mapping | tuple) else list(data or ())
        if not batches:
            raise ValueError("GitRebasin: no data; wanted at least one batch, to trace the model with.")
        if method == "straight-through" and not all(isinstance(b, tuple | list) and len(b) > 1 for b in batches):
            raise ValueError("GitRebasin: straight-through matching needs (inputs, targets) batches.")
        ours, theirs = ({n: tuple(t.shape) for n, t in m.state_dict().items()} for m in (model, other))
        if ours != theirs:
            odd = next(n for n in [*ours, *theirs] if ours.get(n) != theirs.get(n))
            raise ValueError(
                f"GitRebasin: the models differ at {odd!r}: {ours.get(odd)} here, {theirs.get(odd)} in other. "
                "Both need the same structure."
            )
        first = batches[0]
        if isinstance(first, Mapping):
            wiring = trace(model, **first)
        else:
            wiring = trace(model, first[0] if isinstance(first, tuple | list) else first)
        if not wiring.groups:
            why = "; ".join(sorted(set(wiring.fixed.values())))
            raise ValueError(f"GitRebasin: nothing to permute in {type(model).__name__}: {why}.")

        def build() -> nn.Module:
            moving = {k: v for k, v in other.state_dict().items() if isinstance(v, Tensor)}
            if method == "weights":
                names = [n for n, _ in model.named_parameters()]
                state = match_weights(wiring, model.state_dict(), moving, names=names, seed=seed)
            elif method == "activations":
                state = match_activations(wiring, model, other, batches)
            else:
                state = match_straight_through(
                    wiring, model, moving, batches, loss=loss or F.cross_entropy, steps=steps, lr=lr, seed=seed
                )
            aligned = copy.deepcopy(other)
            aligned.load_state_dict({**other.state_dict(), **state})
            out = aligned if merge is None else interpolate(model, aligned, merge, batches)
            recipe.record(out, self.slug, {"method": method, "merge": merge, "seed": seed}, {})
            return out

        touched = [Row(g.name, f"permute {g.size} units, {len(g.members)} axes") for g in wiring.groups.values()]
        skipped = [Row(name, f"axis {dim} stays", why) for (name, dim), why in wiring.fixed.items()]
        return Plan(self.slug, {"method": method, "merge": merge, "seed": seed}, touched, skipped, build)

    def restore(self, model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        """The result has the structure of the base: nothing to do."""
        return model


def _perturbed(model: nn.Module) -> dict[str, Any]:
    """A second model: the first with noise on its weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return {"other": other}


def _plain() -> tuple[Any, ...]:
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), torch.randn(5, 6)


def _gpt2() -> tuple[Any, ...]:
    hf: Any = need("transformers", "hf", "git_rebasin.EXAMPLE")
    config = hf.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=32, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    return hf.GPT2LMHeadModel(config), torch.randint(32, (2, 5))


EXAMPLE = Example(make=GitRebasin, inputs=_plain, hf=_gpt2, options=_perturbed)
