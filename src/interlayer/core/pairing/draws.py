"""Building a model so that each parameter and buffer draws from a stream of its own."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import FrameType
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from interlayer.core.pairing.seeds import kept, seed_all, seed_of

M = TypeVar("M", bound=nn.Module)
Shape = tuple[int, ...]

# Operations that replace all numbers of their first argument without reading them.
REPLACING = frozenset(
    {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "cauchy_", "exponential_", "geometric_"}
    | {"log_normal_", "random_"}
)
# Operations that draw the same numbers from the same generator.
SAME = {"randn": "normal_", "randn_like": "normal_", "normal": "normal_", "rand": "uniform_", "rand_like": "uniform_"}
# Numbers that the first build draws for a large tensor. A prime, so that the rows of a matrix differ.
BLOCK = 4099


@dataclass(frozen=True)
class Plan:
    """Which draw of a build is named how, as a first build showed it; it holds for every seed."""

    names: list[list[str]]
    unpaired: frozenset[str]


@dataclass(frozen=True)
class Paired(Generic[M]):
    """A model, and where its random numbers come from.

    Attributes:
        model: What ``build`` returned.
        drawn: Shapes of the parameters and buffers with paired numbers, by name.
        unpaired: Shapes of those with random numbers that could not be paired, by name.
        noise: The seeds of all draws that reach a parameter or buffer of ``drawn``. Equal seeds mean equal noise.
        plan: Spares the first of the two builds when the same model is built with another seed.
    """

    model: M
    drawn: Mapping[str, Shape]
    unpaired: Mapping[str, Shape]
    noise: Mapping[str, frozenset[int]]
    plan: Plan


def paired(
    build: Callable[[], M], seed: int, *, materialise: Callable[[M], object] | None = None, plan: Plan | None = None
) -> Paired[M]:
    """Build a model whose random numbers depend on the seed and on the parameter's name, not on what else is built.

    Models of one seed get the same noise in every parameter and buffer of equal name and shape. What a model does to its
    noise (a scale, an orthogonalisation, a gate of zero) remains its own.

    The model is built twice. The first build records which draws end in which parameters or buffers; a draw is named after
    the first one that it ends in. In the second build each draw is seeded by a hash of (seed, name, distribution, size,
    occurrence). A draw that ends nowhere, such as a default initialisation that is drawn again later, shifts nothing.
    ``torch.manual_seed`` inside ``build`` has no effect. The global generators of torch are left as they were.

    A function may draw until its numbers fit, as ``nn.init.trunc_normal_`` does: further draws in the same call are named
    after the last one that the first build saw there. Numbers that cannot be paired are left alone, and what they reach is
    reported in ``unpaired``: draws from an explicit ``torch.Generator`` or on a device other than the CPU and CUDA; values
    that differ between the two builds, such as NumPy's; and draws that end elsewhere in the second build than in the first.
    A number that leaves torch (``item()``, ``numpy()``) cannot be followed further.

    Args:
        build: Builds the model. It runs twice, so it should have no side effects.
        seed: The seed that models are paired by.
        materialise: Called with the model after each build, without gradients. Lazy modules get their shapes here:
            ``materialise=lambda model: model(example)``.
        plan: The ``plan`` of an earlier call with the same ``build``. If the build no longer follows it, it is ignored.

    Raises:
        ValueError: A parameter of a lazy module has no shape yet.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> base = paired(lambda: nn.ModuleDict({"head": nn.Linear(4, 2)}), seed=0)
        >>> arm = paired(lambda: nn.ModuleDict({"new": nn.Linear(4, 4), "head": nn.Linear(4, 2)}), seed=0)
        >>> torch.equal(arm.model["head"].weight, base.model["head"].weight)
        True
        >>> arm.drawn["head.weight"], f"{shared(arm, base):.2f}"  # 10 of 30 numbers
        ((2, 4), '0.33')
    """

    def run(trace: _Trace) -> M:
        with trace:
            model = build()
            if materialise is not None:
                with torch.no_grad():
                    materialise(model)
        trace.frame = None
        return model

    with kept():
        before: dict[str, Tensor] = {}
        calls = plan.names if plan else []
        if plan is None:
            first = _Trace(seed, rough=True)
            model = run(first)
            tensors = _tensors(model)
            ends = first.ends(tensors)
            before = {name: tensor for name, tensor in tensors.items() if not ends[name]}
            calls = first.plan(_names(ends))
            del model, tensors
        second = _Trace(seed, calls)
        model = run(second)
    tensors = _tensors(model)
    ends = second.ends(tensors)
    names = _names(ends)
    odd = {n for n, draw in enumerate(second.draws) if draw.seed is None or draw.name != names.get(n, "")}
    drawn, unpaired, noise = {}, {}, {}
    for name, tensor in tensors.items():
        other = name in plan.unpaired if plan else not ends[name] and not _equal(tensor, before.get(name))
        if ends[name] & odd or other:
            unpaired[name] = tuple(tensor.shape)
        elif ends[name]:
            drawn[name] = tuple(tensor.shape)
            noise[name] = frozenset(s for n in ends[name] if (s := second.draws[n].seed) is not None)
    if plan is not None and (
        second.counts() != [len(names) for names in plan.names] or unpaired.keys() != plan.unpaired
    ):
        return paired(build, seed, materialise=materialise)  # another build than the one that was planned
    return Paired(model, drawn, unpaired, noise, Plan(calls, frozenset(unpaired)))


def shared(arm: Paired[Any], base: Paired[Any]) -> float:
    """The share of the arm's random numbers that have the noise of the base's parameter or buffer of the same name.

    Examples:
        >>> one = paired(lambda: nn.Linear(3, 2), seed=0)
        >>> shared(one, paired(lambda: nn.Linear(3, 2), seed=0)), shared(one, paired(lambda: nn.Linear(3, 2), seed=1))
        (1.0, 0.0)
    """
    same = sum(
        math.prod(shape)
        for name, shape in arm.drawn.items()
        if base.drawn.get(name) == shape and base.noise[name] == arm.noise[name]
    )
    total = sum(math.prod(shape) for shape in (*arm.drawn.values(), *arm.unpaired.values()))
    return same / total if total else 1.0


class _Draw(NamedTuple):
    """A draw: the call that it is part of, the name that it was seeded by, and the seed (None if it could not be)."""

    call: int
    name: str
    seed: int | None


class _Flow(NamedTuple):
    """How numbers flow through an operation."""

    kind: str
    draws: bool
    reads: bool
    writes: tuple[int | str, ...]
    replaces: tuple[int | str, ...]
    reads_others: bool


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
    if not draws and not writes and (not reads or all(r.alias_info is not None for r in schema.returns)):
        return None
    replaces = tuple(place for place in writes if isinstance(place, str) or (place == 0 and kind in REPLACING))
    others = any("Tensor" in str(a.type) for a in schema.arguments[1:])
    return _Flow(SAME.get(kind, kind), draws, reads, writes, replaces, others)


class _Trace(TorchDispatchMode):
    """Seeds every draw, and follows the numbers of each through later operations to the storages that they reach.

    Args:
        seed: The seed that models are paired by.
        plan: For each call that draws, the names of its draws.
        rough: Draw only ``BLOCK`` numbers for a large tensor and repeat them, where the numbers are of no use later.
    """

    def __init__(self, seed: int, plan: list[list[str]] | None = None, *, rough: bool = False) -> None:
        super().__init__()
        self.seed, self.known, self.rough = seed, plan or [], rough
        self.draws: list[_Draw] = []
        self.reached: dict[StorageWeakRef, frozenset[int]] = {}
        self.occurrences: Counter[tuple[str, str, int]] = Counter()
        self.frame: FrameType | None = None
        self.call, self.within = -1, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Without torch's wrapper that hides this class from its compiler, which would cost as much as the tracing."""
        return False

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
            self._follow(flow, frozenset(), args, kwargs, out)
            return out
        name = self._name()
        seed = self._seed(name, flow.kind, args, kwargs)
        out = func(*args, **kwargs) if not self.rough or seed is None else _rough(func, args, kwargs)
        drawn = out if isinstance(out, Tensor) else next(_strided((out,)))
        if drawn.device.type not in ("cpu", "cuda", "meta"):
            seed = None
        self._follow(flow, frozenset((len(self.draws),)), args, kwargs, out)
        self.draws.append(_Draw(self.call, name, seed))
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

    def _seed(self, name: str, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """Seed the next draw, unless it has a generator of its own."""
        if any(isinstance(a, torch.Generator) for a in (*args, *kwargs.values())):
            return None
        key = name, kind, _size(args)
        seed = seed_of(self.seed, *key, self.occurrences[key])
        self.occurrences[key] += 1
        seed_all(seed)
        return seed

    def _follow(
        self, flow: _Flow, own: frozenset[int], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        """What is written gets the draws of all that was read, and ``own``."""
        if (
            flow.writes == flow.replaces == (0,) and not flow.reads_others
        ):  # in place, the first argument alone: the usual draw
            if args[0].layout is torch.strided:
                self._reach(args[0], own, replaced=True)
            return
        replaced = [id(t) for t in _strided(_at(flow.replaces, args, kwargs))]
        if flow.reads:
            read = (t for t in _strided((*args, *kwargs.values())) if id(t) not in replaced)
            own = own.union(*(self.reached.get(StorageWeakRef(t.untyped_storage()), ()) for t in read))
        for tensor in _strided(_at(flow.writes, args, kwargs) if flow.writes else (out,)):
            self._reach(tensor, own, replaced=id(tensor) in replaced)

    def _reach(self, tensor: Tensor, own: frozenset[int], replaced: bool) -> None:
        """Note that the draws ``own`` reach a tensor, alone if they replace all that was in its storage."""
        storage = tensor.untyped_storage()
        ref = StorageWeakRef(storage)
        if replaced and tensor.numel() * tensor.element_size() == storage.nbytes():
            self.reached[ref] = own
        elif own:
            self.reached[ref] = self.reached.get(ref, frozenset()) | own

    def ends(self, tensors: Mapping[str, Tensor]) -> dict[str, frozenset[int]]:
        """The draws that reach each parameter and buffer."""
        return {
            name: self.reached.get(StorageWeakRef(tensor.untyped_storage()), frozenset())
            if tensor.layout is torch.strided
            else frozenset()
            for name, tensor in tensors.items()
        }

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


def _rough(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Draw into a large tensor by repeating a block. The first build's numbers are only looked at by rejection loops."""
    if func._schema.name not in ("aten::normal_", "aten::uniform_") or args[0].numel() < 2 * BLOCK:
        return func(*args, **kwargs)
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


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, then buffers, by name; a tied one once.

    Raises:
        ValueError: One has no shape yet.
    """
    found: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():  # one walk: `named_parameters` and `named_buffers` take one each
        for into, held in ((found, module._parameters), (buffers, module._buffers)):
            for key, tensor in held.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    into[f"{path}.{key}" if path else key] = tensor
    found |= buffers
    if lazy := [name for name, tensor in found.items() if is_lazy(tensor)]:
        raise ValueError(
            f"paired: {lazy[0]!r} belongs to a lazy module and has no shape yet; expected a shape after the build. "
            "Pass materialise=lambda model: model(example)."
        )
    return found


def _names(ends: Mapping[str, frozenset[int]]) -> dict[int, str]:
    """The first parameter or buffer that each draw reaches."""
    return {number: name for name in reversed(list(ends)) for number in ends[name]}


def _equal(one: Tensor, two: Tensor | None) -> bool:
    """Whether two builds gave the same bytes."""
    if two is None or one.shape != two.shape or one.dtype != two.dtype or one.layout != two.layout:
        return False
    if one.is_meta or one.layout is not torch.strided:
        return True
    first, second = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (one, two))
    return torch.equal(first, second)
