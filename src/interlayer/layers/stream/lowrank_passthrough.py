"""Low-rank passthrough networks: recurrent cells with a large carried state and few weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm as normed

from interlayer.core.config import configured
from interlayer.core.data import DataShape
from interlayer.core.example import Example

GROUPS = {"highway": (2,), "gru": (2, 1), "lstm": (4,)}  # gates of a cell, by the state that they read
TRANSITIONS = ("full", "low-rank", "low-rank-diagonal")
Apply = Callable[[Tensor], Tensor]


class Transition(nn.Module):
    """State-to-gate maps of one cell: full matrices, ``L R``, or ``L R + diag(d)`` for each gate.

    Args:
        width: State size n.
        gates: Matrices G.
        kind: One of ``TRANSITIONS``.
        rank: Rank of ``L R``.
        tied: Whether all gates share one R.
        weight_norm: Whether to weight-normalise the rows of each factor: a direction times a learned length.
    """

    def __init__(self, width: int, gates: int, kind: str, rank: int, *, tied: bool, weight_norm: bool) -> None:
        super().__init__()
        self.width, self.gates, self.rank, self.tied = width, gates, rank, tied
        self.left = nn.Parameter(_glorot(gates, width, width if kind == "full" else rank))
        self.right = None if kind == "full" else nn.Parameter(_glorot(1 if tied else gates, rank, width))
        self.diagonal = None
        if kind == "low-rank-diagonal":
            self.diagonal = nn.Parameter(torch.empty(gates, width).uniform_(-0.01, 0.01))
        if weight_norm:
            for name in ("left", *(["right"] if self.right is not None else [])):
                normed(self, name, dim=0)

    def ready(self, *groups: int) -> list[Apply]:
        """For each group of gates what maps a state [B, n] to [gates, B, n]; weights are read once, not at every step."""
        left_GND, at, out = self.left.unflatten(0, (self.gates, self.width)), 0, []
        for size in groups:
            part = slice(at, at + size)
            right = self.right
            if right is not None and not self.tied:
                right = right.unflatten(0, (self.gates, -1))[part].flatten(0, 1)
            diagonal = None if self.diagonal is None else self.diagonal[part].unsqueeze(1)
            out.append(_applied(left_GND[part], right, diagonal))
            at += size
        return out


def _applied(left_GND: Tensor, right: Tensor | None, diagonal_G1N: Tensor | None) -> Apply:
    """``h -> h U'`` of a group of gates."""
    gates, width, _ = left_GND.shape
    if right is None:
        full = left_GND.flatten(0, 1)
        return lambda h: F.linear(h, full).unflatten(-1, (gates, width)).transpose(0, 1)
    left_GDN = left_GND.transpose(1, 2)
    rank = left_GDN.shape[1]

    def low_rank(h: Tensor) -> Tensor:
        inner_GBD = F.linear(h, right).unflatten(-1, (-1, rank)).transpose(0, 1).expand(gates, -1, -1)
        y_GBN = torch.bmm(inner_GBD, left_GDN)
        return y_GBN if diagonal_G1N is None else torch.addcmul(y_GBN, h, diagonal_G1N)

    return low_rank


class LowRankPassthrough(nn.Module):
    """A gated recurrent layer with a large carried state and low-rank transitions, so that the state needs few weights.

    Paper: Miceli Barone, "Low-rank passthrough neural networks", arXiv:1603.03116.

    Equation: every state-to-gate matrix is ``U = L R`` or ``U = L R + diag(d)`` with rank r, below the state size n. Cells:

    * ``gru``: ``u = s(W_u x + U_u h + b_u)``, ``r = s(W_r x + U_r h + b_r)``, ``m = tanh(W_m x + U_m (r h) + b_m)``,
      ``h' = (1 - u) m + u h``, as in the author's code;
    * ``highway``: the same without r;
    * ``lstm``: ``c' = f c + i g``, ``h' = o tanh(c')``, all four from x and h.

    Initialisation as in that code: Glorot's uniform for each factor and d uniform within 0.01; the first state is learned. The
    rows of the factors may be weight-normalised (Salimans and Kingma, arXiv:1602.07868). The author's code has
    low-rank GRUs (lowrank-gru, as here; dl4mt-lm, which resets after the matrices), feed-forward highway layers with ReLU and batch
    norm (lowrank-highwaynetwork), an LSTM with full matrices alone, and no weight normalisation. The low-rank LSTM and the recurrent
    highway cell are treated like the GRU here; the paper's text on them could not be read.

    With G matrices, a step costs G n^2 multiply-adds, and as many weights, with full matrices, 2 G n r with low rank ((G + 1)
    n r weights where R is tied), and G n more with the diagonal. The loop over time is inherent; the inputs are projected
    before it, in one product.

    Args:
        inputs: Features F of a step's input.
        width: State size n.
        cell: ``gru``, ``lstm`` or ``highway``.
        transition: ``full``, ``low-rank`` or ``low-rank-diagonal``.
        rank: r. Defaults to 8; a full transition has none.
        tied: Whether all gates share one R; a full transition has none.
        weight_norm: Whether to weight-normalise the factors' rows.
        carry: Initial bias of the gate that carries the state (u, or f of the LSTM).

    Shapes: [B, S, F], and states [B, n] (one, or h and c for the LSTM), to [B, S, n] and the last states.

    Raises:
        ValueError: Unknown cell or transition; a rank outside 1 to n; an input of another shape.

    Examples:
        >>> layer = LowRankPassthrough(3, 64, rank=4)
        >>> y, state = layer(torch.zeros(2, 10, 3))
        >>> y.shape, [s.shape for s in state], sum(p.numel() for p in layer.transition.parameters())
        (torch.Size([2, 10, 64]), [torch.Size([2, 64])], 1728)
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        cell: str = "gru",
        transition: str = "low-rank-diagonal",
        rank: int | None = None,
        tied: bool = False,
        weight_norm: bool = False,
        carry: float = 1.0,
    ) -> None:
        super().__init__()
        if cell not in GROUPS:
            raise ValueError(f"LowRankPassthrough: cell {cell!r} is not one of {list(GROUPS)}.")
        if transition not in TRANSITIONS:
            raise ValueError(f"LowRankPassthrough: transition {transition!r} is not one of {TRANSITIONS}.")
        if transition == "full" and (tied or rank is not None):
            raise ValueError(
                f"LowRankPassthrough: rank={rank} and tied={tied} have no effect on a full transition; leave them out."
            )
        rank = 8 if rank is None else rank
        if transition != "full" and not 1 <= rank <= width:
            raise ValueError(f"LowRankPassthrough: rank {rank} must lie between 1 and the state size {width}.")
        self.inputs, self.width, self.cell, self.gates = inputs, width, cell, sum(GROUPS[cell])
        self.transition = Transition(width, self.gates, transition, rank, tied=tied, weight_norm=weight_norm)
        self.input = nn.Parameter(_glorot(self.gates, width, inputs))
        self.bias = nn.Parameter(torch.zeros(self.gates, width))
        with torch.no_grad():
            self.bias[0] = carry
        self.start = nn.Parameter(torch.zeros(2 if cell == "lstm" else 1, width))

    def forward(
        self, x: Float[Tensor, "B S F"], state: tuple[Tensor, ...] | None = None
    ) -> tuple[Float[Tensor, "B S n"], tuple[Tensor, ...]]:
        """Outputs of all steps, and the last state, from which the next part of the sequence continues."""
        if x.ndim != 3 or x.shape[-1] != self.inputs:
            raise ValueError(f"LowRankPassthrough: input {tuple(x.shape)}; expected [batch, sequence, {self.inputs}].")
        size = (x.shape[0], self.width)
        if state is None:
            state = tuple(self.start.unsqueeze(1).expand(-1, *size).unbind())
        elif [tuple(s.shape) for s in state] != [size] * len(self.start):
            raise ValueError(
                f"LowRankPassthrough: states {[tuple(s.shape) for s in state]}; expected {len(self.start)} of {size}. "
                "Give the state that this layer returned for the same batch."
            )
        driven_SBJ = F.linear(x, self.input, self.bias.flatten()).transpose(0, 1)
        driven_SGBN = driven_SBJ.unflatten(-1, (self.gates, self.width)).transpose(1, 2).to(state[0].dtype)
        step, applied, outputs = STEPS[self.cell], self.transition.ready(*GROUPS[self.cell]), []
        for driven in driven_SGBN.contiguous().unbind():
            state = step(driven, applied, *state)
            outputs.append(state[0])
        return torch.stack(outputs, 1) if outputs else x.new_empty(x.shape[0], 0, self.width), state


def _highway(driven: Tensor, applied: list[Apply], h: Tensor) -> tuple[Tensor, ...]:
    carry, new = driven + applied[0](h)
    return (torch.lerp(new.tanh(), h, carry.sigmoid()),)


def _gru(driven: Tensor, applied: list[Apply], h: Tensor) -> tuple[Tensor, ...]:
    carry, reset = (driven[:2] + applied[0](h)).sigmoid()
    new = (driven[2] + applied[1](reset * h)[0]).tanh()
    return (torch.lerp(new, h, carry),)


def _lstm(driven: Tensor, applied: list[Apply], h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    forget, write, out, new = driven + applied[0](h)
    c = forget.sigmoid() * c + write.sigmoid() * new.tanh()
    return out.sigmoid() * c.tanh(), c


STEPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {"highway": _highway, "gru": _gru, "lstm": _lstm}


def _glorot(gates: int, outputs: int, inputs: int) -> Tensor:
    """One matrix [outputs, inputs] for each gate, stacked by rows, uniform within ``sqrt(6 / (outputs + inputs))``."""
    bound = (6 / (outputs + inputs)) ** 0.5
    return torch.empty(gates * outputs, inputs).uniform_(-bound, bound)


@configured
class PassthroughNet(nn.Module):
    """Reads a series with a ``LowRankPassthrough`` layer and answers after its last step.

    Args:
        inputs: Features F of a step's input.
        outputs: Classes, or predicted values, K.
        width: State size n.
        **options: See ``LowRankPassthrough``; ``transition="full"`` is the ordinary recurrent network.

    Shapes: [B, S, F] to [B, K].

    Examples:
        >>> PassthroughNet(1, 10, width=16, rank=2)(torch.zeros(5, 40, 1)).shape
        torch.Size([5, 10])
    """

    def __init__(self, inputs: int, outputs: int, *, width: int = 64, **options: Any) -> None:
        super().__init__()
        self.layer = LowRankPassthrough(inputs, width, **options)
        self.head = nn.Linear(width, outputs)

    @classmethod
    def for_task(cls, shape: DataShape, **options: Any) -> Self:
        """A network for a task with series as inputs."""
        if shape.kind != "series":
            raise ValueError(
                f"PassthroughNet: takes series, not {shape.kind}. Take a task such as 'sequential-digits'."
            )
        return cls(shape.features, shape.classes, **options)

    def forward(self, x: Float[Tensor, "B S F"]) -> Float[Tensor, "B K"]:
        """Logits, or values, after the last step."""
        return self.head(self.layer(x)[0][:, -1])


EXAMPLE = Example(
    make=lambda: LowRankPassthrough(3, 6, rank=2, weight_norm=True),
    inputs=lambda: (torch.randn(2, 5, 3),),
    odd=lambda: (torch.randn(3, 7, 3),),
    axis=1,
    modes={
        f"{cell}, {transition}": partial(
            LowRankPassthrough,
            3,
            6,
            cell=cell,
            transition=transition,
            rank=None if transition == "full" else 2,
            tied=transition != "full",
        )
        for cell in GROUPS
        for transition in TRANSITIONS
    },
    causal=True,
)
