"""Identity mappings: the closed form, what shortcuts alone carry, and residual nets with other shortcuts and orders on digits."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from interlayer.claims import Claim, Scale, check, effect, fits, lowest, mechanism
from interlayer.claims.training import built, judge, task, train
from interlayer.layers.stream.identity_mappings import ORDERS, SHORTCUTS, IdentityMappings, Order
from interlayer.models import ConvNet

PRE, ORIGINAL = "pre", "original"
HALF, NEARLY, AFTER = "half path", "path of 0.99", "ReLU after the addition"
FIRST = 100  # first seed; see `pilots`
ARMS: dict[str, Any] = {
    **{order: f"identity-mappings(order={order!r})" for order in ORDERS},
    **{s: f"identity-mappings(order='original', shortcut={s!r})" for s in SHORTCUTS if s != "identity"},
}
RATES = {"constant": 3e-2, "exclusive-gate": 3e-2, "conv": 6e-2}  # of others 1e-2; see `pilots`
TWINS: dict[str, Any] = {
    HALF: "identity-mappings(shortcut='constant')",
    NEARLY: "identity-mappings(shortcut='constant(scale=0.99)')",
    AFTER: partial(IdentityMappings, order=Order(before=("norm", "act"), after=("act",))),
}


def build(arm: str, scale: Scale) -> ConvNet:
    """The deepest net."""
    return net(arm, max(scale.depths), scale.width)


def net(arm: str, depth: int, width: int) -> ConvNet:
    """A residual net for digits."""
    shape = task("digits").shape
    return ConvNet(shape.channels, shape.classes, depth=depth, width=width, stream=(ARMS | TWINS)[arm])


@torch.no_grad()
def closed_form(arm: str, seed: int) -> dict[str, float]:
    """Of the 18 units of the first stage of 110 layers, at initialisation and on digits, in float64.

    How far the output is from the input and the sum of the branches, over the output; and how the size of a signal changes
    when all branches give zero.
    """
    model = built(lambda: net(arm, 110, 4), seed).double()
    stream: Any = model.stream
    parts: list[Tensor] = []
    hooks = [p.register_forward_pre_hook(lambda _, args: parts.append(args[1])) for p in stream.paths[:18]]
    image = next(iter(task("digits").batches(seed, 16)))[0].double()
    state = stream.start(model.embed(image))
    for layer, block in enumerate(model.blocks[:18]):
        inputs = stream.read(state, layer)
        parts = parts or [state.x]
        state = stream.write(state, layer, block(inputs))
    for hook in hooks:
        hook.remove()
    first, wanted = parts[0], torch.stack(parts).sum(0)
    alone = stream.start(model.embed(image))
    alone.x = first
    for layer in range(18):
        alone = stream.write(alone, layer, torch.zeros_like(first))
    return {
        "error of the closed form": float((state.x - wanted).norm() / wanted.norm()),
        "log2 of what shortcuts carry": float((alone.x.norm() / first.norm()).log2()),
    }


def learned(arm: str, depth: int, long: int, seed: int, scale: Scale) -> dict[str, float]:
    """Mean training loss of the last five steps and validation error on digits, after ``scale.steps`` and after ``long`` steps."""
    model, found = built(lambda: net(arm, depth, scale.width), seed), dict[str, float]()
    at = "" if depth == scale.depths[0] else f" at {depth}"

    def error(when: str) -> None:
        found[f"error{at}{when}"] = 1 - judge(model, "digits")["accuracy"]

    def early(step: int, loss: float) -> bool:
        if step + 1 == scale.steps:
            error("")
        return False

    losses = train(model, "digits", seed=seed, steps=long, lr=RATES.get(arm, 1e-2), batch=32, watch=early)
    for when, some in {"": losses[: scale.steps], ", long": losses[scale.steps :]}.items():
        if some:
            found[f"loss{at}{when}"] = sum(some[-5:]) / len(some[-5:])
    if long > scale.steps:
        error(", long")
    return found


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Training loss and validation error on digits, and what is exact at initialisation.

    Arms without a statement on the latter have it on the first seed alone, as further depths have theirs.
    """
    found = closed_form(arm, seed) if arm in (PRE, *TWINS) or seed == FIRST else {}
    if arm in (NEARLY, AFTER):
        return found
    for depth in scale.depths:
        found |= learned(arm, depth, scale.long if arm in (PRE, ORIGINAL, HALF) else scale.steps, seed, scale)
    for depth in scale.more if seed == FIRST and arm in (PRE, ORIGINAL) else ():
        found |= learned(arm, depth, scale.steps, seed, scale)
    return found


def _shortcut(name: str, says: str) -> Any:
    return effect(
        f"Trained for 30 steps, original units have a lower training loss with the identity than {says}, by 0.1 nat",
        lowest("loss", ORIGINAL, than=(name,), margin=0.1),
        control=HALF,
    )


CLAIM = Claim(
    says="With pre-activation the output of units is the input and the sum of their branches, and the shortcuts alone carry a signal "
    "unchanged; in residual nets of 56 layers on digits every shortcut that is not the identity trains worse, and after 100 steps "
    "full pre-activation has a lower training loss and validation error than the original unit.",
    measure=measure,
    build=build,
    arms=ARMS,
    statements=(
        mechanism(
            "The output of 18 units is their input and the sum of their branches, to 1e-12",
            fits("error of the closed form", PRE, high=1e-12),
            control=HALF,
            mutant=AFTER,
        ),
        mechanism(
            "Past 18 shortcuts alone a signal keeps its size",
            fits("log2 of what shortcuts carry", PRE, -1e-6, 1e-6),
            control=HALF,
            mutant=NEARLY,
        ),
        _shortcut("constant", "scaled by a half"),
        _shortcut("exclusive-gate", "with exclusive gates"),
        _shortcut("shortcut-gate", "with gates of the shortcut alone"),
        _shortcut("conv", "with 1x1 convolutions"),
        effect(
            "Trained for 30 steps, original units have a lower validation error with the identity than with dropout, by 0.1",
            lowest("error", ORIGINAL, than=("dropout",), margin=0.1),
            control=HALF,
        ),
        effect(
            "After 100 steps full pre-activation has a lower training loss than original units",
            lowest("loss, long", PRE, than=(ORIGINAL,)),
            control=HALF,
        ),
        effect(
            "After 100 steps full pre-activation has a lower validation error than original units",
            lowest("error, long", PRE, than=(ORIGINAL,)),
            control=HALF,
        ),
    ),
    checks=(
        check("Original units are wrong on at most 40% after 100 steps", fits("error, long", ORIGINAL, high=0.4)),
        check("There is room below their error", fits("error, long", ORIGINAL, low=0.05)),
    ),
    first_seed=FIRST,
    pilots="Seeds 1000 and 1001, depth 56, width 4, batches of 32. Original units at .01 and .02: loss after 30 steps .99 1.06 "
    "and .99 1.51, after 100 .29 .23 and .22 .36, error after 100 .28 .16 and .15 .27; pre-activation .01 and .02: loss 1.17 "
    "1.27 and 1.09 1.36, .17 .31 and .26 .38, error .08 .15 and .13 .12; so .01 for both. Loss after 30 steps of other "
    "shortcuts (original units): scaled by a half 2.31 (seed 1001) at .01, 2.23 2.14 at .03, 2.35 (seed 1000) at .06; "
    "exclusive gates 2.10 (1001) at .01, 1.37 1.68 at .03, 1.40 (1000) at .06, 1.69 at .1; gates of the shortcut 1.36 1.55 "
    "at .01, 1.59 (1000) at .02, 1.62 (1001) at .03; 1x1 convolutions 2.17 (1001) at .01, 2.16 2.10 at .03, 1.99 (1000) at "
    ".06; dropout 3.89 at .01, 5.46 at .03 (1001), 4.38 at .003 (1000), and an error of .88 to .92 at each; pre-activation "
    "with half the path 2.25 at .01, 2.32 at .03 (1001). 164 layers (seed 1000): loss after 30 and 60 steps 1.18 .87 of "
    "original units, 1.60 .77 of pre-activation. So pre-activation begins more slowly than original units and has overtaken "
    "them in error after 100 steps. An earlier form, on seeds 0 to 3, compared the loss of 164 layers after 25 steps at "
    ".002: pre-activation against original units undecided (-.01 [-.37, .35]), better than the other shortcuts but dropout, "
    "which was undecided. Models and batches are now of new seeds, 100 and up. 164 layers are measured on the first seed, "
    "without a statement. These seeds were measured twice; before, with AdamW one tensor at a time and on another processor, the loss "
    "of pre-activation after 100 steps was higher (contrary, -.056 [-.104, -.009]), and all other verdicts were those of now.",
    scales={
        "smoke": {"depths": (8,), "more": (), "width": 2, "steps": 1, "long": 2},
        "small": {"depths": (56,), "more": (164,), "width": 4, "steps": 30, "long": 100},
        "full": {"depths": (56, 110, 164, 1004), "more": (), "width": 16, "steps": 600, "long": 2000},
    },
)
