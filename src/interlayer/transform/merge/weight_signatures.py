"""Robust weight signatures: robustness to a corruption as a few weights that are added to a trained model, and taken off again."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from interlayer.core import recipe
from interlayer.core.example import Example, perturbed, tiny_gpt2
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.paths import expect_alike, layers
from interlayer.core.quantizer import Grid, Scaled, pack, unpack

GRID = "interlayer_signature"


@dataclass(frozen=True)
class Signature:
    """What a corruption leaves in the weights of a model, beside what the task leaves there.

    Attributes:
        deltas: By name of the weight.
        norms: Batch norms' own numbers in the corrupted twin, which take the places of the model's.
        codes: Deltas as codes of a grid with its scales, where they are rounded: what is stored of them.
    """

    deltas: dict[str, Tensor]
    norms: dict[str, Tensor] = field(default_factory=dict)
    codes: dict[str, tuple[Scaled, Tensor]] = field(default_factory=dict)

    def rounded(self, bits: int) -> Signature:
        """The same on a grid of so many bits, with a scale for each output channel.

        Raises:
            ValueError: ``bits`` out of 2 to 8.
        """
        if not (isinstance(bits, int) and 2 <= bits <= 8):
            raise ValueError(f"Signature.rounded: bits {bits!r}; expected an integer from 2 to 8.")
        held = {n: Grid(bits, 0 if d.ndim > 1 else None).fit(d, "mse") for n, d in self.deltas.items()}
        codes = {n: (h, h.codes(self.deltas[n])) for n, h in held.items()}
        return Signature({n: h.values(c) for n, (h, c) in codes.items()}, self.norms, codes)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file; rounded deltas are packed."""
        path, tensors, shapes = Path(path), {f"norm {n}": t.contiguous() for n, t in self.norms.items()}, {}
        for n, delta in self.deltas.items():
            if n not in self.codes:
                tensors[f"delta {n}"] = delta.contiguous()
                continue
            held, codes = self.codes[n]
            shapes[n] = [held.grid.bits, list(codes.shape)]
            tensors[f"codes {n}"] = pack(codes.reshape(1, -1).short() - held.grid.low, held.grid.bits)
            tensors[f"scale {n}"] = held.scale.contiguous()
        save_file(tensors, path, {GRID: json.dumps(shapes)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Signature:
        """Read what ``save`` wrote.

        Raises:
            ValueError: Another file.
        """
        with safe_open(path, "pt") as file:
            told = (file.metadata() or {}).get(GRID)
            if told is None:
                raise ValueError(f"Signature.load: {path} holds no signature; expected a file of Signature.save.")
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        parts: dict[str, dict[str, Tensor]] = {"norm": {}, "delta": {}, "codes": {}, "scale": {}}
        for key, value in tensors.items():
            kind, _, name = key.partition(" ")
            parts[kind][name] = value
        codes = {}
        for name, (bits, shape) in json.loads(told).items():
            grid = Grid(bits, 0 if len(shape) > 1 else None)
            count = int(torch.Size(shape).numel())
            whole = unpack(parts["codes"][name], bits, count).view(shape).short() + grid.low
            scale = parts["scale"][name]
            codes[name] = Scaled(grid, scale, torch.zeros_like(scale)), whole.to(torch.int8)
        return cls(parts["delta"] | {n: h.values(c) for n, (h, c) in codes.items()}, parts["norm"], codes)


def extract(start: nn.Module, clean: nn.Module, corrupted: nn.Module, *, first: int | None = None) -> Signature:
    """The signature of a corruption, from two models that began at one: what is left of a step without its part along the other.

    With ``d`` the step of a weight from ``start`` to ``corrupted`` and ``b`` that to ``clean``, it is ``d - b (d.b) / (b.b)``.

    Args:
        start: Where both began, such as a pretrained model.
        clean: Trained on clean data.
        corrupted: Trained on corrupted data.
        first: Only this many layers with matrices or kernels, in the order of the model, and what lies between them. Defaults to all.

    Raises:
        ValueError: Models of different structure, or ``first`` below 1.

    Examples:
        >>> start, clean, corrupted = (nn.Linear(3, 2) for _ in range(3))
        >>> found = extract(start, clean, corrupted).deltas["weight"]
        >>> bool((found * (clean.weight - start.weight)).sum().abs() < 1e-5)
        True
    """
    if first is not None and first < 1:
        raise ValueError(f"weight-signatures: first {first}; expected at least 1, or None for all layers.")
    for other in (clean, corrupted):
        expect_alike("weight-signatures", start, other)
    states = [m.state_dict() for m in (start, clean, corrupted)]
    deltas, norms, count = dict[str, Tensor](), dict[str, Tensor](), 0
    for owner, names in layers(start).items():
        if isinstance(start.get_submodule(owner), _BatchNorm):
            norms |= {n: states[2][n].detach().clone() for n in names}
            continue
        count += any(states[0][n].ndim > 1 for n in names)
        if first is not None and count > first:
            continue
        for n in names:
            origin, base, far = (s[n].detach().double() for s in states)
            d, b = (far - origin).flatten(), (base - origin).flatten()
            along = (d @ b) / (b @ b).clamp_min(1e-300)
            deltas[n] = (d - along * b).view(origin.shape).to(states[0][n].dtype)
    return Signature(deltas, norms)


class Patched:
    """A model with signatures that are put on, rescaled and taken off again, in place.

    A weight is its own value plus the sum of ``scale * delta``. A batch norm takes the mean of the signatures' numbers, by their scales,
    as far as these add up to 1. What is touched is kept as it was, so that the model is the same to the last bit without signatures.

    Args:
        model: Of the structure that the signatures come from.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> patched, before = Patched(model), model.weight.clone()
        >>> patched.put("noise", Signature({"weight": torch.ones(1, 2)}), 0.5)
        >>> torch.equal(model.weight, before + 0.5)
        True
        >>> patched.take_off("noise")
        >>> torch.equal(model.weight, before)
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.own: dict[str, Tensor] = {}
        self.held: dict[str, tuple[Signature, float]] = {}

    def put(self, name: str, signature: Signature | None = None, scale: float = 1.0) -> None:
        """Put a signature on under a name, or rescale the one that has it.

        Raises:
            ValueError: No signature has the name, or it fits no weight of the model.
        """
        if signature is None and name not in self.held:
            raise ValueError(f"Patched: no signature {name!r} to rescale; there are {list(self.held) or 'none'}.")
        signature = signature or self.held[name][0]
        state = self.model.state_dict()
        for n, value in (*signature.deltas.items(), *signature.norms.items()):
            if n not in state or state[n].shape != value.shape:
                have = tuple(state[n].shape) if n in state else "no such weight"
                raise ValueError(
                    f"Patched: {n} of signature {name!r} is {tuple(value.shape)}, the model has {have}; expected a model of one "
                    "structure with those that it comes from. Extract with first= to leave the last layers out."
                )
        self.held[name] = signature, scale
        for n in (*signature.deltas, *signature.norms):
            self.own.setdefault(n, state[n].detach().clone())
        self._write()

    def take_off(self, name: str) -> None:
        """Take a signature off.

        Raises:
            ValueError: There is none of the name.
        """
        if name not in self.held:
            raise ValueError(f"Patched: no signature {name!r} to take off; there are {list(self.held) or 'none'}.")
        del self.held[name]
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        state = self.model.state_dict()
        for n, own in self.own.items():
            value = own.clone()
            for signature, scale in self.held.values():
                if n in signature.deltas:
                    value += scale * signature.deltas[n].to(value)
            norms = [(s.norms[n].to(value), scale) for s, scale in self.held.values() if n in s.norms]
            total = sum(scale for _, scale in norms)
            if total > 0:
                mean = torch.stack([t * scale for t, scale in norms]).sum(0) / total
                value = torch.lerp(own, mean, min(total, 1.0))
            state[n].copy_(value)


class WeightSignatures(Transform):
    r"""Adds to a model the robustness that other models have learned from corrupted data.

    Cai, Zhang and Wang, Robust Weight Signatures: Gaining Robustness as Easy as Patching Weights?, arXiv:2302.12480. Each corrupted twin
    gives a signature (``extract``); the model gets the mean of them, times ``scale``:

    .. math:: \theta + \frac{scale}{k} \sum_{i=1}^{k} (d_i - \mathrm{proj}_b\, d_i),
        \qquad d_i = \theta_i - \theta_{start}, \quad b = \theta_{clean} - \theta_{start}.

    ``plan(model, others=(start, clean, corrupted, ...))``. The model may be ``clean``, or one trained from ``start`` on other data.
    Batch norms take the numbers of the corrupted twins, as in the published code. That code applies the weights of several signatures
    twice, which makes a mean of two a quarter each; here once. For signatures that come and go there is ``Patched``; to store one,
    ``Signature.rounded`` and ``save``.

    Args:
        scale: How much; 1 is what the twins learned.
        first: Only the first layers; see ``extract``. The published default is 7 of the 13 convolutions of a VGG-16.
        bits: Round the signatures to so many bits, 2 to 8, as they would be stored. None keeps floats.

    Shapes: any.

    Raises:
        ValueError: An option out of range; from ``plan``: fewer than three other models, or models of different structure.

    Examples:
        >>> start, clean, noisy = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(3))
        >>> plan = WeightSignatures(first=1).plan(clean, others=(start, clean, noisy))
        >>> new = plan.apply()
        >>> torch.equal(new[0].weight, clean[0].weight), torch.equal(new[2].weight, clean[2].weight)
        (False, True)
    """

    slug: ClassVar[str] = "weight-signatures"
    merges: ClassVar[int] = 3
    more: ClassVar[bool] = True

    def __init__(self, *, scale: float = 1.0, first: int | None = None, bits: int | None = None) -> None:
        if not abs(scale) < float("inf") or (first is not None and first < 1):
            raise ValueError(
                f"weight-signatures: scale {scale}, first {first}; expected a number, and at least 1 or None."
            )
        if bits is not None and not (isinstance(bits, int) and 2 <= bits <= 8):
            raise ValueError(f"weight-signatures: bits {bits!r}; expected an integer from 2 to 8, or None.")
        self.scale, self.first, self.bits = scale, first, bits

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """Extract the signatures and list the weights that they touch."""
        start, clean, *corrupted = self.take(others)
        signatures = [extract(start, clean, twin, first=self.first) for twin in corrupted]
        if self.bits is not None:
            signatures = [s.rounded(self.bits) for s in signatures]
        expect_alike(self.slug, model, start)
        kinds = {n: type(m).__name__ for n, m in model.named_modules()}
        touched, skipped = list[Row](), list[Row]()
        for owner, names in layers(model).items():
            shift, norm = (any(n in part for n in names) for part in (signatures[0].deltas, signatures[0].norms))
            if shift or norm:
                what = "gets the corrupted twins' numbers" if norm else "signature is added"
                touched.append(Row(owner or "(root)", kinds[owner], what))
            else:
                skipped.append(Row(owner or "(root)", kinds[owner], f"lies behind the first {self.first} layers"))
        if not touched:
            raise ValueError(f"{self.slug}: {type(model).__name__} has no weights; expected a trained model.")
        options = {"scale": self.scale, "first": self.first, "bits": self.bits}

        def build() -> nn.Module:
            new = copy.deepcopy(model)
            patched = Patched(new)
            for k, signature in enumerate(signatures):
                patched.put(str(k), signature, self.scale / len(signatures))
            recipe.record(new, self.slug, options, {})
            return new

        return Plan(self.slug, options, touched, skipped, build)


def _twins(model: nn.Module) -> tuple[nn.Module, ...]:
    return (*perturbed(model), *perturbed(model), *perturbed(model))


def _plain() -> tuple[Any, ...]:
    return (nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)),)


EXAMPLE = Example(
    make=WeightSignatures, inputs=_plain, hf=lambda: tiny_gpt2(bos_token_id=0, eos_token_id=0), others=_twins
)
