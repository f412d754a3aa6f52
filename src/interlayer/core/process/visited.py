"""What a model is called with while it samples: calibration data for methods that have none."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

from interlayer.core import taps
from interlayer.core.process.adapter import FORMS, View, adapt
from interlayer.core.process.paths import Diffusion
from interlayer.core.process.sampling import DDIM, Guided, sample

TIMES = ("timestep", "timesteps", "t", "time", "times", "sigma")  # what models call their times
GUIDANCE = 1.5  # of the sampling runs of a DiT, as the authors of DiTAS have it


def visited(model: nn.Module, run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Keep the arguments of each call of a model, as ``taps.feed`` takes them again.

    Memory: the inputs alone, such as the latents of each step.

    Args:
        model: A module that ``run`` calls, at whatever depth.
        run: Whatever calls it, such as sampling.

    Returns:
        Arguments by name, one mapping for each call. Arguments that are None, and ``return_dict``, are left out.

    Examples:
        >>> import torch
        >>> from interlayer.core.process import Euler, Flow, sample
        >>> class Velocity(nn.Linear):
        ...     def forward(self, x, t):
        ...         return super().forward(x)
        >>> net = Velocity(2, 2)
        >>> seen = visited(net, lambda: sample(net, Flow(), Euler(), (3, 2), seed=0, steps=4))
        >>> len(seen), list(seen[0]), seen[0]["x"].shape
        (4, ['x', 't'], torch.Size([3, 2]))
    """
    seen, names = list[dict[str, Any]](), inspect.signature(model.forward)

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = dict(names.bind(*args, **kwargs).arguments)
        kept = {k: v for k, v in given.items() if v is not None and k != "return_dict"}
        seen.append(tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, kept))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return seen


def times_of(who: str, model: nn.Module) -> tuple[str, int]:
    """The argument of a model that holds the times, and its position.

    Args:
        who: Who asks, for the error.
        model: Any module.

    Raises:
        ValueError: It takes no times, or nothing before them.

    Examples:
        >>> class Velocity(nn.Linear):
        ...     def forward(self, x, t):
        ...         return super().forward(x)
        >>> times_of("me", Velocity(2, 2))
        ('t', 1)
    """
    names = [*inspect.signature(model.forward).parameters]
    found = [(n, i) for i, n in enumerate(names) if i and n in TIMES]
    if not found:
        raise ValueError(
            f"{who}: {type(model).__name__}, which takes ({', '.join(names)}); expected a diffusion model, with a noised item and "
            f"{' or '.join(TIMES)} among its arguments."
        )
    return found[0]


def drawn(
    who: str, model: nn.Module, *, steps: int, examples: int, scheduler: Any = None, seed: int = 0, every: bool = False
) -> list[dict[str, Any]]:
    """The calls of a sampling run of an unmodified model of diffusers that needs no more than noise and classes, which are random.

    A ``DiTTransformer2DModel`` is guided, so that each call has every image twice: with a class and without one.

    Args:
        who: Who asks, for the error.
        model: A ``DiTTransformer2DModel``, or a ``UNet2DModel``.
        steps: Of DDIM.
        examples: Images.
        scheduler: Whose noise the model was trained with, and whose bound on clean items holds. Defaults to 1000 linearly rising
            betas, without a bound.
        seed: Of noise and classes.
        every: Draw each class once before one is drawn again.

    Raises:
        ValueError: Another model.

    Examples:
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4,
        ...                    down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1)
        >>> [int(call["timestep"][0]) for call in drawn("me", unet, steps=4, examples=2)]
        [999, 666, 333, 0]
    """
    form = FORMS.get(type(model).__name__)
    if form is None or form.conditions != ("class_labels",):
        known = " or ".join(name for name, each in FORMS.items() if each.conditions == ("class_labels",))
        raise ValueError(
            f"{who}: no data for a {type(model).__name__}; expected a {known}, whose inputs can be drawn, or the calls of a "
            "sampling run as data. Record them with core.process.visited."
        )
    config: Any = model.config
    learned = "learned" if config.out_channels == 2 * config.in_channels else "small"
    if scheduler is None:
        view = View(model, Diffusion(variance=learned), clip=None)
    else:
        view = adapt(model, scheduler)
    draw = torch.Generator().manual_seed(seed)
    like, classes = next(model.parameters()), tuple[Tensor, ...]()
    if view.conditions:
        kinds = config.get("num_embeds_ada_norm") or config.get("num_class_embeds")
        chosen = torch.randint(kinds, (examples,), generator=draw)
        if every:
            chosen = torch.randperm(kinds, generator=draw).repeat(-(-examples // kinds))[:examples]
        classes = (chosen.to(like.device),)

    def called(x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        found: Tensor = view(x.to(like), t, *conditions)
        return found.to(x)

    null = config.get("num_embeds_ada_norm")
    guided: Any = Guided(called, GUIDANCE, null) if classes and null else called
    side = config.sample_size if isinstance(config.sample_size, tuple | list) else (config.sample_size,) * 2
    shape = (examples, config.in_channels, *side)
    with taps.at_rest(model), tqdm(total=steps, desc="sampling", disable=None, leave=False) as bar:
        how: Any = {"seed": seed, "steps": steps, "clip": view.clip, "device": like.device}
        return visited(
            model,
            lambda: sample(guided, view.process, DDIM(), shape, *classes, **how, hooks=[lambda step: bar.update()]),
        )
