"""Low-rank passthrough networks: recurrent cells with a large carried state and few weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm as normed

from interlayer.core.example import Example

GATES = {"highway": 2, "gru": 3, "lstm": 4}
TRANSITIONS = ("full", "low-rank", "low-rank-diagonal")
Apply = Callable[[Tensor, int, int], Tensor]


class Transition(nn.Module):
    """State-to-gate maps of one cell: full matrices, ``L R``, or ``L R + diag(d)`` for each gate.

    Args:
        width: State size n.
        gates: Matrices G.
        kind: One of ``TRANSITIONS``.
        rank: Rank of ``L R``.
        tied: Whether all gates share one R.
        weight_norm: Whether each row of each matrix is a direction times a learned length.
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

    def ready(self) -> Apply:
        """What applies gates a to b to a state [B, n] and gives [b - a, B, n]; weights are read once, not at every step."""
        n, d = self.width, self.rank
        left, right, diagonal = self.left, self.right, self.diagonal
        if right is None:

            def full(h: Tensor, a: int, b: int) -> Tensor:
                return F.linear(h, left[a * n : b * n]).unflatten(-1, (b - a, n)).transpose(0, 1)

            return full
        left_GDN = left.unflatten(0, (self.gates, n)).transpose(1, 2)

        def low_rank(h: Tensor, a: int, b: int) -> Tensor:
            rows = right if self.tied else right[a * d : b * d]
            inner_GBD = F.linear(h, rows).unflatten(-1, (-1, d)).transpose(0, 1).expand(b - a, -1, -1)
            y = torch.bmm(inner_GBD, left_GDN[a:b])
            return y if diagonal is None else torch.addcmul(y, h, diagonal[a:b].unsqueeze(1))

        return low_rank


class LowRankPassthrough(nn.Module):
    """A recurrent layer whose state passes through gates, with transitions of low rank, so that its size costs few weights.

    Paper: Miceli Barone, "Low-rank passthrough neural networks", arXiv:1603.03116.

    Equation: every state-to-gate matrix is ``U = L R`` or ``U = L R + diag(d)`` with rank r, below the state size n. Cells:

    * ``gru``: ``u = s(W_u x + U_u h + b_u)``, ``r = s(W_r x + U_r h + b_r)``, ``m = tanh(W_m x + U_m (r h) + b_m)``,
      ``h' = (1 - u) m + u h``, as in the author's code;
    * ``highway``: the same without r;
    * ``lstm``: ``c' = f c + i g``, ``h' = o tanh(c')``, all four from x and h.

    Glorot's uniform start for each factor, d uniform within 0.01, and a learned first state, as there; the rows of the
    factors may be weight-normed (Salimans and Kingma, arXiv:1602.07868). The author's code has this for the GRU alone;
    how the paper parametrises the LSTM could not be verified, here it is the same for all cells.

    For G matrices a step costs G n^2 multiply-adds and weights with full matrices, 2 G n r with low rank ((G + 1) n r
    weights where R is tied), G n more with the diagonal. Time is a loop by nature; the inputs' part is one product before it.

    Args:
        inputs: Features F of a step's input.
        width: State size n.
        cell: ``gru``, ``lstm`` or ``highway``.
        transition: ``full``, ``low-rank`` or ``low-rank-diagonal``.
        rank: r.
        tied: Whether all gates share one R.
        weight_norm: Whether the factors' rows are weight-normed.
        carry: Bias of the gate that carries the state (u, or f of the LSTM) at the start.

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
        rank: int = 8,
        tied: bool = False,
        weight_norm: bool = False,
        carry: float = 1.0,
    ) -> None:
        super().__init__()
        if cell not in GATES:
            raise ValueError(f"LowRankPassthrough: cell {cell!r} is not one of {list(GATES)}.")
        if transition not in TRANSITIONS:
            raise ValueError(f"LowRankPassthrough: transition {transition!r} is not one of {TRANSITIONS}.")
        if transition != "full" and not 1 <= rank <= width:
            raise ValueError(f"LowRankPassthrough: rank {rank} must lie between 1 and the state size {width}.")
        self.inputs, self.width, self.cell, self.gates = inputs, width, cell, GATES[cell]
        self.transition = Transition(width, self.gates, transition, rank, tied=tied, weight_norm=weight_norm)
        self.input = nn.Parameter(_glorot(self.gates, width, inputs))
        self.bias = nn.Parameter(torch.zeros(self.gates, width))
        with torch.no_grad():
            self.bias[0] = carry
        self.start = nn.Parameter(torch.zeros(2 if cell == "lstm" else 1, width))

    def forward(
        self, x: Float[Tensor, "B S F"], state: tuple[Tensor, ...] | None = None
    ) -> tuple[Float[Tensor, "B S n"], tuple[Tensor, ...]]:
        """Outputs of all steps, and the last state, with which the next piece of the sequence goes on."""
        if x.ndim != 3 or x.shape[-1] != self.inputs:
            raise ValueError(f"LowRankPassthrough: input {tuple(x.shape)}; wanted [batch, sequence, {self.inputs}].")
        wanted = (len(x), self.width)
        state = tuple(self.start.unsqueeze(1).expand(-1, *wanted).unbind()) if state is None else state
        if [tuple(s.shape) for s in state] != [wanted] * len(self.start):
            raise ValueError(
                f"LowRankPassthrough: states {[tuple(s.shape) for s in state]}; wanted {len(self.start)} of {wanted}."
            )
        driven_SGBN = F.linear(x, self.input, self.bias.flatten()).unflatten(-1, (self.gates, -1)).permute(1, 2, 0, 3)
        apply, outputs = self.transition.ready(), []
        for driven in driven_SGBN.contiguous().unbind():
            state = getattr(self, f"_{self.cell}")(driven, apply, *state)
            outputs.append(state[0])
        return torch.stack(outputs, 1), state

    @staticmethod
    def _highway(driven: Tensor, apply: Apply, h: Tensor) -> tuple[Tensor, ...]:
        carry, new = driven + apply(h, 0, 2)
        return (torch.lerp(new.tanh(), h, carry.sigmoid()),)

    @staticmethod
    def _gru(driven: Tensor, apply: Apply, h: Tensor) -> tuple[Tensor, ...]:
        carry, reset = (driven[:2] + apply(h, 0, 2)).sigmoid()
        new = (driven[2] + apply(reset * h, 2, 3)[0]).tanh()
        return (torch.lerp(new, h, carry),)

    @staticmethod
    def _lstm(driven: Tensor, apply: Apply, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        forget, write, out, new = driven + apply(h, 0, 4)
        c = forget.sigmoid() * c + write.sigmoid() * new.tanh()
        return out.sigmoid() * c.tanh(), c


def _glorot(gates: int, outputs: int, inputs: int) -> Tensor:
    """One matrix [outputs, inputs] for each gate, stacked by rows, uniform within ``sqrt(6 / (outputs + inputs))``."""
    bound = (6 / (outputs + inputs)) ** 0.5
    return torch.empty(gates * outputs, inputs).uniform_(-bound, bound)


EXAMPLE = Example(
    make=lambda: LowRankPassthrough(3, 6, rank=2, weight_norm=True),
    inputs=lambda: (torch.randn(2, 5, 3),),
    odd=lambda: (torch.randn(3, 7, 3),),
)
