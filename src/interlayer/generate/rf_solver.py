"""RF-Solver: steps of a rectified flow by a high-order Taylor expansion, inversion, and edits that share attention values."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core import delivery, recipe
from interlayer.core.example import Example
from interlayer.core.extras import need
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.process import Flow, Guided, Process, RungeKutta, View, adapt, integrate, scheduled
from interlayer.core.process.adapter import FORMS
from interlayer.core.process.paths import Model
from interlayer.core.process.whole import WholeStep, arguments, whole
from interlayer.core.select import At, where
from interlayer.core.values import attentions, record, replay

METHODS = {1: "euler", 2: "midpoint", 3: "kutta"}  # the Taylor step of an order, derivatives by differences


class RFSolver(Transform):
    r"""Integrate a rectified flow by its Taylor expansion, so that inversion returns to the source, and edit with its attention.

    From `Taming Rectified Flow for Inversion and Editing <https://arxiv.org/abs/2411.04746>`_ (Wang et al., ICML 2025). With step
    $h = t_{i-1} - t_i$ and the derivative of the velocity v along the path from a half step,

    $$x_{i-1} = x_i + h v_i + \tfrac{h^2}{2} v_i', \qquad
      v_i' = \frac{v(x_i + \tfrac h2 v_i, t_i + \tfrac h2) - v_i}{h / 2},$$

    which is the explicit midpoint rule, ``x + h v(x + h/2 v, t + h/2)``: order 2 at two evaluations a step. The third order, with
    the second derivative from one evaluation more, is Kutta's rule. Inversion follows the same steps from data to noise.

    ``edit`` inverts with the source's conditions at guidance 1, keeps the values of the last self-attention layers in the
    ``inject`` noisiest steps, and follows the target's conditions back with these values in place of its own: values of an
    inversion's step for the same step, evaluation by evaluation (as in the authors' code, wangjiangshan0725/RF-Solver-Edit; of 38
    single-stream blocks of Flux, they share the last 18). It works on unmodified models by hooks that are gone afterwards, and
    holds ``inject`` x order x layers x [B, S, D] numbers.

    ``plan(...).apply()`` gives a model for loops of others, such as a diffusers pipeline with its Euler scheduler: what it returns
    at a time of the schedule is the velocity of the whole step. Steps that classifier-free guidance combines outside of the
    model are of order 2 each for itself; ``edit`` guides inside of the step.

    Args:
        steps: Steps of the schedule.
        order: 1 (Euler), 2 or 3; as many evaluations a step.
        inject: Noisiest steps that share values. Defaults to four fifths of ``steps``; 0 shares none.
        guidance: Of the edit.
        at: Self-attention layers that share. Defaults to the last 18 of 38, in proportion.
        process: A ``Flow`` or a flow-matching scheduler of diffusers. Defaults to a pipeline's own, or ``Flow()`` for a plain model.

    Shapes: items [B, ...], conditions [B, ...].

    Raises:
        ValueError: An option out of range, a process that is not flow matching, no attention to share, guidance without
            unconditional inputs, a model that already takes whole steps, a plan of order 1.

    Examples:
        >>> from interlayer.models import DiT
        >>> model = DiT(1, 8, patch=4, classes=3, depth=2, width=8, heads=2, learned_variance=False)
        >>> solver, x = RFSolver(steps=4), torch.randn(2, 1, 8, 8)
        >>> zero, one, none = (torch.full((2,), i) for i in (0, 1, 3))
        >>> solver.invert(model, x, zero).shape, solver.edit(model, x, zero, one, null=none).shape
        (torch.Size([2, 1, 8, 8]), torch.Size([2, 1, 8, 8]))
    """

    slug: ClassVar[str] = "rf-solver"

    def __init__(
        self,
        *,
        steps: int = 25,
        order: int = 2,
        inject: int | None = None,
        guidance: float = 5.0,
        at: At | None = None,
        process: Any = None,
    ) -> None:
        inject = round(0.8 * steps) if inject is None else inject
        for name, value, good, wanted in (
            ("steps", steps, steps >= 1, "at least 1"),
            ("order", order, order in METHODS, "1, 2 or 3"),
            ("inject", inject, 0 <= inject <= steps, f"0 to steps, {steps}"),
            ("guidance", guidance, guidance >= 0, "at least 0"),
        ):
            if not good:
                raise ValueError(f"RFSolver: {name} {value}; expected {wanted}.")
        self.steps, self.order, self.inject, self.guidance, self.at = steps, order, inject, guidance, at
        if process is not None:
            _flow(process if isinstance(process, Process) else scheduled(process, tokens=1))
        self.process, self.solver = process, RungeKutta(METHODS[order])

    def view(self, model: Any, shape: Sequence[int] | None = None) -> tuple[Model, Process, nn.Module]:
        """How the model is called, its process, and the module that holds the attention."""
        inner = model if isinstance(model, nn.Module) else getattr(model, "transformer", None)
        if not isinstance(inner, nn.Module):
            raise ValueError(f"RFSolver: {type(model).__name__}; expected a module, or a pipeline with a transformer.")
        if whole(inner):
            raise ValueError(
                f"RFSolver: {type(inner).__name__} takes whole steps already. Give the model that it was made from."
            )
        known, given = type(inner).__name__ in FORMS, self.process
        if known and not isinstance(given, Process):
            view = adapt(model, given, shape=shape)
            return view, _flow(view.process), inner
        process = Flow() if given is None else given if isinstance(given, Process) else scheduled(given)
        return View(inner, process, clip=None) if known else inner, process, inner

    def shared(self, model: nn.Module) -> dict[str, str]:
        """The layers that share their values, with the projections that give them; none if ``inject`` is 0."""
        found = attentions(model) if self.inject else {}
        if self.at is not None:
            fits, parts = where(self.at), dict(model.named_modules())
            chosen = [n for n in found if not fits.why(n, parts[n])]
        else:
            chosen = [*found][-max(1, round(len(found) * 18 / 38)) :]
        if self.inject and not chosen:
            raise ValueError(
                f"RFSolver: {type(model).__name__} has no self-attention to share among {[*found] or 'its layers'}; expected one "
                "with to_v or qkv. Change at, or set inject=0."
            )
        return {n: found[n] for n in chosen}

    def invert(self, model: Any, x: Float[Tensor, "B ..."], *conditions: Tensor) -> Float[Tensor, "B ..."]:
        """The noise that leads to ``x``.

        Args:
            model: A module called as ``model(x, t, *conditions)``, or a model or pipeline of diffusers that ``adapt`` knows.
            x: Clean items; the latents where there is an autoencoder.
            *conditions: What describes them.
        """
        call, process, _ = self.view(model, x.shape)
        return integrate(call, process, self.solver, x, process.times(self.steps).flip(0), *conditions)

    def edit(
        self,
        model: Any,
        x: Float[Tensor, "B ..."],
        source: Tensor | Sequence[Tensor],
        target: Tensor | Sequence[Tensor],
        *,
        null: Any = (),
    ) -> Float[Tensor, "B ..."]:
        """``x`` changed from the source's conditions to the target's.

        Args:
            model: See ``invert``.
            x: See ``invert``.
            source: Conditions that describe ``x``.
            target: Conditions that describe what it should become.
            null: What stands for each condition where there is none, for classifier-free guidance.
        """
        call, process, inner = self.view(model, x.shape)
        source, target, null = ((c,) if isinstance(c, Tensor) else tuple(c) for c in (source, target, null))
        guided = self._guided(call, null)
        times, late = process.times(self.steps), self.steps - self.inject
        up = times.flip(0)
        z = integrate(call, process, self.solver, x, up[: late + 1], *source)
        with record(inner, self.shared(inner).values()) as kept:
            z = integrate(call, process, self.solver, z, up[late:], *source)
        with replay(inner, kept, self.order):
            z = integrate(guided, process, self.solver, z, times[: self.inject + 1], *target)
        return integrate(guided, process, self.solver, z, times[self.inject :], *target)

    def _guided(self, call: Model, null: Sequence[Any]) -> Model:
        if isinstance(call, View):
            return call.guided(self.guidance, *null)
        if self.guidance == 1:
            return call
        if not null:
            raise ValueError(
                f"RFSolver: guidance {self.guidance} without unconditional inputs; expected null=, one for each condition. Give "
                "them, or guidance=1."
            )
        return Guided(call, self.guidance, *null)

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """Say which layers share, and what the model will give.

        Args:
            model: A model of a flow's velocity.
            data: Latents [B, C, H, W], whose shape is read where the scheduler shifts by image size.
            others: None.
        """
        self.take(others)
        if self.order == 1:
            raise ValueError("RFSolver: order 1 is Euler's step, which changes no model. Set order=2 or 3.")
        names = arguments(model)
        _, process, _ = self.view(model, data.shape if isinstance(data, Tensor) else None)
        chosen, form = self.shared(model), FORMS.get(type(model).__name__)
        unit = form.unit if form else 1.0
        structure = {
            "times": (process.times(self.steps) / unit).tolist(),
            "scale": process.start / unit,
            "method": METHODS[self.order],
            "names": names,
        }
        options = {"steps": self.steps, "order": self.order, "inject": self.inject, "guidance": self.guidance}

        def build() -> nn.Module:
            new = copy.deepcopy(model)
            recipe.record(new, self.slug, options, structure)
            return self.restore(new, structure)

        touched = [Row("forward", f"the velocity of a whole step of order {self.order}, one of {self.steps}")]
        touched += [Row(n, f"values shared by edit in {self.inject} steps") for n in chosen]
        skipped = [
            Row(n, "keeps its values", "not among the layers that share") for n in attentions(model) if n not in chosen
        ]
        return Plan(self.slug, options, touched, skipped, build=build)

    def restore(self, model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        """Hook the steps to the model."""
        model.register_forward_hook(WholeStep(**structure), with_kwargs=True)
        return delivery.guard(model, "steps of several evaluations")


def _flow(process: Process) -> Process:
    if not process.straight:
        raise ValueError(
            f"RFSolver: {type(process).__name__} is not flow matching; expected a straight path, such as Flow or a "
            "FlowMatchEulerDiscreteScheduler. A diffusion takes DDIM."
        )
    return process


def _plain() -> tuple[nn.Module]:
    from interlayer.models import DiT

    return (DiT(1, 8, patch=4, classes=3, depth=2, width=8, heads=2, learned_variance=False),)


def _sd3() -> tuple[nn.Module, dict[str, Tensor]]:
    diffusers: Any = need("diffusers", "hf", "rf_solver.EXAMPLE")
    model = diffusers.SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=2, out_channels=2, num_layers=2, attention_head_dim=8, num_attention_heads=1,
        joint_attention_dim=6, caption_projection_dim=8, pooled_projection_dim=5, pos_embed_max_size=4,
    )  # fmt: skip
    x, text, pooled = torch.randn(2, 2, 4, 4), torch.randn(2, 3, 6), torch.randn(2, 5)
    t = torch.full((2,), 500.0)
    return model, {"hidden_states": x, "encoder_hidden_states": text, "pooled_projections": pooled, "timestep": t}


EXAMPLE = Example(make=lambda: RFSolver(steps=4, process=Flow()), inputs=_plain, hf=_sd3)
