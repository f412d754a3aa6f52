"""Identity mappings: the pre-activation residual unit, the original one, and the variants that the paper compares."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from interlayer.core.example import Backbone, Example
from interlayer.core.stream import Norm, State, Stream, Width, layernorm, widths

SHORTCUTS = ("identity", "constant", "exclusive-gate", "shortcut-gate", "conv", "dropout")
ORDERS = ("pre", "relu-only-pre", "original", "bn-after-add", "relu-before-add")


class IdentityMappings(Stream):
    """Norm and activation come before the branch's weights, so that nothing touches the path from block to block.

    Paper: He et al., "Identity Mappings in Deep Residual Networks", arXiv:1603.05027.

    Equation (4): with identity shortcuts and nothing after the addition, ``x_L = x_l + sum_{i=l}^{L-1} F(x_i)``. The unit
    is ``x + conv(act(norm(conv(act(norm(x))))))``; the inner ``conv, norm, act, conv`` is the backbone's branch and the
    rest is here. The first unit's activation is taken before the two paths part, and one more norm and activation ends
    the stack (the paper's appendix).

    Orders (figure 4): ``pre`` (full pre-activation), ``relu-only-pre``, ``original``, ``bn-after-add``,
    ``relu-before-add``. Shortcuts (table 1): ``identity``; ``constant`` (shortcut and branch times ``scale``);
    ``exclusive-gate`` ``(1 - g) x + g F``; ``shortcut-gate`` ``(1 - g) x + F``, both with
    ``g = sigmoid(W x + b)``, a 1x1 convolution with b starting at ``gate_bias``; ``conv`` (1x1); ``dropout``.

    Args:
        depth: Number of units.
        width: Channels of a unit's input.
        outputs: Channels of a unit's output, where they differ.
        branches: Sublayers in a block.
        norm: Called with ``width=``.
        activation: Called without arguments.
        order: Where norm and activation stand.
        shortcut: What the path from unit to unit does.
        scale: Factor of ``constant`` for both paths, and the share that ``dropout`` drops.
        gate_bias: b at the start.

    Shapes: [B, C, H, W] with the convolutional shortcuts and gates; otherwise any that the norm takes.

    Raises:
        ValueError: Unknown ``order`` or ``shortcut``.

    Examples:
        >>> import torch
        >>> from interlayer.models import ConvNet
        >>> ConvNet(1, 10, depth=8, width=8, stream="identity-mappings(order='original')")(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
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
        order: str = "pre",
        shortcut: str = "identity",
        scale: float = 0.5,
        gate_bias: float = -6.0,
    ) -> None:
        super().__init__(depth, branches=branches)
        if order not in ORDERS:
            raise ValueError(f"IdentityMappings: order {order!r} is not one of {ORDERS}.")
        if shortcut not in SHORTCUTS:
            raise ValueError(f"IdentityMappings: shortcut {shortcut!r} is not one of {SHORTCUTS}.")
        self.order, self.shortcut, self.scale = order, shortcut, scale
        norm = norm or layernorm
        ins, outs = widths(width, self.layers), widths(outputs or width, self.layers)
        self.act = activation()
        self.stem = nn.Identity() if order == "pre" else nn.Sequential(norm(width=ins[0]), activation())
        has_norm = order != "relu-only-pre"
        self.norms = nn.ModuleList(norm(width=w) for w in (ins if order == "pre" else outs)) if has_norm else None
        self.last = norm(width=outs[-1]) if order == "pre" else None
        if shortcut in ("exclusive-gate", "shortcut-gate", "conv"):
            self.paths = nn.ModuleList(nn.Conv2d(w, w, 1, bias=shortcut != "conv") for w in outs)
            for path in self.paths if shortcut != "conv" else ():
                nn.init.constant_(path.get_parameter("bias"), gate_bias)

    def start(self, x: Tensor) -> State:
        return State(self.stem(x))

    def read(self, state: State, layer: int) -> Tensor:
        if self.order == "pre":
            assert self.norms is not None
            x = self.act(self.norms[layer](state.x))
            if layer == 0:
                state.x = x
            return x
        return self.act(state.x) if self.order == "relu-only-pre" else state.x

    def write(self, state: State, layer: int, branch: Tensor) -> State:
        norm = self.norms[layer] if self.norms is not None else None
        if norm is not None and self.order in ("original", "relu-before-add"):
            branch = norm(branch)
        if self.order == "relu-before-add":
            branch = self.act(branch)
        x = self._join(state.x, branch, layer)
        if norm is not None and self.order == "bn-after-add":
            x = norm(x)
        state.x = self.act(x) if self.order in ("original", "bn-after-add") else x
        return state

    def _join(self, x: Tensor, branch: Tensor, layer: int) -> Tensor:
        if self.shortcut == "constant":
            return self.scale * (x + branch)
        if self.shortcut == "dropout":
            return nn.functional.dropout(x, self.scale, self.training) + branch
        if self.shortcut == "conv":
            return self.paths[layer](x) + branch
        if self.shortcut in ("exclusive-gate", "shortcut-gate"):
            gate = torch.sigmoid(self.paths[layer](x))
            return (1 - gate) * x + (gate * branch if self.shortcut == "exclusive-gate" else branch)
        return x + branch

    def finish(self, state: State) -> Tensor:
        if self.order == "pre":
            assert self.last is not None
            return self.act(self.last(state.x))
        return self.act(state.x) if self.order == "relu-only-pre" else state.x


EXAMPLE = Example(
    make=lambda: Backbone(IdentityMappings),
    inputs=lambda: (torch.randn(2, 6, 8),),
    odd=lambda: (torch.randn(3, 7, 8),),
    axis=1,
    causal=True,
)
