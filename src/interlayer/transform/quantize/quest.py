"""QuEST: diffusion models at 4-bit weights and inputs, with a grid of inputs for each time, and few layers fine-tuned."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from interlayer.core import taps
from interlayer.core.blockwise import Part, fit
from interlayer.core.example import Example
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.process import drawn, times_of
from interlayer.core.quantizer import (
    Clock,
    Grid,
    Learning,
    Scaled,
    TimedRound,
    Tuned,
    layers,
    observe,
    opening,
    packs,
    split,
    weight_of,
)
from interlayer.core.quantizer.attention import OPERANDS
from interlayer.core.quantizer.layers import axis_of
from interlayer.core.quantizer.nearest import operand_rows, ran
from interlayer.core.quantizer.reconstruct import wide
from interlayer.core.quantizer.smooth import one
from interlayer.core.select import At
from interlayer.transform.quantize._dit import tiny_dit

FLOAT = 16  # bits that stand for no rounding
LOOKED = 4  # calls, at times far apart, by which the harm of a layer is measured
ENDS = 8  # bits of the inputs of the first and the last layer


class QuEST(Transform):
    r"""Round all weights and inputs of a diffusion model to few bits, and fine-tune the layers that this harms most.

    Wang et al., QuEST: Low-bit Diffusion Model Quantization via Efficient Selective Finetuning, ICCV 2025, arXiv:2402.03666.

    1. Weights have a scale for each output. Inputs, and what attention multiplies, have a grid for each group of times of the
       sampling run, and below 8 bits one for each feature; those of the first and the last layer have 8 bits.
    2. Layers with temporal information, whose inputs depend on the time and not on the noised item, are fine-tuned together with
       their inputs' scales: :math:`\|\hat\epsilon - \epsilon\|^2 + \frac1{|T|} \sum_{l \in T} \|\hat y_l - y_l\|^2` (means over entries),
       with the outputs :math:`\epsilon` of the model and :math:`y_l` of these layers in floats.
    3. Then the layers that harm the output most when rounded alone are fine-tuned, together with the scales of all other
       inputs: :math:`\|\hat\epsilon - \epsilon\|^2`. All other weights are only rounded.

    No data is needed: calls are those of the model's own sampling runs. Gradients pass the rounding.

    Compared with the authors' code: both kinds of layers are found by measuring, not by their names (``emb_layers``; ``ff.net``,
    ``to_q`` and ``attn1``'s ``to_k`` and ``to_v``); a call's time picks its grid, not a setting of the model; calls are shuffled, not
    taken time by time; weights begin at the nearest levels, not at those of Q-Diffusion; scales are learned as logarithms.

    Cost: sampling; four calls for each layer; then two forward passes and one backward for each call and epoch.
    Memory: the calls, the model with its gradients and Adam's moments of what is trained, and activations of one call.

    Args:
        bits: Of weights, 2 to 8.
        inputs: Bits of inputs, 2 to 8.
        softmax: Bits of the probabilities of attention, 2 to 8, or 16 to leave them in float.
        groups: Largest number of groups of times, of equally many steps.
        share: Of the rounded weights, how many are fine-tuned as sensitive at most, 0 to 1; 0 leaves the third step out.
        epochs: Over the calls, for each of the two kinds of layers.
        lr: Learning rate of weights, relative to a weight's root mean square.
        scale_lr: Learning rate of scales, relative to the scale.
        steps: Of the sampling run, where no data is given; as many as the rounded model will sample with, or more.
        examples: Images of the sampling run; at least one for each class, so that no time's grid misses any.
        scheduler: Of diffusers, whose noise the model was trained with. Defaults to 1000 linearly rising betas.
        seed: Of noise, classes and the order of the calls.
        at: Among which layers. Defaults to all.

    Shapes: any.

    Raises:
        ValueError: An option out of range; from ``plan``: no data for a model whose inputs cannot be drawn, calls without times,
            or no layer that can be rounded.

    Examples:
        >>> from diffusers import DiTTransformer2DModel
        >>> net = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=2, num_layers=2, sample_size=4,
        ...                             patch_size=2, num_embeds_ada_norm=10, norm_num_groups=1)
        >>> new = QuEST(steps=2, examples=2, epochs=1).plan(net).apply()
        >>> new.transformer_blocks[0].ff.net[2]
        Timed([16, 64], 4 bits asymmetric, inputs=4 bits asymmetric by channel, 2 groups of times)
    """

    slug: ClassVar[str] = "quest"

    def __init__(
        self,
        *,
        bits: int = 4,
        inputs: int = 4,
        softmax: int = 8,
        groups: int = 10,
        share: float = 0.25,
        epochs: int = 20,
        lr: float = 3e-3,
        scale_lr: float = 3e-3,
        steps: int = 20,
        examples: int = 16,
        scheduler: Any = None,
        seed: int = 0,
        at: At | None = None,
    ) -> None:
        for name, b, most in (("bits", bits, ()), ("inputs", inputs, ()), ("softmax", softmax, (FLOAT,))):
            if not (isinstance(b, int) and (2 <= b <= 8 or b in most)):
                raise ValueError(f"quest: {name} {b!r}; expected 2 to 8{' or 16' if most else ''}.")
        if groups < 1 or not 0 <= share <= 1 or epochs < 0 or lr <= 0 or scale_lr <= 0:
            raise ValueError(
                f"quest: groups {groups}, share {share}, epochs {epochs}, lr {lr}, scale_lr {scale_lr}; expected at least 1 group, "
                "a share from 0 to 1, 0 epochs or more, and rates above 0."
            )
        if steps < 1 or examples < 1:
            raise ValueError(f"quest: steps {steps}, examples {examples}; expected at least 1 of each.")
        self.bits, self.inputs, self.softmax, self.groups, self.share = bits, inputs, softmax, groups, share
        self.epochs, self.lr, self.scale_lr, self.at = epochs, lr, scale_lr, at
        self.steps, self.examples, self.scheduler, self.seed = steps, examples, scheduler, seed
        self.grid = Grid(bits, 0, kind="asymmetric")

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """Sample, or take the calls in ``data``, find the ranges at each time, and the layers that are fine-tuned."""
        self.take(others)
        if data is None:
            given = {"steps": self.steps, "examples": self.examples, "scheduler": self.scheduler, "seed": self.seed}
            data = drawn(self.slug, model, **given, every=True)
        calls, clock = split(self.slug, taps.batches(data, self.slug), *times_of(self.slug, model), self.groups)
        work, opens, rows = opening(model, self.at)
        there, skipped = layers(work, self.at)
        by_time, by_item = moved(work, calls, clock, there)
        ranges = self.ranges(work, calls, there, by_item, opens)
        there, never = ran(there, ranges, self.slug, "never ran, or not at all times, on the data")
        skipped += rows + never
        weights = {n: self.grid.fit(wide(m), "mse", 2.4) for n, m in there.items()}
        temporal = [n for n in by_time if n in there and n not in by_item]
        harm = self.harm(work, calls, clock, weights, ranges)
        sensitive = self.sensitive({n: h for n, h in harm.items() if n not in temporal}, there)
        touched = []
        for n, m in there.items():
            kind = (
                "temporal, fine-tuned"
                if n in temporal
                else "sensitive, fine-tuned"
                if n in sensitive
                else "rounded only"
            )
            what = f"{weight_of(m).numel()} weights, {self.bits} bits; inputs {ranges[n].grid.bits} bits at {clock.groups} groups of times"
            touched.append(Row(n, type(m).__name__, f"{what}; error {harm[n]:.2g} alone; {kind}"))
        reached = [n for n in opens if f"{n}.attend.{OPERANDS[0]}" in ranges]
        kept = "in float" if self.softmax == FLOAT else f"{self.softmax} bits"
        touched += [
            Row(n, "attention", f"queries, keys and values {self.inputs} bits, probabilities {kept}") for n in reached
        ]
        skipped += operand_rows(opens, ranges, self.grid)[1]
        trained = sum(p.numel() for n in (*temporal, *sensitive) for p in there[n].parameters())
        share = trained / sum(p.numel() for p in model.parameters())
        options = {"bits": self.bits, "inputs": self.inputs, "softmax": self.softmax, "groups": clock.groups}

        def build() -> nn.Module:
            student, own = copy.deepcopy(work).requires_grad_(False), Clock(**clock.structure())
            student.register_forward_pre_hook(own, with_kwargs=True)
            new: dict[str, Any] = {n: Learning(r, own) for n, r in ranges.items()}
            for n, held in weights.items():
                new[n] = Tuned(student.get_submodule(n), held, new[n])
            for n, module in new.items():
                student.set_submodule(n, module.requires_grad_(False))
            flat = [call for each in calls for call in each]
            self.tune(work, student, flat, temporal, scales=temporal, local=temporal)
            self.tune(work, student, flat, sensitive, scales=[n for n in ranges if n not in temporal], local=[])
            found = {n: m.found() if n in there else TimedRound(m.found(), own) for n, m in new.items()}
            return packs(model, found, {"method": self.slug, **options}, opens=reached, clock=own)

        return Plan(self.slug, options | {"trained": round(share, 4)}, touched, skipped, build)

    def ranges(
        self,
        model: nn.Module,
        calls: list[list[dict[str, Any]]],
        there: Mapping[str, nn.Module],
        by_item: Sequence[str],
        opens: Sequence[str],
    ) -> dict[str, Scaled]:
        """The grids of all inputs and operands of attention, with scales for each group of times."""
        fine = self.inputs < ENDS
        axes = {n: axis_of(tuple(weight_of(m).shape)) if fine else None for n, m in there.items()}
        grids = {n: Grid(self.inputs, axis, "asymmetric") for n, axis in axes.items()}
        grids |= {n: Grid(ENDS, kind="asymmetric") for n in (*by_item[:1], *by_item[-1:])}
        for n in opens:
            grids |= {f"{n}.attend.{o}": Grid(self.inputs, -1 if fine else None, "asymmetric") for o in OPERANDS[:-1]}
            if self.softmax != FLOAT:
                grids[f"{n}.attend.{OPERANDS[-1]}"] = Grid(self.softmax, kind="unsigned")
        found: list[dict[str, Any]] = [
            observe(model, each, grids) for each in tqdm(calls, "ranges", disable=None, leave=False)
        ]
        return {
            n: Scaled(grid, *(torch.stack([getattr(f[n], k) for f in found]) for k in ("scale", "zero")))
            for n, grid in grids.items()
            if all(n in f for f in found)
        }

    def harm(
        self,
        model: nn.Module,
        calls: list[list[dict[str, Any]]],
        clock: Clock,
        weights: Mapping[str, Scaled],
        ranges: Mapping[str, Scaled],
    ) -> dict[str, float]:
        """The squared error of the model's output where one layer alone is rounded, relative to the output, by layer."""
        own = [*model.parameters(), *model.buffers()]
        work, some = (
            copy.deepcopy(model, {id(t): t for t in own}),
            [each[0] for each in calls[:: -(-len(calls) // LOOKED)]],
        )
        work.register_forward_pre_hook(clock, with_kwargs=True)
        with taps.at_rest(work), torch.no_grad():
            whole, found = [taps.first(out) for out in taps.feed(work, some)], dict[str, float]()
            for n in tqdm(weights, "sensitivity", disable=None, leave=False):
                layer = work.get_submodule(n)
                work.set_submodule(n, Tuned(layer, weights[n], Learning(ranges[n], clock)))
                off = [
                    (taps.first(o) - w).square().sum() / w.square().sum()
                    for o, w in zip(taps.feed(work, some), whole, strict=True)
                ]
                found[n] = float(torch.stack(off).mean())
                work.set_submodule(n, layer)
        return found

    def sensitive(self, harm: Mapping[str, float], there: Mapping[str, nn.Module]) -> list[str]:
        """The layers that harm the output most, while their weights are within ``share`` of all."""
        left, found = self.share * sum(weight_of(m).numel() for m in there.values()), list[str]()
        for n in sorted(harm, key=harm.__getitem__, reverse=True):
            if weight_of(there[n]).numel() <= left:
                left -= weight_of(there[n]).numel()
                found.append(n)
        return found

    def tune(
        self,
        teacher: nn.Module,
        student: nn.Module,
        calls: list[dict[str, Any]],
        names: Sequence[str],
        *,
        scales: Sequence[str],
        local: Sequence[str],
    ) -> None:
        """Train these layers, and scales of inputs, until the student gives the teacher's outputs, and those of ``local`` layers."""
        there: dict[str, Any] = {n: student.get_submodule(n) for n in (*names, *scales)}
        logs = [(m.inputs if isinstance(m, Tuned) else m).log for m in (there[n] for n in scales)]
        groups: list[dict[str, Any]] = [{"params": logs, "lr": self.scale_lr}]
        for n in names:
            layer = there[n].layer
            size = float(layer.weight.square().mean().sqrt())
            groups.append({"params": [p for p in (layer.weight, layer.bias) if p is not None], "lr": self.lr * size})
        if not scales or not self.epochs:
            return
        steps, wanted = self.epochs * len(calls), self.wanted(teacher, calls, local)
        with taps.at_rest(student), tqdm(total=steps, desc="fine-tuning", disable=None, leave=False) as bar:
            for group in groups:
                for p in group["params"]:
                    p.requires_grad_(True)
            part = _Distilled("", student, [((), call) for call in calls], wanted, local=local, bar=bar)
            fit(part, groups, steps=steps, lr=self.lr, seed=self.seed, loss=lambda a, b: (a - b).square().sum())

    def wanted(self, teacher: nn.Module, calls: list[dict[str, Any]], local: Sequence[str]) -> list[Tensor]:
        """What the student should give for each call."""
        with taps.at_rest(teacher), torch.no_grad():
            return [_run(teacher, call, local) for call in calls]


@dataclass
class _Distilled(Part):
    """A whole model as a block that gives the outputs of some layers too."""

    local: Sequence[str] = ()
    bar: Any = field(default=None, repr=False)

    def run(self, index: int) -> Tensor:
        self.bar.update()
        return _run(self.block, self.inputs[index][1], self.local)


def _run(model: nn.Module, call: Mapping[str, Any], local: Sequence[str]) -> Tensor:
    """The output of a call, and of layers inside, in one vector whose squared differences add up to mean squared errors."""
    seen = dict[str, Tensor]()
    if local:
        with taps.watch(model, lambda n, m: n in local, lambda n, x: seen.update({n: x}), detach=False):
            out = taps.first(model(**call))
    else:
        out = taps.first(model(**call))
    parts = [out, *(x * len(local) ** -0.5 for x in seen.values())]
    return torch.cat([x.float().flatten() * x.numel() ** -0.5 for x in parts])


def moved(
    model: nn.Module, calls: list[list[dict[str, Any]]], clock: Clock, there: Mapping[str, nn.Module]
) -> tuple[list[str], list[str]]:
    """The layers whose inputs another time moves, and those whose inputs another noised item moves, in the order in which they run."""
    call = one(calls[0][0])
    item = next(name for name in inspect.signature(model.forward).parameters if name in call)
    now = torch.as_tensor(call[clock.name])
    later = torch.as_tensor(calls[-1][-1][clock.name]).reshape(-1)[-1].to(now)
    other = torch.where(now == later, torch.where(now == 0, torch.ones_like(now), torch.zeros_like(now)), later)
    seen = list[dict[str, Tensor]]()
    with taps.at_rest(model), torch.no_grad():
        for each in (call, {**call, clock.name: other}, {**call, item: 1 + call[item].roll(1, -1)}):
            seen.append({})
            with taps.watch(model, lambda n, m: n in there, lambda n, x: seen[-1].update({n: x}), side="input"):
                next(taps.feed(model, [each]))
    first, *rest = seen
    by_time, by_item = ([n for n, x in first.items() if not torch.equal(x, each[n])] for each in rest)
    return by_time, by_item


def _plain() -> tuple[nn.Module, Any]:
    from interlayer.models.diffusion import DiT

    model = DiT(1, 4, patch=2, classes=3, depth=1, width=8, heads=2, learned_variance=False)
    return model, {"x": torch.randn(4, 1, 4, 4), "t": torch.tensor([3, 7, 900, 3]), "y": torch.tensor([0, 1, 2, 3])}


EXAMPLE = Example(make=lambda: QuEST(epochs=1), inputs=_plain, hf=tiny_dit)
