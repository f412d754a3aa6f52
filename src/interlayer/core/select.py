"""Say which modules of any model are meant: by type, name, predicate, and by union, intersection and difference."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import nn

from interlayer.core import recipe
from interlayer.core.kinds import Plan, Row
from interlayer.core.recipe import REPLACE
from interlayer.core.slots import Swap

At: TypeAlias = "Where | str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool] | list[Any]"


@dataclass(frozen=True)
class Where:
    """A condition on (name, module). ``why(name, module)`` is empty where it holds and else the reason why not."""

    why: Callable[[str, nn.Module], str]
    says: str

    def __or__(self, other: At) -> Where:
        b = where(other)
        return Where(
            lambda n, m: self.why(n, m) and b.why(n, m) and f"neither {self.says} nor {b.says}",
            f"({self.says} or {b.says})",
        )

    def __and__(self, other: At) -> Where:
        b = where(other)
        return Where(lambda n, m: self.why(n, m) or b.why(n, m), f"({self.says} and {b.says})")

    def __sub__(self, other: At) -> Where:
        b = where(other)
        return Where(
            lambda n, m: self.why(n, m) or ("" if b.why(n, m) else f"left out: {b.says}"),
            f"({self.says} but not {b.says})",
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
        return Where(lambda n, m: "" if pattern.fullmatch(n) else f"not {says}", says)
    if isinstance(at, re.Pattern):
        told = f"matching /{at.pattern}/"
        return Where(lambda n, m: "" if at.search(n) else f"not {told}", told)
    if isinstance(at, type):
        return Where(
            lambda n, m: "" if isinstance(m, at) else f"{type(m).__name__}, not {at.__name__}", f"a {at.__name__}"
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
    """What is meant (``chosen``, by name) and what is not (``skipped``, with the reason)."""

    chosen: dict[str, nn.Module]
    skipped: list[Row] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        return iter(self.chosen.items())

    def __len__(self) -> int:
        return len(self.chosen)


def select(model: nn.Module, at: At) -> Selection:
    """The modules of ``model`` that ``at`` means. A module that occurs twice is chosen once; the model itself never is.

    ``skipped`` lists the other modules that hold weights of their own, each with the reason.

    Raises:
        ValueError: Nothing is meant.
    """
    condition, found = where(at), Selection({})
    for name, module in model.named_modules():
        why = condition.why(name, module) if name else "the whole model"
        if not why:
            found.chosen[name] = module
        elif name and next(module.parameters(recurse=False), None) is not None:
            found.skipped.append(Row(name, type(module).__name__, why))
    if not found.chosen:
        names = [n for n, _ in model.named_modules() if n]
        near = difflib.get_close_matches(at, names, n=3, cutoff=0.4) if isinstance(at, str) else names[:6]
        raise ValueError(
            f"select: nothing in {type(model).__name__} is {condition.says}. "
            f"Names there: {', '.join(near or names[:6])}."
        )
    return found


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList | nn.Sequential]:
    """The repeated blocks of a model and their name: the list of same-class modules that holds the most weights.

    Of two lists with equally many weights the longer one is meant. Weights count first because a list of a model's
    norms, or of a block's experts, is often longer than that of its blocks.

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
    """Set the module of that dotted name, in place."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def replace(model: nn.Module, *, at: At, with_: str | Callable[[nn.Module], nn.Module]) -> Plan:
    """Plan to put other modules in place of some of a model's.

    Args:
        model: Any module; it is left as it is.
        at: Which modules, as ``where`` reads it.
        with_: The name of a norm or activation (see ``slots.Swap``), or a function that gets the old module (of the copy)
            and returns the new one. A module that occurs at several places is replaced at all of them by one new module.
            What was replaced by name is in the recipe: ``save`` and ``load`` rebuild it.

    Raises:
        ValueError: Nothing is meant, or nothing that is meant can be exchanged; no such name.
        TypeError: ``with_`` returns something that is no module (when the plan is applied).

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
    found = select(model, at)
    swap = Swap(with_) if isinstance(with_, str) else None
    refused = {n: why for n, m in found if swap and (why := swap.refuses(m))}
    meant = [n for n in found.chosen if n not in refused]
    if not meant:
        told = "; ".join(f"{n}: {why}" for n, why in list(refused.items())[:3])
        raise ValueError(f"replace: nothing that is meant can become {with_!r} ({told}).")
    inner = {n: o for n in meant for o in meant if n.startswith(f"{o}.")}
    skipped = [
        *found.skipped,
        *(Row(n, type(found.chosen[n]).__name__, why) for n, why in refused.items()),
        *(Row(n, type(found.chosen[n]).__name__, f"within {o}, which is replaced") for n, o in inner.items()),
    ]
    chosen = [n for n in meant if n not in inner]
    owners: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), name)
    touched = []
    for name in chosen:
        ties = [
            owners[id(p)]
            for p in model.get_submodule(name).parameters()
            if not f"{owners[id(p)]}.".startswith(f"{name}.")
        ]
        touched.append(Row(name, type(found.chosen[name]).__name__, f"its tie with {ties[0]} ends" if ties else ""))

    def build() -> nn.Module:
        new = copy.deepcopy(model)
        if swap:
            recipe.record(new, REPLACE, {"with_": swap.spec}, {"with": swap.spec, "places": chosen})
        exchange(new, chosen, swap or with_)  # type: ignore[arg-type]
        if not swap:
            recipe.rebase(new)
        return new

    return Plan(REPLACE, {"with_": swap.spec} if swap else {}, touched, skipped, build)


def exchange(model: nn.Module, names: list[str], make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Put ``make(old)`` in place of each named module, wherever it occurs, in place; ``model`` is returned."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    near = next(model.parameters(), None)
    for name in names:
        old = model.get_submodule(name)
        new = make(old)
        if not isinstance(new, nn.Module):
            raise TypeError(f"replace: with_ returned {type(new).__name__} for {name!r}; wanted a torch.nn.Module.")
        if isinstance(make, Swap) and (like := next(old.parameters(), near)) is not None:
            new = new.to(like.device, like.dtype if like.is_floating_point() else None).train(old.training)
        for place in places[id(old)]:
            put(model, place, new)
    return model
