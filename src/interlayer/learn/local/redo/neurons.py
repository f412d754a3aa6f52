"""The neurons of a model's hidden layers, found from its wiring: which weights write them and which read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from interlayer.core import taps
from interlayer.core.wiring import Group, Member, trace


@dataclass(frozen=True, eq=False)
class Hidden:
    """The neurons of a hidden layer.

    Attributes:
        name: The module that writes them; the first, where several do.
        writers: Their rows in the weights that write them.
        own: Their biases, and their gains, offsets and statistics in a norm.
        readers: Their columns in the weights that read them; several for each neuron behind a flattened convolution.
        scores: Each neuron's mean absolute activation, over the layer's mean of these.
    """

    name: str
    writers: list[Member]
    own: list[Member]
    readers: list[Member]
    scores: Float[Tensor, " N"]


@torch.no_grad()
def hidden(model: nn.Module, inputs: Any) -> list[Hidden]:
    """The hidden layers whose neurons can be recycled, with their scores on a batch. The model is left as it was.

    A layer is a group of units that linear or convolutional weights write and others read. A neuron's activation is what its
    readers get, behind the activation function. A channel is one neuron. Left out are the units of a residual stream, which readers
    meet at several depths, the channels of attention's heads, and units without an activation function.

    Args:
        model: Any module that ``core.wiring.trace`` can follow; it runs in evaluation mode.
        inputs: A batch, as ``core.taps.arguments`` takes it.

    Raises:
        ValueError: There is no such layer, activations are not finite, or the model cannot be traced.
    """
    args, kwargs = taps.arguments(inputs)
    known = [name for name, module in model.named_modules() if name and axes_of(module)]
    if not known:
        raise ValueError(f"ReDo: {type(model).__name__} has no linear or convolutional layer; expected two at least.")
    with taps.at_rest(model), taps.read(model, known, side="input") as got, taps.read(model, known) as given:
        model(*args, **kwargs)
    if bad := [name for name, x in given.items() if not x.isfinite().all()]:
        raise ValueError(
            f"ReDo: {bad[0]!r} gives numbers that are not finite. Check the inputs, or lower the learning rate."
        )
    wiring = trace(model, *args, **kwargs)
    heads = {name for g in wiring.groups.values() if g.parent for name in (g.name, g.parent[0])}
    found = {n: "is part of attention" if n in heads else _read(g, model, got, given) for n, g in wiring.groups.items()}
    layers = [layer for layer in found.values() if isinstance(layer, Hidden)]
    if not layers:
        why = "; ".join(f"{name} {text}" for name, text in found.items()) or "no units can be permuted"
        raise ValueError(
            f"ReDo: {type(model).__name__} has no neurons to recycle: {why}. Expected units behind an activation function, "
            "between two linear or convolutional layers."
        )
    return layers


def axes_of(module: nn.Module) -> tuple[int, int] | None:
    """The axes of a module's weight for what it writes and what it reads; None for a module that is not known."""
    if isinstance(module, nn.Linear):
        return 0, 1
    if isinstance(module, _ConvNd):
        return (1, 0) if isinstance(module, _ConvTransposeNd) else (0, 1)
    return (1, 0) if type(module).__name__ == "Conv1D" else None  # Hugging Face's GPT-2


def _read(group: Group, model: nn.Module, got: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Hidden | str:
    """The neurons of a group, or why it has none."""
    weights = model.state_dict(keep_vars=True)
    writers: list[Member] = []
    own: list[Member] = []
    readers: list[Member] = []
    for member in group.members:
        axes = axes_of(model.get_submodule(home(member)))
        if weights[member.name].ndim > 1 and axes is None:
            return f"meets {member.name}, of a layer that is not known"
        kind = own if axes is None or member.name.endswith("bias") else writers if member.dim == axes[0] else readers
        kind.append(member)
    if not writers or not readers or {m.name for m in writers} & {m.name for m in readers}:
        return "is not written by one layer and read by another"
    if any(m.index.numel() < weights[m.name].shape[m.dim] for m in writers):
        return "shares the rows of a weight with other units"
    sizes = []
    for member in readers:
        module, x = model.get_submodule(home(member)), got.get(home(member))
        axis = -1 - len(module.kernel_size) if isinstance(module, _ConvNd) else -1
        if x is None or x.shape[axis] != weights[member.name].shape[member.dim]:
            return f"is read by {member.name} in groups, or outside of a call"
        index = member.index.to(x.device)
        sizes.append(x.float().abs().movedim(axis, -1).flatten(0, -2).mean(0)[index].mean(1))
        if x.data_ptr() == given[home(writers[0])].data_ptr() and len(group.outputs) == len(writers):
            return "has no activation function"
    if any(not torch.allclose(size, sizes[0], equal_nan=True) for size in sizes):
        return "is read at several depths"
    return Hidden(home(writers[0]), writers, own, readers, sizes[0] / (sizes[0].mean() + 1e-9))


def home(member: Member) -> str:
    """The module that holds the weight."""
    return member.name.rpartition(".")[0]
