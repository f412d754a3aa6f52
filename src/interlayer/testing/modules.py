"""Contracts of layers and models."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from interlayer.core.example import Example
from interlayer.testing.common import finite, make, require, same, seeded, tensors
from interlayer.testing.ddp import two_processes

Inputs = tuple[Any, ...]


def _pair(example: Example, seed: int = 0) -> tuple[nn.Module, Inputs]:
    module = make(example.make, seed)
    require(isinstance(module, nn.Module), f"make() gave {type(module).__name__}; wanted a torch.nn.Module")
    return module, make(example.inputs, 100)


def _map(change: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    return tuple(change(x) if isinstance(x, Tensor) else x for x in inputs)


def _in_every_mode(contract: Callable[[Example], None]) -> Callable[[Example], None]:
    """The contract, held for the example and then for each of its ``modes``."""

    @wraps(contract)
    def held(example: Example) -> None:
        contract(example)
        for name, build in example.modes.items():
            try:
                contract(dataclasses.replace(example, make=build))
            except Exception as error:
                raise AssertionError(f"mode {name!r}: {type(error).__name__}: {error}") from error

    return held


def _longer(inputs: Inputs) -> Inputs:
    return _map(lambda x: torch.cat((x, x, x[:1])), inputs)


def _low(inputs: Inputs) -> Inputs:
    return _map(lambda x: x.bfloat16() if x.is_floating_point() else x, inputs)


def _double(inputs: Inputs) -> Inputs:
    return _map(lambda x: x.double() if x.is_floating_point() else x, inputs)


def _run(module: nn.Module, inputs: Inputs) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs, and gradients of a fixed, uneven sum of them."""
    module.zero_grad()
    out = [t for t in tensors(module(*inputs)) if t.is_floating_point()]
    require(bool(out), "the output has no floating-point tensor")
    loss = sum((t.double() * torch.linspace(-1, 1.3, t.numel(), dtype=torch.float64).view(t.shape)).sum() for t in out)
    if isinstance(loss, Tensor) and loss.requires_grad:
        loss.backward()
    return [t.detach() for t in out], {n: p.grad for n, p in module.named_parameters() if p.requires_grad}


@_in_every_mode
def shapes(example: Example) -> None:
    """Finite outputs that keep the batch, and a finite gradient for every parameter."""
    module, inputs = _pair(example)
    out, grads = _run(module, inputs)
    finite(out, "the output")
    batch = tensors(inputs)[0].shape[0]
    require(batch > 1, "inputs() must give at least two examples")
    require(
        all(t.shape[0] == batch for t in out if t.ndim),
        f"outputs {[tuple(t.shape) for t in out]} do not keep the batch of {batch}",
    )
    for name, grad in grads.items():
        require(grad is not None, f"parameter {name} gets no gradient")
    finite([g for g in grads.values() if g is not None], "a gradient")


def gradcheck(example: Example) -> None:
    """Analytic gradients of inputs and parameters equal numeric ones in float64."""
    module, inputs = _pair(example)
    module, inputs = module.double().eval(), _double(inputs)
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

    # First along one line for each tensor: torch answers a mismatch with a full Jacobian, which can take minutes.
    with seeded():
        _directions(f, leaves, [*names, *(f"input {i}" for i in where)])
        require(torch.autograd.gradcheck(f, tuple(leaves), fast_mode=True, atol=1e-5, rtol=1e-4), "gradcheck")


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


def odd(example: Example) -> None:
    """Odd sizes, and a batch of one."""
    module, inputs = _pair(example)
    for given in (_map(lambda x: x[:1], inputs), make(example.odd, 101) if example.odd else inputs):
        finite(_run(module.eval(), given)[0], "the output at an odd size")


@_in_every_mode
def lengths(example: Example) -> None:
    """Where ``axis`` names the axis of the positions: length one works; length 0 works too, or is a clear error."""
    if (axis := example.axis) is None:
        return
    module, inputs = _pair(example)
    finite(_run(module.eval(), _map(lambda x: x.narrow(axis, 0, 1), inputs))[0], "the output at length one")
    _works_or_says(module, _map(lambda x: x.narrow(axis, 0, 0), inputs), "length 0")


@_in_every_mode
def empty(example: Example) -> None:
    """A batch of 0 items works, backward pass included, or is a clear error."""
    module, inputs = _pair(example)
    for training in (False, True):
        out = _works_or_says(module.train(training), _map(lambda x: x[:0], inputs), "an empty batch")
        require(not any(t.shape[0] for t in out if t.ndim), "an empty batch gives items")


def _works_or_says(module: nn.Module, inputs: Inputs, what: str) -> list[Tensor]:
    """The outputs, which are finite, or none after a ``ValueError`` that says why."""
    try:
        out, _ = _run(module, inputs)
    except ValueError as error:
        require(len(str(error)) > 10, f"{what} raises a ValueError without a message")
        return []
    finite(out, f"the output for {what}")
    return out


def causal(example: Example) -> None:
    """Where ``causal``: a later position along ``axis`` never changes an earlier output, in evaluation or training."""
    if not example.causal:
        return
    module, inputs = _pair(example)
    module, inputs = module.double(), _double(inputs)
    axis = 1 if example.axis is None else example.axis
    half = tensors(inputs)[0].shape[axis] // 2
    require(half > 0, "inputs() must have at least two positions")

    def change(x: Tensor) -> Tensor:
        early, late = x.split([half, x.shape[axis] - half], axis)
        return torch.cat((early, late.flip(axis) + 1 if x.is_floating_point() else late.roll(1, 0)), axis)

    for training in (False, True):
        outs = []
        for given in (inputs, _map(change, inputs)):
            with torch.no_grad(), seeded(5):
                outs.append(tensors(module.train(training)(*given))[0])
        before, after = (out.narrow(axis, 0, half) for out in outs)
        same(before, after, f"the first {half} outputs after a later input changed", rtol=1e-9, atol=1e-9)


@_in_every_mode
def autocast(example: Example) -> None:
    """Under bfloat16 autocast: finite and trainable, and near float32 in evaluation; bfloat16 inputs too."""
    module, inputs = _pair(example)
    with seeded(5):
        plain, _ = _run(module.eval(), inputs)
    with torch.autocast("cpu", torch.bfloat16), seeded(5):
        low, grads = _run(module, inputs)
        trained, more = _run(module.train(), inputs)
        with torch.no_grad():
            rest = [module.train(training)(*_low(inputs)) for training in (True, False)]
    finite([low, trained, rest, [g for g in (*grads.values(), *more.values()) if g is not None]], "bfloat16")
    for a, b in zip(plain, low, strict=True):
        gap = (a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-12)
        require(gap.item() < 0.1, f"bfloat16 is off by {gap.item():.2g} of the float32 output")


def state_dict(example: Example) -> None:
    """Weights go through safetensors into another instance, which then gives the same numbers."""
    module, inputs = _pair(example)
    other = make(example.make, 1)
    _run(module, inputs)  # buffers that a pass changes are state too
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "layer.safetensors")
        save_model(module, path)
        load_model(other, path)
    same(_run(module.eval(), inputs)[0], _run(other.eval(), inputs)[0], "the loaded instance")


def compiles(example: Example) -> None:
    """``torch.compile(fullgraph=True)`` gives the same outputs and gradients."""
    module, inputs = _pair(example)
    module.eval()
    eager = _run(module, inputs)
    torch._dynamo.reset()
    twin = copy.deepcopy(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager", dynamic=False)
        out = [t for t in tensors(compiled(*inputs)) if t.is_floating_point()]
        weights = [torch.linspace(-1, 1.3, t.numel(), dtype=torch.float64).view(t.shape) for t in out]
        loss = torch.stack([(t.double() * w).sum() for t, w in zip(out, weights, strict=True)]).sum()
        if loss.requires_grad:
            loss.backward()
    same(eager[0], out, "compiled output", rtol=1e-4, atol=1e-5)
    grads = {n: p.grad for n, p in twin.named_parameters() if p.requires_grad}
    same(list(eager[1].values()), list(grads.values()), "compiled gradients", rtol=1e-3, atol=1e-4)


def exports(example: Example) -> None:
    """``torch.export`` with a dynamic batch gives a program with the same outputs, also for a larger batch."""
    module, inputs = _pair(example)
    module.eval()
    free = tuple({0: torch.export.Dim.DYNAMIC} if isinstance(x, Tensor) else None for x in inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, inputs, dynamic_shapes=free).module()
        for given in (inputs, _longer(inputs)):
            same(module(*given), program(*given), "exported output", rtol=1e-4, atol=1e-5)


def traces(example: Example) -> None:
    """``torch.jit.trace`` gives a program with the same outputs, also for a larger batch."""
    module, inputs = _pair(example)
    module.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the tracer, for every check of a shape
        program = torch.jit.trace(module, inputs, check_trace=False)
        for given in (inputs, _longer(inputs)):
            same(module(*given), program(*given), "traced output", rtol=1e-4, atol=1e-5)


def per_example(example: Example) -> None:
    """``vmap`` of ``torch.func.grad`` gives the gradients of each example alone."""
    module, inputs = _pair(example)
    module, inputs = module.double().eval(), _double(inputs)
    weights = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    where = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    if not weights:
        return

    def loss(weights: dict[str, Tensor], *given: Tensor) -> Tensor:
        whole = list(inputs)
        for i, x in zip(where, given, strict=True):
            whole[i] = x.unsqueeze(0)
        out = tensors(functional_call(module, weights, tuple(whole)))
        return torch.stack([t.square().sum() for t in out if t.is_floating_point()]).sum()

    batch = [inputs[i] for i in where]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no batching rule
        each = torch.func.vmap(torch.func.grad(loss), (None, *[0] * len(batch)))(weights, *batch)
        for n in range(2):
            leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
            alone = torch.autograd.grad(loss(leaves, *(x[n] for x in batch)), list(leaves.values()), allow_unused=True)
            wanted = [torch.zeros_like(w) if g is None else g for g, w in zip(alone, weights.values(), strict=True)]
            same(wanted, [each[name][n] for name in weights], "gradients of one example", rtol=1e-7, atol=1e-9)


def deepcopy(example: Example) -> None:
    """A deep copy gives the same numbers and shares nothing."""
    module, inputs = _pair(example)
    module.eval()
    before = _run(module, inputs)[0]
    twin = copy.deepcopy(module)
    same(before, _run(twin, inputs)[0], "the copy")
    with torch.no_grad():
        for p in [*twin.parameters(), *twin.buffers()]:
            p.zero_()
    same(before, _run(module, inputs)[0], "the original, after the copy's weights changed")


def seed(example: Example) -> None:
    """The same seed gives the same weights, outputs and gradients, in training too."""
    runs = []
    for _ in range(2):
        module, inputs = _pair(example)
        with seeded(5):
            runs.append((list(module.state_dict().values()), _run(module, inputs)))
    same(runs[0], runs[1], "the second run of the same seed")


def batch(example: Example) -> None:
    """In evaluation, an example's output does not depend on the rest of its batch."""
    module, inputs = _pair(example)
    module, inputs = module.double().eval(), _double(inputs)
    with torch.no_grad():
        whole, alone = tensors(module(*inputs)), tensors(module(*_map(lambda x: x[:1], inputs)))
    same([t[:1] for t in whole if t.ndim], [t for t in alone if t.ndim], "an example on its own", rtol=1e-9, atol=1e-9)


def state(example: Example) -> None:
    """A second call gives the same numbers, if needed after the layer's ``reset()``."""
    module, inputs = _pair(example)
    module.eval()
    with torch.no_grad():
        with seeded(5):
            first = module(*inputs)
        if callable(reset := getattr(module, "reset", None)):
            reset()
        with seeded(5):
            same(first, module(*inputs), "the second call (hidden state without reset()?)")


def ddp(example: Example) -> None:
    """Two processes under DistributedDataParallel get the gradients of the whole batch."""
    module, inputs = _pair(example)
    module = module.double().eval()
    inputs = _double(inputs)
    if not any(p.requires_grad for p in module.parameters()):
        return  # nothing to synchronise
    parts = [_map(lambda x: x[:1], inputs), _map(lambda x: x[1:2], inputs)]
    wanted: dict[str, Tensor] = {}
    for part in parts:
        for name, grad in _run(module, part)[1].items():
            if grad is not None:
                wanted[name] = wanted.get(name, torch.zeros_like(grad)) + grad / 2
    module.zero_grad()
    got = two_processes(module, lambda wrapped, rank: _run(wrapped, parts[rank]))
    require(
        wanted.keys() == got.keys(),
        f"gradients of {sorted(wanted.keys() ^ got.keys())} differ between one process and two",
    )
    same(list(wanted.values()), [got[n] for n in wanted], "gradients of two processes", rtol=1e-7, atol=1e-9)


def wrong(example: Example) -> None:
    """A wrong shape or type raises ValueError or TypeError with a message."""
    module, inputs = _pair(example)
    if example.wrong:
        inputs = make(example.wrong, 102)
    else:
        first = next(i for i, x in enumerate(inputs) if isinstance(x, Tensor))
        x = inputs[first]
        bad = torch.cat((x, x[..., :1]), -1) if x.is_floating_point() else x.double() + 0.5
        inputs = (*inputs[:first], bad, *inputs[first + 1 :])
    shapes = [tuple(x.shape) for x in inputs if isinstance(x, Tensor)]
    try:
        module(*inputs)
    except (ValueError, TypeError) as error:
        require(len(str(error)) > 10, f"wrong inputs {shapes} raise an error without a message")
    except Exception as error:
        raise AssertionError(
            f"wrong inputs {shapes} raise {type(error).__name__} ({str(error)[:80]}); wanted ValueError or TypeError"
        ) from error
    else:
        raise AssertionError(f"wrong inputs {shapes} are accepted silently")


def training(example: Example) -> None:
    """A real training run beats the trivial predictor: ``train()``, or on digits if the inputs are such images."""
    if example.train is not None:
        score, trivial = make(example.train)
    else:
        module, inputs = _pair(example)
        score, trivial = _digits(module, tensors(inputs)[0])
    require(score < trivial, f"after training the loss is {score:.4g}; the trivial predictor has {trivial:.4g}")


def _digits(module: nn.Module, like: Tensor) -> tuple[float, float]:
    """Held-out loss after 60 steps on the handwritten digits, and that of the constant predictor."""
    from sklearn.datasets import load_digits

    require(
        tuple(like.shape[1:]) in ((1, 8, 8), (64,)) and like.is_floating_point(),
        f"no train() is given, and inputs {tuple(like.shape)} are not digits, [batch, 1, 8, 8] or [batch, 64]",
    )
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32).div_(8).sub_(1).view(-1, *like.shape[1:])
    y = torch.tensor(data.target)
    order = make(lambda: torch.randperm(len(x)), 7)
    train_on, held = order[:1400], order[1400:]
    optimiser = torch.optim.AdamW(module.parameters(), 3e-3)
    with seeded(7):
        for at in range(60):
            rows = train_on[torch.arange(at * 32, at * 32 + 32) % len(train_on)]
            loss = nn.functional.cross_entropy(module.train()(x[rows]), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    share = torch.bincount(y[train_on], minlength=10) / len(train_on)
    with torch.no_grad():
        score = nn.functional.cross_entropy(module.eval()(x[held]), y[held]).item()
    return score, -share.log()[y[held]].mean().item()


LAYER: dict[str, Callable[[Example], None]] = {
    "shapes": shapes,
    "gradcheck": gradcheck,
    "odd": odd,
    "lengths": lengths,
    "empty": empty,
    "causal": causal,
    "autocast": autocast,
    "state_dict": state_dict,
    "compile": compiles,
    "export": exports,
    "trace": traces,
    "per_example": per_example,
    "deepcopy": deepcopy,
    "seed": seed,
    "batch": batch,
    "state": state,
    "ddp": ddp,
    "wrong": wrong,
}
MODEL = {**LAYER, "training": training}
