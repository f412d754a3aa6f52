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

    require(torch.autograd.gradcheck(f, tuple(leaves), fast_mode=True, atol=1e-5, rtol=1e-4), "gradcheck")


def odd(example: Example) -> None:
    """Odd sizes, and a batch of one."""
    module, inputs = _pair(example)
    for given in (_map(lambda x: x[:1], inputs), make(example.odd, 101) if example.odd else inputs):
        finite(_run(module.eval(), given)[0], "the output at an odd size")


def autocast(example: Example) -> None:
    """Under bfloat16 autocast: finite, near float32 and trainable."""
    module, inputs = _pair(example)
    plain, _ = _run(module.eval(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        low, grads = _run(module, inputs)
    finite([low, [g for g in grads.values() if g is not None]], "bfloat16")
    for a, b in zip(plain, low, strict=True):
        gap = (a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-12)
        require(gap.item() < 0.1, f"bfloat16 is off by {gap.item():.2g} of the float32 output")


def state_dict(example: Example) -> None:
    """Weights go through safetensors into another instance, which then gives the same numbers."""
    module, inputs = _pair(example)
    other = make(example.make, 1)
    _run(module, inputs)  # what a pass leaves in buffers is state too
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
        warnings.simplefilter("ignore")  # the compiler's own
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
    """``torch.export`` gives a program with the same outputs."""
    module, inputs = _pair(example)
    module.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, inputs).module()
        out = program(*inputs)
        same(module(*inputs), out, "exported output", rtol=1e-4, atol=1e-5)


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
    """A second call gives the same numbers, or the layer says ``reset()``, after which it does."""
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
    told = [tuple(x.shape) for x in inputs if isinstance(x, Tensor)]
    try:
        module(*inputs)
    except (ValueError, TypeError) as error:
        require(len(str(error)) > 10, f"wrong inputs {told} raise an error without a message")
    except Exception as error:
        raise AssertionError(
            f"wrong inputs {told} raise {type(error).__name__} ({str(error)[:80]}); wanted ValueError or TypeError"
        ) from error
    else:
        raise AssertionError(f"wrong inputs {told} are taken without a word")


def training(example: Example) -> None:
    """One real training run beats the trivial predictor: on ``train()``, else on digits if the inputs are their images."""
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
        f"no train() is given, and inputs {tuple(like.shape)} are not those of the digits, [batch, 1, 8, 8] or [batch, 64]",
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
    "autocast": autocast,
    "state_dict": state_dict,
    "compile": compiles,
    "export": exports,
    "deepcopy": deepcopy,
    "seed": seed,
    "batch": batch,
    "state": state,
    "ddp": ddp,
    "wrong": wrong,
}
MODEL = {**LAYER, "training": training}
