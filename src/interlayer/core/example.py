"""What the contracts need to know of a component: how to build it, and its inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.data import Experience
from interlayer.core.extras import need
from interlayer.core.mixer import Attention, Context
from interlayer.core.order import Sequential
from interlayer.core.parts import FeedForward
from interlayer.core.position import Position
from interlayer.core.slots import fill
from interlayer.core.stream import State, Stream


@dataclass(frozen=True)
class Example:
    """A small instance of a component and its inputs. A system's module names it ``EXAMPLE``.

    What the fields mean follows from the kind:

    ============  ==================================  ===============================================================
    kind          ``make()``                          ``inputs()``
    ============  ==================================  ===============================================================
    layer, model  the ``nn.Module`` (for a stream: a  its positional arguments, batch first; at least two examples
                  ``Backbone`` with it)
    transform     the ``Transform``                   ``(model,)`` or ``(model, data)``, a plain ``nn.Module``
    rule          the ``Rule``, bound to a new model  batches to learn from, one for each step
    probe         the ``Probe``                       ``(model, data)``
    data-         the transform                       ``(data,)``
    transform
    construction  the ``Construction``                the problem, as ``build`` and ``reference`` take it
    simulator     the ``Simulator``                   ``(scenario,)``, a small one
    ============  ==================================  ===============================================================

    Args:
        make: Builds the component, drawing from torch's global generator.
        inputs: Makes the inputs, drawing from the same.
        others: The other models that a transform's ``plan``, or a comparing probe, takes, made from the first.
        odd: Inputs of odd sizes, such as a prime length, where the layer allows several.
        wrong: Inputs of a wrong shape, which must raise ``ValueError`` or ``TypeError``. Defaults to one feature more.
        axis: For a layer: the axis of its inputs that counts positions (tokens, pixels), where any length is allowed.
        causal: For a layer: whether a later position never changes an earlier output.
        gradient: For a layer: what its gradients are. ``exact``; ``surrogate`` or ``implicit``, those of ``twin``; ``unbiased``, on
            average those of ``twin``.
        twin: From the module, a function of the same inputs whose gradients by autograd are the stated ones: the formula of a
            surrogate, the iteration of an implicit layer, the layer without sampling.
        control: For a layer: ``static``, or ``data`` if the inputs decide which operations run, as with routing and early exit.
        batch: For a layer: ``independent``, or ``coupled`` if the items of a batch change each other's outputs.
        streams: For a layer: whether it works step by step too: ``start(batch)`` gives a state, and ``step(x, state)`` takes one
            position and gives the output and the next state.
        modes: For a layer: other ways to build it, by name, that run other code on the same inputs.
        hf: The inputs of a transform with an unmodified Hugging Face model instead of the plain one.
        nothing: Inputs of a transform in which there is nothing to do. Defaults to a model without parameters.
        train: For a model: gives ``(score, trivial)``, two losses of which the first must be the lower, after a real
            training run.
        experiences: For a rule that learns a stream: at least two experiences; the inputs are batches of the first.
        forgets: For such a rule: whether learning an experience may change what it predicts for earlier ones.
        planted: For a probe: whether its finding shows what the example planted.
        known: For a data-transform: quantities with a closed form, by name: (found, exact, how far apart they may be).
        invariances: For a data-transform: what its result must keep, by name; each is called with the transform and the data.
        outputs: For a construction: what the model gives for the problem, to be compared with ``reference``.
        precision: For a construction: how far apart these may be, relative to the largest number.
        exceptions: Contracts that the component can't keep, each with the reason. They must really fail.
    """

    make: Callable[[], Any]
    inputs: Callable[[], tuple[Any, ...]]
    others: Callable[[nn.Module], tuple[nn.Module, ...]] = lambda model: ()
    odd: Callable[[], tuple[Any, ...]] | None = None
    wrong: Callable[[], tuple[Any, ...]] | None = None
    axis: int | None = None
    causal: bool = False
    gradient: Literal["exact", "surrogate", "unbiased", "implicit"] = "exact"
    twin: Callable[[Any], Callable[..., Any]] | None = None
    control: Literal["static", "data"] = "static"
    batch: Literal["independent", "coupled"] = "independent"
    streams: bool = False
    modes: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    hf: Callable[[], tuple[Any, ...]] | None = None
    nothing: Callable[[], tuple[Any, ...]] | None = None
    train: Callable[[], tuple[float, float]] | None = None
    experiences: Callable[[], Sequence[Experience]] | None = None
    forgets: bool = True
    planted: Callable[[Any], bool] | None = None
    known: Callable[[], Mapping[str, tuple[float, float, float]]] | None = None
    invariances: Mapping[str, Callable[[Any, Any], bool]] = field(default_factory=dict)
    outputs: Callable[..., Any] | None = None
    precision: float = 0.0
    exceptions: Mapping[str, str] = field(default_factory=dict)


def tiny_gpt2(depth: int = 2, *, length: int = 5, named: bool = False, **config: Any) -> tuple[nn.Module, Any]:
    """A GPT-2 of Hugging Face and two rows of tokens for it; with ``named`` they are a mapping of keyword arguments."""
    hf: Any = need("transformers", "hf", "tiny_gpt2")
    config = {"n_embd": 16, "n_layer": depth, "n_head": 2, "vocab_size": 32, **config}
    model, x = hf.GPT2LMHeadModel(hf.GPT2Config(**config)), torch.randint(config["vocab_size"], (2, length))
    return model, {"input_ids": x} if named else x


def tiny_convnet(examples: int = 2) -> tuple[nn.Module, Tensor]:
    """A convolution and a linear map, and images of 8 x 8 pixels."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    return net, torch.randn(examples, 1, 8, 8)


def tiny_mlp(examples: int = 5) -> tuple[nn.Module, Tensor]:
    """Two linear maps, and rows of 6 features."""
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), torch.randn(examples, 6)


def perturbed(model: nn.Module) -> tuple[nn.Module]:
    """A second model for transforms that merge: the first with noise on its weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return (other,)


class Backbone(nn.Module):
    """The smallest network around a stream, for its example: two blocks of causal attention and an MLP.

    Args:
        stream: Called with those of ``depth=, width=, branches=`` that it names.
        width: Features D.
        order: In which order the blocks run; called with ``depth=``.

    Shapes: [B, S, D] to [B, S, D].

    Raises:
        ValueError: An input of another width.

    Examples:
        >>> import torch
        >>> from interlayer.core.stream import PreNorm
        >>> Backbone(lambda depth, branches, width: PreNorm(depth, width, branches=branches))(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self, stream: Callable[..., Stream], width: int = 8, order: Callable[..., Sequential] = Sequential
    ) -> None:
        super().__init__()
        self.width = width
        self.stream = fill("stream", stream, depth=2, width=width, branches=2)
        self.order = fill("order", order, depth=2)
        self.position = Position()
        self.sublayers = nn.ModuleList()
        for layer in (0, 2):
            values = self.stream.projects(layer)
            self.sublayers += [Attention(width, 2, causal=True, values=values), FeedForward(width, hidden=width)]

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """Run the sublayers, joined by the stream."""
        if x.ndim != 3 or x.shape[-1] != self.width:
            raise ValueError(f"Backbone: input {tuple(x.shape)}; expected [batch, sequence, {self.width}].")
        stream = self.stream

        def step(state: State, block: int) -> State:
            for layer in (2 * block, 2 * block + 1):
                inputs, sublayer = stream.read(state, layer), self.sublayers[layer]
                if isinstance(sublayer, Attention):
                    share = partial(stream.share, state)
                    branch = sublayer(inputs, Context(layer, self.position, share=share))
                else:
                    branch = sublayer(inputs)
                state = stream.write(state, layer, branch)
            return state

        return stream.finish(self.order(stream.start(x), step))
