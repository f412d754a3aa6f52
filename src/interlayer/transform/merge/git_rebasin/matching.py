"""The three ways to find the permutation: from weights, from activations, from the loss at the midpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.transport import assign
from interlayer.core.wiring import Group, Wiring, counted, run

State = Mapping[str, Tensor]
Loss = Callable[[Any, Any], Tensor]
ROUNDING = 1e-6  # a gain below this share of the product of the norms may be rounding, and could go in circles


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
    groups = [g for g in wiring.groups.values() if any(m.name in counted for m in g.members)]
    members = [[m for m in g.members if m.name in counted] for g in groups]
    ours = [[m.rows(target[m.name]) for m in ms] for ms in members]
    # neither norm changes when units are permuted
    least = [
        ROUNDING * sum(float(a.norm() * m.rows(state[m.name]).norm()) for a, m in zip(own, ms, strict=True))
        for own, ms in zip(ours, members, strict=True)
    ]
    waiting = set(range(len(groups)))  # a group is solved again only after a weight of it has changed
    while waiting:
        for n in torch.randperm(len(groups), generator=generator).tolist():
            if n not in waiting:
                continue
            waiting.discard(n)
            group, place = groups[n], torch.arange(groups[n].size)
            similarity = torch.zeros(group.size, group.size, dtype=ours[n][0].dtype, device=ours[n][0].device)
            for a, m in zip(ours[n], members[n], strict=True):
                similarity.addmm_(a, m.rows(state[m.name]).T)
            perm = assign(similarity)
            if similarity[place, perm].sum() - similarity.trace() <= least[n]:
                continue
            axes = {m.name for m in group.members}
            axes |= {alias for alias, name in wiring.aliases.items() if name in axes and alias in state}
            moved = wiring.permute({name: state[name] for name in axes}, {group.name: perm})
            touched = {m.name for m in members[n]}
            twice = len(touched) < len(members[n])
            if twice:
                old, new = (agreement(target, weights, touched) for weights in (state, moved))
                if new <= old + least[n]:
                    continue
            state |= moved
            waiting |= {k for k, ms in enumerate(members) if (k != n or twice) and touched & {m.name for m in ms}}
    return state


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
                a, b = (m.rows(x[m.name].double()) for x in (left, right))  # every other axis holds samples
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
    output: str | None = None,
) -> dict[str, Tensor]:
    """Straight-through matching: find the permutation whose midpoint with ``model`` has the least loss.

    Free weights start at those of ``model``. Each step projects: it permutes ``moving`` to agree with the free weights.
    The loss is taken at the midpoint of ``model`` and the projection, and its gradient goes to the free weights as if
    they had been the projection. Steps take the batches in turn; the projections are compared on the first batch, and the
    one with the least midpoint loss there is returned.
    """
    fixed = {n: p.detach() for n, p in model.named_parameters()}
    free = {n: p.clone().requires_grad_() for n, p in fixed.items()}
    buffers = {n: b.detach() for n, b in model.named_buffers()}
    optimiser = torch.optim.SGD(list(free.values()), lr=lr, momentum=0.9)
    state, best, least = dict(moving), dict(moving), float("inf")

    def midpoint(weights: State, batch: Any) -> Tensor:
        tied = {alias: weights[name] for alias, name in wiring.aliases.items() if name in weights}
        args, kwargs = taps.arguments(batch)
        out = run(model, {**weights, **tied}, *args, **kwargs)
        return loss(out if output is None else counted(out, output)[0], batch[1])

    with taps.at_rest(model), torch.enable_grad():
        for step in range(steps):
            state = match_weights(
                wiring, {n: p.detach() for n, p in free.items()}, state, names=fixed, seed=seed + step
            )
            middle = {n: (fixed[n] + state[n].detach() + (free[n] - free[n].detach())) / 2 for n in fixed}
            middle |= {n: (b + state[n]) / 2 if b.is_floating_point() and n in state else b for n, b in buffers.items()}
            with torch.no_grad():
                judged = midpoint(middle, batches[0]).item()
            if judged < least:
                best, least = dict(state), judged
            optimiser.zero_grad()
            midpoint(middle, batches[step % len(batches)]).backward()
            optimiser.step()
    return best


def match_weights_naive(
    wiring: Wiring, target: State, moving: State, *, names: Iterable[str], seed: int = 0
) -> dict[str, Tensor]:
    """Algorithm 1 as the paper writes it: from the original weights each time, permutation by permutation, unit by unit.

    For networks whose groups do not lie inside each other.
    """
    counted, generator = set(names), torch.Generator().manual_seed(seed)
    groups = list(wiring.groups.values())
    perms = {g.name: list(range(g.size)) for g in groups}

    def permuted(name: str, skip: tuple[str, int] | None = None) -> Tensor:
        weight = moving[name]
        for group in groups:
            for m in group.members:
                if m.name == name and (group.name, m.dim) != skip:
                    old, weight = weight, weight.clone()
                    for unit, source in enumerate(perms[group.name]):
                        for to, place in zip(m.index[unit].tolist(), m.index[source].tolist(), strict=True):
                            weight.select(m.dim, to).copy_(old.select(m.dim, place))
        return weight

    progress = True
    while progress:
        progress = False
        for n in torch.randperm(len(groups), generator=generator).tolist():
            group = groups[n]
            similarity, size = torch.zeros(group.size, group.size), 0.0
            for m in group.members:
                if m.name in counted:
                    a, b = m.rows(target[m.name]), m.rows(permuted(m.name, (group.name, m.dim)))
                    size += float(a.norm() * b.norm())
                    for unit in range(group.size):
                        similarity[unit] += b @ a[unit]
            perm = assign(similarity).tolist()
            old = sum(float(similarity[i, j]) for i, j in enumerate(perms[group.name]))
            new = sum(float(similarity[i, j]) for i, j in enumerate(perm))
            if new > old + ROUNDING * size:
                perms[group.name], progress = perm, True
    return {name: permuted(name) for name in moving}
