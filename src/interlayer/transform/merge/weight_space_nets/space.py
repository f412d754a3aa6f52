"""The weights of MLPs of one shape as flat vectors: matrices and biases, permutations of hidden neurons, and what the MLPs compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector


class WeightSpace:
    """The weights of MLPs of one shape.

    Args:
        widths: Neurons of each layer d_0 to d_M, the inputs and outputs included.

    Attributes:
        count: Weights and biases P of a network.
        sets: Of each matrix and bias, in order, the hidden layers whose neurons are its axes.
        features: Of each, how many numbers belong to fixed axes, those of inputs and outputs.
        kept: Sets of hidden layers that some matrix or bias has as axes: none, one, or two neighbours; with the tensors that
            have them.

    Raises:
        ValueError: Fewer than three widths, or one below 1.

    Examples:
        >>> space = WeightSpace((2, 8, 3))
        >>> space.count, space.sets, space.features
        (51, [(1,), (1,), (1,), ()], [2, 1, 3, 3])
        >>> space.kept
        {(): [0, 1, 2, 3], (1,): [0, 1, 2]}
    """

    def __init__(self, widths: Sequence[int]) -> None:
        self.widths = tuple(widths)
        if len(self.widths) < 3 or min(self.widths) < 1:
            raise ValueError(
                f"WeightSpace: widths {self.widths}; expected at least three of at least 1: inputs, hidden layers, outputs."
            )
        last = len(self.widths) - 1
        axes = [a for m in range(1, last + 1) for a in ((m, m - 1), (m,))]
        self.shapes = [tuple(self.widths[m] for m in a) for a in axes]
        self.sizes = [prod(shape) for shape in self.shapes]
        self.count = sum(self.sizes)
        self.sets = [tuple(sorted(m for m in a if 0 < m < last)) for a in axes]
        self.features = [prod(self.widths[m] for m in a if m in (0, last)) for a in axes]
        # Of each tensor, its axes with those of hidden layers first, in order.
        self.order = [sorted(range(len(a)), key=lambda i, a=a: (a[i] in (0, last), a[i])) for a in axes]
        hidden = range(1, last)
        choices: list[tuple[int, ...]] = [(), *((m,) for m in hidden), *pairwise(hidden)]
        self.kept = {k: [t for t, s in enumerate(self.sets) if set(k) <= set(s)] for k in choices}

    @classmethod
    def of(cls, *models: nn.Module) -> tuple[Self, Float[Tensor, "N P"]]:
        """The space of MLPs and their weights.

        Args:
            *models: Networks whose only parameters are those of linear layers with biases, in the order of their use.

        Raises:
            ValueError: A model is no such MLP, or they differ in widths.
        """
        found = []
        for model in models:
            linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m.bias is not None]
            fits = all(a.out_features == b.in_features for a, b in pairwise(linear))
            if not fits or sum(w.numel() for m in linear for w in m.parameters()) != sum(
                w.numel() for w in model.parameters()
            ):
                raise ValueError(
                    f"WeightSpace.of: {type(model).__name__} is not a chain of linear layers with biases and nothing else that "
                    "learns; expected an MLP."
                )
            found.append((linear[0].in_features, *(m.out_features for m in linear)) if linear else ())
        if len(set(found)) != 1:
            raise ValueError(f"WeightSpace.of: widths {sorted(set(found))}; expected models of one shape.")
        return cls(found[0]), torch.stack([parameters_to_vector(m.parameters()).detach() for m in models])

    def split(self, flat: Float[Tensor, "B P *C"]) -> list[Tensor]:
        """Matrices and biases [B, neurons of hidden layers..., F C]: F of inputs or outputs, C features of each weight."""
        x = flat if flat.ndim == 3 else flat.unsqueeze(-1)
        found = []
        for t, part in enumerate(x.split(self.sizes, 1)):
            tensor = part.unflatten(1, self.shapes[t]).permute(0, *(1 + i for i in self.order[t]), -1)
            dims = [self.widths[m] for m in self.sets[t]]
            found.append(tensor.reshape(x.shape[0], *dims, self.features[t] * x.shape[2]))
        return found

    def join(self, tensors: Sequence[Tensor]) -> Float[Tensor, "B P *C"]:
        """The inverse of ``split``: [B, P], or [B, P, C] where weights have several features."""
        parts = []
        for t, (tensor, order) in enumerate(zip(tensors, self.order, strict=True)):
            shape = [self.shapes[t][i] for i in order]
            full = tensor.reshape(tensor.shape[0], *shape, tensor.shape[-1] // self.features[t])
            parts.append(full.permute(0, *(1 + order.index(i) for i in range(len(order))), -1).flatten(1, -2))
        flat = torch.cat(parts, 1)
        return flat.squeeze(-1) if flat.shape[2] == 1 else flat

    def pooled(self, tensor: Tensor, index: int, kept: tuple[int, ...], pool: str) -> Tensor:
        """A matrix or bias without the axes of hidden layers that are not kept: their ``max`` or ``mean``."""
        dims = [1 + i for i, m in enumerate(self.sets[index]) if m not in kept]
        if not dims:
            return tensor
        return tensor.amax(dims) if pool == "max" else tensor.mean(dims)

    def broadcast(self, tensor: Tensor, index: int, kept: tuple[int, ...]) -> Tensor:
        """The inverse: the axes that a matrix or bias has beside those kept, of size one."""
        for i, m in enumerate(self.sets[index]):
            if m not in kept:
                tensor = tensor.unsqueeze(1 + i)
        return tensor

    def permuted(
        self, flat: Float[Tensor, "B P *C"], orders: Mapping[int, Int[Tensor, "B d"]]
    ) -> Float[Tensor, "B P *C"]:
        """The weights after the neurons of hidden layers are put in another order, that of each network its own.

        Args:
            flat: Weights.
            orders: By hidden layer, from the new position to the old one.
        """
        rows = {m: torch.arange(d, device=flat.device).expand(len(flat), d) for m, d in enumerate(self.widths)}
        rows |= orders
        start, index = 0, []
        for m in range(1, len(self.widths)):
            own, before = rows[m], rows[m - 1]
            d = self.widths[m - 1]
            index.append((start + own.unsqueeze(2) * d + before.unsqueeze(1)).flatten(1))
            start += d * self.widths[m]
            index.append(start + own)
            start += self.widths[m]
        return flat[torch.arange(len(flat), device=flat.device).unsqueeze(1), torch.cat(index, 1)]

    def shuffled(
        self, flat: Float[Tensor, "B P *C"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "B P *C"]:
        """The same networks with their hidden neurons in random orders."""
        orders = {
            m: torch.rand(len(flat), self.widths[m], generator=generator).argsort(1).to(flat.device)
            for m in range(1, len(self.widths) - 1)
        }
        return self.permuted(flat, orders)

    def statistics(self, flat: Float[Tensor, "B P"]) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
        """Mean and standard deviation of each weight over networks and over the neurons of hidden layers, which are not told apart."""
        tensors = self.split(flat)
        moments = [(t.flatten(0, -2).mean(0), t.flatten(0, -2).std(0).clamp_min(1e-6)) for t in tensors]
        mean, deviation = (
            self.join([own[i].expand(1, *t.shape[1:]) for own, t in zip(moments, tensors, strict=True)]).squeeze(0)
            for i in (0, 1)
        )
        return mean, deviation

    def run(
        self,
        flat: Float[Tensor, "B P"],
        x: Float[Tensor, "*B S I"],
        activation: Callable[[Tensor], Tensor] = torch.relu,
    ) -> Float[Tensor, "B S O"]:
        """What the networks compute, all at once: differentiable in the weights.

        Args:
            flat: Weights.
            x: Inputs for all, or for each network its own.
            activation: Of the hidden layers.
        """
        h = x.expand(len(flat), *x.shape[-2:])
        parts = flat.split(self.sizes, 1)
        for layer, (weight, bias) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
            w = weight.unflatten(1, self.shapes[2 * layer])
            h = torch.baddbmm(bias.unsqueeze(1), h, w.transpose(1, 2))
            h = h if layer == len(self.widths) - 2 else activation(h)
        return h
