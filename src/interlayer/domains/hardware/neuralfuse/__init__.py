"""NeuralFuse: a small network that changes the input so that a classifier with bit errors in its weights still answers right."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from interlayer.core import recipe
from interlayer.core.cost import parameters
from interlayer.core.data import answer
from interlayer.core.example import Example
from interlayer.core.extras import need
from interlayer.core.faults import Kind, Memory
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.pairing.seeds import seed_of
from interlayer.core.quantizer import Grid
from interlayer.core.record import note, notes_on
from interlayer.core.select import At
from interlayer.domains.hardware.neuralfuse.fused import Fused, energy_saved
from interlayer.domains.hardware.neuralfuse.generators import Generator, Name

__all__ = ["Fused", "Generator", "NeuralFuse", "energy_saved"]
BETAS, DECAY, EVERY = (0.5, 0.999), 0.96, 500  # the authors' Adam, and its learning rate's factor after so many steps
MOST = 30_000  # fault maps that training draws from


class NeuralFuse(Transform):
    """Put a trained transformation before a classifier, so that bit errors in its weights, as at low voltage, matter less.

    Paper: Sun, Hsiung, Chandramoorthy, Chen and Ho, "NeuralFuse: Learning to Recover the Accuracy of Access-Limited Neural Network
    Inference in Low-Voltage Regimes", NeurIPS 2024, arXiv:2306.16869 (first called "Learning to Improve the Accuracy of ...").

    The generator G of ``F(x) = clip(x + G(x))`` (1) is trained, the classifier M is not: ``L(M_0) + balance / maps * sum_i L(M_i)``
    (3, 4), where L is the cross-entropy, M_0 the classifier without bit errors and M_i that with the i-th of ``maps`` fresh fault
    maps. All maps read the same F(x), so their gradients are summed there and pass G once: the gradient (5), in the memory of one
    classifier. G has weights of 8 bits in training already, and no bit errors.

    Relaxed access: gradients pass through the model itself. Restricted access: they pass through a ``surrogate``, and the model is not
    even called; the paper trains there with ``rate=0.015``.

    Cost of a step: ``maps + 1`` passes forward and backward through the classifier, one through G. In use: one forward pass of G.

    Args:
        generator: One of ``ConvL, ConvS, DeConvL, DeConvS, UNetL, UNetS``; the large ones recover more and save less.
        width: Factor of G's channel counts.
        rate: Share of faulty bits in training, 0 to 1.
        kind: ``"flip"``: a faulty bit is read wrong. ``"stuck"``, as in the authors' code: it is always 0 or always 1, so that half
            as many are read wrong.
        bits: Bits of the classifier's weights, on a symmetric grid of one scale for each layer, in two's complement.
        maps: Fault maps for each step.
        balance: Weight of the faulty classifiers' loss. Without faulty classifiers (0), G learns the clean loss alone.
        steps: Steps of Adam. The authors train for 150 epochs.
        lr: Learning rate; it falls by 4% every 500 steps.
        span: Smallest and largest value of an input. Defaults to those in the data; (-1, 1) in the paper.
        surrogate: A classifier of the same inputs and classes, for restricted access; several take turns, a step each.
        at: Which layers' weights have bit errors. Defaults to all linear maps and convolutions.
        seed: Of the initial weights, the order of the maps and the faults.

    Shapes: batches (images [B, C, H, W], labels [B]), or mappings with ``labels``.

    Raises:
        ValueError: An option out of range; from ``plan``: no labelled images, or no layer that can be quantised.

    Examples:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> data = [(torch.rand(8, 1, 8, 8), torch.arange(8))]
        >>> plan = NeuralFuse(generator="UNetS", width=0.25, steps=2, maps=1).plan(net, data)
        >>> fused = plan.apply()
        >>> fused.faulty(0.01, seed=0)(torch.rand(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    slug: ClassVar[str] = "neuralfuse"

    def __init__(
        self,
        *,
        generator: Name = "ConvS",
        width: float = 1.0,
        rate: float = 0.01,
        kind: Kind = "flip",
        bits: int = 8,
        maps: int = 10,
        balance: float = 5.0,
        steps: int = 200,
        lr: float = 1e-3,
        span: tuple[float, float] | None = None,
        surrogate: nn.Module | Sequence[nn.Module] | None = None,
        at: At | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= rate <= 1:
            raise ValueError(f"neuralfuse: rate {rate!r}; expected a share of bits from 0 to 1, such as 0.01.")
        if min(maps, steps) < 1 or not balance >= 0 or not lr > 0:
            raise ValueError(
                f"neuralfuse: maps={maps}, steps={steps}, balance={balance}, lr={lr}; expected maps and steps of 1 or more, "
                "balance of 0 or more, and lr above 0."
            )
        Generator(generator, 1, *(span or (-1.0, 1.0)), width)
        self.generator, self.width, self.span, self.surrogate = generator, width, span, surrogate
        self.rate, self.kind, self.grid, self.maps, self.balance = rate, kind, Grid(bits), maps, balance
        self.steps, self.lr, self.at, self.seed = steps, lr, at, seed
        self.options = {
            "generator": generator, "width": width, "rate": rate, "kind": kind, "bits": bits, "maps": maps, "balance": balance,
            "steps": steps, "lr": lr, "seed": seed,
        }  # fmt: skip

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """Which generator, and which weights of the classifier have bit errors. ``data`` are labelled batches."""
        self.take(others)
        batches = _labelled(data)
        given = model if self.surrogate is None else self.surrogate
        teachers = [given] if isinstance(given, nn.Module) else list(given)
        if not teachers:
            raise ValueError(
                "neuralfuse: surrogate is empty; expected a model or several. Leave it out for relaxed access."
            )
        memories = [
            Memory(copy.deepcopy(t).eval().requires_grad_(False), self.grid, at=self.at, kind=self.kind)
            for t in teachers
        ]
        images = batches[0][0]
        low, high = self.span or (min(float(x.min()) for x, _ in batches), max(float(x.max()) for x, _ in batches))
        structure: dict[str, Any] = {
            "name": self.generator,
            "channels": images.shape[1],
            "low": low,
            "high": high,
            "width": self.width,
        }
        names = ", ".join(type(t).__name__ for t in teachers)
        where = "the model" if self.surrogate is None else f"a surrogate ({names})"
        with torch.device("meta"):
            weights = parameters(Generator(**structure))
        errors = f"{memories[0].cells} bits, {memories[0].expected(self.rate):.0f} wrong on average"
        touched = [Row("input", self.generator, f"{weights} weights, trained through {where}: {errors}")]
        skipped = [Row(r.name or "model", r.what, f"no bit errors: {r.why}") for r in memories[0].skipped]

        def build() -> nn.Module:
            new = copy.deepcopy(model)
            recipe.record(new, self.slug, self.options, structure)
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                generator = Generator(**structure).to(images.device)
            self.train(generator, memories, batches)
            fused, notes = Fused(generator, new), notes_on(new)
            note(fused, notes["base"], notes["steps"])
            return fused.train(model.training)

        return Plan(self.slug, self.options, touched, skipped, build)

    def restore(self, model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        """Put a generator before the model."""
        return Fused(Generator(**structure), model)

    def train(
        self, generator: Generator, memories: Sequence[Memory], batches: Sequence[tuple[Tensor, Tensor]]
    ) -> list[float]:
        """Train a generator in place, and give the loss of every step.

        Args:
            generator: Ends with weights of 8 bits, in evaluation mode.
            memories: The classifiers.
            batches: Labelled images, over and over in this order.

        Raises:
            ValueError: The loss is not finite.
        """
        optimizer = torch.optim.Adam(generator.parameters(), self.lr, BETAS)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, EVERY, DECAY)
        clean, losses = [m.weights() for m in memories], list[float]()
        generator.train()
        for step, (x, labels) in enumerate(islice(cycle(batches), self.steps)):
            turn = step % len(memories)
            memory = memories[turn]
            fused = generator.training_pass(x)
            seen = fused.detach().requires_grad_()
            total = 0.0
            for number in range(self.maps + 1 if self.balance else 1):
                which = seed_of(self.seed, step, number) % MOST
                weights = memory.weights(self.rate, which) if number else clean[turn]
                loss = F.cross_entropy(answer(functional_call(memory.model, weights, (seen,))), labels)
                loss = loss * (self.balance / self.maps) if number else loss
                loss.backward()  # adds to the gradient of what all of them read
                total += float(loss.detach())
            if not math.isfinite(total):
                raise ValueError(f"neuralfuse: loss {total} at step {step}; expected a finite one. Lower lr={self.lr}.")
            optimizer.zero_grad()
            fused.backward(seen.grad)
            optimizer.step()
            schedule.step()
            losses.append(total)
        generator.store()
        generator.eval()
        return losses


def _labelled(data: Any) -> list[tuple[Tensor, Tensor]]:
    """Batches as (images, labels)."""
    if isinstance(data, tuple | Mapping):
        data = [data]
    found = []
    for batch in () if data is None or isinstance(data, Tensor) else data:
        x, y = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (batch, None)
        if isinstance(x, Mapping):
            y = x.get("labels", y)
            x = next((v for k, v in x.items() if k != "labels"), None)
        if not (
            isinstance(x, Tensor) and x.ndim == 4 and x.is_floating_point() and isinstance(y, Tensor) and y.ndim == 1
        ):
            raise ValueError("neuralfuse: a batch of another form; expected (images [B, C, H, W], labels [B]).")
        found.append((x, y))
    if not found:
        raise ValueError("neuralfuse: no data to train on; expected batches of (images [B, C, H, W], labels [B]).")
    return found


def _digits() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    return net, [(torch.rand(6, 1, 8, 8), torch.arange(6))]


def _vit() -> tuple[nn.Module, list[Any]]:
    hf: Any = need("transformers", "hf", "neuralfuse.EXAMPLE")
    config = hf.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_channels=1, num_labels=6,
    )  # fmt: skip
    return hf.ViTForImageClassification(config), [
        {"pixel_values": torch.rand(6, 1, 8, 8), "labels": torch.arange(6)},
    ]


EXAMPLE = Example(make=lambda: NeuralFuse(generator="UNetS", width=0.25, steps=2, maps=2), inputs=_digits, hf=_vit)
