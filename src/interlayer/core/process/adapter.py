"""Unmodified models, schedulers and pipelines of diffusers as ``model(x, t, *conditions)`` and a ``Process``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.core.data import answer
from interlayer.core.extras import need
from interlayer.core.process.paths import Diffusion, Flow, Model, Prediction, Process
from interlayer.core.process.sampling import Guided


class ScheduledFlow(Flow):
    """Rectified flow at the times of a ``FlowMatchEulerDiscreteScheduler``, its shifts included.

    Args:
        scheduler: Only its configuration is read.
        tokens: Number of image tokens, by which a scheduler with ``use_dynamic_shifting`` shifts its times.
        even: Whether the times before the shift are i / steps, as pipelines of Flux set them. Otherwise they end at the
            scheduler's smallest sigma, as pipelines of SD3 leave them.

    Raises:
        ValueError: Dynamic shifting without ``tokens``, a scheduler that adds noise or whose times rise.
    """

    def __init__(self, scheduler: Any, *, tokens: int | None = None, even: bool = False) -> None:
        config = scheduler.config
        super().__init__(float(config.num_train_timesteps))
        for name in ("stochastic_sampling", "invert_sigmas"):
            if config.get(name):
                raise ValueError(f"ScheduledFlow: a scheduler with {name}=True; expected False. Build it without.")
        if config.use_dynamic_shifting and tokens is None:
            raise ValueError(
                "ScheduledFlow: a scheduler with use_dynamic_shifting, and no number of image tokens. Give adapt the shape of "
                "the latents."
            )
        self.scheduler, self.even, self.mu = scheduler, even, None
        if config.use_dynamic_shifting and tokens is not None:
            share = (tokens - config.base_image_seq_len) / (config.max_image_seq_len - config.base_image_seq_len)
            self.mu = config.base_shift + share * (config.max_shift - config.base_shift)

    def times(self, steps: int) -> Tensor:
        plain = super().times(steps)  # refuses too few steps
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        sigmas = (plain[:-1] / self.scale).tolist() if self.even else None
        scheduler.set_timesteps(steps, sigmas=sigmas, mu=self.mu)
        return scheduler.sigmas * self.scale


class ScheduledDiffusion(Diffusion):
    """Diffusion with the betas, times and prediction type of a scheduler such as ``DDPMScheduler`` or ``DDIMScheduler``.

    A sampler steps from one time of the grid to the next. That is where ``DDIMScheduler`` steps too, if the number of steps
    divides the number of training times.

    Args:
        scheduler: Any with ``alphas_cumprod``; only its configuration is read.

    Raises:
        ValueError: A prediction or variance type that is not known here.
    """

    def __init__(self, scheduler: Any) -> None:
        config = scheduler.config
        kind, variances = (
            config.get("variance_type") or "fixed_small",
            {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "learned_range": "learned"},
        )
        self.prediction = config.get("prediction_type") or "epsilon"
        for what, got, known in (
            ("variance_type", kind, [*variances]),
            ("prediction_type", self.prediction, ["epsilon", "v_prediction", "sample"]),
        ):
            if got not in known:
                raise ValueError(f"ScheduledDiffusion: {what} {got!r}; expected one of {known}.")
        super().__init__(config.num_train_timesteps, variance=variances[kind])
        self.grid = need("diffusers", "hf", "ScheduledDiffusion").DDIMScheduler.from_config(config)
        self.kept = torch.cat((self.grid.final_alpha_cumprod.view(1), self.grid.alphas_cumprod)).double()

    def times(self, steps: int) -> Tensor:
        super().times(steps)  # refuses a wrong number of steps
        self.grid.set_timesteps(steps)
        return torch.cat((self.grid.timesteps, torch.tensor([-1])))

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.broadcast(t, x0)
        return {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0}[self.prediction]

    def read(self, x: Tensor, output: Tensor, t: Tensor) -> Prediction:
        if self.prediction == "epsilon":
            return super().read(x, output, t)
        value, *rest = output.split(x.shape[1], 1)
        alpha, sigma = self.broadcast(t, x)
        if self.prediction == "sample":
            x0, noise = value, (x - alpha * value) / sigma
        else:
            x0, noise = alpha * x - sigma * value, alpha * value + sigma * x
        return Prediction(x0, noise, rest[0] if rest else None)


def scheduled(scheduler: Any, *, tokens: int | None = None, even: bool = False) -> Process:
    """The process of a diffusers scheduler.

    Args:
        scheduler: A ``FlowMatchEulerDiscreteScheduler``, or one with ``alphas_cumprod``.
        tokens: See ``ScheduledFlow``.
        even: See ``ScheduledFlow``.

    Raises:
        ValueError: Another scheduler.
    """
    if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
        return ScheduledFlow(scheduler, tokens=tokens, even=even)
    if hasattr(scheduler, "alphas_cumprod"):
        return ScheduledDiffusion(scheduler)
    raise ValueError(
        f"scheduled: {type(scheduler).__name__}; expected a FlowMatchEulerDiscreteScheduler or a scheduler with alphas_cumprod. "
        "Build one of these from its configuration: FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)."
    )


@dataclass(frozen=True)
class _Form:
    """How a class of diffusers is called: its conditions in order, the unit of its times, and whether it takes packed tokens."""

    conditions: tuple[str, ...]
    unit: float = 1.0
    packed: bool = False


FORMS = {
    "FluxTransformer2DModel": _Form(("encoder_hidden_states", "pooled_projections"), 1000.0, packed=True),
    "SD3Transformer2DModel": _Form(("encoder_hidden_states", "pooled_projections")),
    "DiTTransformer2DModel": _Form(("class_labels",)),
    "UNet2DModel": _Form(("class_labels",)),
    "UNet2DConditionModel": _Form(("encoder_hidden_states",)),
}

CLASSES = ("num_class_embeds", "class_embed_type", "num_embeds_ada_norm")  # keys of models that know classes


def pack(x: Tensor) -> Tensor:
    """[B, C, H, W] as tokens of 2 x 2 pixels, [B, H/2 * W/2, 4 C], in the order of Flux.

    >>> x = torch.randn(2, 3, 4, 6)
    >>> pack(x).shape, bool((unpack(pack(x), 4, 6) == x).all())
    (torch.Size([2, 6, 12]), True)
    """
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3, 5).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``pack``."""
    blocks = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
    return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class View(nn.Module):
    """A model of diffusers as processes call it: ``view(x, t, *conditions)``. Build it with ``adapt``.

    Args:
        inner: The model; it is neither copied nor changed.
        process: What it was trained with.
        clip: Bound on the clean item, for ``integrate`` and ``sample``, if the scheduler has one.
        guidance: What a model with embedded guidance (Flux dev) gets.

    Shapes: latents [B, C, H, W] and times [B] to [B, C or 2 C, H, W]; Flux's are packed and unpacked here.

    Raises:
        ValueError: Too few or too many conditions, or sides that cannot be packed.
    """

    config: Any

    def __init__(self, inner: nn.Module, process: Process, *, clip: float | None, guidance: float = 1.0) -> None:
        super().__init__()
        self.inner, self.process, self.clip, self.guidance = inner, process, clip, guidance
        self.form = FORMS[type(inner).__name__]
        self.config = inner.config
        self.conditions = self.form.conditions
        if self.conditions == ("class_labels",) and not any(self.config.get(n) for n in CLASSES):
            self.conditions = ()

    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        """What the model says."""
        name = type(self.inner).__name__
        if len(conditions) != len(self.conditions):
            raise ValueError(
                f"{name}: {len(conditions)} conditions; expected {len(self.conditions)}: {', '.join(self.conditions) or 'none'}."
            )
        given = dict(zip(self.conditions, conditions, strict=True))
        if not self.form.packed:
            return answer(self.inner(x, timestep=t, **given))
        height, width = x.shape[-2:]
        if height % 2 or width % 2:
            raise ValueError(f"{name}: latents {tuple(x.shape)}; expected an even height and width.")
        ids = torch.zeros(height // 2, width // 2, 3, device=x.device, dtype=x.dtype)
        ids[..., 1], ids[..., 2] = torch.arange(height // 2)[:, None], torch.arange(width // 2)
        told = torch.full_like(t, self.guidance).to(x.dtype) if self.config.guidance_embeds else None
        found = self.inner(
            pack(x),
            timestep=t.to(x.dtype) / self.form.unit,
            guidance=told,
            img_ids=ids.flatten(0, 1),
            txt_ids=ids.new_zeros(conditions[0].shape[1], 3),
            **given,
        )
        return unpack(answer(found), height, width)

    def guided(self, scale: float, *null: Any) -> Model:
        """The model at a guidance: embedded where it was distilled, else classifier-free.

        Args:
            scale: 1 gives the conditional model.
            *null: What stands for each condition where there is none; only for classifier-free guidance.

        Raises:
            ValueError: Classifier-free guidance without ``null``, or embedded guidance with it.
        """
        name = type(self.inner).__name__
        if self.config.get("guidance_embeds"):
            if null:
                raise ValueError(
                    f"{name}: its guidance is embedded, so unconditional inputs have no effect. Leave them out."
                )
            return View(self.inner, self.process, clip=self.clip, guidance=scale)
        if scale == 1:
            return self
        if not null:
            raise ValueError(
                f"{name}: guidance {scale} without unconditional inputs; expected one for each of "
                f"{', '.join(self.conditions) or 'its conditions, of which it has none'}. Give them, or guidance 1."
            )
        return Guided(self, scale, *null)


def adapt(model: Any, scheduler: Any = None, *, shape: Sequence[int] | None = None) -> View:
    """View a model or pipeline of diffusers as ``sample`` and ``integrate`` take it; nothing of it is copied or changed.

    Known are ``FluxTransformer2DModel``, ``SD3Transformer2DModel``, ``DiTTransformer2DModel``, ``UNet2DModel`` and
    ``UNet2DConditionModel``. Cost: one call of the model for each call.

    Args:
        model: The model, or a pipeline with a ``transformer`` or ``unet`` and a ``scheduler``.
        scheduler: The scheduler. Defaults to the pipeline's.
        shape: Shape of the latents, [B, C, H, W] or [C, H, W]. Needed where the scheduler shifts by image size.

    Raises:
        ValueError: A model or a scheduler that is not known, or no scheduler.

    Examples:
        >>> from diffusers import DDIMScheduler, UNet2DModel
        >>> unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4,
        ...                    down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1)
        >>> view = adapt(unet, DDIMScheduler())
        >>> from interlayer.core.process import DDIM, sample
        >>> sample(view, view.process, DDIM(), (2, 1, 8, 8), seed=0, steps=2, clip=view.clip).shape
        torch.Size([2, 1, 8, 8])
    """
    inner = (
        model if isinstance(model, nn.Module) else getattr(model, "transformer", None) or getattr(model, "unet", None)
    )
    scheduler = getattr(model, "scheduler", None) if scheduler is None else scheduler
    if type(inner).__name__ not in FORMS:
        raise ValueError(
            f"adapt: {type(model).__name__}; expected one of {', '.join(FORMS)}, or a pipeline with one. Any other model is "
            "taken by integrate and sample as a function of (x, t, *conditions)."
        )
    if scheduler is None:
        raise ValueError(f"adapt: {type(model).__name__} without a scheduler. Give the one that it was trained with.")
    assert isinstance(inner, nn.Module)
    form, config = FORMS[type(inner).__name__], scheduler.config
    tokens = None
    if shape is not None:
        patch = 2 if form.packed else int(getattr(inner.config, "patch_size", None) or 1)
        tokens = (shape[-2] // patch) * (shape[-1] // patch)
    process = scheduled(scheduler, tokens=tokens, even=form.packed)
    clip = float(config.get("clip_sample_range") or 1.0) if config.get("clip_sample") else None
    return View(inner, process, clip=clip)
