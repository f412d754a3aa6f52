"""Reversible chains: couplings of two halves whose inputs follow from their outputs, so that training keeps no activations.

Per coupling, the backward pass evaluates each branch once more to get the inputs back and differentiate: 4 units of work in place
of 3. Of a chain's activations only its outputs and one branch's graph live at a time, however deep it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from interlayer.core import aside
from interlayer.core.traced import traced

__all__ = ["Coupling", "Pair", "halves", "inverse", "ordinary", "reversible"]

Pair: TypeAlias = tuple[Float[Tensor, "B ..."], Float[Tensor, "B ..."]]


def halves(x: Float[Tensor, "B ..."], dim: int = 1) -> Pair:
    """Split a tensor into the two halves that couplings work on; ``torch.cat(pair, dim)`` joins them again.

    Args:
        x: What is split.
        dim: Along which axis: 1 for the channels of images, -1 for the features of tokens.

    Raises:
        ValueError: An odd size.

    Examples:
        >>> [half.tolist() for half in halves(torch.tensor([[1, 2, 3, 4]]))]
        [[[1, 2]], [[3, 4]]]
    """
    if x.shape[dim] % 2:
        raise ValueError(
            f"halves: {x.shape[dim]} channels (axis {dim} of {tuple(x.shape)}); expected an even number, as a coupling works on "
            "two equal halves. Pad with a channel of zeros, or move pixels into channels first."
        )
    first, second = x.chunk(2, dim)
    return first, second


class Coupling(nn.Module):
    """Change one half by a function of the other, whatever the function is; the change can be undone exactly.

    Equation: a branch f takes ``(x_1, x_2)`` to ``(x_2, x_1 + f(x_2))``, and ``(y_1, y_2)`` back to ``(y_2 - f(y_1), y_1)``. With a
    second branch, ``y_1 = x_1 + f(x_2)`` and ``y_2 = x_2 + g(y_1)``, the block of reversible residual networks (Gomez et al.,
    arXiv:1707.04585, equation 6).

    A subclass may say how f's output and the other half are combined (``join`` and its inverse ``part``) and what becomes of
    halves that are handed on (``carry`` and its inverse ``back``), such as a change of resolution. These have no weights.

    Args:
        f: Branch from one half to the shape of the other; any module.
        g: Second branch.

    Shapes: two halves to two halves; of one shape each, unless ``carry`` changes it.

    Raises:
        ValueError: A branch whose output has not the shape of the half that it changes.

    Examples:
        >>> block, x = Coupling(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU())), torch.randn(2, 4, 3)
        >>> torch.allclose(torch.stack(block.inverse(*block(*x))), x, atol=1e-6)
        True
    """

    def __init__(self, f: nn.Module, g: nn.Module | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList([f] if g is None else [f, g])

    def carry(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """What becomes of a half beside the branch."""
        return x

    def back(self, y: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """The inverse of ``carry``."""
        return y

    def join(self, x: Float[Tensor, "B ..."], branch: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """Combine a half with what the branch gives."""
        return x + branch

    def part(self, y: Float[Tensor, "B ..."], branch: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """The inverse of ``join``: the half."""
        return y - branch

    def step(self, branch: nn.Module, x1: Float[Tensor, "B ..."], x2: Float[Tensor, "B ..."]) -> Pair:
        """Apply one branch."""
        kept, out = self.carry(x1), branch(x2)
        if out.shape != kept.shape:
            raise ValueError(
                f"{type(self).__name__}: a branch gives {tuple(out.shape)}; expected {tuple(kept.shape)}, the shape of the half that "
                "it changes."
            )
        return self.carry(x2), self.join(kept, out)

    def forward(self, x1: Float[Tensor, "B ..."], x2: Float[Tensor, "B ..."]) -> Pair:
        """Apply the branches in turn."""
        for branch in self.branches:
            x1, x2 = self.step(branch, x1, x2)
        return x1, x2

    def inverse(self, y1: Float[Tensor, "B ..."], y2: Float[Tensor, "B ..."]) -> Pair:
        """The inputs of these outputs: exact, up to rounding, where the branches give the same as in ``forward``.

        They do not under dropout, or with statistics of another batch: call ``eval()`` first.
        """
        for branch in reversed(self.branches):
            x2 = self.back(y1)
            y1, y2 = self.back(self.part(y2, branch(x2))), x2
        return y1, y2


def ordinary(blocks: Iterable[Coupling], x: Pair) -> Pair:
    """Run the blocks one after the other, as autograd does by itself: activations grow with the depth.

    Examples:
        >>> x, block = (torch.zeros(1, 2), torch.ones(1, 2)), Coupling(nn.Identity())
        >>> ordinary([block, block], x)[1]
        tensor([[2., 2.]])
    """
    for block in blocks:
        x = block(*x)
    return x


def inverse(blocks: Iterable[Coupling], y: Pair) -> Pair:
    """The inputs of a chain with outputs ``y``; see ``Coupling.inverse``.

    Examples:
        >>> x, block = (torch.zeros(1, 2), torch.ones(1, 2)), Coupling(nn.Identity())
        >>> torch.equal(inverse([block, block], ordinary([block, block], x))[1], x[1])
        True
    """
    for block in reversed(list(blocks)):
        y = block.inverse(*y)
    return y


def reversible(blocks: Iterable[Coupling], x: Pair) -> Pair:
    """Run the blocks without keeping activations: the backward pass makes them again from the outputs.

    Outputs are those of ``ordinary`` bit for bit. Gradients are the same up to the rounding of ``Coupling.inverse``, which a kink such as
    ReLU's at zero or a norm over values that hardly vary magnifies: over 18 convolutional units they differ by 1e-13 of their norm in
    float64, and by 4e-3 in float32, where ordinary ones are 2e-3 from the exact. With halves in bfloat16 nothing of them may be left:
    keep the halves in float32 and let autocast run the branches.

    A branch runs a second time in the backward pass under the first time's conditions: the same random numbers, autocast, and buffers
    as they were, in copies, so that the running statistics of a batch norm are updated once. Hooks on modules of a branch run twice.
    Whatever requires gradients must reach a branch as its input or be one of its parameters.

    Under ``torch.compile`` blocks are checkpointed, which its graphs can express: each keeps its inputs, so memory does grow with the
    depth, by one pair a block. Under the transforms of ``torch.func`` and in exported programs the chain is ``ordinary``.

    Args:
        blocks: Couplings, applied in order.
        x: Both halves.

    Raises:
        ValueError: A block with parameters outside of its branches, or a branch that reports an auxiliary loss (``core.aside``), which
            would have no gradient.
        RuntimeError: A second derivative is asked for (``create_graph=True``), or ``train()`` or ``eval()`` was called before the
            backward pass.

    Examples:
        >>> blocks = [Coupling(nn.Linear(3, 3)) for _ in range(9)]
        >>> y1, y2 = reversible(blocks, halves(torch.randn(2, 6)))
        >>> (y1 * y2).sum().backward()
        >>> blocks[0].branches[0].weight.grad.shape
        torch.Size([3, 3])
    """
    blocks = list(blocks)
    if torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled() and not torch.compiler.is_exporting():
        for block in blocks:
            x = checkpoint(block, *x, use_reentrant=False)
        return x
    if traced() or not torch.is_grad_enabled() or x[0].is_meta:
        return ordinary(blocks, x)
    steps, weights = list[_Step](), list[Tensor]()
    for block in blocks:
        for branch in block.branches:
            named = dict(branch.named_parameters())
            steps.append(_Step(block, branch, list(named)))
            weights += named.values()
        if outside := [name for name, _ in block.named_parameters() if not name.startswith("branches.")]:
            raise ValueError(
                f"reversible: parameter {outside[0]!r} of {type(block).__name__} is outside of its branches and would get no gradient; "
                "move it into a branch."
            )
    return _Chain.apply(steps, *x, *weights)


@dataclass
class _Step:
    """One branch, and under which conditions it ran."""

    block: Coupling
    branch: nn.Module
    names: list[str]  # of its weights
    training: bool = False
    random: list[Tensor] = field(default_factory=list)  # states of the generators before it, if it moved them
    buffers: dict[str, Tensor] = field(default_factory=dict)  # those that it changed, as they were before

    def run(self, x1: Tensor, x2: Tensor) -> Pair:
        """Run the branch and note the conditions."""
        self.training, states = self.branch.training, _states(x2)
        before = {name: buffer.clone() for name, buffer in self.branch.named_buffers()}
        y = self.block.step(self.branch, x1, x2)
        if not all(map(torch.equal, states, _states(x2))):
            self.random = states
        # By value: the kernels of a batch norm change its running statistics without counting up their version.
        self.buffers = {n: b for n, now in self.branch.named_buffers() if not torch.equal(b := before[n], now)}
        return y

    def again(self, weights: Sequence[Tensor], y1: Tensor, y2: Tensor) -> tuple[Pair, Pair]:
        """The inputs as leaves, and the outputs with their graph, from one evaluation of the branch."""
        if self.branch.training != self.training:
            raise RuntimeError(
                "reversible: train() or eval() was called between the forward and the backward pass, so that a branch would not run as "
                "it did. Call it after backward()."
            )
        tensors = dict(zip(self.names, weights, strict=True))
        tensors |= {name: buffer.clone() for name, buffer in self.buffers.items()}
        x2 = self.block.back(y1).detach().requires_grad_()
        with _random(self.random, x2), aside.collect():  # metrics were reported the first time
            out = functional_call(self.branch, tensors, (x2,))
        x1 = self.block.back(self.block.part(y2, out.detach())).detach().requires_grad_()
        return (x1, x2), (self.block.carry(x2), self.block.join(self.block.carry(x1), out))


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, steps: list[_Step], x1: Tensor, x2: Tensor, *weights: Tensor) -> Pair:
        device = x2.device.type
        # Without the cache: what is cast here has no graph, and others that use the weight would take it.
        ctx.autocast = {
            "device_type": device, "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device), "cache_enabled": False,
        }  # fmt: skip
        with aside.collect() as told, torch.autocast(**ctx.autocast):
            for step in steps:
                x1, x2 = step.run(x1, x2)
        if told.losses:
            raise ValueError(
                "reversible: a branch reports an auxiliary loss, which would have no gradient; use `ordinary`."
            )
        for name, values in told.metrics.items():
            for value in values:
                aside.metric(name, value)
        ctx.steps = steps
        ctx.save_for_backward(*weights, x1, x2)
        return x1, x2

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("reversible: second derivatives (create_graph=True) are not supported; use `ordinary`.")
        grads, (*weights, y1, y2) = list(given), ctx.saved_tensors
        found = list[Tensor | None]()  # from the last weight to the first
        for step in reversed(ctx.steps):
            own = [weights.pop() for _ in step.names][::-1]
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                (y1, y2), y = step.again(own, y1, y2)
            leaves = (y1, y2, *(w for w in own if w.requires_grad))
            grads = list(torch.autograd.grad(y, leaves, grads, allow_unused=True))
            found += [grads.pop() if w.requires_grad else None for w in reversed(own)]
        return None, *grads, *reversed(found)


def _states(x: Tensor) -> list[Tensor]:
    """States of the generators that a branch may draw from: the CPU's, and that of the device of ``x``."""
    return [torch.get_rng_state(), *get_device_states(x)[1]]


@contextmanager
def _random(states: Sequence[Tensor], x: Tensor) -> Iterator[None]:
    """Draw the numbers that followed these states; without states, nothing is drawn."""
    if not states:
        yield
        return
    devices = get_device_states(x)[0]
    with torch.random.fork_rng(devices, device_type="cuda" if x.device.type == "cpu" else x.device.type):
        torch.set_rng_state(states[0])
        set_device_states(devices, states[1:], device_type=x.device.type)
        yield
