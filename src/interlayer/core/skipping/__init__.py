"""Skipping: what a router leaves out passes a sublayer or a whole block by, without its being computed; caches stay right.

``SkipMixer`` wraps a mixer of a Transformer of Interlayer, ``SkipDecoder`` an attention or a block of a Hugging Face decoder.
"""

from __future__ import annotations

from interlayer.core.skipping.decoder import SkipDecoder, attention_of
from interlayer.core.skipping.skip import Per, Skip, SkipMixer

__all__ = ["Per", "Skip", "SkipDecoder", "SkipMixer", "attention_of"]
