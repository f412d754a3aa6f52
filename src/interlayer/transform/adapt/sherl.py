"""SHERL: a small adapter consolidates what frozen early layers left behind, and the last layers take it up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.attach import Part, attach, host_of
from interlayer.core.attach.parts import matrix
from interlayer.core.config import configured
from interlayer.core.example import Example
from interlayer.core.select import blocks
from interlayer.transform.adapt._ladder import ladder
from interlayer.transform.adapt._tuned import STEPS, Tuned

M = TypeVar("M", bound=nn.Module)
TEMPERATURE = 0.1  # of the gate
TINY = 1e-8


class Down(nn.Module):
    """A state at fewer features: ``n = relu(A x)``, ``(B n + n) * sigmoid(C n)``; the form for backbones with norms ahead of sublayers.

    Args:
        width: Features D of the state.
        hidden: Features H.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.enter, self.mix, self.gate = nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B H"]:
        """Reduce."""
        n = self.enter(x).relu()
        return (self.mix(n) + n) * self.gate(n).sigmoid()


def redundancy(states: Float[Tensor, "*B N H"]) -> Float[Tensor, "*B N 1"]:
    """How often each state is there: the sum of its positive cosines with all states, itself included."""
    unit = states / (states.norm(dim=-1, keepdim=True) + TINY)
    return (unit @ unit.transpose(-1, -2)).relu().sum(-1, keepdim=True).clamp_min(1)


def consolidate(
    states: Float[Tensor, "*B N H"], guide: Float[Tensor, "*B H"], score: Callable[[Tensor], Tensor]
) -> Float[Tensor, "*B H"]:
    r"""The states of N layers, added up by scores against a guide and against their own redundancy; and the guide.

    $g + \sum_n w_n z_n$ with $w_n \propto \mathrm{relu}(s(z_n * g)) / \sum_m \mathrm{relu}(\cos(z_n, z_m))$, of sum one over the layers. A
    state that many layers repeat weighs no more than one that is there once.

    Args:
        states: $z_n$.
        guide: $g$.
        score: s, from H features to one.
    """
    weights = score(states * guide.unsqueeze(-2)).relu() / redundancy(states)
    weights = weights / (weights.sum(-2, keepdim=True) + TINY)
    return guide + (weights * states).sum(-2)


class Sherl(Part):
    r"""An adapter beside a frozen backbone: it consolidates the states of all early layers, and the last layers run on the result.

    Paper: Diao, Wan, Jia, Zhuge, Zhang, Lu and Chen, "SHERL: Synthesizing High Accuracy and Efficient Memory for Resource-Limited
    Transfer Learning", arXiv:2407.07523; code Paranioar/SHERL.

    Equation, of the code: with the states $x_0$ (embedded input) to $x_E$ ahead of the late layers, each reduced by a map of its own,
    $z_n = D_n x_n$, the early route gives $u = \mathrm{consolidate}(z_0, ..., z_{E-1};\ z_E)$ and the late layers read

    $$x = U\,\mathrm{relu}(u) + \tanh(g / 0.1)\, x_E$$

    with g = 0 at the start, so that the first steps are those of another network than the backbone. Nothing is computed backward through
    the early layers: autograd keeps the E + 1 states and what the adapter and the late layers need. For encoders that normalise behind
    their sublayers, as BERT, ``norm=True`` is the authors' form there: $D_n$ is a linear map and a layer norm, and $U$ has a norm and
    dropout (0.1).

    The authors' T5 has a second adapter behind the encoder, whose output only the late decoder layers read; here the encoder of such a
    model stays as it is.

    Args:
        host: The last block of the backbone.
        depth: Blocks of the backbone; E = depth - late.
        width: Features D of the states. Defaults to the inputs of the first linear map of the block.
        reduction: D / H.
        late: Layers of the late route; 0 replaces the last state.
        norm: Whether the backbone normalises behind sublayers.

    Shapes: states of all early layers [..., E + 1, D] to [..., D].

    Raises:
        ValueError: Fewer than two states, sizes that do not fit, or states of another width.

    Examples:
        >>> from interlayer.models import Transformer
        >>> model = adapt(Transformer(vocab=16, length=8, depth=4, width=8, heads=2), reduction=2)
        >>> model(torch.zeros(2, 5, dtype=torch.long)).shape
        torch.Size([2, 5, 16])
    """

    kind = "sherl"
    spans = True

    def __init__(
        self, host: nn.Module, *, depth: int = 2, width: int | None = None, reduction: int = 8, late: int = 1, norm: bool = False
    ) -> None:  # fmt: skip
        super().__init__()
        width = _width(host) if width is None else width
        hidden = width // reduction if reduction > 0 else 0
        if hidden < 1 or not 0 <= late < depth:
            raise ValueError(
                f"Sherl: width {width}, reduction {reduction}, late {late} of {depth} blocks; expected a reduction that leaves at "
                "least one feature, and fewer late layers than blocks."
            )
        self.width, self.late, self.early = width, late, depth - late
        small: Callable[[], nn.Module] = lambda: nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden))  # noqa: E731
        self.down = nn.ModuleList(small() if norm else Down(width, hidden) for _ in range(self.early + 1))
        self.score, self.gate = nn.Linear(hidden, 1), nn.Parameter(torch.zeros(1))
        self.up: nn.Module = nn.Linear(hidden, width)
        if norm:
            self.up = nn.Sequential(self.up, nn.LayerNorm(width, eps=1e-12), nn.Dropout(0.1))
        self.seen: list[Tensor] = []

    def forward(self, states: Float[Tensor, "*B E D"]) -> Float[Tensor, "*B D"]:
        """What the late layers read."""
        if states.ndim < 2 or states.shape[-2:] != (self.early + 1, self.width):
            raise ValueError(
                f"Sherl: states {tuple(states.shape)}; expected [..., {self.early + 1}, {self.width}], the states ahead of the first "
                f"{self.early + 1} blocks with features last."
            )
        return self.route(states.unbind(-2))

    def route(self, states: Sequence[Tensor]) -> Tensor:
        """The same from a list of states, which are not copied."""
        *shallow, deep = [down(x) for down, x in zip(self.down, states, strict=True)]
        out = self.up(consolidate(torch.stack(shallow, -2), deep, self.score).relu())
        return out + (self.gate / TEMPERATURE).tanh() * states[-1]

    def between(self, number: int, x: Tensor) -> Tensor:
        """Keep the states of the early layers, and give the late ones what comes of them."""
        if number > self.early:
            return x
        self.seen = [*(self.seen if number else []), x.detach()]
        if len(self.seen) != number + 1:
            raise ValueError(
                f"Sherl: block {number} runs after {len(self.seen) - 1} others; expected all blocks once, in order. Switch gradient "
                "checkpointing off, which runs blocks again; there is little to save here."
            )
        if number < self.early:
            return x
        if x.shape[-1] != self.width:
            raise ValueError(
                f"Sherl: a state {tuple(x.shape)} between blocks; expected [..., {self.width}], features last."
            )
        states, self.seen = self.seen, []
        return self.route(states)

    def settings(self) -> dict[str, Any]:
        """What the tensors do not tell."""
        return {"late": self.late, "norm": isinstance(self.up, nn.Sequential)}

    @classmethod
    def restore(cls, host: nn.Module, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Sherl:
        """Sizes come from the tensors."""
        hidden, late = state["score.weight"].shape[1], settings["late"]
        width = state["down.0.0.weight" if settings["norm"] else "down.0.enter.weight"].shape[1]
        count = len({key.split(".")[1] for key in state if key.startswith("down.")})
        return cls(
            host, depth=count - 1 + late, width=width, reduction=width // hidden, late=late, norm=settings["norm"]
        )


def _width(host: nn.Module) -> int:
    """Features of the state, by the first linear map of a block."""
    for module in host.modules():
        try:
            return matrix(module).shape[1]
        except ValueError:
            continue
    raise ValueError(
        f"Sherl: {type(host).__name__} has no linear map that tells the features of its states. Pass width=."
    )


def adapt(model: M, *, at: str | None = None, task: str = "default", late: int = 1, **options: Any) -> M:
    """Freeze a model and put a ``Sherl`` beside its blocks, in place; see ``core.attach`` for saving, switching and taking it off.

    Works for any model with a list of blocks whose states are [..., D]: encoders and decoders of transformers, plain stacks,
    ``interlayer.models`` in the plain order and stream.

    Args:
        model: The model.
        at: Name of the list of blocks. Defaults to the one that holds the most weights, of an encoder-decoder to the decoder's.
        task: Name of the task.
        late: Layers of the late route.
        **options: Of ``Sherl``: ``width``, ``reduction``, ``norm``.

    Returns:
        The model.

    Raises:
        ValueError: No list of blocks, or one that ``Sherl`` does not fit.
    """
    if at is None:
        both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        inner: Any = getattr(model, "get_decoder", lambda: model)() if both else model
        found = blocks(inner)[1]
        at = next(name for name, module in model.named_modules() if module is found)
    children = [name for name, _ in model.get_submodule(at).named_children() if name.isdigit()]
    make = partial(Sherl, depth=len(children), late=late, **options)
    return attach(model, {host_of(model, at): at}, make, task=task)


@configured
class SherlBytes(Tuned):
    """A small language model of bytes, frozen, with SHERL or another way to adapt it, and a linear head on its mean state.

    Args:
        classes: Classes K.
        kind: ``sherl``, ``ladder`` (ladder side tuning), ``lora``, ``bitfit``, ``adapters``, ``head`` or ``full``.
        depth: Blocks of the language model.
        width: Its features D.
        steps: Steps in which it is trained first, once; then it is kept in the user's cache.
        **options: Of the way: those of ``adapt``, ``reduction`` of ``ladder``, ``rank`` of ``lora``, ``hidden`` of ``adapters``.

    Shapes: bytes [B, S] of int64 to logits [B, K].

    Raises:
        ValueError: Unknown kind.

    Examples:
        >>> SherlBytes(2, depth=2, width=16, steps=1)(torch.zeros(3, 9, dtype=torch.long)).shape
        torch.Size([3, 2])
    """

    ways: ClassVar[Mapping[str, Callable[..., Any]]] = {**Tuned.ways, "sherl": adapt, "ladder": ladder}

    def __init__(
        self, classes: int, *, kind: str = "sherl", depth: int = 4, width: int = 64, steps: int = STEPS, **options: Any
    ) -> None:
        super().__init__(classes, kind=kind, depth=depth, width=width, steps=steps, **options)


def _example(**options: Any) -> Sherl:
    part = Sherl(nn.Linear(8, 8), depth=4, reduction=2, **options)
    nn.init.constant_(part.gate, 0.05)
    nn.init.ones_(part.score.bias)  # all layers count, so that rounding decides nothing
    return part


EXAMPLE = Example(
    make=_example,
    inputs=lambda: (torch.randn(2, 5, 4, 8),),
    axis=1,
    causal=True,
    modes={"normalised": partial(_example, norm=True)},
)
