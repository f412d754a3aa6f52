"""Training towards the levels of a quantised weight that its own memory cells can read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from interlayer.core import aside
from interlayer.core.data import answer, run
from interlayer.core.datasets import digit_batches
from interlayer.core.example import Example
from interlayer.core.faults import Devices, Stuck, draw_devices
from interlayer.core.kinds import Rule
from interlayer.core.pairing.seeds import seed_of
from interlayer.core.quantizer import Grid, Packed, Scaled, layers, packs, rounds, weight_of
from interlayer.core.quantizer.layers import is_conv1d
from interlayer.core.select import At
from interlayer.transform.quantize.fault_qat.wells import Levels, Wells

__all__ = ["FaultQAT", "Levels", "Wells"]

Kind = Literal["fixed", "step", "free"]
NARROW, RISE = 2.0, 1e4  # how much narrower the wells and how much stronger their pull become while the rule warms up
SLOW = 0.1  # how fast levels learn beside weights


class FaultQAT(Rule):
    """Trains float weights into wells around the levels that their memory cells can read, so that rounding costs little in the end.

    Paper: Biswas et al., "Regularization-based Framework for Quantization-, Fault- and Variability-Aware Training", arXiv:2503.01297.
    Its text could not be obtained (searches of papers, pages and code gave the abstract and the introduction alone), and its code was not
    found. Wells, their schedule, the first step, the resistances and the snaps are those of the public code of "QFALT" (IJCNN 2024,
    SNNalgo/QFALT), a relative of it, which trains for hundreds of epochs at a rate of 1e-3, with a strength of 1e-6 and a snap every four
    epochs; the defaults here suit a few hundred steps. How levels are learned is derived: they descend the same regulariser, a tenth as
    fast as weights; steps do so on a logarithmic scale.

        L = cross-entropy - strength sum_w sum_k v_k(w) exp(-(w - l_k(w))^2 / sigma^2)

    With ``bits`` b the codes k = 0 .. 2^b - 1 mean ``l_k = step (k - (2^b - 1) / 2)``, and ``step = 2 mean|w| / sqrt((2^b - 1) / 2)`` at
    the start. ``v_k`` is 0 where a stuck device cannot hold code k. Devices of other resistances shift the levels of each weight, and it
    is trained towards its own. While the rule warms up, ``strength`` rises by 10^4 and ``sigma`` falls from a step to half of one, both
    geometrically. After each step weights are clamped to the range of the levels. All layers take part; biases and norms stay floats.

    Cost of a step: about ten passes over the weights for each of the 2^b levels. Memory: two more copies of one layer's weight, and two
    floats and a byte for each bit of real devices.

    Args:
        model: A classifier, plain or spiking. Trained in place; give a trained one, since its weights set the step and with it the range.
        bits: Bits of a weight, 1 to 8.
        levels: ``"fixed"``; ``"step"``: the step of each layer is learned; ``"free"``: all levels of each layer are.
        stuck: Share of devices that are stuck, half of them at 0 and half at 1, or all as ``at_bit`` says.
        at_bit: ``"zero"``, ``"one"`` or ``"both"``.
        spread: Standard deviation of a device's resistance relative to its mean.
        chip: Seed of the devices: another number is another chip.
        devices: Measured devices by layer, in place of drawn ones.
        strength: Pull of the wells after the warm-up, for each weight.
        warmup: Steps until wells are narrow and strong.
        snap: Every so many steps weights are set to the nearest levels and the optimiser starts again; 0 is never.
        at: Which layers. Defaults to all.
        lr: Learning rate of Adam.

    Attributes:
        layers: Names of the quantised layers.
        skipped: All other weights, each with the reason why it stays in float.
        devices: Devices by layer; empty if they are ideal.

    Shapes: a batch is (inputs [B, ...], labels [B] or [B, S]).

    Raises:
        ValueError: A number out of range, no layer to quantise, devices that don't fit, or ``levels="free"`` with devices
            whose resistances vary (levels that are no sums of bits cannot be read from them).

    Examples:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> rule = FaultQAT(net, bits=3, stuck=0.1)
        >>> sorted(rule.step((torch.rand(8, 1, 8, 8), torch.arange(8))))
        ['accuracy', 'loss', 'wells']
        >>> rule.result()(torch.rand(2, 1, 8, 8)).shape, rule.codes()["1"].max() < 8
        (torch.Size([2, 10]), tensor(True))
    """

    slug: ClassVar[str] = "fault-qat"

    def __init__(
        self,
        model: nn.Module,
        *,
        bits: int = 4,
        levels: Kind = "fixed",
        stuck: float = 0.0,
        at_bit: Stuck = "both",
        spread: float = 0.0,
        chip: int = 0,
        devices: Mapping[str, Devices] | None = None,
        strength: float = 1e-3,
        warmup: int = 100,
        snap: int = 30,
        at: At | None = None,
        lr: float = 1e-2,
    ) -> None:
        if not (isinstance(bits, int) and 1 <= bits <= 8) or levels not in get_args(Kind):
            raise ValueError(
                f"FaultQAT: bits {bits!r}, levels {levels!r}; expected 1 to 8, and one of {', '.join(get_args(Kind))}."
            )
        if strength < 0 or warmup < 0 or snap < 0:
            raise ValueError(
                f"FaultQAT: strength {strength}, warmup {warmup}, snap {snap}; expected numbers of at least 0."
            )
        if devices is not None and (stuck or spread):
            raise ValueError(
                f"FaultQAT: devices with stuck={stuck}, spread={spread}; expected measured devices or drawn ones, not both."
            )
        found, self.skipped = layers(model, at)
        self.layers = list(found)
        self.model, self.bits, self.levels, self.number = model, bits, levels, 0
        self.strength, self.warmup, self.snap = strength, warmup, snap
        if devices is None and (stuck or spread):
            shapes = {name: weight_of(layer).shape for name, layer in found.items()}
            devices = {
                name: draw_devices(shape, bits, stuck=stuck, at=at_bit, spread=spread, seed=seed_of(chip, name))
                for name, shape in shapes.items()
            }
        self.devices = self._fitting(devices or {}, found)
        self.steps = {
            name: 2 * weight_of(layer).detach().abs().mean().clamp_min(1e-8) / ((2**bits - 1) / 2) ** 0.5
            for name, layer in found.items()
        }
        start = {"step": torch.zeros(()), "free": torch.zeros(2**bits)}
        self.learned = {
            n: nn.Parameter(start[levels].to(s).clone()) for n, s in self.steps.items() if levels != "fixed"
        }
        self.optimizer = torch.optim.Adam([*model.parameters(), *self.learned.values()], lr)

    def _fitting(self, devices: Mapping[str, Devices], found: Mapping[str, nn.Module]) -> dict[str, Devices]:
        for name, held in devices.items():
            wanted = (self.bits, *weight_of(found[name]).shape) if name in found else None
            if wanted is None or tuple(held.held.shape) != wanted:
                raise ValueError(
                    f"FaultQAT: devices {list(held.held.shape)} for {name!r}; expected a quantised layer's name and "
                    f"{list(wanted or ())} of it. The layers are {', '.join(found)}."
                )
            if self.levels == "free" and not held.exact:
                raise ValueError(
                    f"FaultQAT: levels='free' with devices of {name!r} whose resistances vary; such levels are no sums of "
                    "bits. Use levels='step' or 'fixed'."
                )
        return {name: held.to(weight_of(found[name]).detach()) for name, held in devices.items()}

    def of(self, name: str) -> Levels:
        """The levels of a layer as they are now; gradients reach what is learned of them."""
        step, learned = self.steps[name], self.learned.get(name)
        ideal = torch.arange(2**self.bits).to(step) - (2**self.bits - 1) / 2
        if learned is None:
            values = step * ideal
        else:
            values = step * (ideal + SLOW * learned if self.levels == "free" else (SLOW * learned).exp() * ideal)
        return Levels(values, self.devices.get(name))

    def pull(self) -> Tensor:
        """The regulariser at this step, with its strength."""
        share = min(1.0, (self.number + 1) / self.warmup) if self.warmup else 1.0
        total: Tensor | float = 0.0
        for name in self.layers:
            held = self.of(name)
            width = float(held.values.detach().diff().abs().mean()) * NARROW**-share
            total = total + Wells.apply(weight_of(self.model.get_submodule(name)), held.values, width, held.devices)
        return self.strength * RISE ** (share - 1) * total

    def step(self, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
        """One step of Adam on cross-entropy and regulariser."""
        x, labels = batch
        with aside.collect() as told:
            scores = answer(run(self.model.train(), x))
            loss = F.cross_entropy(scores.flatten(0, -2), labels.flatten())
        pull = self.pull()
        self.optimizer.zero_grad(set_to_none=True)
        (loss + pull + (0.0 if told.loss is None else told.loss)).backward()
        self.optimizer.step()
        self.number += 1
        snaps = bool(self.snap) and self.number % self.snap == 0
        with torch.no_grad():
            for name in self.layers:
                held, weight = self.of(name), weight_of(self.model.get_submodule(name))
                weight.copy_(held.nearest(weight)[1]) if snaps else weight.clamp_(held.values.min(), held.values.max())
        if snaps:
            self.optimizer.state.clear()
        right = (scores.argmax(-1) == labels).float().mean()
        return {"loss": float(loss.detach()), "accuracy": float(right), "wells": float(pull.detach())}

    @torch.no_grad()
    def _nearest(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {n: self.of(n).nearest(weight_of(self.model.get_submodule(n)).detach()) for n in self.layers}

    def codes(self) -> dict[str, Tensor]:
        """What to write into the cells of each layer, uint8, outputs first."""
        return {name: codes for name, (codes, _) in self._nearest().items()}

    def predict(self, inputs: Tensor) -> Tensor:
        """Scores with the weights as the cells read them, in evaluation mode; the mode is restored."""
        training = self.model.training
        read = {}
        for name, (_, value) in self._nearest().items():
            read[f"{name}.weight"] = value.T if is_conv1d(self.model.get_submodule(name)) else value
        with torch.no_grad():
            found = answer(functional_call(self.model.eval(), read, (inputs,)))
        self.model.train(training)
        return found

    def result(self) -> nn.Module:
        """The net as its cells read it. Codes stay packed where levels are equally far apart and read as they were written; where
        resistances vary, and with free levels, weights are floats of those values.
        """
        read = self._nearest()
        if self.levels == "free" or not all(held.exact for held in self.devices.values()):
            return rounds(self.model, {name: value for name, (_, value) in read.items()}).eval()
        new = {}
        for name, (codes, _) in read.items():
            step = self.of(name).values.detach().diff().mean()
            held = Scaled(Grid(self.bits, None, "midrise"), step, torch.full_like(step, (2**self.bits - 1) / 2))
            new[name] = Packed(self.model.get_submodule(name), held, codes=codes)
        return packs(self.model, new).eval()

    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizer."""
        return (self.optimizer,)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, the levels and the number of steps."""
        levels = {name: p.detach() for name, p in self.learned.items()}
        return {"optimizer": self.optimizer.state_dict(), "levels": levels, "steps": self.steps, "number": self.number}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned; devices are drawn again from the same ``chip``."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.number = dict(state["steps"]), state["number"]
        with torch.no_grad():
            for name, value in state["levels"].items():
                self.learned[name].copy_(value)


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


EXAMPLE = Example(make=lambda: FaultQAT(_net(), stuck=0.1, spread=0.1), inputs=digit_batches)
