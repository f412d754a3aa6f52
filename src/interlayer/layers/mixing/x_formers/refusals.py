"""What mixers cannot do, said in one way."""

from __future__ import annotations

from torch import Tensor

from interlayer.core.mixer import Attention


def refuse_dense(mixer: Attention, length: int) -> None:
    """Raise because nothing is left out at the longest input."""
    raise ValueError(
        f"{type(mixer).__name__}: every token sees all others up to the model's length {length}, so nothing is sparse. Take a "
        "smaller window, block or number of keys, or mixer='attention'."
    )


def refuse_causal(mixer: Attention) -> None:
    """Raise in a causal model: the mixer has no causal form."""
    if mixer.causal:
        raise ValueError(
            f"{type(mixer).__name__}: what a token sees depends on all tokens, so there is no causal form; "
            "use it in an encoder or a vision Transformer."
        )


def refuse_mask(mixer: Attention, mask: Tensor | None) -> None:
    """Raise if there is padding, which the mixer cannot leave out."""
    if mask is not None:
        raise ValueError(f"{type(mixer).__name__}: takes no padding mask; give sequences of one length.")
