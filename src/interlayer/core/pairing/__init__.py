"""The ground for paired comparisons: the same initial noise, the same noise in training, and clipping that adds nothing.

Two models that differ only in their initial draws often differ by more than an idea is worth. The seed alone does not pair
them: an arm with one parameter more shifts every later draw.

- ``paired`` builds a model whose parameters and buffers draw from streams of their own, by name.
- ``Streams`` gives every module that draws in training a stream of its own, by step and name.
- ``clip_gradients`` clips by the global norm, in which parameters without gradient leave no trace.
"""

from interlayer.core.pairing.clip import clip_gradients
from interlayer.core.pairing.draws import Paired, Plan, paired, shared
from interlayer.core.pairing.streams import Streams

__all__ = ["Paired", "Plan", "Streams", "clip_gradients", "paired", "shared"]
