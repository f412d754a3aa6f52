"""Contracts of transforms."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.core import recipe, taps
from interlayer.core.example import Example
from interlayer.core.kinds import Plan, Transform
from interlayer.testing.common import finite, make, model_and_data, picture, require, same, seeded, unchanged


def _plan(example: Example, model: nn.Module, data: Any) -> Plan:
    transform = make(example.make)
    require(isinstance(transform, Transform), f"make() gave {type(transform).__name__}; expected a Transform")
    others = make(lambda: example.others(model))
    with seeded(5):
        return transform.plan(model, data, others=others)


def _result(example: Example, model: nn.Module, data: Any) -> nn.Module:
    with seeded(5):
        return _plan(example, model, data).apply()


def _sorts(example: Example) -> Iterator[Callable[[], tuple[Any, ...]]]:
    yield example.inputs
    if example.hf is not None:
        yield example.hf


def untouched(example: Example) -> None:
    """Neither planning nor applying changes the input model, and the result shares no weight with it."""
    for inputs in _sorts(example):
        model, data = model_and_data(inputs)
        before = picture(model)
        plan = _plan(example, model, data)
        unchanged(before, model, "plan")
        with seeded(5):
            result = plan.apply()
        unchanged(before, model, "apply")
        require(result is not model, "apply returns the input model itself")
        with torch.no_grad():
            for t in [*result.parameters(), *result.buffers()]:
                t.zero_()
        unchanged(before, model, "a change of the result")


def plain(example: Example) -> None:
    """On a plain ``nn.Module``: a readable plan that names what it touches, then a model that still runs."""
    _works(example, example.inputs)


def hf(example: Example) -> None:
    """The same on an unmodified Hugging Face or diffusers model."""
    require(example.hf is not None, "the example has no hf inputs")
    assert example.hf is not None
    model, _ = model_and_data(example.hf)
    require(
        type(model).__module__.startswith(("transformers.", "diffusers.")),
        f"{type(model).__name__} is no Hugging Face model",
    )
    _works(example, example.hf)


def _works(example: Example, inputs: Callable[[], tuple[Any, ...]]) -> None:
    model, data = model_and_data(inputs)
    plan = _plan(example, model, data)
    require(bool(plan.touched), "the plan touches nothing and raises no error")
    require(all(row.name in str(plan) and row.what for row in plan.touched), "the plan does not read as text")
    require(all(row.why for row in plan.skipped), "a skipped row does not say why")
    with seeded(5):
        result = plan.apply()
    require(isinstance(result, nn.Module), f"apply gave {type(result).__name__}; expected a torch.nn.Module")
    finite(list(result.state_dict().values()), "the result")
    if isinstance(data, Tensor):
        with torch.no_grad():
            out = result.eval()(data)
        finite(out if isinstance(out, Tensor | tuple | list) else list(dict(out).values()), "the output of the result")


def saved(example: Example) -> None:
    """The result goes through safetensors and JSON and comes back with structure and weights; no pickle."""
    for inputs in _sorts(example):
        model, data = model_and_data(inputs)
        result = _result(example, model, data)
        require(bool(recipe.steps(result)), "apply recorded no step for the recipe")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "saved"
            recipe.save(result, folder)
            odd = [p.name for p in folder.rglob("*") if p.is_file() and p.suffix not in (".safetensors", ".json")]
            require(not odd, f"saved files that are neither safetensors nor JSON: {odd}")
            base = None if inputs is example.hf else (lambda model=model: _fresh(model))
            again = recipe.load(folder, base=base)
        require(again.state_dict().keys() == result.state_dict().keys(), "the loaded model has other weights by name")
        same(list(result.state_dict().values()), list(again.state_dict().values()), "the loaded model")
        require(recipe.steps(again) == recipe.steps(result), "the loaded model has another recipe")
        shape = [(n, type(m).__name__) for n, m in result.named_modules()]
        require(
            shape == [(n, type(m).__name__) for n, m in again.named_modules()], "the loaded model has other modules"
        )


def _fresh(model: nn.Module) -> nn.Module:
    """A base of the same structure whose weights are of no use."""
    base = copy.deepcopy(model)
    with torch.no_grad():
        for p in base.parameters():
            p.fill_(0.123)
    return base


def pretrained(example: Example) -> None:
    """``save_pretrained`` and ``from_pretrained`` give the same numbers, or ``save_pretrained`` refuses with the way out."""
    require(example.hf is not None, "the example has no hf inputs")
    assert example.hf is not None
    model, data = model_and_data(example.hf)
    carried(_result(example, model, data), data)


def carried(result: nn.Module, data: Any) -> str:
    """The refusal of a Hugging Face or diffusers model to be saved in its own format; empty where it comes back whole.

    Args:
        result: What a transform made of the model.
        data: One batch, as ``taps.feed`` takes it.

    Raises:
        AssertionError: The model came back with other numbers, or refused without a way out.
    """
    held: Any = result
    with tempfile.TemporaryDirectory() as folder:
        try:
            held.save_pretrained(folder)
        except ValueError as error:
            require("interlayer.save" in str(error), f"save_pretrained refuses without the way out: {error}")
            return str(error)
        again = type(held).from_pretrained(folder)
    with torch.no_grad():
        outputs = [next(taps.feed(m.eval(), data)) for m in (held, again)]
    same(outputs[0], outputs[1], "the model that from_pretrained gives")
    return ""


def others(example: Example) -> None:
    """Other models than the transform takes, more or fewer, are a ValueError, not ignored."""
    model, data = model_and_data(example.inputs)
    given = make(lambda: example.others(model))
    transform = make(example.make)
    wrong = () if transform.more else (*given, copy.deepcopy(model))
    try:
        transform.plan(model, data, others=wrong)
    except ValueError:
        return
    raise AssertionError(f"a plan with {len(wrong)} other models instead of {len(given)} raises no ValueError")


def seed(example: Example) -> None:
    """The same seed gives the same result, to the bit."""
    first, second = (list(_result(example, *model_and_data(example.inputs)).state_dict().values()) for _ in range(2))
    same(first, second, "the second result of the same seed")


def nothing(example: Example) -> None:
    """Nothing to do is a ValueError with a message, not a silent copy."""
    if example.nothing is not None:
        model, data = model_and_data(example.nothing)
    else:
        model, data = nn.Sequential(nn.Flatten(), nn.ReLU()), model_and_data(example.inputs)[1]
    try:
        plan = _plan(example, model, data)
    except ValueError as error:
        require(len(str(error)) > 10, "the error has no message")
    else:
        raise AssertionError(
            f"a plan for a model with nothing to do raises no ValueError; it touches {len(plan.touched)} places"
        )


TRANSFORM: dict[str, Callable[[Example], None]] = {
    "untouched": untouched,
    "plain": plain,
    "hf": hf,
    "saved": saved,
    "pretrained": pretrained,
    "others": others,
    "seed": seed,
    "nothing": nothing,
}
