"""A layer of a Hugging Face cache for an attention that skips. Imports transformers; read where such a cache is at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from interlayer.core.skipping.skip import scatter


class KeptLayer(CacheLayerMixin):
    """Keys and values of what is kept, and the number of tokens of all.

    Where sequences skip, ``keep`` [B] says which are kept; only they have rows in ``inner``. Where tokens skip, every sequence has
    a row, ``spots`` [B, T] says which token a stored one is, and -1 marks a hole, where another sequence kept one token more.

    Args:
        inner: The empty layer that the plain attention would fill.
        tokens: Whether tokens skip, and not sequences.
    """

    is_compileable = False
    supports_early_init = False

    def __init__(self, inner: Any, *, tokens: bool) -> None:
        super().__init__()
        self.window: int | None = getattr(inner, "sliding_window", None)
        self.is_sliding = self.window is not None
        self.tokens, self.length = tokens, 0
        self.inner = DynamicLayer() if tokens else inner
        self.keep: Tensor | None = None
        self.spots: Tensor | None = None
        self.rows: Tensor | None = (
            None  # that the next keys and values belong to; none are awaited outside of the module
        )

    def await_rows(self, rows: Tensor) -> None:
        """The next ``update`` brings keys and values of these rows."""
        self.rows = rows

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append, and return all that these rows have."""
        if self.rows is None:
            raise ValueError(
                "KeptLayer: the cache belongs to a model with skipping, but a layer without it writes to it. Begin with a new cache."
            )
        rows, self.rows = self.rows, None
        size = len(self.spots) if self.spots is not None else len(rows)
        new = [scatter(t, rows, size) for t in (key_states, value_states)]
        old = self.inner.keys
        if old is not None and old.numel() and (*old.shape[:2], old.shape[3]) != (*new[0].shape[:2], new[0].shape[3]):
            raise ValueError(
                f"KeptLayer: keys {tuple(old.shape)} are stored, {tuple(new[0].shape)} come; the cache belongs to another model. Begin "
                "with a new cache."
            )
        keys, values = self.inner.update(*new)
        return (keys, values) if len(rows) == size else (keys[rows], values[rows])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The inner layer begins by itself."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, kept or not."""
        return self.length

    def get_max_length(self) -> int:
        """As the plain layer's."""
        return self.window or -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask, as the plain layer's."""
        if self.window is None or self.length < self.window:
            return self.length + query_length, 0
        return self.window - 1 + query_length, self.length - self.window + 1

    def reset(self) -> None:
        """Forget everything, the decision too."""
        self.inner.reset()
        self.length, self.keep, self.spots, self.rows = 0, None, None, None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; the decision stays until none is left."""
        self.length = max(self.length - abs(tokens_to_remove), 0)
        if self.spots is None:
            self.inner.crop(tokens_to_remove)
        else:
            self.spots = self.spots.masked_fill(self.spots >= self.length, -1)
        if not self.length:
            self.reset()

    def _take(self, rows: Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        if self.keep is not None:
            rows = rows.to(self.keep.device)
            stored, self.keep = self.keep.cumsum(0) - 1, self.keep[rows]
            rows = stored[rows][self.keep]
        if self.spots is not None:
            self.spots = self.spots[rows]
        self.inner.batch_select_indices(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch."""
        self._take(indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence ``repeats`` times."""
        held = self.keep if self.keep is not None else self.spots
        if held is not None:
            self._take(torch.arange(len(held), device=held.device).repeat_interleave(repeats))


def layer_of(cache: Any, index: int, *, tokens: bool, batch: int) -> KeptLayer:
    """The layer of a cache for a module that skips; put there before the first token.

    Raises:
        ValueError: The cache is none that grows, or holds tokens of another model or batch.
    """
    if not isinstance(cache, Cache) or cache.offloading:
        found = "an offloaded cache" if isinstance(cache, Cache) else type(cache).__name__
        raise ValueError(f"SkipDecoder: the cache is {found}; expected a DynamicCache. Leave out cache_implementation.")
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer: Any = cache.layers[index] if index < len(cache.layers) else None
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        if layer.get_seq_length():
            raise ValueError(
                f"SkipDecoder: layer {index} of the cache holds {layer.get_seq_length()} tokens, but not which of them skipped; it "
                "belongs to another model. Begin with a new cache."
            )
        layer = cache.layers[index] = KeptLayer(layer, tokens=tokens)
    if not isinstance(layer, KeptLayer):
        raise ValueError(
            f"SkipDecoder: layer {index} of the cache is {type(layer).__name__}; expected one that grows. Leave out cache_implementation."
        )
    held = layer.keep if layer.keep is not None else layer.spots
    if layer.tokens != tokens or (held is not None and len(held) != batch):
        kind, size = "tokens" if layer.tokens else "sequences", batch if held is None else len(held)
        raise ValueError(
            f"SkipDecoder: the cache holds {size} sequences of a model where {kind} skip, for a batch of {batch}; it "
            "belongs to another model or batch. Begin with a new cache."
        )
    return layer
