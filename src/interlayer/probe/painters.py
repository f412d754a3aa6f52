"""Layers as painters: the blocks of a frozen model skipped, repeated, reordered or run side by side."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interlayer.core import order as orders
from interlayer.core import recipe, taps
from interlayer.core.example import Example
from interlayer.core.extras import need
from interlayer.core.kinds import Finding, Plan, Row, Transform
from interlayer.core.select import blocks, put
from interlayer.core.stream import State

VARIANTS = ("skip", "middle-repeat", "reverse", "random-order", "parallel", "looped-parallel")
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

    Works on the repeated blocks that ``select.blocks`` finds (Hugging Face decoders and encoders, plain modules) and on
    interlayer's own Transformers with a stream without memory. Weights are shared, never copied. Key-value caches stay
    exact: each run of a block has its own place in a Hugging Face cache; an own model refuses a cache if blocks repeat.

    Shapes: as the model's.

    Examples:
        >>> from interlayer.models import Transformer
        >>> model = Transformer(vocab=50, length=16, depth=8, width=32, heads=2).eval()
        >>> print(Painters().plan(model, variant="skip", start=3, end=5))
        painters {'variant': 'skip', 'start': 3, 'end': 5}
          + trunk.blocks    6 steps, 6 block runs (of 8)  (0 1 2 5 6 7)
          - trunk.blocks.3  Block  (left out)
          - trunk.blocks.4  Block  (left out)
    """

    slug: ClassVar[str] = "painters"

    def plan(  # type: ignore[override]
        self,
        model: nn.Module,
        data: Any = None,
        *,
        variant: str = "parallel",
        start: int | None = None,
        end: int | None = None,
        loops: int = 3,
        seed: int = 0,
    ) -> Plan:
        """Choose the order.

        Args:
            model: A Transformer.
            data: Not used.
            variant: One of ``VARIANTS``.
            start: First block of the middle; by default a quarter of the blocks come before it.
            end: First block after the middle; by default a quarter of the blocks follow.
            loops: How often a looped-parallel step runs. The paper finds the best number in proportion to the number of
                blocks in the middle.
            seed: Of the random order; the paper averages over several.

        Raises:
            ValueError: Unknown variant, a range that is none, an order that is the trained one, or a model whose blocks
                can't be run in another order.
        """
        if variant not in VARIANTS:
            raise ValueError(f"painters: variant was {variant!r}; wanted one of {', '.join(VARIANTS)}.")
        at, found = blocks(model)
        count = len(found)
        start = count // 4 if start is None else start
        end = count - count // 4 if end is None else end
        if not 0 <= start < end <= count or loops < 1:
            raise ValueError(
                f"painters: start {start}, end {end}, loops {loops}; wanted 0 <= start < end <= {count} (the blocks in "
                f"{at!r}) and at least one loop."
            )
        order = execution(variant, count, start, end, loops=loops, seed=seed)
        order = [item[0] if isinstance(item, list) and len(item) == 1 else item for item in order]
        run = _flat(order)
        if order == list(range(count)) or not order:
            raise ValueError(
                f"painters: {variant} of blocks {start} to {end - 1} leaves the order as it is or nothing."
            )
        told: dict[str, Any] = {"variant": variant, "start": start, "end": end}
        told |= (
            {"loops": loops} if variant == "looped-parallel" else {"seed": seed} if variant == "random-order" else {}
        )
        structure = {"at": at, "order": order}
        _check(model, at, order)

        def build() -> nn.Module:
            new = copy.deepcopy(model)
            recipe.record(new, self.slug, told, structure)
            return self.restore(new, structure)

        shown = " ".join("(" + " | ".join(map(str, o)) + ")" if isinstance(o, list) else str(o) for o in order)
        sums = cost(order)
        touched = [Row(at, f"{sums['depth']} steps, {sums['work']} block runs (of {count})", shown)]
        left = [Row(f"{at}.{i}", type(found[i]).__name__, "left out") for i in range(count) if i not in run]
        return Plan(self.slug, told, touched, left, build)

    def restore(self, model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        """Put the order in place."""
        at, order = structure["at"], structure["order"]
        owner, found = _owner(model, at), model.get_submodule(at)
        _check(model, at, order)
        if owner is not None:
            owner.order = Route(len(found), order)  # type: ignore[arg-type]
            return model
        _configure(model, at, order)
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
        return model


def _owner(model: nn.Module, at: str) -> Any:
    """The backbone with a slot for the order of its blocks, if ``at`` belongs to one."""
    parent = model.get_submodule(at.rpartition(".")[0])
    return parent if isinstance(getattr(parent, "order", None), orders.Sequential) else None


def _check(model: nn.Module, at: str, order: Order) -> None:
    owner, config = _owner(model, at), _config(model, at)
    if owner is not None and type(owner.order) is not orders.Sequential:
        raise ValueError(
            f"painters: the blocks of {at!r} run in {type(owner.order).__name__} order already; wanted the plain one, "
            "order='sequential'."
        )
    kinds = getattr(config, "layer_types", None) or []
    if len(set(kinds)) > 1 and any(isinstance(o, list) and len({kinds[b] for b in o}) > 1 for o in order):
        raise ValueError(
            f"painters: the blocks of {at!r} use different attention masks ({', '.join(sorted(set(kinds)))}), so they "
            "can't run in parallel. Take a range of one kind, or another variant."
        )


def _config(model: nn.Module, at: str) -> Any:
    """The Hugging Face configuration that counts the blocks at ``at``, if there is one."""
    path = at.split(".")
    count = len(model.get_submodule(at))  # type: ignore[arg-type]
    for end in range(len(path) - 1, -1, -1):
        config = getattr(model.get_submodule(".".join(path[:end])), "config", None)
        if getattr(config, "num_hidden_layers", None) == count:
            return config
    return None


def _configure(model: nn.Module, at: str, order: Order) -> None:
    """Tell the configuration how many block runs there are; caches are made by it."""
    config, run = _config(model, at), _flat(order)
    if config is None:
        return
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(run)
    if kinds:
        config.layer_types = [kinds[block] for block in run]


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
def similarity(model: nn.Module, data: Any) -> Finding:
    """The cosine of the hidden states after each pair of blocks, averaged over all tokens.

    The paper finds the middle blocks alike and the first and last ones unlike them.

    Args:
        model: Any model with repeated blocks; it is as before afterwards.
        data: What ``taps.feed`` takes.

    Returns:
        Table ``similarity``: a column ``layer`` and one column for each layer; and a figure.
    """
    at, found = blocks(model)
    names = [f"{at}.{i}" for i in range(len(found))]
    owner = _owner(model, at)
    with taps.at_rest(model):
        if owner is None:
            with taps.read(model, names, every=True) as seen:
                list(taps.feed(model, data))
            states = [torch.cat([x.flatten(0, -2) for x in seen[n]]) for n in names]
        else:
            _check(model, at, [])
            trained, owner.order = owner.order, _Recorder(len(found))
            try:
                list(taps.feed(model, data))
                states = [torch.cat([x.flatten(0, -2) for x in xs]) for xs in owner.order.seen]
            finally:
                owner.order = trained
    units = torch.stack([F.normalize(x.double(), dim=-1) for x in states])
    matrix = torch.einsum("itd,jtd->ij", units, units) / units.shape[1]
    columns: dict[str, list[Any]] = {"layer": list(range(len(found)))}
    columns |= {str(i): row for i, row in enumerate(matrix.tolist())}

    def figure() -> Any:
        from matplotlib.figure import Figure

        drawn = Figure(layout="constrained")
        axes = drawn.subplots()
        drawn.colorbar(axes.imshow(matrix.numpy(), vmax=1.0), label="mean cosine of hidden states")
        axes.set(xlabel="after block", ylabel="after block", title=type(model).__name__)
        return drawn

    return Finding({"similarity": columns}, figure)


def _own() -> tuple[nn.Module, Tensor]:
    from interlayer.models import Transformer

    return Transformer(vocab=32, length=16, depth=6, width=16, heads=2), torch.randint(32, (2, 5))


def _gpt2() -> tuple[nn.Module, Tensor]:
    hf: Any = need("transformers", "hf", "painters.EXAMPLE")
    config = hf.GPT2Config(n_embd=16, n_layer=6, n_head=2, vocab_size=32, use_cache=False)
    return hf.GPT2LMHeadModel(config), torch.randint(32, (2, 5))


EXAMPLE = Example(make=Painters, inputs=_own, hf=_gpt2, options={"variant": "looped-parallel", "loops": 2})
