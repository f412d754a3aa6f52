"""Git Re-Basin: permute the units of one network to those of another, and merge the two."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.core import recipe, taps
from interlayer.core.example import Example, perturbed, tiny_gpt2, tiny_mlp
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.paths import expect_alike, interpolate
from interlayer.core.wiring import trace
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
    "match_activations",
    "match_straight_through",
    "match_weights",
    "match_weights_naive",
]

Method = Literal["weights", "activations", "straight-through"]
METHODS = get_args(Method)


class GitRebasin(Transform):
    r"""Permutes a network's hidden units to line up with another's, so that the two can be merged by averaging weights.

    Git Re-Basin: Merging Models modulo Permutation Symmetries, https://arxiv.org/abs/2209.04836. Weight matching
    (algorithm 1) is coordinate descent on

    .. math:: \arg\max_\pi \langle \mathrm{vec}(\Theta_A), \mathrm{vec}(\pi(\Theta_B)) \rangle .

    Activation matching solves one linear assignment for each group on the correlations of activations;
    straight-through matching (algorithm 2) learns the permutation from the loss at the midpoint. Which axes are tied is
    found by ``interlayer.core.wiring``, so any network that can be run can be matched: also attention heads.

    ``plan(model, data, others=(other,))`` takes the model that stays, batches as ``taps.feed`` takes them, and the model
    whose units are permuted, of the same structure. The first batch is used for tracing. Activation matching, the loss of
    straight-through matching (targets needed) and batch-norm statistics use all of them. No model is changed.

    Args:
        method: ``"weights"``, ``"activations"`` or ``"straight-through"``.
        merge: Weight of the other model in the merged one; None returns the aligned other, the same function as before.
        output: The field of the model's output that must stay the same, such as ``"logits"``; see ``wiring.trace``. By
            default all of them, which pins units that show in an encoder's states beside the logits.
        loss: Straight-through matching: ``loss(output, target)``. Defaults to cross-entropy.
        steps: Straight-through matching: gradient steps.
        lr: Straight-through matching: step size.
        seed: Order in which groups are visited.

    Raises:
        ValueError: An unknown method; from ``plan``: no data, models of different structure, no units that can be
            permuted or matched, or a model whose wiring one pass does not show (see ``wiring.trace``).
        TypeError: The model's output has no field of the name ``output``.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2))
        >>> x = torch.randn(5, 4)
        >>> aligned = GitRebasin(merge=None).plan(a, x, others=(b,)).apply()
        >>> torch.allclose(aligned(x), b(x), atol=1e-6)
        True
    """

    slug: ClassVar[str] = "git-rebasin"
    merges: ClassVar[int] = 1

    def __init__(
        self,
        *,
        method: Method = "weights",
        merge: float | None = 0.5,
        output: str | None = None,
        loss: Loss | None = None,
        steps: int = 100,
        lr: float = 0.01,
        seed: int = 0,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"git-rebasin: method was {method!r}; expected one of {', '.join(METHODS)}.")
        self.method, self.merge, self.output = method, merge, output
        self.loss, self.steps, self.lr, self.seed = loss or F.cross_entropy, steps, lr, seed

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """Find which units can be permuted."""
        (other,) = self.take(others)
        batches = taps.batches(data, self.slug, "no data; expected at least one batch, to trace the model with.")
        if self.method == "straight-through" and not all(isinstance(b, tuple | list) and len(b) > 1 for b in batches):
            raise ValueError("git-rebasin: straight-through matching needs (inputs, targets) batches.")
        expect_alike(self.slug, model, other)
        args, kwargs = taps.arguments(batches[0])
        wiring = trace(model, *args, output=self.output, **kwargs)
        if not wiring.groups:
            why = "; ".join(sorted(set(wiring.fixed.values())))
            raise ValueError(f"git-rebasin: nothing to permute in {type(model).__name__}: {why}.")
        matched = [g for g in wiring.groups.values() if self.method != "activations" or g.outputs]
        if not matched:
            raise ValueError(
                f"git-rebasin: no module of {type(model).__name__} gives out the units of a group, so their activations "
                "can't be read and nothing would be matched. Use method='weights'."
            )

        def build() -> nn.Module:
            moving = {k: v for k, v in other.state_dict().items() if isinstance(v, Tensor)}
            if self.method == "weights":
                names = [n for n, _ in model.named_parameters()]
                state = match_weights(wiring, model.state_dict(), moving, names=names, seed=self.seed)
            elif self.method == "activations":
                state = match_activations(wiring, model, other, batches)
            else:
                state = match_straight_through(
                    wiring, model, moving, batches, output=self.output, loss=self.loss, steps=self.steps, lr=self.lr,
                    seed=self.seed,
                )  # fmt: skip
            aligned = copy.deepcopy(other)
            aligned.load_state_dict({**other.state_dict(), **state})
            out = aligned if self.merge is None else interpolate(model, aligned, self.merge, batches)
            recipe.record(out, self.slug, options, {})
            return out

        options = {"method": self.method, "merge": self.merge, "seed": self.seed}
        touched = [Row(g.name, f"permute {g.size} units, {len(g.members)} axes") for g in matched]
        skipped = [
            Row(g.name, f"{g.size} units stay", "no module gives out their activations; method='weights' matches them")
            for g in wiring.groups.values()
            if g not in matched
        ]
        skipped += [Row(name, f"axis {dim} stays", why) for (name, dim), why in wiring.fixed.items()]
        return Plan(self.slug, options, touched, skipped, build)


EXAMPLE = Example(
    make=GitRebasin,
    inputs=tiny_mlp,
    hf=lambda: tiny_gpt2(use_cache=False, bos_token_id=0, eos_token_id=0),
    others=perturbed,
)
