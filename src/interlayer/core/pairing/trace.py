"""Following random numbers through the operations of a build to the storages that they reach."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from interlayer.core.pairing.seeds import seed_all, seed_of

# Operations that replace all numbers of their first argument without reading them.
REPLACING = frozenset(
    {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "cauchy_", "exponential_", "geometric_"}
    | {"log_normal_", "random_"}
)
# Operations that draw the same numbers from the same generator.
SAME = {"randn": "normal_", "randn_like": "normal_", "normal": "normal_", "rand": "uniform_", "rand_like": "uniform_"}
# Numbers that the first build draws for a large tensor. A prime, so that the rows of a matrix differ.
BLOCK = 4099


class _Draw(NamedTuple):
    """A draw: the call that it is part of, its seed (None if it could not be seeded), and what the seed was made of."""

    call: int
    seed: int | None
    name: str
    kind: str
    size: int


class _Fill(NamedTuple):
    """An operation that filled a whole storage in place, without its first argument."""

    operation: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype
    size: int


class _Held(NamedTuple):
    """What a storage holds: the numbers of these draws; what filled it, if nothing else did since; whether a table is in it.

    A table is computed from ``arange`` alone, as rotary positions are, so it is the same in every build.
    """

    draws: frozenset[int]
    fill: _Fill | None
    table: bool
    storage: StorageWeakRef  # as long as it is here, no other storage gets the same address


_NONE: frozenset[int] = frozenset()


class _Flow(NamedTuple):
    """How numbers flow through an operation."""

    kind: str
    draws: bool
    reads: bool
    writes: tuple[int | str, ...]
    replaces: tuple[int | str, ...]
    alone: bool  # it fills its first argument in place, from no other tensor


@cache
def _flow(operation: torch._ops.OpOverload) -> _Flow | None:
    """Read the flow off an operation's schema; None if it draws nothing and leaves no number where there was none."""
    schema = operation._schema
    kind = schema.name.partition("::")[2]
    draws = torch.Tag.nondeterministic_seeded in operation.tags
    reads = any("Tensor" in str(a.type) for a in schema.arguments) and not kind.startswith("new_")
    reads = reads and not kind.endswith("_like")  # these read a shape, not numbers
    written = [(a.name if a.kwarg_only else i, a) for i, a in enumerate(schema.arguments)]
    writes = tuple(place for place, a in written if a.alias_info is not None and a.alias_info.is_write)
    if kind != "arange" and not draws and not writes and (not reads or all(r.alias_info for r in schema.returns)):
        return None
    replaces = tuple(place for place in writes if isinstance(place, str) or (place == 0 and kind in REPLACING))
    others = any("Tensor" in str(a.type) for a in schema.arguments[1:])
    return _Flow(SAME.get(kind, kind), draws, reads, writes, replaces, writes == replaces == (0,) and not others)


class Trace(TorchDispatchMode):
    """Seeds every draw, and follows the numbers of each through later operations to the storages that they reach.

    Args:
        seed: The seed that models are paired by.
        plan: For each call that draws, the names of its draws.
        unread: No operation reads a drawn number, so a draw without a name is left out where it is in place.
        rough: Draw only ``BLOCK`` numbers for a large tensor and repeat them, where the numbers are of no use later.
    """

    def __init__(
        self, seed: int, plan: list[list[str]] | None = None, *, unread: bool = False, rough: bool = False
    ) -> None:
        super().__init__()
        self.seed, self.known, self.unread, self.rough = seed, plan or [], unread, rough
        self.draws: list[_Draw] = []
        self.held: dict[int, _Held] = {}
        self.read = False
        self.occurrences: Counter[tuple[str, str, int]] = Counter()
        self.frame: FrameType | None = None
        self.call, self.within = -1, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Without torch's wrapper that hides this class from its compiler, which would cost as much as the tracing."""
        return False

    def __exit__(self, *error: Any) -> None:
        """Let go of the last frame, which holds the locals of whatever drew last."""
        self.frame = None
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        flow = _flow(func)
        if flow is None:
            return func(*args, **kwargs)
        if not flow.draws:
            out = func(*args, **kwargs)
            self._follow(func, flow, _NONE, args, kwargs, out)
            return out
        name, size = self._name(), _size(args)
        seed: int | None = self.seed
        if kwargs.get("generator") is not None or torch.Generator in map(type, args):
            seed, out = None, func(*args, **kwargs)
        elif self.unread and not name and flow.alone:
            out = args[0]
        elif not self.rough:
            seed = self._seed(name, flow.kind, size)
            out = func(*args, **kwargs)
        elif size >= 2 * BLOCK and flow.kind in ("normal_", "uniform_") and flow.alone:
            out = _rough(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        drawn = out if isinstance(out, Tensor) else next(_strided((out,)))
        if not (drawn.is_cpu or drawn.is_cuda or drawn.is_meta):
            seed = None
        self._follow(func, flow, frozenset((len(self.draws),)), args, kwargs, out)
        self.draws.append(_Draw(self.call, seed, name, flow.kind, size))
        return out

    def _name(self) -> str:
        """The planned name of the next draw, by the call that it is part of and its number within the call.

        A call is one run of one Python function, not counting private functions of torch. Its frame is kept while it is the
        latest, so that no later call can have the same one.
        """
        frame = sys._getframe(2)
        while frame.f_back is not None and (
            frame.f_code.co_name == "__torch_function__"
            or frame.f_globals.get("__name__", "").startswith(("torch._", "torch.utils._", "torch.overrides"))
        ):
            frame = frame.f_back
        if frame is self.frame:
            self.within += 1
        else:
            self.frame, self.call, self.within = frame, self.call + 1, 0
        names = self.known[self.call] if self.call < len(self.known) else [""]
        return names[min(self.within, len(names) - 1)]

    def _seed(self, *key: *tuple[str, str, int]) -> int:
        """Seed the next draw by its name, kind and size."""
        seed = seed_of(self.seed, *key, self.occurrences[key])
        self.occurrences[key] += 1
        seed_all(seed)
        return seed

    def _follow(
        self,
        func: torch._ops.OpOverload,
        flow: _Flow,
        own: frozenset[int],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
    ) -> None:
        """What is written gets the draws of all that was read, and ``own``."""
        if flow.alone:  # the usual draw
            if args[0].layout is torch.strided:
                self._reach(
                    args[0], own, replaced=True, fill=_Fill(func, args[1:], kwargs, args[0].dtype, args[0].numel())
                )
            return
        replaced = [id(t) for t in _strided(_at(flow.replaces, args, kwargs))]
        table = flow.kind == "arange"
        if flow.reads:
            strided = [t for t in _strided((*args, *kwargs.values())) if id(t) not in replaced]
            read = [self.held.get(t.untyped_storage()._cdata) for t in strided]
            found = _NONE.union(*(held.draws for held in read if held))
            self.read = self.read or bool(found)
            own |= found
            table = not flow.writes and bool(read) and all(held and held.table for held in read)
        for tensor in _strided(_at(flow.writes, args, kwargs) if flow.writes else (out,)):
            self._reach(tensor, own, replaced=id(tensor) in replaced, table=table)

    def _reach(
        self, tensor: Tensor, own: frozenset[int], replaced: bool, fill: _Fill | None = None, table: bool = False
    ) -> None:
        """Note that the draws ``own`` reach a tensor, alone if they replace all that was in its storage."""
        storage = tensor.untyped_storage()
        held = self.held.get(storage._cdata)
        if not (replaced and tensor.numel() * tensor.element_size() == storage.nbytes()):
            own, fill = own if held is None else own | held.draws, None
        elif not tensor.is_contiguous():
            fill = None
        ref = StorageWeakRef(storage) if held is None else held.storage
        self.held[storage._cdata] = _Held(own, fill, table, ref)

    def repeat(self, tensors: Mapping[str, Tensor]) -> bool:
        """Repeat the draws that end in ``tensors``, seeded by their names, if nothing else can depend on them.

        That is so when no operation read a drawn number, all of them are in ``tensors``, and these hold nothing but them,
        zeros, ones and tables. Otherwise nothing is done and the answer is False.
        """
        if self.read or any(draw.seed is None for draw in self.draws):
            return False
        fills: dict[int, tuple[_Fill, str]] = {}
        kept = set()
        for name, tensor in tensors.items():
            if tensor.layout is not torch.strided:
                return False
            address = tensor.untyped_storage()._cdata
            held = self.held.get(address)
            if held is not None and held.table:
                continue
            if held is None or held.fill is None or not (held.draws or _constant(held.fill)):
                return False
            if tensor.dtype != held.fill.dtype or tensor.numel() != held.fill.size or not tensor.is_contiguous():
                return False
            kept.add(address)
            for number in held.draws:
                fills.setdefault(number, (held.fill, name))
        if any(h.draws and address not in kept and not h.storage.expired() for address, h in self.held.items()):
            return False
        self.occurrences.clear()
        with torch.no_grad():
            for number, (fill, name) in sorted(fills.items()):
                draw = self.draws[number]
                seed = self._seed(name, draw.kind, draw.size)
                fill.operation(tensors[name], *fill.args, **fill.kwargs)
                self.draws[number] = draw._replace(name=name, seed=seed)
        return True

    def ends(self, tensors: Mapping[str, Tensor]) -> dict[str, frozenset[int]]:
        """The draws that reach each parameter and buffer."""
        held = {n: self.held.get(t.untyped_storage()._cdata) for n, t in tensors.items() if t.layout is torch.strided}
        return {name: h.draws if (h := held.get(name)) else _NONE for name in tensors}

    def counts(self) -> list[int]:
        """How many draws each call made."""
        found = Counter(draw.call for draw in self.draws)
        return [found[call] for call in range(self.call + 1)]

    def plan(self, names: Mapping[int, str]) -> list[list[str]]:
        """The names of the draws, by call."""
        calls: list[list[str]] = [[] for _ in range(self.call + 1)]
        for number, draw in enumerate(self.draws):
            calls[draw.call].append(names.get(number, ""))
        return calls


def _constant(fill: _Fill) -> bool:
    """Whether a fill cannot depend on another source of random numbers."""
    kind = fill.operation._schema.name
    return kind == "aten::zero_" or (kind == "aten::fill_" and fill.args[0] in (0, 1))


def _rough(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Draw into a large tensor by repeating a block. The first build's numbers are only looked at by rejection loops."""
    tensor, rest = args[0], args[1:]
    if not tensor.is_contiguous():
        return func(*args, **kwargs)
    flat, block = tensor.detach().view(-1), func(tensor.new_empty(BLOCK), *rest, **kwargs)
    end = len(flat) // BLOCK * BLOCK
    flat[:end].view(-1, BLOCK).copy_(block)
    flat[end:].copy_(block[: len(flat) - end])
    return tensor


def _size(args: tuple[Any, ...]) -> int:
    """How many numbers are drawn: the size of the first argument, which is a tensor, a shape or a number."""
    first = args[0] if args else 0
    if isinstance(first, Tensor):
        return first.numel()
    return math.prod(first) if isinstance(first, list | tuple) else int(first)


def _at(places: tuple[int | str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments by position or name."""
    return [args[place] if isinstance(place, int) else kwargs.get(place) for place in places]


def _strided(values: Any) -> Iterator[Tensor]:
    """The tensors in nested lists and tuples that have a storage (sparse ones don't)."""
    for value in values:
        if isinstance(value, Tensor):
            if value.layout is torch.strided:
                yield value
        elif isinstance(value, list | tuple):
            yield from _strided(value)
