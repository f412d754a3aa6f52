"""The contract of gradients, by trait: exact, or what they are said to be in place of that."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from interlayer.core.example import Example
from interlayer.testing.common import make, require, same, seeded, tensors
from interlayer.testing.harness import Inputs, double, pair, uneven

SAMPLES = 300  # backward passes whose mean is compared
DEVIATIONS = 5.0  # standard errors that the mean may be off


def gradient(example: Example) -> None:
    """The gradients of inputs and parameters, in float64, are what ``Example.gradient`` says.

    ``exact``: they equal numeric ones. ``surrogate``: they equal those of ``twin``, the stated formula. ``implicit``: so do the
    outputs. ``unbiased``: the mean over many seeds is that of ``twin``, within its standard error.
    """
    if example.gradient == "exact":
        return _exact(example)
    require(example.twin is not None, f"gradient={example.gradient!r} needs a twin, which says what the gradient is")
    module, inputs = _ready(example)
    assert example.twin is not None
    out, wanted = _gradients(module, example.twin(module), inputs)
    if example.gradient == "unbiased":
        return _unbiased(module, inputs, wanted)
    got, found = _gradients(module, module, inputs)
    if example.gradient == "implicit":
        same(out, got, "the output, against the twin's", rtol=1e-6, atol=1e-9)
    same(wanted, found, f"the {example.gradient} gradients, against the twin's", rtol=1e-5, atol=1e-8)
    return None


def _ready(example: Example) -> tuple[nn.Module, Inputs]:
    module, inputs = pair(example)
    return module.double().eval(), double(inputs)


def _gradients(module: nn.Module, run: Callable[..., object], inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of ``run``, and the gradients of an uneven sum of them for floating-point inputs and the module's parameters."""
    given = tuple(x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    leaves = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
    leaves += [p for p in module.parameters() if p.requires_grad]
    out = [t for t in tensors(run(*given)) if t.is_floating_point()]
    found = torch.autograd.grad(uneven(out), leaves, allow_unused=True)
    return [t.detach() for t in out], [
        torch.zeros_like(p) if g is None else g for g, p in zip(found, leaves, strict=True)
    ]


def _unbiased(module: nn.Module, inputs: Inputs, wanted: list[Tensor]) -> None:
    """Along random directions the mean of the gradients over many seeds is the wanted one, and they do vary."""
    directions = make(lambda: [torch.randn(4, *g.shape, dtype=g.dtype) for g in wanted], 3)

    def along(gradients: list[Tensor]) -> Tensor:
        return torch.stack([(d * g).flatten(1).sum(1) for d, g in zip(directions, gradients, strict=True)])

    samples = []
    for seed in range(SAMPLES):
        with seeded(seed):
            samples.append(along(_gradients(module, module, inputs)[1]))
    found = torch.stack(samples)
    error = found.std(0) / SAMPLES**0.5
    require(
        bool((error > 0).any()), "the gradients of different seeds are equal; declare another gradient than 'unbiased'"
    )
    off = ((found.mean(0) - along(wanted)).abs() / (error + 1e-9)).max().item()
    require(off < DEVIATIONS, f"the mean gradient is {off:.1f} standard errors from the twin's")


def _exact(example: Example) -> None:
    """Analytic gradients equal numeric ones."""
    module, inputs = _ready(example)
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    where = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_floating_point()]
    leaves = [module.get_parameter(n).detach().clone().requires_grad_() for n in names]
    leaves += [inputs[i].clone().requires_grad_() for i in where]
    if not leaves:
        return

    def f(*values: Tensor) -> tuple[Tensor, ...]:
        given = list(inputs)
        for i, value in zip(where, values[len(names) :], strict=True):
            given[i] = value
        out = functional_call(module, dict(zip(names, values[: len(names)], strict=True)), tuple(given))
        return tuple(t for t in tensors(out) if t.is_floating_point())

    # Along one line for each tensor: torch's `gradcheck` answers a mismatch with a full Jacobian, which can take minutes.
    with seeded():
        _directions(f, leaves, [*names, *(f"input {i}" for i in where)])


def _directions(f: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor], names: list[str]) -> None:
    """Compare the derivative of a random projection of ``f`` along a random line in each leaf with a difference quotient."""
    step, weights = 1e-6, [torch.rand_like(t) for t in f(*leaves)]

    def loss(*values: Tensor) -> Tensor:
        return torch.stack([(t * w).sum() for t, w in zip(f(*values), weights, strict=True)]).sum()

    total = loss(*leaves)
    grads = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [None] * len(leaves)
    for i, (leaf, name, grad) in enumerate(zip(leaves, names, grads, strict=True)):
        line = nn.functional.normalize(torch.rand_like(leaf), dim=None)  # type: ignore[arg-type]
        analytic = 0.0 if grad is None else (grad * line).sum().item()
        with torch.no_grad():
            up, down = (loss(*leaves[:i], leaf + s * line, *leaves[i + 1 :]) for s in (step, -step))
        numeric = ((up - down) / (2 * step)).item()
        require(
            abs(analytic - numeric) <= 1e-5 * max(1.0, float(total.detach().abs())) + 1e-4 * abs(numeric),
            f"the gradient of {name} along a random line is {analytic:.6g}; the difference quotient is {numeric:.6g}",
        )
