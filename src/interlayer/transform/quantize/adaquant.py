"""AdaQuant: each layer's weights, bias and ranges calibrated on a tiny set, and bits allocated by an integer programme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from interlayer.core import taps
from interlayer.core.allocate import Curve, allocate
from interlayer.core.example import Example, tiny_gpt2
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.paths import estimate_statistics
from interlayer.core.quantizer import Grid, Learned, Rounder, Scaled, layers, learned, reconstruct, through, weight_of
from interlayer.core.quantizer.after import divergence, logits, tune
from interlayer.core.quantizer.grid import By
from interlayer.core.select import At, put


class Calibrated(Rounder):
    r"""Rounding to the nearest level of a weight that moves, on a grid that moves.

    :math:`\hat W = s\,(\mathrm{clip}(\lfloor (W + V) / s \rceil + z, low, high) - z)`. Learned are V, in units of the standard deviation of
    W; the scale s, as a logarithm; and z, as a share of the range. All start at zero, so it starts at round-to-nearest. Gradients pass the
    rounding. Nothing keeps a weight within one step of where it was, as AdaRound does.

    Args:
        weight: Outputs first.
        held: The grid at first.

    Examples:
        >>> weight = torch.randn(4, 3)
        >>> held = Grid(4, kind="asymmetric").fit(weight)
        >>> torch.allclose(Calibrated(weight, held).value(weight), held.fake(weight), atol=1e-5)
        True
    """

    def __init__(self, weight: Float[Tensor, "out ..."], held: Scaled) -> None:
        super().__init__(weight, held)
        self.unit = float(weight.std(correction=0))
        self.by = nn.Parameter(torch.zeros_like(weight))
        self.grid = Learned(held)

    def value(self, weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
        """The rounded weight."""
        now = self.grid.now()
        return through(weight + self.unit * self.by, now.grid, now.scale, now.zero)

    def found(self, weight: Float[Tensor, "out ..."]) -> tuple[Scaled, Tensor]:
        """The learned grid, and the codes nearest to the moved weight."""
        held = self.grid.found()
        return held, held.codes(weight + self.unit * self.by)


class AdaQuant(Transform):
    r"""Calibrate a quantised model layer by layer, each on its own outputs; choose bits by an integer programme; tune norms and biases.

    Hubara et al., Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming, arXiv:2006.10518.

    1. Each layer's weight, bias, and the grids of its weight and inputs minimise :math:`\|W X + b - (Q(W + V) Q(X) + \hat b)\|^2` over the
       calibration data (``Calibrated``). A layer has few parameters for the many outputs that it must give, so a tiny set is enough.
    2. Given several widths, an integer programme chooses one for each layer. What a layer loses at a width is measured: the model with
       all layers at the largest width, and this one at that. The losses are added up.
    3. Statistics of batch norms are estimated again in the quantised model.
    4. Biases of all layers are trained together towards the float model's outputs.

    The published code trains at fixed rates that were tuned for 8 bits; here one rate holds for all parts, relative to their size, which
    is the rule that its comments name. It compares some layers behind their ReLU, and folds batch norms into convolutions first; grids for
    each output channel make that the same but for rounding of the bias.

    Cost: ``steps`` forward and backward passes of each layer over one batch, and as many passes of the whole model as there are
    layers where it is no chain. With several widths, that for each width, and a pass for each layer and width. Memory: a copy of the
    model, the inputs and outputs of one layer for all batches, and four times its weights; with several widths, one packed model for each.

    Args:
        bits: Of the weights, 2 to 8; or several, among which ``average`` or ``loss`` decides.
        inputs: Bits of the inputs of the same layers; ``"same"`` as the weight of each has, or ``"float"``.
        average: With several widths: most bits that a weight may have on average. The total loss is least.
        loss: With several widths: most total loss, in nats of the divergence of the outputs' softmax from the float model's. The size
            is least.
        mode: ``"sequential"``: each layer is calibrated on what the calibrated layers before it give, and makes up for their errors.
            ``"parallel"``: on inputs from the float model, so that layers are independent.
        by: How ranges are chosen at first; see ``Grid.fit``.
        steps: For each layer.
        lr: First learning rate, of everything relative to its size.
        norms: Estimate the statistics of batch norms again. Of most use with ``mode="parallel"``, and with a few hundred examples or more.
        tuned: Steps in which biases are trained; 0 for none. Batch norms and layer norms have biases too.
        rate: Learning rate of these biases.
        at: Which linear maps and convolutions are rounded. Defaults to all whose weight is their own.
        packed: Keep the weights packed. False gives a plain model of floats on the grid, with ``inputs="float"`` only.
        folder: Where each finished layer is kept, so that an interrupted run goes on there.
        seed: Of the order of the batches.

    Shapes: any. ``loss``, several widths and ``tuned`` take the first tensor that the model gives as logits, [..., classes].

    Raises:
        ValueError: An option out of range, several widths with not exactly one budget, a budget that cannot be met; from ``plan``: no
            calibration data, data that the model does not run on, or no layer to round.

    Examples:
        >>> net, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(64, 16)
        >>> new = AdaQuant(bits=(2, 4, 8), average=4).plan(net, x).apply()
        >>> sorted(m.grid.bits for m in new if hasattr(m, "grid"))[0] in (2, 4)
        True
    """

    slug: ClassVar[str] = "adaquant"

    def __init__(
        self,
        *,
        bits: int | Sequence[int] = 4,
        inputs: int | Literal["same", "float"] = "same",
        average: float | None = None,
        loss: float | None = None,
        mode: Literal["sequential", "parallel"] = "sequential",
        by: By = "mse",
        steps: int = 100,
        lr: float = 1e-2,
        norms: bool = False,
        tuned: int = 0,
        rate: float = 1e-2,
        at: At | None = None,
        packed: bool = True,
        folder: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        widths = [bits] if isinstance(bits, int) else sorted(set(bits))
        if not widths or not all(isinstance(b, int) and 2 <= b <= 8 for b in widths):
            raise ValueError(f"adaquant: bits {bits!r}; expected integers from 2 to 8.")
        if inputs not in ("same", "float") and not (isinstance(inputs, int) and 1 <= inputs <= 8):
            raise ValueError(f"adaquant: inputs {inputs!r}; expected 'same', 'float' or an integer from 1 to 8.")
        if mode not in ("sequential", "parallel"):
            raise ValueError(f"adaquant: mode {mode!r}; expected 'sequential' or 'parallel'.")
        if (average is not None) + (loss is not None) != (len(widths) > 1):
            raise ValueError(
                f"adaquant: bits {bits!r}, average {average}, loss {loss}; expected one of average and loss with several "
                "widths, and neither with one."
            )
        if average is not None and average < widths[0]:
            raise ValueError(f"adaquant: average {average}; expected at least {widths[0]}, the smallest of bits.")
        if loss is not None and not loss >= 0:
            raise ValueError(f"adaquant: loss {loss}; expected at least 0.")
        if steps < 1 or tuned < 0 or not lr > 0 or not rate > 0:
            raise ValueError(
                f"adaquant: steps {steps}, tuned {tuned}, lr {lr}, rate {rate}; expected at least 1, at least 0, and above 0."
            )
        if not packed and inputs != "float":
            raise ValueError(
                "adaquant: rounded inputs cannot become plain floats; expected packed=True, or inputs='float'."
            )
        self.widths, self.inputs, self.average, self.loss = widths, inputs, average, loss
        self.mode, self.by, self.at, self.packed, self.folder = mode, by, at, packed, folder
        self.norms, self.tuned, self.rate = norms, tuned, rate
        self.options: dict[str, Any] = {"steps": steps, "lr": lr, "mode": mode, "seed": seed}

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """List the layers; ``apply`` calibrates them."""
        self.take(others)
        batches = taps.batches(data, self.slug)
        names = list(layers(model, self.at)[0])
        largest = self._layerwise(model, batches, names, self.widths[-1], parallel=self.mode == "parallel")
        rounded = [row.name for row in largest.touched]
        norms = [
            n for n, m in model.named_modules() if self.norms and isinstance(m, _BatchNorm) and m.track_running_stats
        ]
        several = " or ".join(f"{b} bits" for b in self.widths) if len(self.widths) > 1 else ""
        given = f"{self.widths[-1]} bits"
        touched = [Row(r.name, r.what, r.why.replace(given, several or given)) for r in largest.touched]
        touched += [Row(n, type(model.get_submodule(n)).__name__, "statistics estimated again") for n in norms]
        skipped = [r for r in largest.skipped if r.name not in norms]

        def build() -> nn.Module:
            chosen = largest
            if several:
                bits = self._allocated(model, batches, rounded)
                chosen = self._layerwise(model, batches, rounded, bits, parallel=self.mode == "parallel")
            new = chosen.apply()
            if norms:
                estimate_statistics(new, batches)
            if self.tuned:
                tune(new, model, batches, steps=self.tuned, lr=self.rate, seed=self.options["seed"])
            return new

        return Plan(self.slug, largest.options, touched, skipped, build)

    def _layerwise(
        self, model: nn.Module, batches: list[Any], names: list[str], bits: int | Mapping[str, int], *, parallel: bool
    ) -> Plan:
        """The plan that calibrates these layers, each on its own."""
        widths = dict.fromkeys(names, bits) if isinstance(bits, int) else bits
        grids = {n: Grid(b, 0, "asymmetric") for n, b in widths.items()}
        given = None
        if self.inputs != "float":
            given = {
                n: Grid(b if self.inputs == "same" else self.inputs, None, "asymmetric") for n, b in widths.items()
            }
        lr, seed = self.options["lr"], self.options["seed"]
        solve = learned(Calibrated, steps=self.options["steps"], lr=lr, inputs=lr, biases=lr, seed=seed)
        return reconstruct(
            model, batches, grids, solve, inputs=given, blocks=names, at=names, by=self.by, packed=self.packed,
            prefix="original" if parallel else "changed", folder=self.folder, name=self.slug, options=self.options,
        )  # fmt: skip

    def losses(self, model: nn.Module, batches: list[Any], names: list[str]) -> list[list[float]]:
        """What each layer loses at each width, in nats, while all others have the largest."""
        wanted = logits(model, batches)
        models = {b: self._layerwise(model, batches, names, b, parallel=True).apply() for b in self.widths}
        whole = models.pop(self.widths[-1])

        def lost() -> float:
            pairs = zip(logits(whole, batches), wanted, strict=True)
            return sum(float(divergence(found, exact)) for found, exact in pairs) / len(wanted)

        least, found = lost(), list[list[float]]()
        for n in names:
            largest, row = whole.get_submodule(n), list[float]()
            for new in models.values():
                put(whole, n, new.get_submodule(n))
                row.append(max(lost() - least, 0.0))
            put(whole, n, largest)
            found.append([*row, 0.0])
        return found

    def _allocated(self, model: nn.Module, batches: list[Any], names: list[str]) -> dict[str, int]:
        """The bits of each layer, by the integer programme."""
        losses = self.losses(model, batches, names)
        weights = [weight_of(model.get_submodule(n)).numel() for n in names]
        sizes = [[float(w * b) for b in self.widths] for w in weights]
        if self.average is not None:
            costs, lost, budget = sizes, losses, self.average * sum(weights)
        else:
            costs, lost, budget = losses, sizes, float(self.loss or 0)
        curves = [Curve(cost=c, loss=e) for c, e in zip(costs, lost, strict=True)]
        choice = allocate(curves, budget, method="integer").choice
        return {n: self.widths[k] for n, k in zip(names, choice, strict=True)}


def _plain() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    return net, torch.randn(4, 1, 8, 8)


EXAMPLE = Example(make=lambda: AdaQuant(steps=3, norms=True), inputs=_plain, hf=lambda: tiny_gpt2(1))
