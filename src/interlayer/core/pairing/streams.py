"""Random numbers in training: a stream for each step and module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from interlayer.core.pairing.seeds import generators, kept, seed_all, seed_of
from interlayer.core.traced import traced


class Streams:
    """Every module that draws in its forward pass (dropout, stochastic depth, routing) gets a stream of its own.

    A call of a module draws from the stream of (seed, step, module name, number of the call in the step). So an arm's own
    draws never shift those of the modules that it shares with other arms, from the first step on. Everything else that draws
    in a step, such as the loss, draws from the stream of (seed, step).

    The first step puts hooks on all modules and notes which of them draw; later steps put them only on modules of the same
    classes, and on none if nothing draws. Hooks are there only during a step. If something new draws in a later step,
    the next step looks at all modules again. Activation checkpointing computes a call again with the numbers of the
    first time. Inside a region compiled by ``torch.compile`` or transformed by ``torch.func`` hooks don't act: it draws from
    the stream of the innermost module around it, or of the step.

    Args:
        model: The model that is trained.
        seed: The seed that models are paired by.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        >>> noise, x = Streams(model, seed=0), torch.ones(2, 4)
        >>> with noise.step(0):
        ...     one = model(x)
        >>> with noise.step(0):
        ...     again = model(x)
        >>> with noise.step(1):
        ...     other = model(x)
        >>> torch.equal(one, again), torch.equal(one, other)
        (True, False)
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model, self.seed = model, seed
        self._drawing: set[type[nn.Module] | None] = set()
        self._look = True

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """One training step: the forward pass, the loss and the backward pass.

        Args:
            number: The number of the step.
        """
        with kept(), ExitStack() as hooks:
            seed_all(seed_of(self.seed, number))
            step = _Step(self.seed, number)
            for name, module in self.model.named_modules():
                if self._look or type(module) in self._drawing:
                    name = name.replace("_orig_mod.", "").removesuffix("_orig_mod")  # as before torch.compile
                    hooks.callback(module.register_forward_pre_hook(partial(step.enter, name), prepend=True).remove)
                    hooks.callback(module.register_forward_hook(step.leave, always_call=True).remove)
            yield
            step.notice(step.states())
        if self._look:
            self._drawing |= step.drew
        self._look = not self._look and not step.drew <= self._drawing


class _Step:
    """The hooks of one step."""

    def __init__(self, seed: int, number: int) -> None:
        self.seed, self.number = seed, number
        self.generators = generators()
        self.running: list[tuple[nn.Module, list[Tensor]]] = []  # with the states of the generators around the call
        self.calls: Counter[str] = Counter()
        self.numbers: dict[tuple[str, int], int] = {}
        self.drew: set[type[nn.Module] | None] = set()  # None: code outside of all modules
        self.last = self.states()

    def states(self) -> list[Tensor]:
        """The states of the generators."""
        return [generator.get_state() for generator in self.generators]

    def notice(self, states: list[Tensor]) -> None:
        """If the generators have moved, the module that runs has drawn."""
        if not all(map(torch.equal, states, self.last)):
            self.drew.add(type(self.running[-1][0]) if self.running else None)

    def enter(self, name: str, module: nn.Module, args: Any) -> None:
        """Go over to the module's stream."""
        if traced():
            return
        outer = self.states()
        self.notice(outer)
        # A call that is computed again finds the state that was there the first time, and gets the same number.
        number = self.numbers.setdefault((name, torch.initial_seed()), self.calls[name])
        self.calls[name] = max(self.calls[name], number + 1)
        self.running.append((module, outer))
        seed_all(seed_of(self.seed, self.number, name, number))
        self.last = self.states()

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Go back to the stream around the call, which goes on as if the module had drawn nothing.

        The state must still differ from that before the call, or the next call would be taken for the same one. A generator's
        state begins with the seed that it was given, which has no influence on what is drawn afterwards: it is counted up.
        """
        if traced() or not self.running or self.running[-1][0] is not module:
            return
        self.notice(self.states())
        self.last = self.running.pop()[1]
        self.last[0].numpy().view(np.uint64)[0] += 1
        for generator, state in zip(self.generators, self.last, strict=True):
            generator.set_state(state)
