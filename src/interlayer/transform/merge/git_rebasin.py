"""Git Re-Basin: permute the units of one network to those of another, and merge the two."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from interlayer.core import recipe, taps
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.wiring import Group, Member, Wiring, trace

State = Mapping[str, Tensor]
Loss = Callable[[Any, Any], Tensor]
Method = Literal["weights", "activations", "straight-through"]


def rows(weight: Tensor, member: Member) -> Tensor:
    """The part of a weight that each unit of a group owns: ``[units, values]``."""
    return weight.movedim(member.dim, 0)[member.index.to(weight.device)].flatten(1)


def assign(similarity: Tensor) -> Tensor:
    """The permutation p that maximises the sum of ``similarity[i, p[i]]``."""
    return torch.from_numpy(linear_sum_assignment(similarity.double().cpu().numpy(), maximize=True)[1])


def agreement(target: State, moving: State, names: Iterable[str]) -> float:
    """The inner product of two sets of weights, which weight matching raises."""
    return sum(float(torch.dot(target[n].flatten().double(), moving[n].flatten().double())) for n in names)


def match_weights(
    wiring: Wiring, target: State, moving: State, *, names: Iterable[str], seed: int = 0
) -> dict[str, Tensor]:
    """Weight matching: ``moving`` permuted so that it agrees with ``target`` as well as coordinate descent can tell.

    Each step takes one group and solves, the others held, for the permutation of the largest ``<target, moving>``.
    A group may sit on both axes of a weight; then the linear assignment is only a proposal, and a step that does not
    raise the inner product is not taken.

    Args:
        wiring: The tied axes, as ``trace`` finds them.
        target: Weights of the model that stays.
        moving: Weights of the model that is permuted, with buffers, which move along.
        names: The weights that count in the inner product (parameters, without running statistics).
        seed: Order in which groups are visited.
    """
    counted = set(names)
    state, generator = dict(moving), torch.Generator().manual_seed(seed)
    groups = list(wiring.groups.values())
    progress = True
    while progress:
        progress = False
        for n in torch.randperm(len(groups), generator=generator).tolist():
            group = groups[n]
            members = [m for m in group.members if m.name in counted]
            pairs = [(rows(target[m.name], m), rows(state[m.name], m)) for m in members]
            if not pairs:
                continue
            similarity = torch.cat([a for a, _ in pairs], 1) @ torch.cat([b for _, b in pairs], 1).T
            perm = assign(similarity)
            gain = similarity[torch.arange(group.size), perm].sum() - similarity.trace()
            if gain <= 1e-6 * similarity.abs().max():
                continue
            moved = wiring.permute(
                {m.name: state[m.name] for m in group.members} | _aliased(wiring, state, group), {group.name: perm}
            )
            if len({m.name for m in members}) < len(members):
                touched = {m.name for m in members}
                if agreement(target, moved, touched) <= agreement(target, state, touched) + 1e-6 * float(
                    similarity.abs().max()
                ):
                    continue
            state |= moved
            progress = True
    return state


def _aliased(wiring: Wiring, state: State, group: Group) -> dict[str, Tensor]:
    moved = {m.name for m in group.members}
    return {alias: state[alias] for alias, name in wiring.aliases.items() if name in moved and alias in state}


def match_activations(wiring: Wiring, model: nn.Module, other: nn.Module, data: Any) -> dict[str, Tensor]:
    """Activation matching: for each group the permutation that maximises the correlation of the units' activations.

    Groups inside units of other groups come after those, one pass over the data for each level.
    """
    moving = {k: v for k, v in other.state_dict().items() if isinstance(v, Tensor)}
    moved = copy.deepcopy(other)
    level = [g for g in wiring.groups.values() if g.parent is None]
    while level:
        perms = {g.name: assign(s) for g, s in zip(level, correlations(level, model, moved, data), strict=True)}
        moving = wiring.permute(moving, perms)
        moved.load_state_dict({**moved.state_dict(), **moving})
        above = {g.name for g in level}
        level = [g for g in wiring.groups.values() if g.parent is not None and g.parent[0] in above]
    return moving


def correlations(groups: Sequence[Group], model: nn.Module, other: nn.Module, data: Any) -> list[Tensor]:
    """For each group ``[unit of model, unit of other]``: correlation over the data, summed over where the units show."""
    names = sorted({m.name for g in groups for m in g.outputs})
    sums: dict[tuple[int, int], list[Tensor]] = {}
    for batch in data if names else ():
        with taps.read(model, names) as left, taps.read(other, names) as right:
            for net in (model, other):
                with torch.no_grad(), taps.at_rest(net):
                    for _ in taps.feed(net, [batch]):
                        pass
        for n, group in enumerate(groups):
            for place, m in enumerate(group.outputs):
                a, b = (rows(x[m.name].double(), m) for x in (left, right))  # every other axis holds samples
                count = torch.tensor(a.shape[1])
                now = [count, a.sum(1), b.sum(1), a.square().sum(1), b.square().sum(1), a @ b.T]
                old = sums.get((n, place), [torch.zeros(())] * len(now))
                sums[n, place] = [s + t for s, t in zip(old, now, strict=True)]
    out = [torch.eye(g.size, dtype=torch.float64) * 1e-9 for g in groups]  # a group that shows nowhere stays
    for (n, _), (count, a, b, aa, bb, ab) in sums.items():
        spread = [(s / count - (m / count).square()).clamp_min(1e-12).sqrt() for s, m in ((aa, a), (bb, b))]
        out[n] += ((ab / count - torch.outer(a, b) / count**2) / torch.outer(*spread)).cpu()
    return out


def match_straight_through(
    wiring: Wiring,
    model: nn.Module,
    moving: State,
    batches: Sequence[Any],
    *,
    loss: Loss,
    steps: int,
    lr: float,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Straight-through matching: find the permutation whose midpoint with ``model`` has the least loss.

    Free weights start at those of ``model``. Each step projects: it permutes ``moving`` to agree with the free weights.
    The loss is taken at the midpoint of ``model`` and the projection, and its gradient goes to the free weights as if
    they had been the projection. Of all projections met, the one with the least midpoint loss is returned.
    """
    fixed = {n: p.detach() for n, p in model.named_parameters()}
    free = {n: p.clone().requires_grad_() for n, p in fixed.items()}
    buffers = {n: b.detach() for n, b in model.named_buffers()}
    optimiser = torch.optim.SGD(list(free.values()), lr=lr, momentum=0.9)
    state, best, least = dict(moving), dict(moving), float("inf")
    with taps.at_rest(model), torch.enable_grad():
        for step in range(steps):
            state = match_weights(
                wiring, {n: p.detach() for n, p in free.items()}, state, names=fixed, seed=seed + step
            )
            middle = {n: (fixed[n] + state[n].detach() + (free[n] - free[n].detach())) / 2 for n in fixed}
            kept = {n: (b + state[n]) / 2 if b.is_floating_point() and n in state else b for n, b in buffers.items()}
            batch = batches[step % len(batches)]
            value = loss(torch.func.functional_call(model, middle | kept, (batch[0],), tie_weights=True), batch[1])
            if value.item() < least:
                best, least = dict(state), value.item()
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
    return best


def interpolate(model: nn.Module, other: nn.Module, weight: float, data: Any = None) -> nn.Module:
    """A new model at ``(1 - weight) * model + weight * other``.

    Running statistics of batch norms don't interpolate; with ``data`` they are estimated anew.
    """
    out = copy.deepcopy(model)
    others = other.state_dict()
    with torch.no_grad():
        for name, value in out.state_dict().items():
            if isinstance(value, Tensor) and value.is_floating_point():
                value.copy_((1 - weight) * model.state_dict()[name] + weight * others[name])
    if data is not None:
        estimate_statistics(out, data)
    return out


def estimate_statistics(model: nn.Module, data: Any) -> None:
    """Set the running statistics of batch norms, in place, to their plain average over the batches of ``data``."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    modes = [(m, m.training) for m in model.modules()]
    momenta = [m.momentum for m in norms]
    model.eval()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a cumulative average
        m.train()
    with torch.no_grad():
        for _ in taps.feed(model, data):
            pass
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    for module, mode in modes:
        module.training = mode


def barrier(
    model: nn.Module, other: nn.Module, loss: Callable[[nn.Module], float], *, points: int = 11, data: Any = None
) -> float:
    """The loss barrier: ``max over w of L((1 - w) A + w B) - (L(A) + L(B)) / 2``.

    Args:
        model: A.
        other: B.
        loss: L, from a model to a number.
        points: Values of w between 0 and 1, both included.
        data: For estimating batch-norm statistics anew in between.
    """
    ends = (loss(model), loss(other))
    between = [loss(interpolate(model, other, w, data)) for w in torch.linspace(0, 1, points).tolist()[1:-1]]
    return max(*ends, *between) - sum(ends) / 2


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

    Example:
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
