"""Leaves whose blocks see sequences of several lengths: pooled ones, and sentences."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from interlayer.core.order import Sequential, Step
from interlayer.core.stream import State


class Funnel(Sequential):
    """Later blocks see a sequence pooled to half its length, again and again (Funnel-Transformer; Dai et al., arXiv:2006.03236).

    The blocks but ``decode`` form ``stages``. The first block of a stage reads with ``h' = pool(h)``, the means of pairs,
    from h: ``h <- h' + Attention(Q=h', KV=h)``. At the end every state is repeated to the full length, the output of
    the first stage is added, and ``decode`` blocks follow.

    Args:
        depth: Number of blocks.
        stages: Lengths: full, half, quarter, ...
        decode: Blocks at full length at the end. Defaults to a quarter of them.
        causal: Whether a token sees only earlier ones.

    Raises:
        ValueError: A causal model; fewer blocks than stages; a stream that keeps earlier states.

    Examples:
        >>> from interlayer.models import Encoder
        >>> model = Encoder(vocab=11, classes=3, length=9, depth=2, width=8, heads=2, order="funnel", position="learned")
        >>> model(torch.zeros(1, 9, dtype=torch.long)).shape
        torch.Size([1, 3])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"qkv", "bias"})  # any queries may ask any keys
    caches, masks, rotates = False, False, False

    def __init__(self, depth: int, *, stages: int = 2, decode: int | None = None, causal: bool = False) -> None:
        super().__init__(depth)
        self.decode = depth // 4 if decode is None else decode
        if causal:
            raise ValueError("Funnel: pooled states mix a token with the next one; use it in an encoder or on images.")
        if not 1 < stages <= depth - self.decode:
            raise ValueError(
                f"Funnel: stages {stages} for {depth} blocks, {self.decode} of them at the end; expected at least 2, with a "
                "block for each. Take a greater depth or fewer stages."
            )
        self.firsts = [round(n * (depth - self.decode) / stages) for n in range(stages)]

    def forward(self, state: State, step: Step) -> State:
        """Pool, and come back to the full length."""
        length, whole = state.x.shape[1], state.x
        for block in range(self.depth - self.decode):
            if block and block in self.firsts:
                if state.kept:
                    raise ValueError(
                        "Funnel: the stream keeps states of the full length; take one that keeps none, such as 'pre-norm'."
                    )
                if block == self.firsts[1]:
                    whole = state.x
                source = state.x
                state.x = F.avg_pool1d(source.transpose(1, 2), 2, ceil_mode=True).transpose(1, 2)
                state = step(state, block, source)
            else:
                state = step(state, block)
        back = state.x.repeat_interleave(2 ** (len(self.firsts) - 1), 1)[:, :length]
        state.x = back + whole
        for block in range(self.depth - self.decode, self.depth):
            state = step(state, block)
        return state


class Sentences(Sequential):
    """Lower blocks read within sentences, upper ones read the sentences (HIBERT; Zhang et al., arXiv:1905.06566, section 3.1).

    The first half of the blocks sees ``block`` tokens at a time. The state of a sentence's last token stands for it: ``h_i``; the
    rest of the blocks turn the sentences ``h_1 .. h_n`` into ``d_1 .. d_n``, each in the context of all. A token's output is
    its own state plus its sentence's d.

    Args:
        depth: Number of blocks, at least 2.
        block: Tokens in a sentence; the last one may be shorter.
        length: Longest sequence.
        causal: Whether a token sees only earlier ones.

    Raises:
        ValueError: A causal model; a single block or sentence; a stream that keeps earlier states.

    Examples:
        >>> from interlayer.models import Encoder
        >>> model = Encoder(vocab=11, classes=3, length=9, depth=2, width=8, heads=2, order="sentences(block=4)")
        >>> model(torch.zeros(1, 9, dtype=torch.long)).shape
        torch.Size([1, 3])
    """

    caches, masks = False, False

    def __init__(self, depth: int, *, block: int = 16, length: int | None = None, causal: bool = False) -> None:
        super().__init__(depth)
        if causal:
            raise ValueError("Sentences: a sentence is read as a whole; use it in an encoder or on images.")
        if depth < 2 or block < 1 or (length is not None and length <= block):
            raise ValueError(
                f"Sentences: depth {depth}, sentences of {block} in length {length}; expected at least 2 blocks and 2 sentences."
            )
        self.block = block

    def forward(self, state: State, step: Step) -> State:
        """Read words, then sentences."""
        half = self.depth // 2
        length, size = state.x.shape[1:]
        whole = length - length % self.block
        full, rest = state.x[:, :whole], state.x[:, whole:]  # sentences of one length, and a shorter one
        words, last = [], []
        for part, tokens in ((full, self.block), (rest, length - whole)):
            if part.shape[1]:
                here = State(part.reshape(-1, tokens, size))
                for block in range(half):
                    here = step(here, block)
                if here.kept:
                    raise ValueError(
                        "Sentences: the stream keeps states of earlier blocks; take one that keeps none, such as 'pre-norm'."
                    )
                words.append(here.x.reshape(part.shape))
                last.append(here.x[:, -1].reshape(part.shape[0], -1, size))
        there = State(torch.cat(last, 1))
        for block in range(half, self.depth):
            there = step(there, block)
        state.x = torch.cat(words, 1) + there.x.repeat_interleave(self.block, 1)[:, :length]
        return state
