"""DiTAS: diffusion Transformers at 4-bit weights and 8-bit inputs, smoothed over all steps of sampling, without any data."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from interlayer.core import taps
from interlayer.core.example import Example
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.process import drawn
from interlayer.core.quantizer import Corrected, Grid, alternate, extremes, layers, packs, weight_of
from interlayer.core.quantizer.modulated import divide, sources
from interlayer.core.quantizer.smooth import Fold, apply, foldable, one
from interlayer.core.select import At
from interlayer.transform.quantize._dit import tiny_dit

INPUTS = Grid(8, kind="asymmetric")
LEAST = 1e-4  # magnitude of a feature or column that never moves
RATIO = 36  # smaller side of a matrix for each rank, at least; 32 of 1152 in DiT-XL


class DiTAS(Transform):
    r"""Round the Transformer blocks of a diffusion model to 4 or 8-bit weights and 8-bit inputs, from its own sampling runs.

    Dong and Zhang, DiTAS: Quantizing Diffusion Transformers via Enhanced Activation Smoothing, WACV 2025, arXiv:2409.07756.

    1. Temporal-aggregated smoothing: feature j of a layer's inputs is divided by
       :math:`s_j = (\max_t |X^t_j|)^\alpha / (\max_i |W_{ij}|)^{1 - \alpha}`, and column j of its weight multiplied by it. The
       maximum is over all steps t of sampling runs.
    2. Layer-wise grid search: the :math:`\alpha` of ``alphas`` with the least squared error of the rounded layer's output over
       all steps. Maps that read the same tensor share one.
    3. What rounding does to the weights is made up for by a product of low rank, found by turns and without data:
       :math:`Q = round(W - L R)`, :math:`L R = svd_r(W - Q)` (``core.quantizer.alternate``).

    Division happens before the layer, in gains and shifts of adaptive norms (adaLN-Zero), in affine norms, or in values of attention.
    Inputs that an activation function gives, as those of the second map of an MLP, are divided in the call. Layers are the linear
    maps of repeated blocks that read tokens; maps of the conditioning, embeddings and the last layer stay in float.

    Compared with the authors' code: inputs are rounded by token, not by one range for each call, so the items of a batch stay
    independent; weights have a scale for each output, not for each 32 in a column, so products are of integers; smoothing comes before
    the product of low rank, not after, and its strength is searched without that product; and the rank of small matrices is less.

    Cost: a sampling run, one pass over its calls for the ranges, and one pass whose layers are computed once more for each alpha.
    Memory: the inputs of each call, two numbers for each feature, and a copy of the model.

    Args:
        bits: Of weights, 2 to 8: 4 gives W4A8, 8 W8A8.
        alphas: Number of values from 0 to 1 that are tried, evenly spaced; 1 takes 0.5 and needs no search.
        rank: Largest rank of the products, 0 for none; a layer's is at most 1/36 of its matrix's smaller side, and at least 1.
        steps: Of the sampling runs, where no data is given.
        examples: Images of the sampling runs.
        scheduler: Of diffusers, whose noise the model was trained with. Defaults to DiT's, 1000 linearly rising betas.
        seed: Of noise and classes.
        at: Among which layers. Defaults to all.

    Shapes: any.

    Raises:
        ValueError: An option out of range; from ``plan``: no data for a model whose inputs ``core.process.drawn`` cannot draw
            (record them with ``core.process.visited``), or no linear map of a block that reads tokens.

    Examples:
        >>> from diffusers import DiTTransformer2DModel
        >>> net = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=2, num_layers=2, sample_size=4,
        ...                             patch_size=2, num_embeds_ada_norm=10, norm_num_groups=1)
        >>> new = DiTAS(steps=2, examples=2, alphas=3).plan(net).apply()
        >>> new.transformer_blocks[0].ff.net[2].inputs.bits
        8
    """

    slug: ClassVar[str] = "ditas"

    def __init__(
        self,
        *,
        bits: int = 4,
        alphas: int = 21,
        rank: int = 32,
        steps: int = 50,
        examples: int = 16,
        scheduler: Any = None,
        seed: int = 0,
        at: At | None = None,
    ) -> None:
        if not (isinstance(bits, int) and 2 <= bits <= 8 and alphas >= 1 and rank >= 0):
            raise ValueError(
                f"ditas: bits {bits!r}, alphas {alphas}, rank {rank}; expected 2 to 8 bits, 1 alpha or more, and a rank of at least 0."
            )
        if steps < 1 or examples < 1:
            raise ValueError(f"ditas: steps {steps}, examples {examples}; expected at least 1 of each.")
        self.bits, self.alphas, self.rank, self.at = bits, alphas, rank, at
        self.steps, self.examples, self.scheduler, self.seed = steps, examples, scheduler, seed
        self.grid = Grid(bits, 0, kind="asymmetric")

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """Sample, or take the calls in ``data``, find the ranges over all steps and search for each layer's alpha."""
        self.take(others)
        batches = self.drawn(model) if data is None else taps.batches(data, self.slug)
        there, skipped = layers(model, self.at)
        there, groups, why = _grouped(model, batches, there)
        skipped += [Row(n, type(model.get_submodule(n)).__name__, f"{w}, stays in float") for n, w in why.items()]
        ends = extremes(model, tqdm(batches, "ranges", disable=None, leave=False), dict.fromkeys(groups, -1))
        reach = {
            key: (
                ends[key].abs().amax(-1).clamp_min(LEAST),
                torch.stack([weight_of(there[n]).detach().abs().amax(0) for n in names]).amax(0).clamp_min(LEAST),
            )
            for key, names in groups.items()
        }
        found = self.searched(model, batches, groups, reach)
        scales = {key: self.scale(*reach[key], alpha) for key, alpha in found.items()}
        norms, _ = foldable(model, batches, there)
        norm_of = {key: norm for key, names in groups.items() for norm, each in norms.items() if each == names}
        source_of = sources(model, {k: names for k, names in groups.items() if k not in norm_of}, batches[0])
        touched = []
        for key, names in groups.items():
            where = norm_of.get(key) or (source_of[key].name if key in source_of else "the call")
            for n in names:
                rank = self.rank_of(there[n])
                what = (
                    f"{weight_of(there[n]).numel()} weights, {self.bits} bits and rank {rank}; inputs 8 bits by token"
                )
                touched.append(Row(n, type(there[n]).__name__, f"{what}; alpha {found[key]:.2f}, divided in {where}"))
        options = {"bits": self.bits, "alphas": self.alphas, "rank": self.rank}

        def build() -> nn.Module:
            work = copy.deepcopy(model)
            for key, names in groups.items():
                maps = [work.get_submodule(n) for n in names]
                if key in norm_of:
                    apply(work.get_submodule(norm_of[key]), maps, Fold(names, scales[key]))
                    continue
                if key in source_of:
                    divide(work, source_of[key], scales[key])
                for m in maps:
                    weight_of(m).data.mul_(scales[key].to(weight_of(m)))
            new = dict[str, nn.Module]()
            for key, names in groups.items():
                divisor = None if key in norm_of or key in source_of else scales[key]
                new |= {n: self.corrected(work.get_submodule(n), divisor) for n in names}
            changed = {*norm_of.values(), *(s.name for s in source_of.values() if s.name not in new)}
            held = {n: work.get_submodule(n) for n in changed}
            return packs(model, new, {"method": self.slug, **options}, norms=held)

        return Plan(self.slug, options, touched, skipped, build)

    def drawn(self, model: nn.Module) -> list[dict[str, Any]]:
        """The calls of sampling runs of a DiT, of random classes and guided."""
        return drawn(
            self.slug, model, steps=self.steps, examples=self.examples, scheduler=self.scheduler, seed=self.seed
        )

    def searched(
        self,
        model: nn.Module,
        batches: list[Any],
        groups: Mapping[str, list[str]],
        reach: Mapping[str, tuple[Tensor, Tensor]],
    ) -> dict[str, float]:
        """The alpha of each group with the least squared error of its rounded maps over all batches."""
        if self.alphas == 1:
            return dict.fromkeys(groups, 0.5)
        tried = torch.linspace(0, 1, self.alphas).tolist()
        errors = {key: torch.zeros(len(tried)) for key in groups}
        weights = {key: [weight_of(model.get_submodule(n)).detach() for n in names] for key, names in groups.items()}

        def see(key: str, x: Tensor) -> None:
            x = x.flatten(0, -2)
            for k, alpha in enumerate(tried):
                scale = self.scale(*reach[key], alpha).to(x)
                near = INPUTS.by_token(x / scale).fake(x / scale)
                for weight in weights[key]:
                    rounded = self.grid.fit(weight * scale).fake(weight * scale)
                    errors[key][k] += (F.linear(near, rounded) - F.linear(x, weight)).square().sum().cpu()

        with taps.at_rest(model), torch.no_grad(), taps.watch(model, lambda n, m: n in groups, see, side="input"):
            for batch in tqdm(batches, "alphas", disable=None, leave=False):
                next(taps.feed(model, [batch]))
        return {key: tried[int(e.argmin())] for key, e in errors.items()}

    def scale(
        self, tops: Float[Tensor, " features"], columns: Float[Tensor, " features"], alpha: float
    ) -> Float[Tensor, " features"]:
        """``tops^alpha / columns^(1 - alpha)``, from the largest magnitudes of features and of columns."""
        return (tops.to(columns).pow(alpha) / columns.pow(1 - alpha)).clamp_min(LEAST)

    def rank_of(self, layer: nn.Module) -> int:
        """The rank of a layer's product."""
        return min(self.rank, max(1, min(weight_of(layer).shape) // RATIO))

    def corrected(self, layer: nn.Module, divisor: Tensor | None) -> Corrected:
        """The rounded layer with its product."""
        weight, rank = weight_of(layer).detach(), self.rank_of(layer)
        if not rank:
            return Corrected(layer, self.grid.fit(weight), inputs=INPUTS, divisor=divisor)
        held, codes, factors = alternate(weight, self.grid, rank)
        return Corrected(layer, held.to(weight), codes=codes, inputs=INPUTS, factors=factors, divisor=divisor)


def _grouped(
    model: nn.Module, batches: list[Any], there: Mapping[str, nn.Module]
) -> tuple[dict[str, nn.Module], dict[str, list[str]], dict[str, str]]:
    """The maps that are rounded, the same by the tensor that they read, and the others with the reason."""
    seen, why = dict[str, Tensor](), dict[str, str]()
    with (
        taps.at_rest(model),
        torch.no_grad(),
        taps.watch(model, lambda n, m: n in there, lambda n, x: seen.update({n: x}), side="input"),
    ):
        next(taps.feed(model, [one(batches[0])]))
    for n, m in there.items():
        if n not in seen:
            why[n] = "never ran on the data"
        elif weight_of(m).ndim != 2 or seen[n].ndim < 3:
            why[n] = "reads no tokens"
        elif not any(part.isdigit() for part in n.split(".")[:-1]):
            why[n] = "in no repeated block"
    kept, groups = {n: m for n, m in there.items() if n not in why}, dict[str, list[str]]()
    for n in kept:
        same = [g for g in groups if seen[g].data_ptr() == seen[n].data_ptr() and seen[g].shape == seen[n].shape]
        groups.setdefault(same[0] if same else n, []).append(n)
    if not groups:
        raise ValueError(f"ditas: {type(model).__name__} has no linear map of a repeated block that reads tokens.")
    return kept, groups, why


def _plain() -> tuple[nn.Module, Tensor]:
    from interlayer.models import Transformer

    return Transformer(8, 4, 1, 8, 2), torch.randint(8, (2, 4))


EXAMPLE = Example(make=lambda: DiTAS(alphas=3), inputs=_plain, hf=tiny_dit)
