"""Values of self-attention, recorded in one pass through a sampler's steps and put back in another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from interlayer.core import taps


class Values:
    """The values of one attention layer over an inversion, to be given back in an edit."""

    def __init__(self, joined: bool) -> None:
        self.joined, self.kept = joined, list[Tensor]()

    def record(self, x: Tensor) -> Tensor:
        """Keep the values in a projection's output; queries and keys may stand before them."""
        self.kept.append(x.chunk(3, -1)[2].clone() if self.joined else x)
        return x

    def replay(self, stages: int) -> Callable[[Tensor], Tensor]:
        """A change that puts them back: the last step's first, each stage of a step for the same stage."""
        steps = [self.kept[i : i + stages] for i in range(0, len(self.kept), stages)]
        queue = [value for step in reversed(steps) for value in step]

        def change(x: Tensor) -> Tensor:
            value = queue.pop(0)
            head, old = (x.chunk(3, -1)[:2], x.chunk(3, -1)[2]) if self.joined else ((), x)
            if value.shape[1:] != old.shape[1:] or len(old) % len(value):
                raise ValueError(
                    f"values: values {tuple(value.shape)} of the source for {tuple(old.shape)} of the target; expected as many "
                    "items and tokens. Pad the conditions to one length."
                )
            value = value.repeat(
                len(old) // len(value), *[1] * (old.ndim - 1)
            )  # with guidance, every item is there twice
            return torch.cat((*head, value), -1)

        return change


def attentions(model: nn.Module) -> dict[str, str]:
    """Self-attention layers by name, in order, with the name of the projection that gives their values.

    Where a model has single-stream blocks (Flux), those alone. Joint attention of SD3 shares its image tokens' values.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        fused = getattr(module, "qkv", None)
        if isinstance(getattr(module, "to_v", None), nn.Linear) and not getattr(module, "is_cross_attention", False):
            found[name] = f"{name}.to_qkv" if getattr(module, "fused_projections", False) else f"{name}.to_v"
        elif isinstance(fused, nn.Linear) and fused.out_features == 3 * fused.in_features:
            found[name] = f"{name}.qkv"
    return {n: p for n, p in found.items() if n.startswith("single_")} or found


@contextmanager
def record(model: nn.Module, projections: Iterable[str]) -> Iterator[dict[str, Values]]:
    """Keep the values that projections give while the context is open.

    Args:
        model: Any module.
        projections: Names of projections, as ``attentions`` gives them.
    """
    kept = {name: Values(name.endswith("qkv")) for name in projections}
    with taps.patch(model, {name: v.record for name, v in kept.items()}):
        yield kept


@contextmanager
def replay(model: nn.Module, kept: Mapping[str, Values], stages: int) -> Iterator[None]:
    """Put recorded values back while the context is open, the steps in reverse order.

    Args:
        model: The same module.
        kept: What ``record`` gave.
        stages: Calls of the model a step.
    """
    with taps.patch(model, {name: v.replay(stages) for name, v in kept.items()}):
        yield
