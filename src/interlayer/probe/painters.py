"""Layers as painters: the blocks of a frozen model skipped, repeated, reordered or run side by side."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interlayer import catalog
from interlayer.core import delivery, recipe, taps
from interlayer.core import order as orders
from interlayer.core.example import Example
from interlayer.core.extras import need
from interlayer.core.kinds import Finding, Plan, Row, Transform
from interlayer.core.select import blocks, put
from interlayer.core.stream import State

Variant = Literal["skip", "middle-repeat", "reverse", "random-order", "parallel", "looped-parallel"]
VARIANTS = get_args(Variant)
Order = list[int | list[int]]


def execution(variant: str, count: int, start: int, end: int, *, loops: int = 1, seed: int = 0) -> Order:
    """In which order ``count`` blocks run: numbers, and lists of blocks that share one input and are averaged.

    >>> execution("looped-parallel", 6, 1, 4, loops=2)
    [0, [1, 2, 3], [1, 2, 3], 4, 5]
    """
    middle = list(range(start, end))
    changed: dict[str, Order] = {
        "skip": [],
        "middle-repeat": [(start + end) // 2] * len(middle),
        "reverse": [*reversed(middle)],
        "random-order": [*_mixed(middle, seed)] if variant == "random-order" else [],
        "parallel": [middle],
        "looped-parallel": [middle] * loops,
    }
    return [*range(start), *changed[variant], *range(end, count)]


def _mixed(middle: list[int], seed: int) -> list[int]:
    chance = torch.Generator().manual_seed(seed)
    mixed = middle
    while mixed == middle and len(middle) > 1:  # the trained order is none of the random ones
        mixed = [middle[i] for i in torch.randperm(len(middle), generator=chance).tolist()]
    return mixed


def cost(order: Order) -> dict[str, int]:
    """Blocks one after another (``depth``: the latency where parallel blocks cost no time) and in all (``work``)."""
    return {"depth": len(order), "work": sum(len(o) if isinstance(o, list) else 1 for o in order)}


class Parallel(nn.Module):
    """Blocks that all get one input; their outputs are averaged. What else they return is the last one's."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As a single block is called."""
        outputs = [block(*args, **kwargs) for block in self.members]
        return taps.swap(outputs[-1], torch.stack([taps.first(o) for o in outputs]).mean(0))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # such as ``attention_type``, which some models ask of a block
            return getattr(next(iter(self.members)), name)


class Route(orders.Sequential):
    """The slot ``order`` of interlayer's own backbones, filled with an ``execution``."""

    def __init__(self, count: int, order: Order) -> None:
        super().__init__(count)
        self.order = order
        run = _flat(order)
        self.caches = len(set(run)) == len(run)  # keys and values are kept by block, so a repeated one has no place

    def forward(self, state: State, step: orders.Step) -> State:
        for item in self.order:
            ends = []
            for block in item if isinstance(item, list) else [item]:
                if not state.kept:
                    ends.append(step(copy.copy(state), block))
                if state.kept:  # copies share it
                    raise ValueError(
                        "painters: this model's stream keeps earlier outputs for later blocks, which ties them to their "
                        "order. Take a stream without memory, such as 'pre-norm'."
                    )
            state = ends[-1]
            state.x = torch.stack([end.x for end in ends]).mean(0) if len(ends) > 1 else state.x
        return state


def _flat(order: Order) -> list[int]:
    return [block for item in order for block in (item if isinstance(item, list) else [item])]


class Painters(Transform):
    """Run the middle layers of a frozen Transformer in another way than they were trained, to see what each is to it.

    Sun et al., Transformer Layers as Painters, AAAI 2025, arXiv:2407.09298. Of T blocks, those from ``start`` to
    ``end`` are the middle: left out (skip), each replaced by the centre one (middle-repeat), in ``reverse`` or
    ``random-order``, or all on one input with their outputs averaged (parallel), that step once or ``loops`` times
    (looped-parallel): ``h <- (1/M) sum_m block_m(h)``.

    Works on the repeated blocks that ``select.blocks`` finds (Hugging Face decoders and encoders, diffusion Transformers,
    plain modules) and on interlayer's own Transformers with a stream without memory. Weights are shared, never copied.
    Key-value caches stay exact: each run of a block has its own place in a Hugging Face cache; an own model refuses a
    cache if blocks repeat. A Hugging Face model whose blocks only change their order, or are left out, still saves with
    ``save_pretrained``; where blocks repeat or run side by side it refuses.

    Args:
        variant: One of ``VARIANTS``.
        start: First block of the middle. Defaults to a quarter of the blocks.
        end: First block after the middle. Defaults to all but a quarter.
        loops: How often a looped-parallel step runs. The paper finds the best number in proportion to the number of blocks
            in the middle.
        seed: Of the random order; the paper averages over several.
        at: Name of the list of blocks, or of a part of the model that holds it, such as ``"encoder"``. Defaults to the
            list that holds the most weights (in T5 and BART the decoder's).

    Shapes: as the model's.

    Raises:
        ValueError: Unknown variant; from ``plan``: a range that is none, an order that is the trained one, or a model
            whose blocks can't be run in another order.

    Examples:
        >>> from interlayer.models import Transformer
        >>> model = Transformer(vocab=50, length=16, depth=8, width=32, heads=2).eval()
        >>> print(Painters(variant="skip", start=3, end=5).plan(model))
        painters {'variant': 'skip', 'start': 3, 'end': 5}
          + trunk.blocks    6 steps, 6 block runs (of 8)  (0 1 2 5 6 7)
          - trunk.blocks.3  Block  (left out)
          - trunk.blocks.4  Block  (left out)
    """

    slug: ClassVar[str] = "painters"

    def __init__(
        self,
        *,
        variant: Variant = "parallel",
        start: int | None = None,
        end: int | None = None,
        loops: int = 3,
        seed: int = 0,
        at: str | None = None,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"painters: variant was {variant!r}; wanted one of {', '.join(VARIANTS)}.")
        self.variant, self.start, self.end, self.loops, self.seed, self.at = variant, start, end, loops, seed, at

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """Choose the order. It needs no data."""
        self.take(others, 0)
        at, found = _blocks(model, self.at)
        count, variant = len(found), self.variant
        start = count // 4 if self.start is None else self.start
        end = count - count // 4 if self.end is None else self.end
        if not 0 <= start < end <= count or self.loops < 1:
            raise ValueError(
                f"painters: start {start}, end {end}, loops {self.loops}; wanted 0 <= start < end <= {count} (the blocks "
                f"in {at!r}) and at least one loop."
            )
        order = execution(variant, count, start, end, loops=self.loops, seed=self.seed)
        order = [item[0] if isinstance(item, list) and len(item) == 1 else item for item in order]
        run = _flat(order)
        if order == list(range(count)) or not order:
            raise ValueError(
                f"painters: {variant} of blocks {start} to {end - 1} leaves the order as it is or nothing."
            )
        options: dict[str, Any] = {"variant": variant, "start": start, "end": end}
        options |= {"loops": self.loops} if variant == "looped-parallel" else {}
        options |= {"seed": self.seed} if variant == "random-order" else {}
        structure = {"at": at, "order": order}
        _check(model, at, order)
        _interchangeable(found, at, start, end, order)

        def build() -> nn.Module:
            new = copy.deepcopy(model)
            recipe.record(new, self.slug, options, structure)
            return self.restore(new, structure)

        shown = " ".join("(" + " | ".join(map(str, o)) + ")" if isinstance(o, list) else str(o) for o in order)
        sums = cost(order)
        touched = [Row(at, f"{sums['depth']} steps, {sums['work']} block runs (of {count})", shown)]
        left = [Row(f"{at}.{i}", type(found[i]).__name__, "left out") for i in range(count) if i not in run]
        return Plan(self.slug, options, touched, left, build)

    def restore(self, model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        """Put the order in place."""
        at, order = structure["at"], structure["order"]
        owner, found = _owner(model, at), model.get_submodule(at)
        _check(model, at, order)
        if owner is not None:
            owner.order = Route(len(found), order)  # type: ignore[arg-type]
            return model
        run = _flat(order)
        counted = _configure(model, at, run)
        used: set[int] = set()
        place = 0
        items: list[nn.Module] = []
        for item in order:
            members = []
            for index in item if isinstance(item, list) else [item]:
                block = found[index]  # type: ignore[index]
                members.append(_place(_twin(block) if index in used else block, place))
                used.add(index)
                place += 1
            items.append(Parallel(members) if isinstance(item, list) else members[0])
        put(model, at, nn.Sequential(*items) if isinstance(found, nn.Sequential) else nn.ModuleList(items))
        if len(run) != len(order) or len(set(run)) != len(run):
            return delivery.guard(model, "blocks that run twice or side by side")
        if not counted and len(run) != len(found):  # type: ignore[arg-type]
            return delivery.guard(model, "fewer blocks than its configuration counts")
        return model


def _blocks(model: nn.Module, at: str | None) -> tuple[str, nn.ModuleList | nn.Sequential]:
    """The selected list of blocks, and its name."""
    if any(isinstance(m, Parallel) for m in model.modules()):
        raise ValueError(
            f"painters: blocks of {type(model).__name__} run side by side already; wanted blocks that run one after another. "
            "Start from the model before."
        )
    if at is None:
        if hasattr(model, "down_blocks") and hasattr(model, "up_blocks"):
            raise ValueError(
                f"painters: {type(model).__name__} joins blocks on the way down with those on the way up, which ties them "
                "to their order. Name a list of alike blocks inside one of them with at."
            )
        return blocks(model)
    try:
        part = model.get_submodule(at)
    except AttributeError:
        held = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1]
        raise ValueError(
            f"painters: {type(model).__name__} has no part {at!r}.{catalog.nearest(at, held)} "
            f"Lists of blocks there: {', '.join(held[:6])}."
        ) from None
    if isinstance(part, nn.ModuleList | nn.Sequential):
        return at, part
    inner, found = blocks(part)
    return f"{at}.{inner}", found


def _interchangeable(found: Any, at: str, start: int, end: int, order: Order) -> None:
    """Raise unless the middle blocks fit in each other's places, as far as their parameters show."""
    shapes = [{n: tuple(p.shape) for n, p in block.named_parameters()} for block in found]
    middle = list(range(start, end)) if end - start > 1 else [start, start + 1 if end < len(found) else start - 1]
    for i, j in pairwise(middle):
        odd = [n for n in shapes[i] if shapes[j].get(n, shapes[i][n]) != shapes[i][n]]
        if odd:
            raise ValueError(
                f"painters: {odd[0]} is {shapes[i][odd[0]]} in block {i} of {at!r} and {shapes[j][odd[0]]} in block {j}, so "
                "they don't fit in each other's places. Take a range of alike blocks, or another list with at."
            )
    own = sorted(set(shapes[0]) - set().union(*shapes[1:]))
    if own and order[0] != 0:
        raise ValueError(
            f"painters: the first block of {at!r} holds {own[0]}, which the others depend on; wanted it to stay the first. "
            "Set start to 1 or more."
        )


def _owner(model: nn.Module, at: str) -> Any:
    """The backbone with a slot for the order of its blocks, if ``at`` belongs to one."""
    parent = model.get_submodule(at.rpartition(".")[0])
    return parent if isinstance(getattr(parent, "order", None), orders.Sequential) else None


def _check(model: nn.Module, at: str, order: Order) -> None:
    owner = _owner(model, at)
    if owner is not None and type(owner.order) is not orders.Sequential:
        raise ValueError(
            f"painters: the blocks of {at!r} run in {type(owner.order).__name__} order already; wanted the plain one, "
            "order='sequential'."
        )
    for config, _ in _counts(model, at):
        kinds = getattr(config, "layer_types", None) or []
        mixed = len(set(kinds)) > 1
        if mixed and (_computed(config) or any(isinstance(o, list) and len({kinds[b] for b in o}) > 1 for o in order)):
            raise ValueError(
                f"painters: the blocks of {at!r} use different attention masks ({', '.join(sorted(set(kinds)))}), so they "
                "can't run in parallel. Take a range of one kind, or another variant."
            )


def _counts(model: nn.Module, at: str) -> list[tuple[Any, str]]:
    """The configurations that count the blocks at ``at``, each with the name under which it does."""
    path = at.split(".")
    count = len(model.get_submodule(at))  # type: ignore[arg-type]
    side = "decoder" if "decoder" in path else "encoder"
    whole = getattr(model, "config", None)
    found: dict[tuple[int, str], tuple[Any, str]] = {}
    for end in range(len(path)):
        config = getattr(model.get_submodule(".".join(path[:end])), "config", None)
        both = getattr(config, "is_encoder_decoder", False)
        names = [n for n in (f"{side}_layers", f"num_{side}_layers") if both and hasattr(config, n)]
        if not names or config is not whole:  # T5's decoder has a configuration of its own
            names += [n for n in ("num_hidden_layers", "num_layers") if hasattr(config, n)][:1]
        found |= {(id(config), n): (config, n) for n in names if getattr(config, n) == count}
    return list(found.values())


def _configure(model: nn.Module, at: str, run: list[int]) -> bool:
    """Tell the configurations how many block runs there are; caches are made by them. Whether any counts them."""
    counts = _counts(model, at)
    for config, name in counts:
        if isinstance(config, dict):  # of diffusers, which is frozen
            model.register_to_config(**{name: len(run)})  # type: ignore[operator]
            continue
        kinds = getattr(config, "layer_types", None)
        setattr(config, name, len(run))
        if kinds and not _computed(config):
            config.layer_types = [kinds[block] for block in run]
    whole: Any = getattr(model, "config", None)
    if not (counts and getattr(whole, "is_encoder_decoder", False)):
        return bool(counts)
    runs = getattr(whole, "num_decoder_layers", None) or getattr(whole, "decoder_layers", 0)
    enough = whole.get_text_config(decoder=True).num_hidden_layers >= runs
    if not enough:  # generate makes the cache of T5's decoder by the number of encoder blocks
        whole.num_hidden_layers = runs
    return enough


def _computed(config: Any) -> bool:
    """Whether the kinds of the blocks follow from their number, and can't be set."""
    return isinstance(getattr(type(config), "layer_types", None), property)


def _twin(block: nn.Module) -> nn.Module:
    """A second block on the same parameters and buffers, which can have its own place in a cache."""
    return copy.deepcopy(block, {id(t): t for t in (*block.parameters(), *block.buffers())})


def _place(block: nn.Module, place: int) -> nn.Module:
    for module in block.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx = place  # type: ignore[assignment]
    return block


class _Recorder(orders.Sequential):
    """The trained order, keeping what each block leaves in the stream."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.seen: list[list[Tensor]] = [[] for _ in range(count)]

    def forward(self, state: State, step: orders.Step) -> State:
        for block in range(self.depth):
            state = step(state, block)
            self.seen[block].append(state.x)
        return state


@torch.no_grad()
def similarity(model: nn.Module, data: Any, *, at: str | None = None) -> Finding:
    """The cosine of the hidden states after each pair of blocks, averaged over all tokens (or pixels).

    The paper finds the middle blocks alike and the first and last ones unlike them. Where a model's blocks differ in the
    shape of their states (the stages of a ResNet), the blocks inside the heaviest of them are compared.

    Args:
        model: Any model with repeated blocks; it is as before afterwards.
        data: What ``taps.feed`` takes.
        at: Name of the list of blocks, or of a part that holds it. Defaults to the list that holds the most weights.

    Returns:
        Table ``similarity``: a column ``layer`` and one column for each layer; and a figure.

    Raises:
        ValueError: No list of blocks whose states have one shape.
    """
    at, found = blocks(model) if at is None else _blocks(model, at)
    states = _states(model, data, at)
    while len({x.shape for x in states}) > 1:
        heaviest = max(range(len(found)), key=lambda i: sum(p.numel() for p in found[i].parameters()))
        inner, found = blocks(found[heaviest])
        at = f"{at}.{heaviest}.{inner}"
        states = _states(model, data, at)
    units = torch.stack([F.normalize(x.double(), dim=-1) for x in states])
    matrix = torch.einsum("itd,jtd->ij", units, units) / units.shape[1]
    columns: dict[str, list[Any]] = {"layer": list(range(len(found)))}
    columns |= {str(i): row for i, row in enumerate(matrix.tolist())}

    def figure() -> Any:
        from matplotlib.figure import Figure

        drawn = Figure(layout="constrained")
        axes = drawn.subplots()
        drawn.colorbar(axes.imshow(matrix.numpy(), vmax=1.0), label="mean cosine of hidden states")
        axes.set(xlabel="after block", ylabel="after block", title=f"{type(model).__name__}: {at}")
        return drawn

    return Finding({"similarity": columns}, figure)


def _states(model: nn.Module, data: Any, at: str) -> list[Tensor]:
    """The hidden states after each block: ``[tokens or pixels, features]``."""
    owner, count = _owner(model, at), len(model.get_submodule(at))  # type: ignore[arg-type]

    def flat(x: Tensor) -> Tensor:
        return (x.movedim(1, -1) if x.ndim == 4 else x).flatten(0, -2)

    with taps.at_rest(model):
        if owner is None:
            with taps.read(model, [f"{at}.{i}" for i in range(count)], every=True) as seen:
                for _ in taps.feed(model, data):
                    pass
            return [torch.cat([flat(x) for x in xs]) for xs in seen.values()]
        _check(model, at, [])
        trained, owner.order = owner.order, _Recorder(count)
        try:
            for _ in taps.feed(model, data):
                pass
            return [torch.cat([flat(x) for x in xs]) for xs in owner.order.seen]
        finally:
            owner.order = trained


def _own() -> tuple[nn.Module, Tensor]:
    from interlayer.models import Transformer

    return Transformer(vocab=32, length=16, depth=6, width=16, heads=2), torch.randint(32, (2, 5))


def _gpt2() -> tuple[nn.Module, Tensor]:
    hf: Any = need("transformers", "hf", "painters.EXAMPLE")
    config = hf.GPT2Config(n_embd=16, n_layer=6, n_head=2, vocab_size=32, use_cache=False)
    return hf.GPT2LMHeadModel(config), torch.randint(32, (2, 5))


EXAMPLE = Example(make=lambda: Painters(variant="looped-parallel", loops=2), inputs=_own, hf=_gpt2)
