"""Adversarial examples: inputs moved within a ball so that a model errs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.data import answer, run

Norm = Literal["inf", "2", "1"]
Loss = Callable[[Tensor, Tensor], Tensor]
TINY = 1e-10
SPARSE = 0.01  # share of the coordinates that one step in the 1-norm moves


def errors(output: Float[Tensor, "B ... C"], target: Int[Tensor, "B ..."]) -> Float[Tensor, " B"]:
    """Cross-entropy of each example; classes are the last axis of the output."""
    each = F.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)
    return each.flatten(1).mean(1) if each.ndim > 1 else each


def attack(
    model: nn.Module,
    x: Float[Tensor, "B ..."],
    y: Any,
    norm: Norm = "inf",
    radius: float = 8 / 255,
    *,
    steps: int = 10,
    size: float | None = None,
    random: bool = True,
    restarts: int = 1,
    targeted: bool = False,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    loss: Loss = errors,
    seed: int = 0,
) -> Float[Tensor, "B ..."]:
    """Projected gradient ascent on the loss within a ball around each input (PGD, Madry et al., arXiv:1706.06083).

    Equation: ``x_{k+1} = P(x_k + size u(g_k))`` with the gradient ``g_k`` of the loss at ``x_k`` and the projection P onto the
    ball and the bounds. The unit step u is the steepest one: the sign of g in the infinity norm, ``g / |g|_2`` in the 2-norm, and
    in the 1-norm the signs of the largest 1% of the coordinates, shared evenly (Tramèr and Boneh, arXiv:1904.13000). One step of
    ``size=radius`` from the input itself (``steps=1, random=False``) is FGSM (Goodfellow et al., arXiv:1412.6572).

    Gradients are taken for the inputs alone. The model runs in eval mode, and its modes, gradients, buffers and random state
    are afterwards as before. Cost: ``restarts x steps`` forward and backward passes; with several restarts a forward pass more for
    each.

    Args:
        model: Gives class scores (the last axis), as a tensor or as Hugging Face models do.
        x: Inputs.
        y: True classes, or with ``targeted`` the wanted ones; whatever ``loss`` takes.
        norm: ``"inf"``, ``"2"`` or ``"1"``: the norm of the ball, over all coordinates of an example.
        radius: Its radius, in units of x.
        steps: Ascent steps.
        size: Length of a step in the same norm. Defaults to the radius for one step, and to a quarter of it for more, or 1.25 times the
            radius over ``steps`` where that is larger.
        random: Start at a random point of the ball: uniform in the infinity norm, else a random direction and a uniform length.
        restarts: Attacks from different starts; for each example the one with the highest loss is kept.
        targeted: Descend, towards ``y``.
        bounds: Smallest and largest value of an input, or None.
        loss: From output and ``y`` to the loss of each example.
        seed: Of the random starts.

    Returns:
        The attacked inputs, detached.

    Raises:
        TypeError: Inputs that are no floating-point tensor.
        ValueError: An unknown norm; radius, steps, size or restarts out of range; several restarts without random starts; an input
            that is not finite or out of bounds; a loss that is not one number for each example.

    Examples:
        >>> net, x, y = nn.Linear(4, 3), torch.rand(5, 4), torch.arange(5) % 3
        >>> moved = attack(net, x, y, radius=0.1)
        >>> bool((moved - x).abs().max() <= 0.1 + 1e-6), bool((errors(net(moved), y) >= errors(net(x), y)).all())
        (True, True)
    """
    _check(x, norm, radius, steps, size, restarts, random, bounds)
    size = size if size is not None else radius if steps == 1 else max(radius / 4, 1.25 * radius / steps)
    sign = -1.0 if targeted else 1.0
    generator = torch.Generator().manual_seed(seed)
    clean = x.detach()
    best, most = clean.clone(), torch.full((len(x),), -math.inf, device=x.device)

    def each(inputs: Tensor) -> Tensor:
        found = loss(answer(run(model, inputs)), y)
        if found.shape != (len(x),):
            raise ValueError(
                f"attack: a loss of shape {tuple(found.shape)}; expected [{len(x)}], one number for each example."
            )
        return sign * found

    with taps.at_rest(model):
        model.requires_grad_(False)  # `at_rest` gives the flags back
        for _ in range(restarts):
            delta = _start(clean, norm, radius, generator) if random else torch.zeros_like(clean)
            delta = inside(clean, delta, bounds)
            for _ in range(steps):
                at = (clean + delta).requires_grad_()
                with torch.enable_grad():
                    (gradient,) = torch.autograd.grad(each(at).sum(), at)
                delta = inside(clean, project(delta + size * steepest(gradient, norm), norm, radius), bounds)
            if restarts == 1:
                return clean + delta
            with torch.no_grad():
                value = each(clean + delta).float()
            better = value > most
            most = torch.where(better, value, most)
            best = torch.where(better.view(-1, *[1] * (x.ndim - 1)), clean + delta, best)
    return best


def steepest(gradient: Float[Tensor, "B ..."], norm: Norm) -> Float[Tensor, "B ..."]:
    """The step of length 1 in ``norm`` along which the loss rises most, for the 1-norm shared by 1% of the coordinates.

    Examples:
        >>> steepest(torch.tensor([[3.0, -4.0]]), "2")
        tensor([[ 0.6000, -0.8000]])
    """
    if norm == "inf":
        return gradient.sign()
    flat = gradient.flatten(1)
    if norm == "2":
        return (flat / flat.norm(dim=1, keepdim=True).clamp_min(TINY)).view_as(gradient)
    count = max(1, round(SPARSE * flat.shape[1]))
    largest = flat.abs().topk(count, 1).indices
    return torch.zeros_like(flat).scatter_(1, largest, flat.gather(1, largest).sign() / count).view_as(gradient)


def project(delta: Float[Tensor, "B ..."], norm: Norm, radius: float) -> Float[Tensor, "B ..."]:
    """The nearest point of the ball of a radius around 0, for each example; for the 1-norm by Duchi et al. (2008), with one sort.

    Examples:
        >>> project(torch.tensor([[3.0, 1.0]]), "1", 2.0), project(torch.tensor([[3.0, 4.0]]), "2", 1.0)
        (tensor([[2., 0.]]), tensor([[0.6000, 0.8000]]))
    """
    if norm == "inf":
        return delta.clamp(-radius, radius)
    flat = delta.flatten(1)
    if norm == "2":
        length = flat.norm(dim=1, keepdim=True)
        return (flat * (radius / length.clamp_min(TINY)).clamp_max(1)).view_as(delta)
    sizes = flat.abs()
    ordered = sizes.sort(1, descending=True).values
    excess = (ordered.cumsum(1) - radius) / torch.arange(1, flat.shape[1] + 1, device=flat.device)
    last = (ordered > excess).sum(1, keepdim=True).clamp_min(1) - 1
    cut = torch.where(sizes.sum(1, keepdim=True) > radius, excess.gather(1, last), 0.0)
    return (flat.sign() * (sizes - cut).clamp_min(0)).view_as(delta)


def _start(x: Tensor, norm: Norm, radius: float, generator: torch.Generator) -> Tensor:
    """A random point of the ball."""
    if norm == "inf":
        drawn = torch.rand(x.shape, generator=generator, dtype=x.dtype) * 2 - 1
        return radius * drawn.to(x.device)
    flat = torch.randn(x.shape, generator=generator, dtype=x.dtype).flatten(1)
    length = torch.rand(len(x), 1, generator=generator, dtype=x.dtype)
    if norm == "1":  # differences of exponential numbers have the shape of the ball
        flat = flat.sign() * torch.empty_like(flat).exponential_(generator=generator)
    own = flat.norm(p=float(norm), dim=1, keepdim=True).clamp_min(TINY)
    return (radius * length * flat / own).view_as(x).to(x.device)


def inside(x: Tensor, delta: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """The change of x that keeps ``x + delta`` within the bounds."""
    return delta if bounds is None else (x + delta).clamp(*bounds) - x


def movable(who: str, x: Any, bounds: tuple[float, float] | None) -> Tensor:
    """Inputs, if they can be moved a little and lie within the bounds.

    Raises:
        TypeError: No floating-point tensor.
        ValueError: Numbers out of bounds.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{who}: inputs of {got}; expected a floating-point tensor. Move embeddings where inputs are tokens."
        )
    if bounds is not None and x.numel() and (x.min() < bounds[0] or x.max() > bounds[1]):
        raise ValueError(
            f"{who}: inputs from {float(x.min()):.4g} to {float(x.max()):.4g}, bounds {bounds}; expected inputs within "
            "the bounds. Give the bounds of normalised inputs, or None."
        )
    return x


def _check(
    x: Any, norm: Any, radius: float, steps: int, size: float | None, restarts: int, random: bool, bounds: Any
) -> None:
    if norm not in get_args(Norm):
        raise ValueError(f"attack: norm {norm!r}; expected one of {', '.join(map(repr, get_args(Norm)))}.")
    if not 0 <= radius < math.inf or (size is not None and not 0 <= size < math.inf):
        raise ValueError(f"attack: radius {radius}, size {size}; expected 0 or more, in units of the inputs.")
    if steps < 1 or restarts < 1:
        raise ValueError(f"attack: {steps} steps, {restarts} restarts; expected 1 or more of both.")
    if restarts > 1 and not random:
        raise ValueError(f"attack: {restarts} restarts from the same start; expected random=True, or restarts=1.")
    movable("attack", x, None)
    if x.ndim < 2 or not bool(x.isfinite().all()):
        raise ValueError(f"attack: inputs {tuple(x.shape)}; expected [batch, ...] of finite numbers.")
    movable("attack", x, bounds)
