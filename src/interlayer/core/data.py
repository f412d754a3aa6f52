"""What a model must know of a task to be built for it; and how a model is called with a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Batch = tuple[Any, Any]
"""Inputs (a tensor, a tuple of positional arguments, a mapping of keyword arguments, or one object such as a graph) and
targets (None if the model gives its own loss)."""

KINDS = ("tokens", "image", "vector", "series", "seq2seq", "vectors", "states")
OUTPUTS = ("tokens", "classes", "values", "image", "noise")


@dataclass(frozen=True)
class DataShape:
    """Shape of a task's inputs and outputs; fields that a kind has no use for stay 0.

    Args:
        kind: ``tokens`` (integers [B, S]), ``image`` ([B, C, H, W]), ``vector`` ([B, F]), ``series`` ([B, S, F]), ``seq2seq``
            (a source [B, R] and the target so far [B, S], both integers), ``vectors`` (one [B, F] for each sense) or ``states``
            (those of L layers of a frozen model, [B, L, S, F]).
        outputs: ``tokens`` (logits at each place), ``classes`` (logits), ``values`` (real numbers), ``image`` (an image of as
            many channels) or ``noise`` (what was added to an image ``x``, from it, its time ``t`` and its class ``y``).
        classes: Number of classes, or of values that are predicted.
        vocab: Number of token kinds.
        length: Length S of a sequence.
        source: Length R of a source sequence.
        channels: Channels C of an image.
        height: Height H in pixels.
        width: Width W in pixels.
        features: Features F of a vector or of a step of a series.
        senses: Features of each of several vectors.
        layers: Number of layers L whose states are given.
        scales: Factors by which output images are larger than the inputs; a batch is of one of them.
    """

    kind: str
    outputs: str
    classes: int = 0
    vocab: int = 0
    length: int = 0
    source: int = 0
    channels: int = 0
    height: int = 0
    width: int = 0
    features: int = 0
    senses: tuple[int, ...] = ()
    layers: int = 0
    scales: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"DataShape: kind {self.kind!r} is not one of {KINDS}.")
        if self.outputs not in OUTPUTS:
            raise ValueError(f"DataShape: outputs {self.outputs!r} is not one of {OUTPUTS}.")

    def require(self, who: str, kind: str, outputs: str) -> None:
        """Raise ValueError if a model that takes one kind of data only, and gives one, is asked for another."""
        if (self.kind, self.outputs) != (kind, outputs):
            raise ValueError(f"{who}: takes {kind} data and gives {outputs}, not {self.kind} and {self.outputs}.")

    @property
    def flat(self) -> int:
        """Numbers in one input, for a model that flattens it."""
        if self.kind == "image":
            return self.channels * self.height * self.width
        return self.features * max(self.length, 1)


@dataclass(frozen=True, eq=False)
class Experience:
    """One part of a stream that a rule learns in order: a classification task with data of its own.

    Args:
        name: Its name; no two experiences of a stream share one.
        train: Inputs and targets to learn from.
        test: Inputs and targets to be judged on.
        classes: Number of outputs K that it needs; targets are integers below K.

    Raises:
        ValueError: No data, or not as many targets as inputs, or a target outside of the classes.
    """

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int

    def __post_init__(self) -> None:
        for part, (x, y) in (("train", self.train), ("test", self.test)):
            if len(x) != len(y) or not len(x):
                raise ValueError(
                    f"Experience {self.name!r}: {len(x)} inputs and {len(y)} targets in {part}; expected as many, and some."
                )
            if y.is_floating_point() or y.min() < 0 or y.max() >= self.classes:
                raise ValueError(
                    f"Experience {self.name!r}: targets {y.min()} to {y.max()} in {part}; expected integers from 0 to "
                    f"{self.classes - 1}. Number the classes from 0, or raise classes."
                )


def run(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a batch's inputs: a mapping gives keyword arguments, as Hugging Face's models want them, and a tuple
    positional ones.

    Examples:
        >>> run(nn.Bilinear(2, 2, 1), {"input1": torch.zeros(3, 2), "input2": torch.zeros(3, 2)}).shape
        torch.Size([3, 1])
        >>> run(nn.Bilinear(2, 2, 1), (torch.zeros(3, 2), torch.zeros(3, 2))).shape
        torch.Size([3, 1])
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if type(inputs) is tuple else model(inputs)


def _leaf(data: Any) -> bool:
    return hasattr(data, "to") and not isinstance(data, Mapping)


def moved(data: Any, device: torch.device | str) -> Any:
    """Tensors, and objects with a method ``to`` such as graphs, in nested tuples, lists and mappings on a device."""
    return tree_map(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, data, is_leaf=_leaf)


def count(batch: Batch) -> int:
    """Samples in a batch: graphs, or the length of the first tensor among targets and inputs.

    Raises:
        ValueError: The batch holds no tensor.

    Examples:
        >>> count(({"input_ids": torch.zeros(3, 7)}, None)), count((torch.zeros(2, 5), torch.zeros(2)))
        (3, 2)
    """
    graphs = getattr(batch[0], "num_graphs", None)
    if isinstance(graphs, int):
        return graphs
    for leaf in tree_leaves((batch[1], batch[0])):
        if isinstance(leaf, Tensor) and leaf.dim():
            return len(leaf)
    raise ValueError(f"count: a batch of {[type(part).__name__ for part in batch]} without a tensor. Give tensors.")


def answer(outputs: Any) -> Tensor:
    """The prediction in what a model returns: the tensor itself, ``logits`` or ``sample``, or the first item of a tuple.

    Raises:
        TypeError: There is no such tensor.

    Examples:
        >>> answer((torch.ones(1), None)), answer({"logits": torch.ones(1), "loss": None})
        (tensor([1.]), tensor([1.]))
    """
    found = outputs
    if not isinstance(found, Tensor):
        named = dict(found) if isinstance(found, Mapping) else vars(found) if hasattr(found, "__dict__") else {}
        first = found[0] if isinstance(found, tuple | list) and found else None
        found = next((named[k] for k in ("logits", "sample") if isinstance(named.get(k), Tensor)), first)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"the model returned {type(outputs).__name__}; expected a tensor, a tuple that begins with one, or an object "
            "with logits."
        )
    return found
