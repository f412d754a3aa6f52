"""Order: in which order, and how often, the blocks of a backbone run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.stream import State


class Step(Protocol):
    """Run one block of the backbone."""

    def __call__(self, state: State, block: int, source: Tensor | None = None) -> State:
        """Advance ``state``; keys and values are read from ``source``, by default from the state."""


class Sequential(nn.Module):
    """Every block once, in order; and the protocol of the slot.

    ``needs`` names what an order asks of the mixer: one that gives a block a ``source`` needs ``"qkv"``. An order says by
    ``caches``, ``masks`` and ``rotates`` whether it runs with a key-value cache, with padding, and with positions that
    act inside the mixer.

    Args:
        depth: Number of blocks.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    caches: bool = True
    masks: ClassVar[bool] = True
    rotates: ClassVar[bool] = True

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth

    def forward(self, state: State, step: Step) -> State:
        """Run ``step(state, block)`` over the blocks."""
        for block in range(self.depth):
            state = step(state, block)
        return state


class Looped(Sequential):
    """The whole stack ``times`` times with the same weights.

    A key-value cache holds one entry for a block, so a looped stack decodes without one.

    Args:
        depth: Number of blocks.
        times: How often they run.
    """

    caches = False

    def __init__(self, depth: int, *, times: int = 2) -> None:
        super().__init__(depth)
        self.times = times

    def forward(self, state: State, step: Step) -> State:
        for _ in range(self.times):
            state = super().forward(state, step)
        return state


class _Recorder(Sequential):
    """The plain order, keeping what each block leaves in the stream."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.seen: list[list[Tensor]] = [[] for _ in range(depth)]

    def forward(self, state: State, step: Step) -> State:
        for block in range(self.depth):
            state = step(state, block)
            self.seen[block].append(state.x)
        return state


@contextmanager
def behind(model: nn.Module, at: str) -> Iterator[list[list[Tensor]]]:
    """Keep the hidden states behind each block of a list, while the context is open: for each block, one for each call.

    They stay in the graph. In the backbones of ``interlayer.models`` they are what a block leaves in the stream; elsewhere the
    first tensor of its output.

    Args:
        model: Any model.
        at: Name of the list of blocks, as ``select.blocks`` gives it.

    Raises:
        ValueError: The blocks run in an order of their own, so that it is not known what follows what.

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
        >>> with behind(net, "1") as seen:
        ...     _ = net(torch.zeros(5, 2))
        >>> [tuple(states[0].shape) for states in seen]
        [(5, 3), (5, 3)]
    """
    owner: Any = model.get_submodule(at.rpartition(".")[0])
    count = len(model.get_submodule(at))  # type: ignore[arg-type]
    trained = getattr(owner, "order", None)
    if not isinstance(trained, Sequential):
        names = [f"{at}.{i}" for i in range(count)]
        found: list[list[Tensor]] = [[] for _ in names]
        with taps.read(model, lambda name, module: name in names, every=True, detach=False) as seen:
            yield found
            for states, name in zip(found, names, strict=True):
                states += seen.get(name, [])
        return
    if type(trained) is not Sequential:
        raise ValueError(
            f"behind: the blocks of {at!r} run in {type(trained).__name__} order; expected the plain one, order='sequential'."
        )
    owner.order = _Recorder(count)
    try:
        yield owner.order.seen
    finally:
        owner.order = trained


Change = Callable[[int, Tensor], Tensor]
"""From the number of blocks that have run, and the hidden state, the state that goes on."""


class _Between(Sequential):
    """The plain order with a change ahead of each block, and behind the last."""

    def __init__(self, depth: int, change: Change) -> None:
        super().__init__(depth)
        self.change = change

    def forward(self, state: State, step: Step) -> State:
        for block in range(self.depth):
            state.x = self.change(block, state.x)
            state = step(state, block)
        state.x = self.change(self.depth, state.x)
        return state


def _ahead(change: Change, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return taps.swap(args, change(number, taps.first(args))), kwargs
    return args, taps.swap(kwargs, change(number, taps.first(kwargs)))


def _after(change: Change, number: int, module: nn.Module, args: Any, output: Any) -> Any:
    return taps.swap(output, change(number, taps.first(output)))


def between(model: nn.Module, at: str, change: Change) -> None:
    """Change the hidden state ahead of each block of a list, and behind the last, until ``undone``. In place.

    It is what ``behind`` keeps: in the backbones of ``interlayer.models`` the stream, elsewhere the first tensor among a block's
    arguments. With a key-value cache it is that of the new tokens alone.

    Args:
        model: Any model.
        at: Name of the list of blocks, as ``select.blocks`` gives it.
        change: Called with how many blocks have run and with the state; gives the state that goes on.

    Raises:
        ValueError: The blocks run in an order of their own, or between them there is a change already.

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Identity(), nn.Identity())
        >>> between(nn.ModuleDict({"blocks": net}), "blocks", lambda number, x: x + number)
        >>> net(torch.zeros(1))
        tensor([3.])
    """
    owner, blocks = _blocks(model, at)
    trained = getattr(owner, "order", None)
    if isinstance(trained, Sequential):
        if type(trained) is not Sequential:
            raise ValueError(
                f"between: the blocks of {at!r} run in {type(trained).__name__.strip('_')} order; expected the plain one, "
                "order='sequential'."
            )
        owner.order = _Between(len(blocks), change)
        return
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(partial(_ahead, change, number), with_kwargs=True)
    blocks[-1].register_forward_hook(partial(_after, change, len(blocks)))


def undone(model: nn.Module, at: str) -> None:
    """Take the change between these blocks off again, in place."""
    owner, blocks = _blocks(model, at)
    if isinstance(getattr(owner, "order", None), _Between):
        owner.order = Sequential(len(blocks))
    for block in blocks:
        for hooks, kind in ((block._forward_pre_hooks, _ahead), (block._forward_hooks, _after)):
            for key, hook in list(hooks.items()):
                if isinstance(hook, partial) and hook.func is kind:
                    del hooks[key]
                    block._forward_pre_hooks_with_kwargs.pop(key, None)


def _blocks(model: nn.Module, at: str) -> tuple[Any, list[nn.Module]]:
    blocks: Any = model.get_submodule(at)
    return model.get_submodule(at.rpartition(".")[0]), [m for name, m in blocks.named_children() if name.isdigit()]
