"""Select modules of any model by type, name or predicate, combine selections, and replace what they select."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import nn

from interlayer.core.delivery import guard
from interlayer.core.kinds import Plan, Row
from interlayer.core.record import REPLACE, rebase, record
from interlayer.core.swap import Swap, bypassed, out_of_reach, unfuse

At: TypeAlias = "Where | str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool] | list[Any]"


@dataclass(frozen=True)
class Where:
    """A condition on (name, module).

    Attributes:
        why: Empty where the condition holds, else the reason why not.
        says: The condition in words.
        names: Whether the condition names a module or its class, as opposed to sweeping over many.
    """

    why: Callable[[str, nn.Module], str]
    says: str
    names: Callable[[str, nn.Module], bool] = lambda n, m: True

    def __or__(self, other: At) -> Where:
        a, b = self, where(other)
        return Where(
            lambda n, m: a.why(n, m) and b.why(n, m) and f"neither {a.says} nor {b.says}",
            f"({a.says} or {b.says})",
            lambda n, m: any(not c.why(n, m) and c.names(n, m) for c in (a, b)),
        )

    def __and__(self, other: At) -> Where:
        a, b = self, where(other)
        return Where(
            lambda n, m: a.why(n, m) or b.why(n, m),
            f"({a.says} and {b.says})",
            lambda n, m: a.names(n, m) or b.names(n, m),
        )

    def __sub__(self, other: At) -> Where:
        a, b = self, where(other)
        return Where(
            lambda n, m: a.why(n, m) or ("" if b.why(n, m) else f"left out: {b.says}"),
            f"({a.says} but not {b.says})",
            a.names,
        )


def where(at: At) -> Where:
    """Read a selector.

    Args:
        at: A glob over the dotted name (``"blocks.*.mlp"``: ``*`` stays within one part of the name, ``**`` does not),
            a compiled regular expression (searched in the name), a module class, a predicate
            ``(name, module) -> bool``, a ``Where`` (these combine by ``|``, ``&`` and ``-``),
            or a list of any of these, meaning their union.

    Raises:
        TypeError: It is none of these.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> list(select(net, where(nn.Linear) - "2").chosen)
        ['0']
    """
    if isinstance(at, Where):
        return at
    if isinstance(at, str):
        says, pattern = f"named {at!r}", re.compile(_regex(at))
        names = "*" not in at.rpartition(".")[2]
        return Where(lambda n, m: "" if pattern.fullmatch(n) else f"not {says}", says, lambda n, m: names)
    if isinstance(at, re.Pattern):
        says = f"matching /{at.pattern}/"
        return Where(lambda n, m: "" if at.search(n) else f"not {says}", says)
    if isinstance(at, type):
        return Where(
            lambda n, m: "" if isinstance(m, at) else f"{type(m).__name__}, not {at.__name__}",
            f"a {at.__name__}",
            lambda n, m: at is not nn.Module,
        )
    if isinstance(at, list) and at:
        union = where(at[0])
        for more in at[1:]:
            union = union | more
        return union
    if callable(at):
        named = getattr(at, "__name__", "predicate")
        return Where(lambda n, m: "" if at(n, m) else f"not {named}", named)
    raise TypeError(
        f"select: `at` was {at!r}. Wanted a glob over module names, a compiled regular expression, a module class, "
        "a predicate (name, module) -> bool, a Where, or a list of these."
    )


def _regex(glob: str) -> str:
    parts = {"**.": r"(?:.*\.)?", ".**": r"(?:\..*)?", "**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    return re.sub(r"\*\*\.|\.\*\*$|\*\*|\*|\?|[^*?]", lambda m: parts.get(m[0]) or re.escape(m[0]), glob)


@dataclass
class Selection:
    """The selected modules by name (``chosen``), and the others with the reason (``skipped``)."""

    chosen: dict[str, nn.Module]
    skipped: list[Row] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        return iter(self.chosen.items())

    def __len__(self) -> int:
        return len(self.chosen)


def select(model: nn.Module, at: At) -> Selection:
    """The modules of ``model`` that ``at`` selects; the model itself never counts.

    A module that occurs at several places counts once, under the first of its names that ``at`` selects. ``skipped``
    lists the other modules that hold weights of their own, each with the reason.

    Raises:
        ValueError: ``at`` selects nothing.
    """
    condition, found = where(at), Selection({})
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    del names[model]
    for module, places in names.items():
        whys = {name: condition.why(name, module) for name in places}
        if meant := [name for name, why in whys.items() if not why]:
            found.chosen[meant[0]] = module
        elif next(module.parameters(recurse=False), None) is not None:
            found.skipped.append(Row(places[0], type(module).__name__, whys[places[0]]))
    if not found.chosen:
        there = [name for places in names.values() for name in places]
        near = difflib.get_close_matches(at, there, n=3, cutoff=0.4) if isinstance(at, str) else there[:6]
        raise ValueError(
            f"select: nothing in {type(model).__name__} is {condition.says}. "
            f"Names there: {', '.join(near or there[:6])}."
        )
    return found


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList | nn.Sequential]:
    """The repeated blocks of a model and their name: the list of same-class modules that holds the most weights.

    Of two lists with equally many weights, the longer one wins. Weights count first because a list of a model's norms, or
    of a block's experts, is often longer than that of its blocks.

    Raises:
        ValueError: No ``ModuleList`` or ``Sequential`` holds two or more modules of one class.

    Examples:
        >>> blocks(nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))))[0]
        '1'
    """
    best: tuple[tuple[int, int], str, nn.ModuleList | nn.Sequential] | None = None
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList | nn.Sequential)
            and len(module) > 1
            and len({type(m) for m in module}) == 1
        ):
            size = (sum(p.numel() for p in module.parameters()), len(module))
            if size[0] and (best is None or size > best[0]):
                best = size, name, module
    if best is None:
        raise ValueError(
            f"select.blocks: {type(model).__name__} has no ModuleList or Sequential of two or more modules of "
            "one class, so it is not known which its blocks are."
        )
    return best[1], best[2]


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set the module with this dotted name, in place."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def replace(model: nn.Module, *, at: At, with_: str | Callable[[nn.Module], nn.Module]) -> Plan:
    """Plan to replace some of a model's modules.

    Given the name of an activation, ``replace`` changes the activations among the modules that ``at`` selects, and
    likewise for norms and linear maps. It knows those of torch, transformers, diffusers and the catalogue. It replaces a
    class that it does not know, and functions such as ``Sigmoid`` that are gates more often than activations, only where
    ``at`` names the module or the class: ``"**.act"`` does, ``"**"`` does not.

    Args:
        model: Any module. It is not changed.
        at: Which modules, as ``where`` reads it.
        with_: The name of a norm, activation or linear map (see ``swap.Swap``), or a function that gets the old module (of
            the copy) and returns the new one. A module that occurs at several places is replaced at all of them by one new
            module. What was replaced by name is in the recipe: ``save`` and ``load`` rebuild it.

    Returns:
        The plan. Its ``skipped`` rows name what stays and why, among it what is a function call (``F.gelu(x)``) or part of a
        kernel and so cannot be replaced.

    Raises:
        ValueError: ``at`` selects nothing that can be replaced, or there is no such name.
        TypeError: ``with_`` returns something that is not a module (when the plan is applied).

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.LayerNorm(2))
        >>> print(replace(net, at="*", with_="gelu"))
        replace {'with_': 'gelu'}
          + 1  ReLU
          - 0  Linear  (Linear is no activation)
          - 2  LayerNorm  (LayerNorm is no activation)
        >>> replace(net, at=nn.ReLU, with_=lambda old: nn.Tanh()).apply()[1]
        Tanh()
    """
    condition, found = where(at), select(model, at)
    swap = Swap(with_) if isinstance(with_, str) else None
    refused = {n: why for n, why in bypassed(model).items() if n in found.chosen}
    if swap:
        whys = {n: swap.refuses(m, condition.names(n, m)) for n, m in found if n not in refused}
        refused |= {n: why for n, why in whys.items() if why}
    hidden = out_of_reach(model, swap.slot) if swap else ()
    calls = [Row(n or type(m).__name__, type(m).__name__, why) for n, m, why in hidden]
    meant = [n for n in found.chosen if n not in refused]
    if not meant:
        reasons = sorted(
            [*refused.items(), *((r.name, r.why) for r in calls)], key=lambda r: (" is no " in r[1], "Norm" not in r[1])
        )
        shown = "; ".join(f"{n}: {why}" for n, why in reasons[:3])
        raise ValueError(f"replace: nothing that `at` selects can become {with_!r} ({shown}).")
    worth = {
        n for n, m in found if condition.names(n, m) or next(m.children(), None) is None
    }  # containers go without saying
    owner = {m: o for o in meant for m in found.chosen[o].modules() if m is not found.chosen[o]}
    inner = {n: owner[found.chosen[n]] for n in meant if found.chosen[n] in owner}
    skipped = [
        *found.skipped,
        *(Row(n, type(found.chosen[n]).__name__, why) for n, why in refused.items() if n in worth),
        *(Row(n, type(found.chosen[n]).__name__, f"within {o}, which is replaced") for n, o in inner.items()),
        *calls,
    ]
    chosen = [n for n in meant if n not in inner]
    tied = ties(model, chosen)
    touched = [Row(n, type(found.chosen[n]).__name__, f"its tie with {t} ends" if t else "") for n, t in tied.items()]

    def build() -> nn.Module:
        new = copy.deepcopy(model)
        if swap:
            record(new, REPLACE, {"with_": swap.spec}, {"with": swap.spec, "places": chosen})
        exchange(new, chosen, swap or with_)  # type: ignore[arg-type]
        if not swap:
            rebase(new)
        return new

    return Plan(REPLACE, {"with_": swap.spec} if swap else {}, touched, skipped, build)


def ties(model: nn.Module, names: list[str]) -> dict[str, str]:
    """By module, a parameter outside of it that is one of its own; empty if there is none."""
    owners: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), name)
    within = {n: [owners[id(p)] for p in model.get_submodule(n).parameters()] for n in names}
    return {n: next((o for o in own if not o.startswith(f"{n}.")), "") for n, own in within.items()}


def exchange(model: nn.Module, names: list[str], make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Replace each named module by ``make(old)``, wherever it occurs, in place. Returns ``model``."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    near, changed = next(model.parameters(), None), set()
    for name in names:
        old = model.get_submodule(name)
        new = make(old)
        if not isinstance(new, nn.Module):
            raise TypeError(f"replace: with_ returned {type(new).__name__} for {name!r}; expected a torch.nn.Module.")
        if isinstance(make, Swap) and (like := next(old.parameters(), near)) is not None:
            new = new.to(like.device, like.dtype if like.is_floating_point() else None).train(old.training)
        for place in places[id(old)]:
            put(model, place, new)
        changed.add(id(new))
    unfuse(model, changed)
    return guard(model, "replaced modules")
