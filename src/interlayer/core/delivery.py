"""Results that Hugging Face's own format cannot carry refuse ``save_pretrained``, with the way out."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn
from torch.nn.utils import parametrize


def guard(model: nn.Module, why: str = "", way: str = "") -> nn.Module:
    """Make ``save_pretrained`` of a Hugging Face or diffusers model raise, in place; other models are left alone.

    ``from_pretrained`` builds the class of the configuration and fills in weights by name. Of anything else, such as a
    mask or a block that runs twice, it would lose a part without an error.

    Args:
        model: The result of a transform.
        why: What the format cannot carry. Defaults to masked weights: the model saves again as soon as it has none.
        way: What to do instead. Defaults to saving all of it with ``interlayer.save``.

    Examples:
        >>> model = guard(nn.Linear(2, 1))  # no save_pretrained, nothing to guard
        >>> hasattr(model, "save_pretrained")
        False
    """
    if hasattr(model, "save_pretrained"):
        model._cannot_carry, model._instead = why, way  # type: ignore[assignment]
        model.save_pretrained = MethodType(_save_pretrained, model)  # type: ignore[assignment]
    return model


def release(model: nn.Module) -> dict[str, Any]:
    """Take a guard off again, in place, and give what it was, to be put back with ``vars(model).update``."""
    names = ("_cannot_carry", "_instead", "save_pretrained")
    return {name: vars(model).pop(name) for name in names if name in vars(model)}


def _save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
    masked = any(parametrize.is_parametrized(m) for m in self.modules())
    if self._cannot_carry or masked:
        bake = "" if self._cannot_carry else "Make them plain with interlayer.core.weights.bake(model) first, or "
        way = f"{bake}{'save' if bake else 'Save'} all of it with interlayer.save(model, directory)."
        raise ValueError(
            f"save_pretrained: {type(self).__name__} has {self._cannot_carry or 'masked weights'}, which from_pretrained "
            f"would lose. {self._instead or way}"
        )
    return type(self).save_pretrained(self, *args, **kwargs)
