"""Parts added to modules of a frozen model: trained, named by task, switched, saved alone, and baked into plain weights.

``attach`` adds a ``Part`` (``Lora``, ``Bias``, ``Scale``, ``Bottleneck``, ``Whole``, or one of your own) to modules of any model. The
modules keep their classes, names and weights: a part is a child of its module and acts by a forward hook. ``active`` says which
tasks' parts act, ``detach`` takes them off again, ``save`` and ``load`` keep them in PEFT's files, and ``bake`` gives a plain model.
"""

from interlayer.core.attach.attaching import active, attach, attached, bake, detach
from interlayer.core.attach.files import load, save
from interlayer.core.attach.parts import Bias, Bottleneck, Lora, Part, Scale, Whole, matrix
from interlayer.core.attach.sites import attention_outputs, biased, feed_forwards, host_of

__all__ = [
    "Bias",
    "Bottleneck",
    "Lora",
    "Part",
    "Scale",
    "Whole",
    "active",
    "attach",
    "attached",
    "attention_outputs",
    "bake",
    "biased",
    "detach",
    "feed_forwards",
    "host_of",
    "load",
    "matrix",
    "save",
]
