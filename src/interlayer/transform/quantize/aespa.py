"""aespa: rounding of one layer after the other that keeps the scores and outputs of attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.blockwise import Part
from interlayer.core.example import Example, tiny_gpt2
from interlayer.core.kinds import Plan, Transform
from interlayer.core.quantizer import AdaRound, Form, Grid, Scaled, attended, columns, forms, reconstruct
from interlayer.core.quantizer.reconstruct import Found, wide
from interlayer.core.select import At

DAMP = 0.01  # of the mean of the diagonal of a moment, added to it
TOLD = {"query": "scores", "key": "scores", "value": "what heads read"}


class Aespa(Transform):
    r"""Round weights layer by layer, each so that attention keeps its scores and outputs, without running the model again.

    Kim et al., Towards Next-Level Post-Training Quantization of Hyper-Scale Transformers, NeurIPS 2024, arXiv:2402.08958. With
    :math:`\Delta` the error of a weight, each head minimises (equations 17, 21 and 22)

    .. math::
        \mathrm{tr}\big(\Delta_V E[X A^T A X^T] \Delta_V^T\big), \quad
        \mathrm{tr}\big(E[K^T K] \Delta_Q E[X X^T] \Delta_Q^T\big), \quad
        \mathrm{tr}\big(E[Q^T Q] \Delta_K E[X X^T] \Delta_K^T\big),

    and all other layers :math:`\mathrm{tr}(\Delta E[X X^T] \Delta^T)`. The moments are computed once for each block, in one pass over
    the calibration data as the blocks before give them; then ranges, a start by GPTQ, and rounding up or down (``AdaRound``) need
    no data. Rotated queries and keys get the mean over positions of the rotated moment, as in the authors' code; keys and values that
    several heads share get the sum over these.

    Which rows of which maps are queries, keys and values is found from what reaches ``scaled_dot_product_attention``: separate and
    fused maps, grouped heads and rotations alike. ``print(plan)`` lists the objective of each layer.

    Unlike the authors' code, the losses are divided by that of the nearest levels for each weight, so that ``strength`` means the same in
    every layer, and its penalty anneals along a cosine, as that of ``AdaRound``. Their options to scale inputs (Z-Fold) and to sort columns
    are left out.

    Cost: one pass with the moments, then for each step about two products of each weight with its moment. Memory: those of
    ``core.quantizer.forms``.

    Args:
        bits: Of the weights, 2 to 8; a scale for each output.
        kind: ``"asymmetric"``, or ``"symmetric"`` with zero at code 0.
        start: What is rounded: the weights as GPTQ moves them (``"gptq"``), or as they are (``"nearest"``).
        steps: Of Adam, for each layer. 0 rounds the start to the nearest levels.
        lr: Learning rate.
        strength: Weight of the penalty that drives each rounding to up or down.
        at: Which layers are rounded. Defaults to all whose weight is their own; the authors leave the head of a language model in
            float, ``at=where(nn.Linear) - "lm_head"``.
        packed: Keep the weights packed (``interlayer.save``). False gives floats on the grid: a plain model, which
            ``save_pretrained`` carries.
        folder: Where each finished block is kept, so that an interrupted run goes on there.

    Shapes: any.

    Raises:
        ValueError: An option out of range; from ``plan``: no calibration data, data that the model does not run on, no layer to
            round, or no attention whose maps are found.

    Examples:
        >>> from interlayer.models import Transformer
        >>> net, text = Transformer(16, 8, 1, 16, 2), torch.randint(16, (4, 8))
        >>> plan = Aespa(bits=3, steps=10).plan(net, text)
        >>> next(row.why for row in plan.touched if "qkv" in row.name)
        '768 weights, 3 bits asymmetric, with block trunk, keeps scores and what heads read'
    """

    slug: ClassVar[str] = "aespa"

    def __init__(
        self,
        *,
        bits: int = 4,
        kind: Literal["asymmetric", "symmetric"] = "asymmetric",
        start: Literal["gptq", "nearest"] = "gptq",
        steps: int = 500,
        lr: float = 0.1,
        strength: float = 30.0,
        at: At | None = None,
        packed: bool = True,
        folder: str | Path | None = None,
    ) -> None:
        for name, given, wanted in (
            ("kind", kind, ("asymmetric", "symmetric")),
            ("start", start, ("gptq", "nearest")),
        ):
            if given not in wanted:
                raise ValueError(f"aespa: {name} {given!r}; expected {' or '.join(map(repr, wanted))}.")
        if not (isinstance(bits, int) and 2 <= bits <= 8):
            raise ValueError(f"aespa: bits {bits!r}; expected an integer from 2 to 8.")
        if steps < 0 or not lr > 0 or not strength >= 0:
            raise ValueError(
                f"aespa: steps {steps}, lr {lr}, strength {strength}; expected at least 0, above 0, at least 0."
            )
        self.grid, self.at, self.packed, self.folder = Grid(bits, 0, kind), at, packed, folder
        self.options: dict[str, Any] = {"bits": bits, "start": start, "steps": steps, "lr": lr, "strength": strength}

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """List the layers, each with its block and objective; ``apply`` rounds them."""
        self.take(others)
        batches = taps.batches(data, self.slug)
        plan = reconstruct(
            model, batches, self.grid, self.solve, at=self.at, by="minmax", packed=self.packed, folder=self.folder,
            name=self.slug, options=self.options,
        )  # fmt: skip
        there = {row.name: model.get_submodule(row.name) for row in plan.touched}
        with taps.at_rest(model):
            pieces = attended(lambda: next(taps.feed(model, batches[:1])), there)
        if not pieces:
            raise ValueError(
                f"aespa: {type(model).__name__} has no attention between linear maps that are rounded: none reaches torch's "
                "scaled_dot_product_attention. Load a Hugging Face model with attn_implementation='sdpa', or use "
                "quantizer.reconstruct with gptq()."
            )
        kept = {n: list(dict.fromkeys(TOLD[p.role] for p in pieces if p.layer == n)) for n in there}
        plan.touched = [
            replace(r, why=f"{r.why}, keeps {' and '.join(kept[r.name]) or 'its own output'}") for r in plan.touched
        ]
        return plan

    def objectives(self, part: Part, there: Mapping[str, nn.Module]) -> dict[str, list[Form]]:
        """What the errors of the layers of a block do."""
        return forms(part, there)

    def solve(self, part: Part, there: Mapping[str, nn.Module], held: Mapping[str, Scaled]) -> Found:
        """Codes of the layers of one block."""
        found: Found = {}
        for name, mine in self.objectives(part, there).items():
            weight = wide(there[name]).flatten(1)
            scale, zero = torch.empty_like(weight[:, 0]), torch.empty_like(weight[:, 0])
            codes = torch.empty_like(weight)
            for form in mine:
                scaled, values = self.rounded(weight[form.rows], damped(form))
                at = form.rows.flatten()
                scale[at], zero[at] = scaled.scale, scaled.zero
                codes[at] = values.to(codes)
            whole = codes.view(wide(there[name]).shape).to(torch.int8 if self.grid.low else torch.uint8)
            found[name] = Scaled(self.grid, scale, zero), whole
        return found

    def rounded(self, weight: Float[Tensor, "G K I"], form: Form) -> tuple[Scaled, Integer[Tensor, "GK I"]]:
        """The range with the least loss by the right moment, the start, and the rounding with the least loss."""
        flat = weight.flatten(0, 1)
        right = form.right.to(flat)

        def measure(off: Tensor) -> Tensor:
            each = off.view(len(right), -1, off.shape[-1])
            return (each @ right * each).sum(-1).flatten()

        held = self.grid.fit(flat, measure)
        nearest = held.codes(flat)
        codes, start = columns(flat, right, held, damp=0.0) if self.options["start"] == "gptq" else (nearest, flat)
        steps = self.options["steps"]
        if not steps:
            return held, codes
        unit = float(form.loss(held.values(nearest).view_as(weight) - weight)) / weight.numel()
        made = AdaRound(start, held)
        optimizer = torch.optim.Adam(made.parameters(), self.options["lr"])
        with torch.enable_grad():
            for step in range(steps):
                error = made.value(start).view_as(weight) - weight
                loss = (
                    2 / max(unit, 1e-30) * (error * form.slope(error.detach())).sum()
                )  # its gradient is that of the form
                if (penalty := made.penalty(step / steps)) is not None:
                    loss = loss + self.options["strength"] / made.WEIGHT * penalty
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            return made.found(start)


def damped(form: Form) -> Form:
    """The form with a share of the mean of the diagonal added to its right moment."""
    diagonal = form.right.diagonal(dim1=-2, dim2=-1)
    more = torch.diag_embed((DAMP * diagonal.mean(-1, keepdim=True)).clamp_min(1e-12).expand_as(diagonal))
    return replace(form, right=form.right + more)


def _transformer() -> tuple[nn.Module, Tensor]:
    from interlayer.models import Transformer

    return Transformer(16, 8, 1, 8, 2), torch.randint(16, (2, 6))


EXAMPLE = Example(make=lambda: Aespa(steps=3), inputs=_transformer, hf=tiny_gpt2)
