import copy

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import nn

import interlayer
from interlayer.core.process import Diffusion, Flow, RungeKutta, adapt, integrate
from interlayer.core.process.adapter import pack, unpack
from interlayer.generate.rf_solver import RFSolver
from interlayer.models import DiT

SHIFTING = {"use_dynamic_shifting": True}


def filled(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _, p in sorted(model.named_parameters()):
        p.data = torch.randn(p.shape, generator=generator) * (1.0 if p.ndim == 1 else p.shape[-1] ** -0.5)
    return model.eval()


def flux(singles=4):
    return filled(
        FluxTransformer2DModel(
            in_channels=8, num_layers=1, num_single_layers=singles, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=6, pooled_projection_dim=5, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
        )
    )  # fmt: skip


def sd3():
    return filled(
        SD3Transformer2DModel(
            sample_size=8, in_channels=2, out_channels=2, num_layers=2, attention_head_dim=8, num_attention_heads=1,
            joint_attention_dim=6, caption_projection_dim=8, pooled_projection_dim=5, pos_embed_max_size=8,
        )
    )  # fmt: skip


def dit():
    torch.manual_seed(0)
    model = DiT(1, 8, patch=4, classes=3, depth=2, width=8, heads=2, learned_variance=False)
    return filled(model)


def inputs(seed=1):
    """Latents, and text and pooled text of a source and of a target."""
    generator = torch.Generator().manual_seed(seed)
    x, *rest = (torch.randn(s, generator=generator) for s in ((2, 2, 4, 6), (2, 5, 6), (2, 5), (2, 5, 6), (2, 5)))
    return x, tuple(rest[:2]), tuple(rest[2:])


def test_it_computes_what_the_authors_code_computes():
    """Figures of wangjiangshan0725/RF-Solver-Edit, commit 3388e29: Flux with these weights, 5 steps, the first 4 of the edit shared."""
    model, (x, source, target) = flux(38), inputs()
    solver = RFSolver(steps=5, process=FlowMatchEulerDiscreteScheduler(**SHIFTING))
    assert list(solver.shared(model)) == [f"single_transformer_blocks.{i}.attn" for i in range(20, 38)]
    found = solver.invert(model, x, *source)
    torch.testing.assert_close(
        found[0, 0, 1], torch.tensor([-1.53074, -0.53289, -1.31831, 1.52938, -1.35362, 0.85400]), rtol=0, atol=2e-4
    )
    torch.testing.assert_close(found.square().mean(), torch.tensor(4.77833), rtol=1e-4, atol=0)
    found = solver.edit(model, x, source, target)
    torch.testing.assert_close(
        found[0, 0, 1], torch.tensor([-0.10010, -4.31717, 0.15885, -2.35825, 0.11145, -2.96255]), rtol=0, atol=2e-4
    )
    torch.testing.assert_close(found.square().mean(), torch.tensor(2.90162), rtol=1e-4, atol=0)
    alone = RFSolver(steps=5, inject=0, process=FlowMatchEulerDiscreteScheduler(**SHIFTING))
    torch.testing.assert_close(
        alone.edit(model, x, source, target)[0, 0, 1],
        torch.tensor([-0.17207, -4.19241, 0.08295, -2.24393, 0.02790, -2.86596]), rtol=0, atol=2e-4,
    )  # fmt: skip


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_step_is_the_taylor_expansion(order):
    """With derivatives from differences of the velocity along the path, as the paper writes it."""

    def v(x, t):
        return torch.sin(3 * x) * (1 + t.view(-1, 1))

    x, t, h = torch.randn(4, 2).double(), torch.tensor(0.9).double(), torch.tensor(-0.2).double()
    first = v(x, t)
    half = v(x + h / 2 * first, t + h / 2)
    if order == 1:
        wanted = x + h * first
    elif order == 2:
        wanted = x + h * first + h**2 / 2 * (half - first) / (h / 2)
    else:
        end = v(x + h * (2 * half - first), t + h)
        slope, bend = (4 * half - 3 * first - end) / h, 4 * (first - 2 * half + end) / h**2
        wanted = x + h * first + h**2 / 2 * slope + h**3 / 6 * bend
    found = integrate(v, Flow(1.0), RFSolver(order=order).solver, x, torch.stack((t, t + h)))
    torch.testing.assert_close(found, wanted)


def test_inversion_at_equal_evaluations():
    """To noise and back on tiny Flux: closer to the source than Euler with as many calls of the model."""
    model, (x, source, _) = flux(), inputs()
    scheduler = FlowMatchEulerDiscreteScheduler(**SHIFTING)
    errors = []
    for order, steps in ((2, 10), (1, 20)):
        solver = RFSolver(steps=steps, order=order, process=scheduler)
        view = adapt(model, scheduler, shape=x.shape)
        noise = solver.invert(model, x, *source)
        errors.append(
            (integrate(view, view.process, solver.solver, noise, view.process.times(steps), *source) - x).norm()
        )
    assert errors[0] < errors[1] / 4


def test_an_unmodified_pipeline_takes_its_steps():
    model, scheduler = flux(), FlowMatchEulerDiscreteScheduler(**SHIFTING)
    x, source, _ = inputs()
    view = adapt(model, scheduler, shape=x.shape)
    wanted = integrate(view.guided(3.5), view.process, RungeKutta(), x, view.process.times(6), *source)
    new = RFSolver(steps=6, process=scheduler).plan(model, x).apply()
    pipe = FluxPipeline(scheduler, None, None, None, None, None, new)
    pipe.set_progress_bar_config(disable=True)
    found = pipe(
        prompt_embeds=source[0], pooled_prompt_embeds=source[1], latents=pack(x), height=32, width=48,
        num_inference_steps=6, guidance_scale=3.5, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(unpack(found, 4, 6), wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_saved_compiled_and_in_low_precision(tmp_path):
    model, x, t, y = dit(), torch.randn(3, 1, 8, 8), torch.tensor([1000.0, 500.0, 40.0]), torch.tensor([0, 1, 2])
    new = RFSolver(steps=8).plan(model).apply()
    wanted = new(x, t, y)
    assert (wanted - model(x, t, y)).abs().max() > 1e-3
    interlayer.save(new, tmp_path)
    again = interlayer.load(tmp_path, base=dit())
    for other in (again, copy.deepcopy(new), torch.compile(new, backend="eager", fullgraph=True)):
        torch.testing.assert_close(other(x, t, y), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert (new(x, t, y) - wanted).norm() < 0.05 * wanted.norm()
    exported = torch.export.export(new, (x, t, y), dynamic_shapes=({0: torch.export.Dim("b", max=64)},) * 3)
    torch.testing.assert_close(exported.module()(x[:2], t[:2], y[:2]), wanted[:2])


@pytest.mark.parametrize(("order", "make"), [(2, flux), (2, sd3), (3, sd3)])
def test_an_edit_that_changes_nothing_returns_the_source(order, make):
    """With the source as target and guidance 1, all values are nearly its own; without sharing it is a mere round trip."""
    x, source, target = inputs()
    model = make()
    before = [p.clone() for p in model.parameters()]
    options = {"steps": 16, "order": order, "guidance": 1.0, "process": FlowMatchEulerDiscreteScheduler()}
    same = RFSolver(**options).edit(model, x, source, source)
    moved = RFSolver(**options).edit(model, x, source, target)
    assert (same - x).norm() < 0.1 * (moved - x).norm()
    view = adapt(model, options["process"])
    alone = RFSolver(**options, inject=0)
    times = view.process.times(16)
    noise = alone.invert(model, x, *source)
    wanted = integrate(view, view.process, alone.solver, noise, times, *target)
    torch.testing.assert_close(alone.edit(model, x, source, target), wanted)
    assert (moved - wanted).abs().max() > 1e-4
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(m._forward_hooks for m in model.modules())


def test_guidance_and_fused_projections():
    """Classifier-free guidance doubles the batch, and both halves get the source's values; fused layers give the same edit."""
    (x, source, target), null = inputs(), inputs(2)[1]
    model, process = sd3(), FlowMatchEulerDiscreteScheduler(shift=3.0)
    solver = RFSolver(steps=5, guidance=4.0, process=process)
    found = solver.edit(model, x, source, target, null=null)
    view = adapt(model, process)
    times = view.process.times(5)
    noise = RFSolver(steps=5, process=process, inject=0).edit(model, x, source, target, null=null)
    assert found.isfinite().all() and (found - noise).abs().max() > 1e-4 and len(times) == 6
    model.fuse_qkv_projections()
    torch.testing.assert_close(solver.edit(model, x, source, target, null=null), found, rtol=1e-4, atol=1e-4)


def test_which_layers_share():
    plan = RFSolver(steps=4, process=Flow()).plan(flux(6))
    assert [r.name for r in plan.touched] == ["forward", *(f"single_transformer_blocks.{i}.attn" for i in (3, 4, 5))]
    assert [r.name for r in plan.skipped] == [f"single_transformer_blocks.{i}.attn" for i in (0, 1, 2)]
    assert list(RFSolver(at="blocks.0.*").shared(dit())) == ["blocks.0.mixer"]
    assert RFSolver(inject=0).shared(dit()) == {} and RFSolver(steps=10).inject == 8 and RFSolver().inject == 20


def test_errors():
    x, source, target = inputs()
    for options, text in (
        ({"steps": 0}, "steps 0; expected at least 1"),
        ({"order": 4}, "order 4; expected 1, 2 or 3"),
        ({"steps": 5, "inject": 6}, "inject 6; expected 0 to steps, 5"),
        ({"guidance": -1.0}, "guidance -1.0; expected at least 0"),
        ({"process": DDIMScheduler()}, "ScheduledDiffusion is not flow matching"),
        ({"process": Diffusion()}, "Diffusion is not flow matching"),
        ({"process": "euler"}, "scheduled: str; expected"),
    ):
        with pytest.raises(ValueError, match=text):
            RFSolver(**options)
    with pytest.raises(ValueError, match="adapt: SD3Transformer2DModel without a scheduler"):
        RFSolver().invert(sd3(), x, *source)
    with pytest.raises(ValueError, match=r"guidance 5.0 without unconditional inputs; expected one for each"):
        RFSolver(process=FlowMatchEulerDiscreteScheduler()).edit(sd3(), x, source, target)
    zero = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"guidance 5.0 without unconditional inputs; expected null="):
        RFSolver().edit(dit(), torch.randn(2, 1, 8, 8), zero, zero)
    with pytest.raises(ValueError, match="no self-attention to share"):
        RFSolver(guidance=1).edit(lambda_model(), torch.randn(2, 3), (), ())
    with pytest.raises(ValueError, match=r"no self-attention to share among \['blocks.0.mixer', 'blocks.1.mixer'\]"):
        RFSolver(at="nowhere").plan(dit())
    with pytest.raises(ValueError, match="order 1 is Euler's step, which changes no model"):
        RFSolver(order=1).plan(dit())
    new = RFSolver(steps=4).plan(dit()).apply()
    with pytest.raises(ValueError, match="takes whole steps already"):
        RFSolver(steps=4).plan(new)
    with pytest.raises(ValueError, match="str; expected a module, or a pipeline"):
        RFSolver().invert("flux", x)
    with pytest.raises(ValueError, match="Pad the conditions to one length"):
        RFSolver(steps=2, process=FlowMatchEulerDiscreteScheduler()).edit(
            flux(), x, source, (target[0][:, :3], target[1])
        )


def lambda_model():
    class Free(nn.Linear):
        def forward(self, x, t):
            return super().forward(x)

    return Free(3, 3)
