"""MRECG: neighbouring blocks of unequal capacity are rounded together, so that reconstruction errors do not oscillate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.blockwise import Part, fed, sequence
from interlayer.core.example import Example, tiny_gpt2
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.quantizer import AdaRound, Grid, Scaled, layers, learned, reconstruct, weight_of
from interlayer.core.quantizer.after import lost
from interlayer.core.quantizer.grid import By
from interlayer.core.quantizer.reconstruct import Found
from interlayer.core.select import At

Capacity = Literal["weights", "loss"]
STRIDE = 1.6  # the factor of a layer that skips positions


def capacity(parts: Iterable[nn.Module], bits: int) -> float:
    r"""The capacity of a block without data: the sum over its layers of weights times bits, times ``STRIDE`` for each with a stride.

    Args:
        parts: Its linear maps and convolutions.
        bits: Of their weights.

    Examples:
        >>> capacity([nn.Conv2d(1, 2, 3), nn.Conv2d(2, 1, 1, stride=2)], 4)
        84.8
    """
    return sum(
        weight_of(m).numel() * bits * (STRIDE if any(s > 1 for s in getattr(m, "stride", ())) else 1.0) for m in parts
    )


def neighbours(names: Sequence[str], chained: Sequence[bool], sizes: Sequence[float], pairs: int) -> list[list[str]]:
    """The pairs of neighbouring blocks whose capacities differ most, as runs of blocks that are rounded together.

    Args:
        names: Blocks in the order in which they run.
        chained: Whether each gets the output of the one before and nothing else, as ``blockwise.fed`` says.
        sizes: The capacity of each.
        pairs: How many; all that can be joined if there are fewer.

    Examples:
        >>> neighbours(["a", "b", "c", "d"], [False, True, True, True], [1, 9, 2, 3], 2)
        [['a', 'b', 'c']]
        >>> neighbours(["a", "b", "c", "d"], [False, True, False, True], [1, 9, 2, 3], 2)
        [['a', 'b'], ['c', 'd']]
    """
    gaps = {k: (sizes[k] - sizes[k - 1]) ** 2 for k in range(1, len(names)) if chained[k]}
    found = list[list[str]]()
    for k in sorted(sorted(gaps, key=lambda k: gaps[k], reverse=True)[:pairs]):
        if found and found[-1][-1] == names[k - 1]:
            found[-1].append(names[k])
        else:
            found.append([names[k - 1], names[k]])
    return found


class Mrecg(Transform):
    r"""Reconstruct a quantised model block by block, and neighbours whose capacities differ most together.

    Ma et al., Solving Oscillation Problem in Post-Training Quantization Through a Theoretical Perspective, CVPR 2023, arXiv:2303.11906.

    Blocks are rounded one after the other, each on what the rounded ones before it give. After a block of small capacity the error is
    large, and one of large capacity makes up for it again: the error oscillates over the blocks, and what it was at its peak is not
    won back. The differences :math:`(C_i - C_{i-1})^2` of the capacities of neighbours say where, and the largest ``pairs`` of them are
    optimised together. All else is as in BRECQ: AdaRound for the weights, learned ranges of inputs.

    The capacity is :math:`C = \sum_l n_l b_l \alpha_l` for :math:`n_l` weights of :math:`b_l` bits, where :math:`\alpha_l` is
    larger for layers with a stride (``capacity``); or it is read from data: the smaller the error of a block after it was rounded
    by itself, the larger it is. The published code computes neither; its joined blocks are written by hand into its configurations.
    The value of :math:`\alpha` (1.6), and that errors are relative to the size of outputs (``core.quantizer.after.lost``), are choices
    made here and not checked against the paper, whose text could not be obtained.

    Cost: ``steps`` passes over one batch, forward and backward, for each block or joined run; with ``capacity="loss"`` twice that, and
    a pass over the data.
    Memory: as ``reconstruct``, for the largest run of joined blocks.

    Args:
        bits: Of the weights, 2 to 8.
        inputs: Bits of the inputs of the same layers, or ``"float"``.
        pairs: How many pairs of neighbours are optimised together.
        capacity: ``"weights"``: from the number of weights, without data. ``"loss"``: from the error of each block, after a first round.
        steps: For each block; joined blocks get as many as they would by themselves together. The authors take 20000 for each run.
        lr: Of the rounding.
        rate: Of the ranges of inputs, relative to them.
        blocks: The blocks; see ``blockwise.sequence``. Only those can be joined between which nothing happens.
        at: Which layers are rounded. Defaults to all whose weight is their own.
        by: How ranges are chosen at first; the authors' is ``"mse"``, with a power of 2.4.
        packed: Keep the weights packed. False gives a plain model of floats on the grid, with ``inputs="float"`` only.
        folder: Where each finished block is kept, so that an interrupted run goes on there.
        seed: Of the order of the batches.

    Shapes: any.

    Raises:
        ValueError: An option out of range; from ``plan``: no data, data that the model does not run on, no layer to round, or no two
            blocks that can be joined.

    Examples:
        >>> block = lambda i, o: nn.Sequential(nn.Linear(i, o), nn.ReLU())
        >>> net, x = nn.Sequential(block(8, 8), block(8, 32), block(32, 4), nn.Linear(4, 2)), torch.randn(64, 8)
        >>> plan = Mrecg(bits=4, pairs=1, steps=5).plan(net, x)
        >>> [row.why.rpartition("with ")[2] for row in plan.touched]
        ['block 0+1', 'block 0+1', 'block 2', 'block 3']
    """

    slug: ClassVar[str] = "mrecg"

    def __init__(
        self,
        *,
        bits: int = 4,
        inputs: int | Literal["float"] = "float",
        pairs: int = 2,
        capacity: Capacity = "weights",
        steps: int = 200,
        lr: float = 3e-2,
        rate: float = 1e-2,
        blocks: At | None = None,
        at: At | None = None,
        by: By = "mse",
        packed: bool = True,
        folder: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        if not (isinstance(bits, int) and 2 <= bits <= 8):
            raise ValueError(f"mrecg: bits {bits!r}; expected an integer from 2 to 8.")
        if inputs != "float" and not (isinstance(inputs, int) and 1 <= inputs <= 8):
            raise ValueError(f"mrecg: inputs {inputs!r}; expected 'float' or an integer from 1 to 8.")
        if capacity not in get_args(Capacity):
            raise ValueError(f"mrecg: capacity {capacity!r}; expected 'weights' or 'loss'.")
        if pairs < 1 or steps < 1 or not lr > 0 or not rate > 0:
            raise ValueError(
                f"mrecg: pairs {pairs}, steps {steps}, lr {lr}, rate {rate}; expected at least 1, 1, and above 0."
            )
        if not packed and inputs != "float":
            raise ValueError(
                "mrecg: rounded inputs cannot become plain floats; expected packed=True, or inputs='float'."
            )
        self.bits, self.inputs, self.pairs, self.capacity = bits, inputs, pairs, capacity
        self.blocks, self.at, self.by, self.packed, self.folder = blocks, at, by, packed, folder
        self.steps, self.lr, self.rate, self.seed = steps, lr, rate, seed

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """Choose what is joined, without data or in a first round when the plan is carried out; ``apply`` rounds."""
        self.take(others)
        batches = taps.batches(data, self.slug)
        there, _ = layers(model, self.at)
        every = sequence(model, batches, self.blocks)[0]
        inside = {b: [m for n, m in there.items() if n == b or n.startswith(f"{b}.") or not b] for b in every}
        names = [b for b, parts in inside.items() if parts]
        chained = fed(model, batches, names)
        if not any(chained):
            raise ValueError(
                f"mrecg: no two of the blocks ({', '.join(names[:3])}) can be joined; expected two neighbours where the "
                "second gets the output of the first and nothing else. Pass other blocks."
            )
        if self.capacity == "loss":
            return self._measured(model, batches, names, chained)
        sizes = [capacity(inside[b], self.bits) for b in names]
        return self.reconstructed(model, batches, neighbours(names, chained, sizes, self.pairs))

    def _measured(self, model: nn.Module, batches: list[Any], names: Sequence[str], chained: Sequence[bool]) -> Plan:
        """A plan that rounds each block by itself first, to see what it loses."""
        first = self.reconstructed(model, batches, ())

        def build() -> nn.Module:
            errors = lost(model, first.apply(), batches, names)
            joined = neighbours(names, chained, [errors[b] for b in names], self.pairs)
            return self.reconstructed(model, batches, joined).apply()

        why = f"joined where the losses of neighbours differ most, {self.pairs} times"
        touched = [Row(r.name, r.what, f"{r.why}, or {why}") for r in first.touched]
        return Plan(self.slug, first.options, touched, first.skipped, build)

    def reconstructed(self, model: nn.Module, batches: list[Any], joined: Sequence[Sequence[str]]) -> Plan:
        """The plan that rounds with these runs of blocks joined."""
        given = {
            "bits": self.bits,
            "joined": [list(run) for run in joined],
            "steps": self.steps,
            "lr": self.lr,
            "seed": self.seed,
        }
        entering = None if self.inputs == "float" else Grid(self.inputs, None, "asymmetric")
        length = {"+".join(run): len(run) for run in joined}

        def solve(part: Part, there: Mapping[str, nn.Module], held: Mapping[str, Scaled]) -> Found:
            steps = self.steps * length.get(part.name, 1)
            rate = self.rate if entering else 0.0
            return learned(AdaRound, steps=steps, lr=self.lr, decay=False, inputs=rate, seed=self.seed)(
                part, there, held
            )

        return reconstruct(
            model, batches, Grid(self.bits, 0, "asymmetric"), solve, inputs=entering, blocks=self.blocks, joined=joined,
            at=self.at, by=self.by, packed=self.packed, folder=self.folder, name=self.slug, options=given,
        )  # fmt: skip


def _plain() -> tuple[nn.Module, Tensor]:
    first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    return nn.Sequential(first, nn.Sequential(nn.Flatten(), nn.Linear(144, 10))), torch.randn(4, 1, 8, 8)


EXAMPLE = Example(make=lambda: Mrecg(steps=3, inputs=4), inputs=_plain, hf=tiny_gpt2)
