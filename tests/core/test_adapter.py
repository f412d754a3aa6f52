"""Unmodified models and pipelines of diffusers, without downloads: the numbers are those of their own loops."""

import copy

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

from interlayer.core.process import (
    DDIM,
    Adaptive,
    Euler,
    Flow,
    Heun,
    RungeKutta,
    adapt,
    integrate,
    sample,
    scheduled,
)
from interlayer.core.process.adapter import pack, unpack

TEXT, POOLED = 6, 5


def flux(**changes):
    torch.manual_seed(0)
    config = {
        "in_channels": 8, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": TEXT, "pooled_projection_dim": POOLED, "guidance_embeds": True, "axes_dims_rope": (2, 2, 4),
    }  # fmt: skip
    return FluxTransformer2DModel(**config | changes).eval()


def sd3(**changes):
    torch.manual_seed(0)
    config = {
        "sample_size": 8, "patch_size": 2, "in_channels": 2, "out_channels": 2, "num_layers": 3, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": TEXT, "caption_projection_dim": 16,
        "pooled_projection_dim": POOLED, "pos_embed_max_size": 8,
    }  # fmt: skip
    return SD3Transformer2DModel(**config | changes).eval()


def unet(**changes):
    torch.manual_seed(0)
    config = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "layers_per_block": 1,
        "norm_num_groups": 4, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4,
    }  # fmt: skip
    return UNet2DModel(**config | changes).eval()


def drawn(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("shift", [{"shift": 3.0}, {"use_dynamic_shifting": True, "shift": 3.0}])
def test_flux_pipeline(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(**shift)
    pipe = quiet(FluxPipeline(scheduler, None, None, None, None, None, flux()))
    x, text, pooled = drawn((2, 2, 4, 6), (2, 5, TEXT), (2, POOLED))
    given = {"prompt_embeds": text, "pooled_prompt_embeds": pooled, "height": 32, "width": 48}
    wanted = pipe(**given, latents=pack(x), num_inference_steps=4, guidance_scale=3.5, output_type="latent").images
    view = adapt(pipe, shape=x.shape)
    found = integrate(view.guided(3.5), view.process, Euler(), x, view.process.times(4), text, pooled)
    torch.testing.assert_close(found, unpack(wanted, 4, 6), rtol=1e-5, atol=1e-5)
    other = integrate(view.guided(1.0), view.process, Euler(), x, view.process.times(4), text, pooled)
    assert (found - other).abs().max() > 1e-3


def test_sd3_pipeline_with_guidance():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)  # only asked by how much it scales
    pipe = quiet(StableDiffusion3Pipeline(sd3(), scheduler, vae, *[None] * 6))
    x, text, null, pooled, none = drawn((2, 2, 4, 6), (2, 5, TEXT), (2, 5, TEXT), (2, POOLED), (2, POOLED))
    wanted = pipe(
        prompt_embeds=text, pooled_prompt_embeds=pooled, negative_prompt_embeds=null, negative_pooled_prompt_embeds=none,
        latents=x, height=4, width=6, num_inference_steps=4, guidance_scale=3.0, output_type="latent",
    ).images  # fmt: skip
    view = adapt(pipe)
    found = integrate(view.guided(3.0, null, none), view.process, Euler(), x, view.process.times(4), text, pooled)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [True, False])
def test_unet_with_ddim(prediction, clip):
    model, (x,) = unet(num_class_embeds=3), drawn((3, 1, 8, 8))
    y = torch.arange(3)
    scheduler = DDIMScheduler(1000, prediction_type=prediction, clip_sample=clip, beta_schedule="scaled_linear")
    scheduler.set_timesteps(10)
    wanted = x
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = model(wanted, t, y).sample
            wanted = scheduler.step(out, t, wanted, use_clipped_model_output=clip).prev_sample
    view = adapt(model, scheduler)
    assert (view.clip is not None) == clip
    found = integrate(view, view.process, DDIM(), x, view.process.times(10), y, clip=view.clip)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_what_a_model_says_is_read_as_it_is_taught(prediction):
    process = scheduled(DDPMScheduler(prediction_type=prediction, beta_schedule="squaredcos_cap_v2"))
    x0, noise = drawn((4, 2, 3, 3), (4, 2, 3, 3))
    t = torch.tensor([3, 400, 700, 900])
    x = process.noised(x0, t, noise)
    torch.testing.assert_close(x, process.grid.add_noise(x0, noise, t))
    if prediction == "v_prediction":
        torch.testing.assert_close(process.target(x0, noise, t), process.grid.get_velocity(x0, noise, t))
    said = process.read(x, process.target(x0, noise, t), t)
    torch.testing.assert_close(said.x0, x0, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(said.noise, noise, rtol=1e-3, atol=1e-3)


def test_dit_and_latent_unet_sample():
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=2, num_layers=1, sample_size=8,
        num_embeds_ada_norm=3,
    )  # fmt: skip
    latent = UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=6,
        attention_head_dim=4, mid_block_type=None,
    )  # fmt: skip
    y, (text,) = torch.tensor([0, 1]), drawn((2, 4, 6))
    for model, condition, null in ((dit, y, 3), (latent, text, torch.zeros(4, 6))):
        view = adapt(model, PNDMScheduler())  # its betas; the grid is DDIM's
        before = copy.deepcopy(model.state_dict())
        modes = [m.training for m in model.modules()]
        runs = [
            sample(
                view.guided(g, *([null] if g != 1 else [])),
                view.process,
                DDIM(),
                (2, 1, 8, 8),
                condition,
                seed=0,
                steps=3,
            )
            for g in (1, 1, 4)
        ]
        assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2]) and runs[2].isfinite().all()
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert modes == [m.training for m in model.modules()]


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("kutta", 3), ("rk4", 4)])
def test_order_of_convergence(method, order):
    """On a velocity that bends in space and time: the error falls with the step's ``order``-th power, both ways in time."""

    def velocity(x, t):
        return torch.sin(2 * x) + (t.view(-1, 1) / 250).cos() * x

    process, (x,) = Flow(), drawn((64, 3))
    x = x.double()

    def run(solver, steps, back):
        times = process.times(steps).double()
        return integrate(velocity, process, solver, x, times.flip(0) if back else times)

    for back in (False, True):
        exact = run(RungeKutta("rk4"), 400, back)
        errors = [float((run(RungeKutta(method), n, back) - exact).norm().log2()) for n in (16, 32, 64)]
        assert abs((errors[0] - errors[2]) / 2 - order) < 0.2
        loose, tight = (float((run(Adaptive(e), 1, back) - exact).norm()) for e in (1e-2, 1e-7))
        assert tight < 1e-4 < loose


def test_one_step_by_hand():
    def velocity(x, t):
        return x * t.view(-1, 1)

    process, x, times = Flow(1.0), torch.tensor([[2.0]]), torch.tensor([1.0, 0.5])
    half = 2 - 0.25 * 2
    assert integrate(velocity, process, RungeKutta(), x, times).item() == pytest.approx(2 - 0.5 * half * 0.75)
    assert torch.equal(
        integrate(velocity, process, RungeKutta("euler"), x, times), integrate(velocity, process, Euler(), x, times)
    )


def test_inversion_returns():
    """Flux's latents to noise and back, at its own shifted times."""
    view = adapt(flux(), FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), shape=(2, 2, 4, 6))
    x, text, pooled = drawn((2, 2, 4, 6), (2, 5, TEXT), (2, POOLED))
    times, errors = view.process.times(12), []
    for solver in (Euler(), Heun(), RungeKutta()):
        noise = integrate(view, view.process, solver, x, times.flip(0), text, pooled)
        errors.append(float((integrate(view, view.process, solver, noise, times, text, pooled) - x).norm()))
    assert max(errors[1:]) < errors[0] / 5


def test_errors():
    shifting = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    x, text, pooled = drawn((1, 2, 4, 6), (1, 5, TEXT), (1, POOLED))
    with pytest.raises(ValueError, match="use_dynamic_shifting, and no number of image tokens"):
        adapt(flux(), shifting)
    with pytest.raises(ValueError, match="expected at least 1"):
        adapt(flux(), shifting, shape=x.shape).process.times(0)
    with pytest.raises(ValueError, match="adapt: Linear; expected one of FluxTransformer2DModel"):
        adapt(torch.nn.Linear(1, 1), shifting)
    with pytest.raises(ValueError, match="without a scheduler"):
        adapt(flux())
    with pytest.raises(ValueError, match="scheduled: int; expected"):
        scheduled(3)
    with pytest.raises(ValueError, match="with invert_sigmas=True"):
        scheduled(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    with pytest.raises(ValueError, match="prediction_type 'flow_prediction'"):
        scheduled(DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True))
    view = adapt(sd3(), FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="1 conditions; expected 2: encoder_hidden_states, pooled_projections"):
        view(x, torch.ones(1), text)
    with pytest.raises(ValueError, match=r"guidance 5.0 without unconditional inputs"):
        view.guided(5.0)
    embedded = adapt(flux(), FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="have no effect"):
        embedded.guided(5.0, text, pooled)
    with pytest.raises(ValueError, match="expected an even height and width"):
        embedded(x[..., :5], torch.ones(1), text, pooled)
    with pytest.raises(ValueError, match="RungeKutta: method 'rk5'"):
        RungeKutta("rk5")
    unconditional = adapt(unet(), DDIMScheduler())
    assert unconditional.conditions == () and unconditional(x[:, :1, :, :4], torch.ones(1)).isfinite().all()
