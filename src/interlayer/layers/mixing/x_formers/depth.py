"""Leaves that change how blocks follow each other: halting, early exit, feedback, transparent attention."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from interlayer.core import aside
from interlayer.core.order import Sequential, Step
from interlayer.core.stream import Norm, PreNorm, State, Width


class Universal(Sequential):
    """The same blocks again and again, each position as often as it needs (Universal Transformer; Dehghani et al., arXiv:1807.03819).

    Before step t, ``P^t_{i,2j} = sin(i / 10000^{2j/D}) + sin(t / 10000^{2j/D})`` (and the cosine at 2j + 1) is added to the
    state of position i. Then it halts with ``p = sigmoid(w x + b)``: when the sum of its p passes ``threshold`` the rest up to
    1 is its last weight a; before that a is p. The output is ``y <- a x + (1 - a) y`` over the steps, and a halted
    position keeps its state. Training adds ``penalty`` times the mean of steps plus rest to the loss.

    One step runs the whole stack; ``depth=1`` is the paper's model. Take ``position="none"`` with it.

    Args:
        depth: Number of blocks.
        width: Features D, even.
        steps: Most steps.
        threshold: Sum of the halting probabilities at which a position halts.
        penalty: Weight of the mean number of steps in the loss.

    Examples:
        >>> from interlayer.models import Transformer
        >>> model = Transformer(vocab=11, length=9, depth=1, width=8, heads=2, order="universal(steps=3)", position="none")
        >>> model(torch.zeros(1, 9, dtype=torch.long)).shape
        torch.Size([1, 9, 11])
    """

    caches = False

    def __init__(
        self, depth: int, *, width: int, steps: int = 4, threshold: float = 0.99, penalty: float = 1e-3
    ) -> None:
        super().__init__(depth)
        self.halt = nn.Linear(width, 1)
        nn.init.constant_(self.halt.bias, -1.0)
        self.steps, self.threshold, self.penalty = steps, threshold, penalty

    def signal(self, x: Tensor, step: int) -> Tensor:
        """The coordinates [S, D] of the positions and of a step."""
        rate = 10000 ** (-torch.arange(0, x.shape[-1], 2, device=x.device) / x.shape[-1])
        angle, time = torch.arange(x.shape[1], device=x.device)[:, None] * rate, step * rate
        return torch.stack((angle.sin() + time.sin(), angle.cos() + time.cos()), -1).flatten(1).to(x.dtype)

    def forward(self, state: State, step: Step) -> State:
        """Run the stack until all positions have halted."""
        spent = torch.zeros_like(state.x[..., :1])
        rest, taken, out = spent, spent, torch.zeros_like(state.x)
        for at in range(1, self.steps + 1):
            before = state.x
            state.x = state.x + self.signal(state.x, at)
            chance = torch.sigmoid(self.halt(state.x))
            running = spent < 1
            halts = running & (spent + chance > self.threshold)
            weight = torch.where(halts, 1 - spent, chance) * running
            rest, taken = rest + halts * (1 - spent), taken + running
            spent = torch.where(halts, 1.0, spent + weight)
            state = super().forward(state, step)
            out = weight * state.x + (1 - weight) * out
            state.x = torch.where(running, state.x, before)
            if not torch.compiler.is_compiling() and bool((spent >= 1).all()):
                break
        if self.training:
            aside.loss(self.penalty * (taken + rest).mean())
        state.x = out
        return state


class EarlyExit(Sequential):
    """Blocks stop when the answers of ``patience`` blocks in a row agree with the one before (PABEE; Zhou et al., arXiv:2006.04152).

    Every block but the last has a classifier, a linear map in front of the model's head. The paper trains all with
    ``sum_j j L_j / sum_j j``; here each example of a training batch leaves at a block j drawn with probability
    ``j / sum j``, whose expected loss is that sum. In evaluation an example's answer is fixed when it exits, and the stack
    stops when all examples have.

    Args:
        depth: Number of blocks.
        width: Features D.
        patience: Agreements in a row.
        causal: Whether a token sees only earlier ones.

    Raises:
        ValueError: A causal model, one that gives no answer for the whole input, or a patience that never exits early.

    Examples:
        >>> from interlayer.models import Encoder
        >>> model = Encoder(vocab=11, classes=3, length=9, depth=3, width=8, heads=2, order="early-exit")
        >>> model(torch.zeros(1, 9, dtype=torch.long)).shape
        torch.Size([1, 3])
    """

    caches = False

    def __init__(self, depth: int, *, width: int, patience: int = 1, causal: bool = False) -> None:
        super().__init__(depth)
        if causal:
            raise ValueError("EarlyExit: compares answers for the whole input; use it in a classifier.")
        if not 1 <= patience <= depth - 2:
            raise ValueError(
                f"EarlyExit: patience {patience} in {depth} blocks never exits early; expected 1 to depth - 2. Take a greater depth."
            )
        self.patience = patience
        self.exits = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))

    def leave(self, x: Tensor, block: int) -> Tensor:
        """What the head reads if it reads after a block."""
        return self.exits[block](x) if block < self.depth - 1 else x

    def forward(self, state: State, step: Step) -> State:
        """Run the blocks until the answers agree."""
        if state.answer is None:
            raise ValueError("EarlyExit: the model gives no answer for the whole input; give it classes.")
        if self.training:
            outs = []
            for block in range(self.depth):
                state = step(state, block)
                outs.append(self.leave(state.x, block))
            share = torch.arange(1.0, self.depth + 1, device=state.x.device)
            at = torch.multinomial(share, state.x.shape[0], replacement=True)
            state.x = torch.stack(outs, 1)[torch.arange(at.shape[0], device=at.device), at]
            return state
        out, last, agreed, done = state.x, None, None, None
        for block in range(self.depth):
            state = step(state, block)
            here = self.leave(state.x, block)
            label = state.answer(replace(state, x=here)).argmax(-1)
            if last is None or agreed is None or done is None:
                agreed, done, out = torch.zeros_like(label), torch.zeros_like(label, dtype=torch.bool), here
            else:
                agreed = torch.where(label == last, agreed + 1, 0)
                out = torch.where(done[:, None, None], out, here)
            last, done = label, done | (agreed >= self.patience)
            if not torch.compiler.is_compiling() and bool(done.all()):
                break
        state.x = out
        return state


class Feedback(Sequential):
    """Every block reads one memory of the past, which holds all levels of it (Feedback Transformer; Fan et al., arXiv:2002.09402).

    ``m_t = sum_l softmax(w)_l x_t^l`` over the input and the outputs of all blocks; every block of token t attends to
    ``m_1 .. m_{t-1}`` (the first token to itself). Low blocks so see what high ones found, and tokens run one by one.

    Args:
        depth: Number of blocks.
        causal: Whether a token sees only earlier ones.

    Raises:
        ValueError: A model that is not causal, or a stream that keeps earlier states.

    Examples:
        >>> from interlayer.models import Transformer
        >>> model = Transformer(vocab=11, length=9, depth=2, width=8, heads=2, order="feedback")
        >>> model(torch.zeros(1, 9, dtype=torch.long)).shape
        torch.Size([1, 9, 11])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"qkv", "cache"})  # one query asks many keys, as in decoding
    caches, masks = False, False

    def __init__(self, depth: int, *, causal: bool) -> None:
        super().__init__(depth)
        if not causal:
            raise ValueError("Feedback: a token reads the memory of earlier ones alone; use it in a causal model.")
        self.level = nn.Parameter(torch.zeros(depth + 1))

    def forward(self, state: State, step: Step) -> State:
        """Run all blocks for one token after the other."""
        weight, memory, out = self.level.softmax(0), state.x[:, :0], []
        for t in range(state.x.shape[1]):
            here = State(state.x[:, t : t + 1])
            levels = [here.x]
            for block in range(self.depth):
                here = step(here, block, memory if t else None)
                levels.append(here.x)
            if here.kept:
                raise ValueError(
                    "Feedback: the stream keeps states of earlier blocks; take one that keeps none, such as 'pre-norm'."
                )
            memory = torch.cat((memory, (torch.stack(levels, -1) * weight).sum(-1)), 1)
            out.append(here.x)
        state.x = torch.cat(out, 1)
        return state


class Transparent(PreNorm):
    """The output is a learned mean of all blocks' outputs (Transparent Attention; Bapna et al., arXiv:1808.07561).

    ``z = sum_i softmax(w)_i h_i`` over the input and the outputs of all blocks, w starting at zero. The paper has one w for
    every layer of a decoder; here the model's head is the one reader.

    Args:
        depth: Number of blocks.
        width: Features of a sublayer's input, one number or one for each sublayer.
        outputs: Features of a sublayer's output, where they differ.
        branches: Sublayers in a block.
        norm: Called with ``width=`` for each norm.

    Examples:
        >>> from interlayer.models import Transformer
        >>> model = Transformer(vocab=11, length=9, depth=2, width=8, heads=2, stream="transparent")
        >>> model(torch.zeros(1, 9, dtype=torch.long)).shape
        torch.Size([1, 9, 11])
    """

    def __init__(
        self, depth: int, width: Width, *, outputs: Width | None = None, branches: int = 1, norm: Norm | None = None
    ) -> None:
        super().__init__(depth, width, outputs=outputs, branches=branches, norm=norm)
        self.level = nn.Parameter(torch.zeros(depth + 1))

    def start(self, x: Tensor) -> State:
        return State(x, {0: x})

    def write(self, state: State, layer: int, branch: Tensor) -> State:
        state = super().write(state, layer, branch)
        if self.ends_block(layer):
            state.kept[layer // self.branches + 1] = state.x
        return state

    def finish(self, state: State) -> Tensor:
        levels = list(state.kept.values())
        return self.last((torch.stack(levels, -1) * self.level[: len(levels)].softmax(0)).sum(-1))
