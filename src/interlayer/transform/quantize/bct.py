"""BCT: every part of a Transformer in a few bits, block by block, without training and without data."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.core.example import Example
from interlayer.core.extras import need
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.quantizer import (
    OPERANDS,
    Around,
    Grid,
    Packed,
    PackedEmbedding,
    Round,
    inner,
    layers,
    opening,
    packs,
    weight_of,
)
from interlayer.core.select import At, select
from interlayer.core.swap import known, mentions
from interlayer.models import Encoder

EIGHT = 8
FUNCTIONS = (F.gelu, F.relu, F.silu)


class BCT(Transform):
    r"""Round all parts of a Transformer in blocks that have a scale of their own; no training, no calibration data.

    Dong and Chen, Blockwise Compression of Transformer-based Models without Retraining, arXiv:2304.01483. A block is ``block``
    neighbouring values of a row. Its scale is a power of 2, which 8 bits hold, so that a change of scale is a shift; its values
    are integers of b bits times that. What the model computes has the least power that covers the block,
    :math:`s = 2^{\lceil \log_2 (\max |x| / (2^{b-1} - 1)) \rceil}`; a weight has the power with the least squared error. In this form are

    - the weights of linear maps and convolutions, and embeddings, packed in memory and on disk;
    - what linear maps read and give inside the blocks: they multiply integers of 8 bits, block by block;
    - the inputs and outputs of GELU and other activations, and of layer norms;
    - queries, keys and values by token and head, and the probabilities of the softmax by query.

    Scales of what the model computes are found in the call. A float32 product of values on such grids is the product of
    the integers, shifted, to the last bit, as long as a block's sum has fewer than 24 bits.

    What stays in float: biases, the parameters of norms, sums of branches that no norm reads, scores between the product and the softmax
    (its accumulators), outputs of convolutions, and the outputs of the head; ``plan`` lists every module that does. Where gradients
    are asked for, linear maps multiply the rounded floats instead of the integers.

    Only the abstract of the paper could be read, and the authors published no code: the power of 2, the size of blocks and which widths
    they mix are chosen here.

    Cost: rounding of every activation; a linear map takes one integer product for each block of a row.
    Size: ``bits + 8 / block`` bits for each weight.

    Args:
        bits: Of weights and embeddings, 2 to 8.
        results: Of what the model computes, 2 to 8.
        block: Values that share a scale. A row that this does not divide has blocks of its largest divisor below it, and a row
            whose largest divisor is below 16 one scale.
        eight: Layers and embeddings that keep 8 bits, such as those that are sensitive. Defaults to none.
        at: Which modules. Defaults to all.

    Shapes: any.

    Raises:
        ValueError: An option out of range; from ``plan``: nothing to round, or an ``eight`` that names no layer that is rounded.

    Examples:
        >>> net = Encoder(vocab=16, classes=3, length=8, depth=1, width=32, heads=2)
        >>> new = BCT(bits=4, block=16, eight="embed").plan(net).apply()
        >>> new.embed, new.trunk.blocks[0].mixer.qkv.module
        (PackedEmbedding([16, 32], 8 bits symmetric), Packed([96, 32], 4 bits symmetric, inputs=8 bits symmetric by token))
    """

    slug: ClassVar[str] = "bct"

    def __init__(
        self, *, bits: int = 8, results: int = 8, block: int = 64, eight: At | None = None, at: At | None = None
    ) -> None:
        wrong = {
            k: v for k, v in {"bits": bits, "results": results}.items() if not (isinstance(v, int) and 2 <= v <= 8)
        }
        if wrong or not (isinstance(block, int) and block >= 1):
            raise ValueError(
                f"bct: {wrong or {'block': block}}; expected integers, 2 to 8 bits and blocks of 1 or more."
            )
        self.bits, self.results, self.block, self.eight, self.at = bits, results, block, eight, at

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """List what becomes integers, and what stays in float with the reason. ``data`` is not needed."""
        self.take(others)
        work, opens, rows = opening(model, self.at)
        chosen, skipped = layers(work, self.at)
        found = select(work, "**" if self.at is None else self.at)
        tied = {n: o for n, o in _tied(work).items() if n in found.chosen}
        embeds = {n: m for n, m in found if type(m) is nn.Embedding and n not in tied and m.max_norm is None}
        between = {n: m for n, m in found if known(m) == "activation" or (known(m) == "norm" and not _by_channel(m))}
        skipped = [r for r in skipped if r.name not in embeds and r.name not in between and r.name not in tied] + rows
        skipped += [Row(n, "Embedding", f"its weight is that of {o} too, stays in float") for n, o in tied.items()]
        skipped += [
            Row(n, type(m).__name__, f"its {call} is a function call, which stays in float")
            for n, m in found
            if n not in between and (call := _calls(m))
        ]
        wide = [] if self.eight is None else [n for n in select(work, self.eight).chosen if n in chosen or n in embeds]
        if self.eight is not None and not wide:
            raise ValueError(f"bct: eight={self.eight!r} names no layer or embedding that is rounded; expected one.")
        results = Grid(self.results, -1, group=self.block, powers=True)
        row = Grid(self.results, powers=True)
        inside = [n for n in inner(work, chosen) if weight_of(chosen[n]).ndim == 2]
        grids = {n: self.grid(n in wide, weight_of(m)[0].numel()) for n, m in chosen.items()}
        grids |= {n: self.grid(n in wide, m.embedding_dim) for n, m in embeds.items()}

        def what(n: str, m: nn.Module, also: str) -> str:
            count = weight_of(m).numel() if n in chosen else m.weight.numel()  # type: ignore[operator]
            return f"{count} weights, {grids[n].bits} bits in blocks of {grids[n].group or 'a row'}{also}"

        both = f"inputs and outputs {self.results} bits"
        touched = [
            Row(n, type(m).__name__, what(n, m, f", {both if n in inside else f'inputs {self.results} bits'}"))
            for n, m in chosen.items()
        ]
        touched += [Row(n, type(m).__name__, what(n, m, "")) for n, m in embeds.items()]
        touched += [Row(n, type(m).__name__, f"{both}, its own parameters stay in float") for n, m in between.items()]
        touched += [Row(n, "attention", f"{', '.join(OPERANDS)}, {self.results} bits") for n in opens]
        options = {"bits": self.bits, "results": self.results, "block": self.block}

        def build() -> nn.Module:
            new: dict[str, nn.Module] = {
                n: PackedEmbedding(m, grids[n].fit(m.weight, "mse")) for n, m in embeds.items()
            }
            for n, m in chosen.items():
                inputs = _matching(results, grids[n]) if weight_of(m).ndim == 2 else row
                packed = Packed(m, grids[n].fit(weight_of(m), "mse"), inputs=inputs)
                new[n] = Around(packed, results) if n in inside else packed
            for n in opens:
                for operand in OPERANDS:
                    positive = operand == OPERANDS[-1]
                    to = Grid(self.results, kind="unsigned", powers=True) if positive else row
                    new[f"{n}.attend.{operand}"] = Round(to)
            new |= {n: Around(copy.deepcopy(m), results) for n, m in between.items()}
            return packs(model, new, {"method": self.slug, **options, "eight": wide}, opens=opens)

        return Plan(self.slug, options, touched, skipped, build)

    def grid(self, wide: bool, across: int) -> Grid:
        """The grid of a weight with this many values in a row."""
        return Grid(EIGHT if wide else self.bits, 0, group=self.block, powers=True).divided(across)


def _matching(results: Grid, weights: Grid) -> Grid:
    """The grid of inputs in the blocks of the weights."""
    return (
        Grid(results.bits, powers=True)
        if weights.group is None
        else Grid(results.bits, -1, group=weights.group, powers=True)
    )


def _by_channel(norm: nn.Module) -> bool:
    """Whether a norm has statistics of channels, whose features are not its last axis."""
    return isinstance(norm, nn.modules.batchnorm._NormBase | nn.GroupNorm)


def _tied(model: nn.Module) -> dict[str, str]:
    """Embeddings whose weight is another module's too, with its name."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(name)
    found = {n: owners[id(m.weight)] for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    return {n: next(o for o in all_ if o != n) for n, all_ in found.items() if len(all_) > 1}


def _calls(module: nn.Module) -> str:
    """The activation that a module calls as a function, or empty."""
    own = [f.__name__ for f in FUNCTIONS if any(v is f for v in vars(module).values())]
    return next(iter(own or sorted({f.__name__ for f in FUNCTIONS} & mentions(module))), "")


def _plain() -> tuple[nn.Module, Tensor]:
    return Encoder(vocab=8, classes=3, length=4, depth=1, width=16, heads=2), torch.randint(8, (2, 4))


def _bert() -> tuple[nn.Module, Any]:
    hf: Any = need("transformers", "hf", "bct.EXAMPLE")
    config = hf.BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=8,
        max_position_embeddings=8,
    )
    return hf.BertForSequenceClassification(config), {"input_ids": torch.randint(8, (2, 4))}


EXAMPLE = Example(make=lambda: BCT(bits=4, block=16), inputs=_plain, hf=_bert)
