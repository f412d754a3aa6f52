"""A frozen language model of bytes with parts and a head of its own: what ways to adapt are compared on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from interlayer.core import datasets
from interlayer.core.attach import Bias, Bottleneck, Lora, attach, attention_outputs, biased, feed_forwards
from interlayer.core.data import DataShape
from interlayer.core.fit import fit
from interlayer.core.nano import nano
from interlayer.models import Transformer

LENGTH, STEPS = 64, 400


@cache
def _text() -> Tensor:
    return torch.tensor(list(b"".join(datasets.stdlib_bytes()[0])), dtype=torch.uint8)


def upstream(depth: int = 2, width: int = 64, steps: int = STEPS) -> Transformer:
    """A language model of the bytes of Python's standard library, trained once (about 7 seconds) and kept in the user's cache.

    Args:
        depth: Blocks.
        width: Features; a head for each 16.
        steps: Training steps, of 16 texts of 64 bytes.
    """

    def loss(model: nn.Module, starts: Tensor) -> Tensor:
        text = _text()[starts.unsqueeze(1) + torch.arange(LENGTH + 1)].long()
        return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    def train(model: nn.Module) -> None:
        starts = torch.randint(len(_text()) - LENGTH, (steps, 16), generator=torch.Generator().manual_seed(0))
        fit(model, starts, loss, steps=steps, lr=3e-3, warmup=steps // 10)

    def build() -> Transformer:
        return Transformer(256, LENGTH, depth, width, width // 16)

    if torch.get_default_device().type == "meta":  # shapes alone are wanted
        return build()
    made: Any = nano(build, train, task="adapted-bytes", kind="transformer", steps=steps)
    return made


def _bitfit(model: nn.Module) -> Any:
    return attach(model, list(biased(model)), Bias)


def _lora(model: nn.Module, rank: int = 1) -> Any:
    """On the map to queries, keys and values."""
    return attach(model, "**.qkv", partial(Lora, rank=rank))


def _adapters(model: nn.Module, hidden: int = 4) -> Any:
    """Behind both sublayers."""
    return attach(model, [*attention_outputs(model), *feed_forwards(model)], partial(Bottleneck, hidden=hidden))


class Tuned(nn.Module):
    """A frozen ``upstream``, adapted in one of several ways, and a linear head on the mean of its states.

    Args:
        classes: Classes K.
        kind: One of ``ways``: ``head`` (the head alone), ``full`` (everything), ``bitfit``, ``lora``, ``adapters``, and those of a
            subclass.
        depth: Blocks of the language model.
        width: Its features D.
        steps: Its training steps.
        **options: Of the way, such as ``rank`` or ``hidden``.

    Shapes: bytes [B, S] of int64 to logits [B, K].

    Raises:
        ValueError: Unknown kind.
    """

    ways: ClassVar[Mapping[str, Callable[..., Any]]] = {
        "head": lambda model: model.requires_grad_(False),
        "full": lambda model: model,
        "bitfit": _bitfit,
        "lora": _lora,
        "adapters": _adapters,
    }

    def __init__(
        self, classes: int, *, kind: str, depth: int = 2, width: int = 64, steps: int = STEPS, **options: Any
    ) -> None:
        super().__init__()
        if kind not in self.ways:
            raise ValueError(f"{type(self).__name__}: kind {kind!r} is not one of {list(self.ways)}.")
        base: Any = upstream(depth, width, steps)
        base.head = nn.Identity()
        self.base, self.head = base, nn.Linear(width, classes)
        self.ways[kind](base, **options)

    @classmethod
    def for_task(cls, shape: DataShape, **options: Any) -> Self:
        """A classifier of texts of at most 64 bytes.

        Raises:
            ValueError: The task is another.
        """
        shape.require(cls.__name__, "tokens", "classes")
        if shape.vocab > 256 or shape.length > LENGTH:
            raise ValueError(
                f"{cls.__name__}: {shape.length} tokens of {shape.vocab} kinds; expected at most {LENGTH} bytes, as its frozen "
                "language model knows them."
            )
        return cls(shape.classes, **options)

    def forward(self, tokens: Int[Tensor, "B S"]) -> Float[Tensor, "B K"]:
        """Logits."""
        return self.head(self.base(tokens).mean(1))
