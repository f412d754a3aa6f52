"""OT fusion: align the units of other networks to one by optimal transport, and average all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core import recipe, taps
from interlayer.core.example import Example, perturbed, tiny_gpt2, tiny_mlp
from interlayer.core.extras import need
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.paths import blend
from interlayer.core.transport import transport
from interlayer.core.wiring import Bridge, Group, Member, in_order, trace

Method = Literal["weights", "activations"]
METHODS = get_args(Method)


class OTFusion(Transform):
    r"""Averages networks after a soft alignment: each layer's units are moved to another network's by optimal transport.

    Model Fusion via Optimal Transport, https://arxiv.org/abs/1910.05653. With :math:`T_l` the transport plan from the units of
    the other network in layer l to those of the one that stays, uniform masses, and :math:`\beta_l` the plan's column sums, the
    other's weights become

    .. math:: \tilde W_l = \mathrm{diag}(1 / \beta_l)\, T_l^\top\, W_l\, T_{l-1}\, \mathrm{diag}(1 / \beta_{l-1})

    and the fused network is the mean of the one that stays and all others so aligned. The cost of moving a unit to another is
    the Euclidean distance of their incoming weights, those already aligned with the layers before, or of their activations on
    the same data, before the nonlinearity. Inputs and outputs of the network stay as they are. Incoming weights are averaged over
    units like everything else, so that what a network of twice the width brings to a layer is halved, as in the authors' code.

    ``plan(model, data, others=(other, ...))`` takes any number of others, of the same layers but of any widths: the result has the
    widths of ``model``. So a wide network is fused into a small or pruned one. Which axes belong together is found by
    ``interlayer.core.wiring``, so biases, batch norms (their statistics are estimated anew) and attention heads follow. Heads
    need the same number and size in all. The first batch is used for tracing; activations and statistics use all of them. No
    model is changed.

    Args:
        method: Align by ``"weights"`` or by ``"activations"``.
        reg: Entropy of the transport as a share of the mean cost, by Sinkhorn. 0 solves exactly: for equal widths that gives a
            permutation.
        weight: Share of ``model`` in the mean; the others share the rest equally. Defaults to equal shares. With 0 and one other
            the result is that other, aligned.
        output: The field of the model's output that must stay the same, such as ``"logits"``; see ``wiring.trace``.

    Raises:
        ValueError: Options out of range; from ``plan``: no data, no other model, models that differ in more than widths, no
            units that can be moved, or a model whose wiring one pass does not show; from ``apply``: no convergence.
        ImportError: POT is not installed (``pip install "interlayer[merge]"``).

    Examples:
        >>> small, wide = (nn.Sequential(nn.Linear(4, n), nn.ReLU(), nn.Linear(n, 3)) for n in (8, 16))
        >>> fused = OTFusion(method="activations").plan(small, torch.randn(20, 4), others=(wide, wide)).apply()
        >>> fused[0].weight.shape
        torch.Size([8, 4])
    """

    slug: ClassVar[str] = "ot-fusion"
    merges: ClassVar[int] = 1
    more: ClassVar[bool] = True

    def __init__(
        self, *, method: Method = "weights", reg: float = 0.0, weight: float | None = None, output: str | None = None
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"ot-fusion: method was {method!r}; expected one of {', '.join(METHODS)}.")
        if not 0 <= reg < float("inf"):
            raise ValueError(f"ot-fusion: reg was {reg}; expected 0 (exact) or more.")
        if weight is not None and not 0 <= weight < 1:
            raise ValueError(
                f"ot-fusion: weight was {weight}; expected at least 0 and below 1 (else no other model counts)."
            )
        self.method, self.reg, self.weight, self.output = method, reg, weight, output

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """Find which units correspond."""
        others = tuple(self.take(others))
        batches = taps.batches(data, self.slug, "no data; expected at least one batch, to trace the models with.")
        need("ot", "merge", "ot-fusion")
        args, kwargs = taps.arguments(batches[0])
        wiring = trace(model, *args, output=self.output, **kwargs)
        if not wiring.groups:
            why = "; ".join(sorted(set(wiring.fixed.values())))
            raise ValueError(f"ot-fusion: no units to move in {type(model).__name__}: {why}.")
        bridges = [Bridge(model, o, wiring, trace(o, *args, output=self.output, **kwargs)) for o in others]
        groups, trained = in_order(wiring, model, *args, **kwargs), {n for n, _ in model.named_parameters()}
        chosen = [_order(bridge, groups, trained, self.method) for bridge in bridges]
        share = 1 / (1 + len(others)) if self.weight is None else self.weight
        shares = (share, *[(1 - share) / len(others)] * len(others))
        touched, skipped = [], [Row(n, f"axis {dim} stays", why) for (n, dim), why in wiring.fixed.items()]
        for group in wiring.groups.values():
            sizes = ", ".join(str(b.theirs[group.name].size) for b in bridges)
            if all(group in order for order in chosen):
                touched.append(Row(group.name, f"move {sizes} units to {group.size}, {len(group.members)} axes"))
            elif all(b.theirs[group.name].size == group.size for b in bridges):
                skipped.append(Row(group.name, f"{group.size} units stay", f"nothing to compare by {self.method}"))
            else:
                raise ValueError(
                    f"ot-fusion: {group.name!r} has {group.size} units here and {sizes} in the others, and nothing to compare "
                    f"them by {self.method}. Use the other method."
                )
        if not touched:
            raise ValueError(f"ot-fusion: nothing to compare by {self.method}. Use the other method.")

        def build() -> nn.Module:
            states = [model.state_dict()]
            for other, bridge, order in zip(others, bridges, chosen, strict=True):
                maps = self._maps(bridge, order, model, other, batches)
                states.append(bridge.carry(other.state_dict(), maps))
            out = blend(model, states, shares, batches)
            recipe.record(out, self.slug, options, {})
            return out

        options = {"method": self.method, "reg": self.reg, "weight": self.weight}
        return Plan(self.slug, options, touched, skipped, build)

    def _maps(
        self,
        bridge: Bridge,
        order: Mapping[Group, list[Any]],
        model: nn.Module,
        other: nn.Module,
        batches: Sequence[Any],
    ) -> dict[str, Tensor]:
        """``T diag(1 / column sums)`` of each group, layer after layer."""
        maps = {g.name: torch.eye(g.size) for g in bridge.ours.groups.values() if g not in order}
        if self.method == "weights":
            ours, theirs = model.state_dict(), other.state_dict()
            for group, members in order.items():
                pairs = ((bridge.rows(group, m, theirs[m.name], maps), m.rows(ours[m.name])) for m in members)
                maps[group.name] = self.mix(_squares(pairs).sqrt())
            return maps
        depths = {g: len(bridge.above(g)) for g in order}
        for depth in sorted(set(depths.values())):  # units inside others are compared after those have been moved
            level = {g: places for g, places in order.items() if depths[g] == depth}
            for group, squares in zip(level, _activations(bridge, level, model, other, batches, maps), strict=True):
                maps[group.name] = self.mix(squares.sqrt())
        return maps

    def mix(self, distances: Float[Tensor, "theirs ours"]) -> Float[Tensor, "theirs ours"]:
        """Of which units of the other network each unit is made up: columns with sum one, from distances between units."""
        plan = transport(distances, reg=self.reg)
        return plan / plan.sum(0)


def _squares(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Squared distances ``[units there, units here]``, summed over pairs of ``[units, values]``."""
    return torch.stack([torch.cdist(a.double(), b.double()).square() for a, b in pairs]).sum(0).cpu()


def _order(bridge: Bridge, groups: Sequence[Group], trained: set[str], method: Method) -> dict[Group, list[Any]]:
    """What the units of each group are compared by, layer after layer.

    For weights: incoming weights, those of modules that give out the units, whose other axes are aligned by then. For
    activations: the outputs of these modules.
    """
    order, known = dict[Group, list[Any]](), set[str]()
    for group in groups:
        owners = {m.name.rpartition(".")[0] for m in group.members}
        found: list[Any] = []
        if method == "activations":
            shown = bridge.shown(group)
            found = [pair for pair in shown if pair[0].name in owners] or shown
        else:
            mine = [m for m in group.members if m.name in trained and bridge.ready(group, m, known)]
            producers = {m.name for m in group.outputs} & owners
            found = [m for m in mine if m.name.rpartition(".")[0] in producers] or mine
        if found:
            order[group] = found
            known.add(group.name)
    return order


def _activations(
    bridge: Bridge,
    level: Mapping[Group, list[tuple[Member, Member]]],
    model: nn.Module,
    other: nn.Module,
    batches: Sequence[Any],
    maps: Mapping[str, Tensor],
) -> list[Tensor]:
    """For each group the squared distances of its units' activations, summed over the data, a batch at a time."""
    names = sorted({m.name for places in level.values() for m, _ in places})
    sums = [torch.zeros(bridge.theirs[g.name].size, g.size, dtype=torch.float64) for g in level]
    for batch in batches if names else ():
        with taps.read(model, names) as left, taps.read(other, names) as right, torch.no_grad():
            for net in (model, other):
                with taps.at_rest(net):
                    next(taps.feed(net, batch))
        for total, (group, places) in zip(sums, level.items(), strict=True):
            total += _squares((bridge.within(group, b, right[b.name], maps), a.rows(left[a.name])) for a, b in places)
    return sums


EXAMPLE = Example(
    make=OTFusion,
    inputs=tiny_mlp,
    hf=lambda: tiny_gpt2(use_cache=False, bos_token_id=0, eos_token_id=0),
    others=perturbed,
)
