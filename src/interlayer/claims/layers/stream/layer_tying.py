"""Dynamic layer tying against the untied Transformer, on few texts that it reads again and again and on fresh ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, check, effect, fits, lowest, mechanism
from interlayer.claims.training import batches, built, judge
from interlayer.core.cost import parameters, peak_bytes
from interlayer.layers.stream.layer_tying import LayerTying
from interlayer.models import Transformer

UNTIED, OURS, RANDOM = "untied", "q-learning", "random ties"
INERT, ONCE, OTHER, BLIND = "inert", "copied once", "reward of the other sign", "no reward"
LONG, FRESH = ", past its best", ", fresh text"
# Learning rate of each arm; see `pilots`.
RATES = {"": 2e-3, LONG: 3e-3, FRESH: 3e-3, UNTIED: 1.5e-3, INERT: 1.5e-3}
CLIP = 256.0  # the perplexity of guessing a byte; within the default of 10, all rewards of a young model are the same


class Inert(LayerTying):
    """A control: the agent learns and decides, but no layer gets the weights of another."""

    def _give(self, layer: int, owner: int, before: int) -> None:
        pass


class Once(LayerTying):
    """A mutant: a tied layer takes the values of the other's weights once, and trains on with weights of its own."""

    def _give(self, layer: int, owner: int, before: int) -> None:
        self.blocks[layer].load_state_dict(self.blocks[owner].state_dict())


class OtherSign(LayerTying):
    """A mutant: the reward is the perplexity itself."""

    def _learn(self, reward: float) -> None:
        super()._learn(-reward)


class Blind(LayerTying):
    """A control: all rewards are the same."""

    def _learn(self, reward: float) -> None:
        super()._learn(0.0)


RULES: dict[str, type[LayerTying]] = {INERT: Inert, ONCE: Once, OTHER: OtherSign, BLIND: Blind}


def build(arm: str, scale: Scale) -> Transformer:
    """A language model of bytes; the arms differ in their rule."""
    return Transformer(length=scale.length, depth=scale.depth, width=scale.width, heads=4)


def ruled(arm: str, model: nn.Module, seed: int, *, every: int = 4, decay: float, **options: Any) -> LayerTying:
    """The rule of an arm."""
    name = arm.partition(",")[0]
    options |= {"seed": seed, "clip": CLIP, "weight_decay": 0.0}
    if name == UNTIED:  # the agent is never asked
        rule = LayerTying(model, start="free", every=10**9, **options)
        rule.steps = 1
        return rule
    return RULES.get(name, LayerTying)(model, every=every, decay=1.0 if name == RANDOM else decay, **options)


def texts(arm: str, seed: int, steps: int, scale: Scale) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches drawn from few texts, or fresh ones."""
    few = next(batches("stdlib-bytes", seed, scale.texts, 1))
    draw = torch.Generator().manual_seed(seed)
    rows = (torch.randint(len(few[0]), (scale.batch,), generator=draw) for _ in range(steps))
    drawn = ((few[0][at], few[1][at]) for at in rows)
    for x, y in batches("stdlib-bytes", seed, scale.batch, steps) if arm.endswith(FRESH) else drawn:
        yield x[:, : scale.length], y[:, : scale.length]


@torch.no_grad()
def apart(rule: LayerTying) -> float:
    """Largest difference of weights between a layer and the one that it copies."""
    pairs = ((block, rule.blocks[rule.owner(i)]) for i, block in enumerate(rule.blocks))
    return max(
        float((p - q).abs().max()) for a, b in pairs for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


def preferred(arm: str, seed: int, scale: Scale) -> float:
    """Share of ties among an agent's last decisions where each untied layer adds 1 to the perplexity."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(1, 1)) for _ in range(4)))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return 0 * output.sum() + torch.tensor(parameters(model) / 2).log()

    options: dict[str, Any] = {"loss": loss, "discount": 0.5, "q_lr": 3e-3, "start": "free"}
    rule, found = ruled(arm, model, seed, every=1, decay=0.94, **options), []
    for _ in range(scale.decisions):
        rule.step((torch.zeros(1, 1), torch.zeros(1)))
        assert rule.acted is not None
        layer, action, _ = rule.acted
        found.append(float(action < layer))
    last = found[-scale.decisions // 4 :]
    return sum(last) / len(last)


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Loss on other texts, parameters that train, bytes of a step at its fullest, and what is exact."""
    name, found = arm.partition(",")[0], {}
    if arm in (OURS, BLIND, OTHER):
        torch.manual_seed(seed)
        found["ties where they pay"] = preferred(arm, seed, scale)
    if arm == OTHER:
        return found
    model = built(lambda: build(arm, scale), seed)
    whole = parameters(model)
    tail = arm.removeprefix(name)
    steps = scale.steps * (2 if tail == LONG else 1)
    rule = ruled(arm, model, seed, lr=RATES.get(arm, RATES[tail]), decay=scale.decay)
    shares, losses = [], []

    def step(batch: tuple[Tensor, Tensor]) -> None:
        told = rule.step(batch)
        shares.append(told["trainable"] / whole)
        losses.append(told["loss"])

    for number, batch in enumerate(texts(arm, seed, steps, scale)):
        if number == steps - 2 and arm in (UNTIED, OURS, INERT):
            model.zero_grad(set_to_none=True)
            moments = chain.from_iterable(s.values() for s in rule.optimiser.state.values())
            alive = [*model.parameters(), *moments, *batch]
            found["peak MB"] = peak_bytes(partial(step, batch), alive) / 1e6
        else:
            step(batch)
    if name in (OURS, INERT, ONCE):
        found["most between tied layers"] = apart(rule)
    found["loss"] = judge(model, "stdlib-bytes", batch=64, most=scale.judged, cut=scale.length)["loss"]
    last = losses[-max(len(losses) // 10, 1) :]
    found["loss above training loss"] = found["loss"] - sum(last) / len(last)
    found["trained share"] = sum(shares) / len(shares)
    quarter = len(shares) // 4
    for q in range(4):
        found[f"trained share, quarter {q + 1}"] = sum(shares[q * quarter : (q + 1) * quarter]) / quarter
    return found


CLAIM = Claim(
    says="Dynamic layer tying keeps tied layers equal, learns to tie where that pays, and trains less than 0.65 of the parameters of a "
    "small Transformer, in less memory; its loss on other texts is lower than the untied model's where few texts are read too often, "
    "where few are read at the best rate, and on fresh texts, and lower than with ties at random.",
    measure=measure,
    build=build,
    arms=(UNTIED, OURS, RANDOM, UNTIED + LONG, OURS + LONG, UNTIED + FRESH, OURS + FRESH),
    statements=(
        mechanism(
            "After training, a layer that copies another has exactly its weights",
            fits("most between tied layers", OURS, high=1e-6),
            control=INERT,
            mutant=ONCE,
        ),
        mechanism(
            "Where each untied layer adds 1 to the perplexity, at least 85% of the agent's last decisions are ties",
            fits("ties where they pay", OURS, low=0.85),
            control=BLIND,
            mutant=OTHER,
        ),
        effect(
            "Over the training, less than 0.65 of the parameters train",
            fits("trained share", OURS, high=0.65),
            control=INERT,
        ),
        effect(
            "A late step takes less memory at its fullest than the untied model's",
            lowest("peak MB", OURS, than=(UNTIED,)),
            control=INERT,
        ),
        effect(
            "Trained past its best on few texts, the loss on others is lower than the untied model's",
            lowest("loss", OURS + LONG, than=(UNTIED + LONG,)),
            control=INERT + LONG,
        ),
        effect(
            "On few texts, each at its best rate, the loss on others is lower than the untied model's",
            lowest("loss", OURS, than=(UNTIED,)),
            control=INERT,
        ),
        effect(
            "On fresh texts, each at its best rate, the loss is lower than the untied model's",
            lowest("loss", OURS + FRESH, than=(UNTIED + FRESH,)),
            control=INERT + FRESH,
        ),
        effect(
            "On few texts, the loss on others is lower than with ties at random",
            lowest("loss", OURS, than=(RANDOM,)),
            control=BLIND,
        ),
    ),
    checks=(
        check(
            "The untied model is below 3 nats on fresh texts; unigrams have 3.2", fits("loss", UNTIED + FRESH, high=3.0)
        ),
        check(
            "Past its best, the untied model's loss on others is 0.5 above that in training",
            fits("loss above training loss", UNTIED + LONG, low=0.5),
        ),
    ),
    pilots="Seeds 1000 and 1001, 4 layers of 32, 140 steps of 8 texts. 32 texts, loss on others: untied 2.80 2.92 (1.5e-3), 2.79 2.98 "
    "(2e-3), 2.87 3.05 (3e-3), 3.03 3.13 (5e-3); tied 2.92 2.96, 2.88 2.98, 2.89 3.00, 2.99 3.05; random ties at 2e-3 2.86 2.97, no reward "
    "2.84 3.01. 280 steps at 3e-3: untied 3.68 4.11 4.10, tied 3.41 3.55 3.54. Fresh texts, 3e-3, 5e-3, 1e-2: untied 2.69 2.63, "
    "2.77 2.66, 2.84 2.74; tied 2.83 2.76, 2.81 2.79, 3.08 2.82. Trained share .52 .57, random .64 .54. Ties where they pay, six "
    "seeds: .97 to 1, no reward .52 to .83, the other sign .02 to .67. 240 steps on 24 texts of 48 (2e-3, 5e-3): untied 3.36, 4.54, tied "
    "3.13, 3.27, one layer 2.93, 3.14; at 1e-3, near their best, 2.88 2.89 and 2.84 2.87. So ties help where training overfits; the gain "
    "is small or gone at the best rate. After the "
    "reported run, which gave exactly 0, the bound of the first statement went from 0, which no interval at 0 leaves out, to 1e-6; it "
    "alone was judged again, on the same values.",
    scales={
        "smoke": {
            "depth": 3,
            "width": 16,
            "length": 8,
            "batch": 2,
            "texts": 4,
            "steps": 8,
            "decay": 0.5,
            "judged": 1,
            "decisions": 4,
        },
        "small": {
            "depth": 4,
            "width": 32,
            "length": 32,
            "batch": 8,
            "texts": 32,
            "steps": 140,
            "decay": 0.7,
            "judged": 3,
            "decisions": 240,
        },
        "full": {
            "depth": 48,
            "width": 768,
            "length": 128,
            "batch": 64,
            "texts": 4096,
            "steps": 40000,
            "decay": 0.95,
            "judged": 200,
            "decisions": 4000,
        },
    },
)
