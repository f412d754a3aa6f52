"""Where scales of features can go before a linear map reads them: gains and shifts that a map computes, and values of attention."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.quantizer.layers import weight_of
from interlayer.core.quantizer.smooth import CLOSE, one


class Source(NamedTuple):
    """A linear map whose outputs give features as factors.

    Attributes:
        name: The map.
        rows: (first output, what is added to it) of each run of outputs that is divided; a gain ``1 + g`` adds 1.
    """

    name: str
    rows: tuple[tuple[int, float], ...]


def sources(model: nn.Module, groups: Mapping[str, Sequence[str]], batch: Any) -> dict[str, Source]:
    """Maps that can give features divided by scales, so that what reads them can be multiplied and the function stays.

    Known are the gains and shifts of adaptive norms in diffusers' Transformer blocks (adaLN-Zero), and the values of its attention.
    They are tried out on one example, together; where outputs move, one by one, and those that move them are left out.

    Args:
        model: Any module. It is not changed.
        groups: Linear maps that read one tensor, by a name for it.
        batch: A batch of which the first example is run.

    Returns:
        By group; those without a source are missing.
    """
    found = {key: source for key, names in groups.items() if (source := _source(model, names)) is not None}
    if not found:
        return {}
    work, example = copy.deepcopy(model), one(batch)
    with taps.at_rest(work), torch.no_grad():

        def run() -> Tensor:
            return taps.first(next(taps.feed(work, [example]))).clone()

        before = run()

        def fits(keys: Iterable[str]) -> bool:
            """Whether the outputs stay, with these sources divided and what reads them multiplied; all is as before afterwards."""
            names = {n for key in keys for n in (found[key].name, *groups[key])}
            old = {n: copy.deepcopy(work.get_submodule(n).state_dict()) for n in names}
            for key in keys:
                scale = 1 + torch.rand(weight_of(work.get_submodule(groups[key][0])).shape[1]).to(before)
                divide(work, found[key], scale)
                for n in groups[key]:
                    weight_of(work.get_submodule(n)).mul_(scale)
            stays = float((run() - before).abs().max()) <= CLOSE * float(before.abs().max())
            for n, state in old.items():
                work.get_submodule(n).load_state_dict(state)
            return stays

        return found if fits(list(found)) else {key: source for key, source in found.items() if fits([key])}


def _source(model: nn.Module, names: Sequence[str]) -> Source | None:
    """The source that the names of what reads it tell of."""
    block, _, last = names[0].partition(".attn1.") if ".attn1." in names[0] else names[0].partition(".ff.")
    there, width = dict(model.named_modules()), weight_of(model.get_submodule(names[0])).shape[1]
    linear = there.get(f"{block}.norm1.linear")
    adaptive = isinstance(linear, nn.Linear) and linear.bias is not None and linear.out_features == 6 * width
    if adaptive and {n.partition(f"{block}.attn1.")[2] for n in names} <= {"to_q", "to_k", "to_v"}:
        return Source(f"{block}.norm1.linear", ((0, 0.0), (width, 1.0)))
    if adaptive and names == [f"{block}.ff.net.0.proj"]:
        return Source(f"{block}.norm1.linear", ((3 * width, 0.0), (4 * width, 1.0)))
    value = there.get(f"{block}.attn1.to_v")
    if last == "to_out.0" and len(names) == 1 and isinstance(value, nn.Linear) and value.out_features == width:
        return Source(f"{block}.attn1.to_v", ((0, 0.0),))
    return None


@torch.no_grad()
def divide(model: nn.Module, source: Source, scale: Tensor) -> None:
    """Divide the features that a source gives by scales, in place: ``(w / s) x + (b + 1) / s - 1`` for a gain.

    Examples:
        >>> net = nn.ModuleDict({"gain": nn.Linear(2, 3)})
        >>> x, s = torch.ones(1, 2), torch.tensor([2.0, 3.0, 4.0])
        >>> before = 1 + net["gain"](x)
        >>> divide(net, Source("gain", ((0, 1.0),)), s)
        >>> torch.allclose(1 + net["gain"](x), before / s)
        True
    """
    linear: Any = model.get_submodule(source.name)
    for first, added in source.rows:
        rows = slice(first, first + len(scale))
        linear.weight[rows] /= scale.to(linear.weight)[:, None]
        if linear.bias is not None:
            linear.bias[rows] = (linear.bias[rows] + added) / scale.to(linear.bias) - added
