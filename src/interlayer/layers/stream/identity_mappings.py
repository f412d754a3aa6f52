"""Identity mappings: the pre-activation residual unit, the original one, and the variants that the paper compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.core.example import Backbone, Example
from interlayer.core.slots import choose
from interlayer.core.stream import Norm, State, Stream, Width, layernorm, widths


@dataclass(frozen=True)
class Order:
    """Where a unit's norm and activation stand around the weights of its branch, each a sequence of ``norm`` and ``act``.

    Args:
        before: Before the branch, beside the shortcut.
        end: At the end of the branch.
        after: After the addition.

    Raises:
        ValueError: Other steps, or not exactly one norm.
    """

    before: tuple[str, ...] = ()
    end: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        steps = (*self.before, *self.end, *self.after)
        if steps.count("norm") != 1 or {*steps} - {"norm", "act"}:
            raise ValueError(f"Order: steps {steps}; expected 'norm' once, and any number of 'act'.")


ORDERS = {  # figure 4; the backbone's branch is conv, norm, act, conv
    "pre": Order(before=("norm", "act")),
    "relu-only-pre": Order(before=("act",), end=("norm",)),
    "original": Order(end=("norm",), after=("act",)),
    "bn-after-add": Order(after=("norm", "act")),
    "relu-before-add": Order(end=("norm", "act")),
}


class Identity(nn.Module):
    """``x + F``."""

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Add."""
        return x + branch


class Constant(nn.Module):
    """``s x + s F``.

    Args:
        scale: s.
    """

    def __init__(self, scale: float = 0.5) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Add and scale."""
        return self.scale * (x + branch)


class Dropout(nn.Module):
    """``dropout(x) + F``.

    Args:
        rate: Share that is dropped.
    """

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Drop and add."""
        return F.dropout(x, self.rate, self.training) + branch


class Conv(nn.Module):
    """``W x + F`` with a 1x1 convolution.

    Args:
        width: Channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Convolve and add."""
        return self.map(x) + branch


class ShortcutGate(nn.Module):
    """``(1 - g) x + F`` with ``g = sigmoid(W x + b)``, a 1x1 convolution.

    Args:
        width: Channels.
        gate_bias: b at initialisation; below 0, the gate is nearly open for x.
    """

    def __init__(self, width: int, gate_bias: float = -6.0) -> None:
        super().__init__()
        self.gate = nn.Conv2d(width, width, 1)
        assert self.gate.bias is not None
        nn.init.constant_(self.gate.bias, gate_bias)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Gate the shortcut and add."""
        return (1 - torch.sigmoid(self.gate(x))) * x + branch


class ExclusiveGate(ShortcutGate):
    """``(1 - g) x + g F``; arguments as for ``ShortcutGate``."""

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Mix."""
        return torch.lerp(x, branch, torch.sigmoid(self.gate(x)))


SHORTCUTS: dict[str, Callable[..., nn.Module]] = {  # table 1
    "identity": Identity,
    "constant": Constant,
    "exclusive-gate": ExclusiveGate,
    "shortcut-gate": ShortcutGate,
    "conv": Conv,
    "dropout": Dropout,
}


class IdentityMappings(Stream):
    """Norm and activation come before the branch's weights, so that nothing touches the path from block to block.

    Paper: He et al., "Identity Mappings in Deep Residual Networks", arXiv:1603.05027.

    Equation (4): with identity shortcuts and nothing after the addition, ``x_L = x_l + sum_{i=l}^{L-1} F(x_i)``. The unit
    is ``x + conv(act(norm(conv(act(norm(x))))))``; the inner ``conv, norm, act, conv`` is the backbone's branch and the
    rest is here. The first unit's activation is taken before the two paths part, and one more norm and activation ends
    the stack (the paper's appendix).

    The paper's other units differ in their ``order`` (figure 4) and ``shortcut`` (table 1).

    Args:
        depth: Number of units.
        width: Channels of a unit's input.
        outputs: Channels of a unit's output, where they differ.
        branches: Sublayers in a block.
        norm: Called with ``width=``.
        activation: Called without arguments.
        order: Where norm and activation stand: ``pre`` (full pre-activation), ``relu-only-pre``, ``original``,
            ``bn-after-add``, ``relu-before-add``, or an ``Order``.
        shortcut: What joins the path from unit to unit with the branch: ``identity``, ``constant(scale=0.5)``,
            ``exclusive-gate(gate_bias=-6.0)``, ``shortcut-gate(gate_bias=-6.0)``, ``conv``, ``dropout(rate=0.5)``, or a class
            or factory, called with ``width=`` if it names it.

    Shapes: [B, C, H, W] with convolutional shortcuts and gates; otherwise any that the norm takes.

    Raises:
        ValueError: Unknown ``order`` or ``shortcut``, or an option that the shortcut does not have.

    Examples:
        >>> import torch
        >>> from interlayer.models import ConvNet
        >>> ConvNet(1, 10, depth=8, width=8, stream="identity-mappings(order='original')")(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
        >>> net = ConvNet(depth=8, width=8, stream="identity-mappings(shortcut='dropout(rate=0.2)')")
        >>> net.stream.paths[0].rate
        0.2
    """

    def __init__(
        self,
        depth: int,
        width: Width,
        *,
        outputs: Width | None = None,
        branches: int = 1,
        norm: Norm | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
        order: str | Order = "pre",
        shortcut: Any = "identity",
    ) -> None:
        super().__init__(depth, branches=branches)
        if isinstance(order, str) and order not in ORDERS:
            raise ValueError(f"IdentityMappings: order {order!r} is not one of {list(ORDERS)}.")
        self.order = ORDERS[order] if isinstance(order, str) else order
        norm = norm or layernorm
        ins, outs = widths(width, self.layers), widths(outputs or width, self.layers)
        self.act = activation()
        first = "norm" in self.order.before
        self.stem = nn.Identity() if first else nn.Sequential(norm(width=ins[0]), activation())
        self.norms = nn.ModuleList(norm(width=w) for w in (ins if first else outs))
        self.last = norm(width=outs[-1]) if first else None
        self.paths = nn.ModuleList(choose("IdentityMappings: shortcut", shortcut, SHORTCUTS, width=w) for w in outs)

    def start(self, x: Tensor) -> State:
        return State(self.stem(x))

    def read(self, state: State, layer: int) -> Tensor:
        x = self._steps(self.order.before, state.x, layer)
        if layer == 0 and "norm" in self.order.before:
            state.x = x
        return x

    def write(self, state: State, layer: int, branch: Tensor) -> State:
        x = self.paths[layer](state.x, self._steps(self.order.end, branch, layer))
        state.x = self._steps(self.order.after, x, layer)
        return state

    def _steps(self, steps: tuple[str, ...], x: Tensor, layer: int) -> Tensor:
        for step in steps:
            x = self.norms[layer](x) if step == "norm" else self.act(x)
        return x

    def finish(self, state: State) -> Tensor:
        x = state.x if self.last is None else self.last(state.x)
        return self.act(x) if self.order.before else x


EXAMPLE = Example(
    make=lambda: Backbone(IdentityMappings),
    inputs=lambda: (torch.randn(2, 6, 8),),
    odd=lambda: (torch.randn(3, 7, 8),),
    axis=1,
    causal=True,
    modes={order: lambda order=order: Backbone(partial(IdentityMappings, order=order)) for order in ORDERS},
)
