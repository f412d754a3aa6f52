"""Translation as a task: number words from German order to English order, exact by construction."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from interlayer.core.data import Batch, DataShape, answer
from interlayer.core.task import Task

PAD, END, START = 0, 1, 2
UND, HUNDERT, UNITS, TENS = 3, 4, 5, 14  # source: 9 units from 5, 8 tens from 14
HUNDRED, SHIFT = 22, 18  # target: hundred, units from 23, tens from 32
VOCAB = 40
HELD = 2**32  # the seed of what is validated, above those of studies


def sentences(seed: int, count: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of three numbers from 121 to 999 each, with units before tens as in German, and as English says them."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        hundred, unit, ten = (torch.randint(0, top, (size, 3), generator=draw) for top in (9, 9, 8))
        always = torch.zeros_like(unit)
        source = [UNITS + hundred, HUNDERT + always, UNITS + unit, UND + always, TENS + ten]
        target = [UNITS + SHIFT + hundred, HUNDRED + always, TENS + SHIFT + ten, UNITS + SHIFT + unit]
        ends = torch.full((size, 1), END)
        yield (
            torch.cat([torch.stack(source, -1).flatten(1), ends], 1),
            torch.cat([torch.stack(target, -1).flatten(1), ends], 1),
        )


class Translation(Task):
    """Translate three numbers from German words to English ones. A model gets source [B, 16] and target so far [B, 13].

    The loss is the mean cross-entropy of the next target token. ``exact`` is the share of sentences in which every token is
    the likeliest one, given those before it: just these are translated without a mistake by greedy decoding.

    Examples:
        >>> (source, before), target = next(Translation().batches(0, 2))
        >>> source.shape, before[0, :3].tolist() == [START, *target[0, :2].tolist()]
        (torch.Size([2, 16]), True)
    """

    name, base = "translation", "encoder-decoder"
    shape = DataShape("seq2seq", "tokens", vocab=VOCAB, source=16, length=13)
    about = "Three numbers from 121 to 999 in words, German order to English order: new ones at each step, 256 for validation."

    def batches(self, seed: int, batch_size: int, split: str = "train") -> Iterator[Batch]:
        """New sentences without end, or those of validation."""
        if split == "train":
            pairs, size = sentences(seed, sys.maxsize, batch_size), batch_size
        else:
            pairs, size = sentences(HELD, 2, 128), 128
        start = torch.full((size, 1), START)
        for source, target in pairs:
            yield (source, torch.cat([start, target[:, :-1]], 1)), target

    def evaluate(
        self, predict: Callable[[Any], Any], batch_size: int, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """Loss, bits per token and exact translations; see ``Task.evaluate``."""
        right: list[Tensor] = []

        def noted(inputs: Any) -> Any:
            outputs = predict(inputs)
            right.append(answer(outputs).argmax(-1))
            return outputs

        found = super().evaluate(noted, batch_size, device)
        targets = [y for _, y in self.batches(0, batch_size, "validation")]
        return {**found, "exact": float((torch.cat(right).cpu() == torch.cat(targets)).all(1).float().mean())}


@cache
def translation() -> Task:
    """Number words, German order to English order."""
    return Translation()
