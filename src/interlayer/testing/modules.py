"""Contracts of layers and models."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from interlayer.core.example import Example
from interlayer.testing.common import finite, make, require, same, seeded, tensors
from interlayer.testing.ddp import two_processes
from interlayer.testing.gradients import gradient
from interlayer.testing.harness import Inputs, double, in_every_mode, longer, low_precision, mapped, outcome, pair
from interlayer.testing.models import training as learns


@in_every_mode
def shapes(example: Example) -> None:
    """Finite outputs that keep the batch, and a finite gradient for every parameter."""
    module, inputs = pair(example)
    out, grads = outcome(module, inputs)
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


def odd(example: Example) -> None:
    """Odd sizes, and a batch of one."""
    module, inputs = pair(example)
    for given in (mapped(lambda x: x[:1], inputs), make(example.odd, 101) if example.odd else inputs):
        finite(outcome(module.eval(), given)[0], "the output at an odd size")


@in_every_mode
def lengths(example: Example) -> None:
    """Where ``axis`` names the axis of the positions: length one works; length 0 works too, or is a clear error."""
    if (axis := example.axis) is None:
        return
    module, inputs = pair(example)
    finite(outcome(module.eval(), mapped(lambda x: x.narrow(axis, 0, 1), inputs))[0], "the output at length one")
    _works_or_says(module, mapped(lambda x: x.narrow(axis, 0, 0), inputs), "length 0")


@in_every_mode
def empty(example: Example) -> None:
    """A batch of 0 items works, backward pass included, or is a clear error."""
    module, inputs = pair(example)
    for training in (False, True):
        out = _works_or_says(module.train(training), mapped(lambda x: x[:0], inputs), "an empty batch")
        require(not any(t.shape[0] for t in out if t.ndim), "an empty batch gives items")


def _works_or_says(module: nn.Module, inputs: Inputs, what: str) -> list[Tensor]:
    """The outputs, which are finite, or none after a ``ValueError`` that says why."""
    try:
        out, _ = outcome(module, inputs)
    except ValueError as error:
        require(len(str(error)) > 10, f"{what} raises a ValueError without a message")
        return []
    finite(out, f"the output for {what}")
    return out


def causal(example: Example) -> None:
    """Where ``causal``: a later position along ``axis`` never changes an earlier output, in evaluation or training."""
    if not example.causal:
        return
    module, inputs = pair(example)
    module, inputs = module.double(), double(inputs)
    axis = 1 if example.axis is None else example.axis
    half = tensors(inputs)[0].shape[axis] // 2
    require(half > 0, "inputs() must have at least two positions")

    def change(x: Tensor) -> Tensor:
        early, late = x.split([half, x.shape[axis] - half], axis)
        return torch.cat((early, late.flip(axis) + 1 if x.is_floating_point() else late.roll(1, 0)), axis)

    for training in (False, True):
        outs = []
        for given in (inputs, mapped(change, inputs)):
            with torch.no_grad(), seeded(5):
                outs.append(tensors(module.train(training)(*given))[0])
        before, after = (out.narrow(axis, 0, half) for out in outs)
        same(before, after, f"the first {half} outputs after a later input changed", rtol=1e-9, atol=1e-9)


@in_every_mode
def autocast(example: Example) -> None:
    """Under bfloat16 autocast: finite and trainable, and near float32 in evaluation; bfloat16 inputs too."""
    module, inputs = pair(example)
    with seeded(5):
        plain, _ = outcome(module.eval(), inputs)
    with torch.autocast("cpu", torch.bfloat16), seeded(5):
        half, grads = outcome(module, inputs)
        trained, more = outcome(module.train(), inputs)
        with torch.no_grad():
            rest = [module.train(training)(*low_precision(inputs)) for training in (True, False)]
    finite([half, trained, rest, [g for g in (*grads.values(), *more.values()) if g is not None]], "bfloat16")
    for a, b in zip(plain, half, strict=True):
        gap = (a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-12)
        require(gap.item() < 0.1, f"bfloat16 is off by {gap.item():.2g} of the float32 output")


def state_dict(example: Example) -> None:
    """Weights go through safetensors into another instance, which then gives the same numbers."""
    module, inputs = pair(example)
    other = make(example.make, 1)
    outcome(module, inputs)  # buffers that a pass changes are state too
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "layer.safetensors")
        save_model(module, path)
        load_model(other, path)
    same(outcome(module.eval(), inputs)[0], outcome(other.eval(), inputs)[0], "the loaded instance")


def compiles(example: Example) -> None:
    """``torch.compile`` gives the same outputs and gradients, as one graph where the control is static."""
    module, inputs = pair(example)
    module.eval()
    with seeded(5):
        eager = outcome(module, inputs)
    torch._dynamo.reset()
    twin = copy.deepcopy(module)
    with warnings.catch_warnings(), seeded(5):
        warnings.simplefilter("ignore")  # of the compiler
        compiled: Any = torch.compile(twin, fullgraph=example.control == "static", backend="aot_eager", dynamic=False)
        out, grads = outcome(compiled, inputs)
    same(eager[0], out, "compiled output", rtol=1e-4, atol=1e-5)
    same(list(eager[1].values()), list(grads.values()), "compiled gradients", rtol=1e-3, atol=1e-4)


def exports(example: Example) -> None:
    """``torch.export`` with a dynamic batch gives a program with the same outputs, also for a larger batch.

    Where the data control what runs there is no such program; then other inputs really run other operations.
    """
    if example.control == "data":
        return _depends(example)
    module, inputs = pair(example)
    module.eval()
    free = tuple({0: torch.export.Dim.DYNAMIC} if isinstance(x, Tensor) else None for x in inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, inputs, dynamic_shapes=free).module()
        for given in (inputs, longer(inputs)):
            same(module(*given), program(*given), "exported output", rtol=1e-4, atol=1e-5)


def _depends(example: Example) -> None:
    module, _ = pair(example)
    module.eval()
    counts = set()
    for seed in range(100, 110):
        with _Shapes() as seen, torch.no_grad():
            module(*make(example.inputs, seed))
        counts.add(tuple(seen.found))
    require(len(counts) > 1, "control='data', but inputs of ten seeds run the same operations on the same shapes")


class _Shapes(TorchDispatchMode):
    """Operations and the shapes of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found += [(str(func), tuple(t.shape)) for t in tensors(out)]
        return out


def traces(example: Example) -> None:
    """``torch.jit.trace`` gives a program with the same outputs, also for a larger batch, where the control is static."""
    if example.control == "data":
        return
    module, inputs = pair(example)
    module.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the tracer, for every check of a shape
        program = torch.jit.trace(module, inputs, check_trace=False)
        for given in (inputs, longer(inputs)):
            same(module(*given), program(*given), "traced output", rtol=1e-4, atol=1e-5)


def per_example(example: Example) -> None:
    """``vmap`` of ``torch.func.grad`` gives the gradients of each example alone.

    Not for layers whose batch is coupled or whose gradients are drawn. Where the data control what runs, the gradients of
    the examples alone add up to those of the batch.
    """
    if example.batch == "coupled" or example.gradient == "unbiased":
        return
    module, inputs = pair(example)
    module, inputs = module.double().eval(), double(inputs)
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

    def alone(n: int) -> list[Tensor]:
        leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
        found = torch.autograd.grad(loss(leaves, *(x[n] for x in items)), list(leaves.values()), allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights.values(), strict=True)]

    items = [inputs[i] for i in where]
    if example.control == "data":
        parts = [alone(n) for n in range(len(items[0]))]
        leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
        out = [t for t in tensors(functional_call(module, leaves, inputs)) if t.is_floating_point()]
        total = torch.stack([t.square().sum() for t in out]).sum()
        whole = torch.autograd.grad(total, list(leaves.values()))
        same(whole, [torch.stack(g).sum(0) for g in zip(*parts, strict=True)], "summed gradients", rtol=1e-7, atol=1e-9)
        return
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no batching rule
        each = torch.func.vmap(torch.func.grad(loss), (None, *[0] * len(items)))(weights, *items)
        for n in range(2):
            same(alone(n), [each[name][n] for name in weights], "gradients of one example", rtol=1e-7, atol=1e-9)


def deepcopy(example: Example) -> None:
    """A deep copy gives the same numbers and shares nothing."""
    module, inputs = pair(example)
    module.eval()
    before = outcome(module, inputs)[0]
    twin = copy.deepcopy(module)
    same(before, outcome(twin, inputs)[0], "the copy")
    with torch.no_grad():
        for p in [*twin.parameters(), *twin.buffers()]:
            p.zero_()
    same(before, outcome(module, inputs)[0], "the original, after the copy's weights changed")


def seed(example: Example) -> None:
    """The same seed gives the same weights, outputs and gradients, in training too."""
    runs = []
    for _ in range(2):
        module, inputs = pair(example)
        with seeded(5):
            runs.append((list(module.state_dict().values()), outcome(module, inputs)))
    same(runs[0], runs[1], "the second run of the same seed")


def batch(example: Example) -> None:
    """In evaluation, an example's output does not depend on the rest of its batch.

    Where the batch is coupled: it does, but not on the order of the batch.
    """
    module, inputs = pair(example)
    module, inputs = module.double().eval(), double(inputs)
    with torch.no_grad():
        whole, alone = tensors(module(*inputs)), tensors(module(*mapped(lambda x: x[:1], inputs)))
        turned = tensors(module(*mapped(lambda x: x.flip(0), inputs)))
    if example.batch == "coupled":
        same([t.flip(0) for t in whole], turned, "the batch in another order", rtol=1e-9, atol=1e-9)
        moved = any(not torch.allclose(a[:1], b) for a, b in zip(whole, alone, strict=True) if a.ndim)
        require(moved, "batch='coupled', but an example on its own gives the same output")
        return
    same([t[:1] for t in whole if t.ndim], [t for t in alone if t.ndim], "an example on its own", rtol=1e-9, atol=1e-9)


def state(example: Example) -> None:
    """A second call gives the same numbers, if needed after the layer's ``reset()``."""
    module, inputs = pair(example)
    module.eval()
    with torch.no_grad():
        with seeded(5):
            first = module(*inputs)
        if callable(reset := getattr(module, "reset", None)):
            reset()
        with seeded(5):
            same(first, module(*inputs), "the second call (hidden state without reset()?)")


def steps(example: Example) -> None:
    """Where it ``streams``: one position after the other gives the outputs of the whole pass, and a state is left unchanged."""
    if not example.streams:
        return
    module, inputs = pair(example)
    module, (x,) = module.double().eval(), double(inputs)
    axis = 1 if example.axis is None else example.axis
    with torch.no_grad():
        whole = tensors(module(x))[0]
        for size in (len(x), 1):
            state, outs = module.start(size), []  # type: ignore[operator]
            for position in x[:size].unbind(axis):
                before = copy.deepcopy(state)
                out, following = module.step(position, state)  # type: ignore[operator]
                same(before, state, "the state that a step was given")
                state = following
                outs.append(out)
            same(whole[:size], torch.stack(outs, axis), "the outputs step by step", rtol=1e-7, atol=1e-9)


def ddp(example: Example) -> None:
    """Two processes under DistributedDataParallel get the gradients of the whole batch."""
    module, inputs = pair(example)
    module = module.double().eval()
    inputs = double(inputs)
    if not any(p.requires_grad for p in module.parameters()):
        return  # nothing to synchronise
    parts = [mapped(lambda x: x[:1], inputs), mapped(lambda x: x[1:2], inputs)]
    wanted: dict[str, Tensor] = {}

    def seeded_outcome(module: nn.Module, part: Inputs) -> tuple[list[Tensor], dict[str, Tensor | None]]:
        with seeded(5):
            return outcome(module, part)

    for part in parts:
        for name, grad in seeded_outcome(module, part)[1].items():
            if grad is not None:
                wanted[name] = wanted.get(name, torch.zeros_like(grad)) + grad / 2
    module.zero_grad()
    got = two_processes(module, lambda wrapped, rank: seeded_outcome(wrapped, parts[rank]))
    require(
        wanted.keys() == got.keys(),
        f"gradients of {sorted(wanted.keys() ^ got.keys())} differ between one process and two",
    )
    same(list(wanted.values()), [got[n] for n in wanted], "gradients of two processes", rtol=1e-7, atol=1e-9)


def wrong(example: Example) -> None:
    """A wrong shape or type raises ValueError or TypeError with a message."""
    module, inputs = pair(example)
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
            f"wrong inputs {shapes} raise {type(error).__name__} ({str(error)[:80]}); expected ValueError or TypeError"
        ) from error
    else:
        raise AssertionError(f"wrong inputs {shapes} are accepted silently")


LAYER: dict[str, Callable[[Example], None]] = {
    "shapes": shapes,
    "gradient": gradient,
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
    "steps": steps,
    "ddp": ddp,
    "wrong": wrong,
}
MODEL = {**LAYER, "training": learns}
