"""The stream: how inputs of sublayers are formed from what came before, and how their outputs are taken in.

A backbone walks its sublayers in order. Sublayer number ``layer`` (a Transformer has two in a block: mixer, then MLP)
gets ``stream.read(state, layer)`` and its output goes to ``stream.write(state, layer, branch)``. Residual paths, gates, norm
placement and cross-layer connections are each one small ``Stream``; backbones know none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn


@dataclass
class State:
    """What one forward pass carries.

    Attributes:
        x: The current residual.
        kept: Whatever a stream keeps for later layers.
        answer: The model's logits for a state, if the model provides them.
    """

    x: Tensor
    kept: dict[Any, Any] = field(default_factory=dict)
    answer: Callable[[State], Tensor] | None = None

    @property
    def bytes_kept(self) -> int:
        """Bytes of the tensors kept beside ``x``, each storage counted once."""
        mine = self.x.untyped_storage().data_ptr()
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.kept.values()}
        return sum(size for pointer, size in kept.items() if pointer != mine)


class QKV(NamedTuple):
    """Separate inputs for the queries, keys and values of an attention sublayer."""

    q: Tensor
    k: Tensor
    v: Tensor


class Stream(nn.Module):
    """Base of all streams: ``x_{l+1} = x_l + f_l(x_l)``, with hooks at every point where an idea may differ.

    Args:
        depth: Number of blocks.
        branches: Sublayers in a block.

    ``needs`` names what a stream asks of the mixer (``"qkv"``: separate inputs, ``"share"``: to change keys and values); a
    backbone refuses a pair that does not fit.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, depth: int, *, branches: int = 1) -> None:
        super().__init__()
        if depth < 1 or branches < 1:
            raise ValueError(f"{type(self).__name__}: depth {depth} and branches {branches} must be at least 1.")
        self.depth, self.branches = depth, branches

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *rest: Any) -> None:
        """Report weights saved at another depth in one sentence, before torch lists every mismatched name."""
        own = {name: tuple(t.shape) for name, t in self.state_dict().items()}
        saved = {name.removeprefix(prefix): tuple(t.shape) for name, t in state_dict.items() if name.startswith(prefix)}
        # Leave missing and unexpected parts to torch, which knows whether loading is strict.
        both = {n.partition(".")[0] for n in own} & {n.partition(".")[0] for n in saved}
        odd = [n for n in {**own, **saved} if n.partition(".")[0] in both and own.get(n) != saved.get(n)]
        if odd:
            here, there = own.get(odd[0], "not there"), saved.get(odd[0], "not there")
            raise ValueError(
                f"{type(self).__name__}: the saved weights are of another stream: {odd[0]!r} is {there} in them and {here} "
                f"here, where depth is {self.depth}; build it with the depth, width and options that it was saved with."
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *rest)

    @property
    def layers(self) -> int:
        """Number of sublayers."""
        return self.depth * self.branches

    def ends_block(self, layer: int) -> bool:
        """Whether ``layer`` is the last sublayer of its block."""
        return layer % self.branches == self.branches - 1

    def start(self, x: Tensor) -> State:
        """Begin a pass with the embedded input."""
        return State(x)

    def read(self, state: State, layer: int) -> Tensor | QKV:
        """The input of sublayer ``layer``."""
        return state.x

    def share(self, state: State, layer: int, k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
        """Change the keys and values [B, heads, S, D] that sublayer ``layer`` attends to and caches.

        Values that are the very tensor of an earlier sublayer are cached once.
        """
        assert v is not None
        return k, v

    def projects(self, layer: int) -> bool:
        """Whether sublayer ``layer`` projects values of its own; if not, ``share`` gets None for them."""
        return True

    def write(self, state: State, layer: int, branch: Tensor) -> State:
        """Take in the output of sublayer ``layer``."""
        state.x = state.x + branch
        return state

    def resample(self, state: State, layer: int, shortcut: Callable[[Tensor], Tensor]) -> State:
        """Bring all that is carried to the shape of a new stage (stride, width) before sublayer ``layer`` writes."""
        state.x = shortcut(state.x)
        state.kept = {key: shortcut(t) for key, t in state.kept.items()}
        return state

    def finish(self, state: State) -> Tensor:
        """The output of the stack."""
        return state.x


Norm = Callable[..., nn.Module]
Width = int | list[int]


def widths(width: Width, layers: int) -> list[int]:
    """The width of every sublayer, from one number or one for each (convolutional stages differ)."""
    every = [width] * layers if isinstance(width, int) else list(width)
    if len(every) != layers:
        raise ValueError(f"stream: {len(every)} widths for {layers} sublayers; give one width or one for each.")
    return every


class Residual(Stream):
    """A bare residual: ``x + f(x)``, nothing normalised."""


class Feedforward(Stream):
    """No residual at all: ``f(x)``."""

    def write(self, state: State, layer: int, branch: Tensor) -> State:
        state.x = branch
        return state


class PreNorm(Stream):
    """``x + f(norm(x))``, and a norm at the end of the stack.

    Args:
        depth: Number of blocks.
        width: Features of a sublayer's input, one number or one for each sublayer.
        outputs: Features of a sublayer's output, where they differ.
        branches: Sublayers in a block.
        norm: Called with ``width=`` for each norm.

    Shapes: any that the norm takes; the state keeps the shape of the input.
    """

    def __init__(
        self, depth: int, width: Width, *, outputs: Width | None = None, branches: int = 1, norm: Norm | None = None
    ) -> None:
        super().__init__(depth, branches=branches)
        norm = norm or layernorm
        self.norms = nn.ModuleList(norm(width=w) for w in widths(width, self.layers))
        self.last = norm(width=widths(outputs or width, self.layers)[-1])

    def read(self, state: State, layer: int) -> Tensor | QKV:
        return self.norms[layer](state.x)

    def finish(self, state: State) -> Tensor:
        return self.last(state.x)


class PostNorm(Stream):
    """``norm(x + f(x))``, the original Transformer's order."""

    def __init__(
        self, depth: int, width: Width, *, outputs: Width | None = None, branches: int = 1, norm: Norm | None = None
    ) -> None:
        super().__init__(depth, branches=branches)
        norm = norm or layernorm
        self.norms = nn.ModuleList(norm(width=w) for w in widths(outputs or width, self.layers))

    def write(self, state: State, layer: int, branch: Tensor) -> State:
        state.x = self.norms[layer](state.x + branch)
        return state


def layernorm(width: int) -> nn.Module:
    """The default norm of streams."""
    return nn.LayerNorm(width)
