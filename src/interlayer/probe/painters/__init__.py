"""Layers as painters: the blocks of a frozen model skipped, repeated, reordered or run side by side."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from interlayer.core import delivery, recipe
from interlayer.core.example import Example, tiny_gpt2
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.select import put
from interlayer.probe.painters.orders import VARIANTS, Parallel, Route, Variant, cost, execution, flat
from interlayer.probe.painters.places import backbone, check_order, check_shapes, configure, find, numbered, twin
from interlayer.probe.painters.states import similarity

__all__ = ["VARIANTS", "Painters", "cost", "execution", "similarity"]


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
            raise ValueError(f"painters: variant was {variant!r}; expected one of {', '.join(VARIANTS)}.")
        self.variant, self.start, self.end, self.loops, self.seed, self.at = variant, start, end, loops, seed, at

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """Choose the order. It needs no data."""
        self.take(others)
        at, found = find(model, self.at)
        total, variant = len(found), self.variant
        start = total // 4 if self.start is None else self.start
        end = total - total // 4 if self.end is None else self.end
        if not 0 <= start < end <= total or self.loops < 1:
            raise ValueError(
                f"painters: start {start}, end {end}, loops {self.loops}; expected 0 <= start < end <= {total} (the blocks "
                f"in {at!r}) and at least one loop."
            )
        order = execution(variant, total, start, end, loops=self.loops, seed=self.seed)
        order = [item[0] if isinstance(item, list) and len(item) == 1 else item for item in order]
        run = flat(order)
        if order == list(range(total)) or not order:
            raise ValueError(
                f"painters: {variant} of blocks {start} to {end - 1} leaves the order as it is or nothing."
            )
        options: dict[str, Any] = {"variant": variant, "start": start, "end": end}
        options |= {"loops": self.loops} if variant == "looped-parallel" else {}
        options |= {"seed": self.seed} if variant == "random-order" else {}
        structure = {"at": at, "order": order}
        check_order(model, at, order)
        check_shapes(found, at, start, end, order)

        def build() -> nn.Module:
            new = copy.deepcopy(model)
            recipe.record(new, self.slug, options, structure)
            return self.restore(new, structure)

        shown = " ".join("(" + " | ".join(map(str, o)) + ")" if isinstance(o, list) else str(o) for o in order)
        sums = cost(order)
        touched = [Row(at, f"{sums['depth']} steps, {sums['work']} block runs (of {total})", shown)]
        left = [Row(f"{at}.{i}", type(found[i]).__name__, "left out") for i in range(total) if i not in run]
        return Plan(self.slug, options, touched, left, build)

    def restore(self, model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        """Put the order in place."""
        at, order = structure["at"], structure["order"]
        own, found = backbone(model, at), model.get_submodule(at)
        check_order(model, at, order)
        if own is not None:
            own.order = Route(len(found), order)  # type: ignore[arg-type]
            return model
        run = flat(order)
        counted = configure(model, at, run)
        used: set[int] = set()
        number = count()
        items: list[nn.Module] = []
        for item in order:
            members = []
            for index in item if isinstance(item, list) else [item]:
                block = found[index]  # type: ignore[index]
                members.append(numbered(twin(block) if index in used else block, next(number)))
                used.add(index)
            items.append(Parallel(members) if isinstance(item, list) else members[0])
        put(model, at, nn.Sequential(*items) if isinstance(found, nn.Sequential) else nn.ModuleList(items))
        if len(run) != len(order) or len(set(run)) != len(run):
            return delivery.guard(model, "blocks that run twice or side by side")
        if not counted and len(run) != len(found):  # type: ignore[arg-type]
            return delivery.guard(model, "fewer blocks than its configuration counts")
        return model


def _own() -> tuple[nn.Module, Tensor]:
    from interlayer.models import Transformer

    return Transformer(vocab=32, length=16, depth=6, width=16, heads=2), torch.randint(32, (2, 5))


EXAMPLE = Example(
    make=lambda: Painters(variant="looped-parallel", loops=2), inputs=_own, hf=lambda: tiny_gpt2(6, use_cache=False)
)
