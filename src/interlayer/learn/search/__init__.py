"""How architectures are found, and the baseline of differentiable search: DARTS."""

from interlayer.learn.search._darts import DARTS

__all__ = ["DARTS"]
