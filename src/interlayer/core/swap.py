"""Exchange norms, activations and linear maps of any model: which modules are known to be one, and what replaces them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from interlayer import catalog
from interlayer.core.slots import fill, normed_axis, parse_spec

SLOTS = ("norm", "activation", "linear")
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.RReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Tanh, nn.Hardtanh, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Threshold,
)  # fmt: skip
# Functions that squash or score. They are gates and output ranges more often than activations: only when named.
GATES = (
    "Sigmoid", "Hardsigmoid", "LogSigmoid", "Softplus", "LaplaceActivation", "LinearActivation", "SqrtSoftplusActivation",
)  # fmt: skip
FUNCTIONS: dict[str, set[str]] = {
    "activation": {
        "relu", "relu_", "relu6", "rrelu", "leaky_relu", "leaky_relu_", "prelu", "elu", "elu_", "celu", "selu",
        "gelu", "silu", "mish", "hardswish", "tanh", "tanh_", "hardtanh", "softsign", "tanhshrink", "softshrink", "hardshrink",
    },
    "norm": {"layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm"},
    "linear": {"linear", "addmm", "baddbmm"},
}  # fmt: skip
_CELLS = (nn.RNNBase, nn.RNNCellBase)
KERNELS = {
    "activation": _CELLS,
    "norm": (),
    "linear": (*_CELLS, nn.MultiheadAttention),
}  # hold parts that are no modules
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def known(module: nn.Module) -> str | None:
    """The slot that a module fills, by its type: one of ``SLOTS``, or empty for another torch module; None if unknown.

    Known are the types of ``torch.nn``, the activations of transformers and diffusers, the classes of these two whose
    names end in RMSNorm or LayerNorm, and the systems of the catalogue.

    Examples:
        >>> known(nn.GELU()), known(nn.Dropout()), known(nn.Sequential())
        ('activation', '', '')
    """
    name, home = type(module).__name__, type(module).__module__
    if name in GATES and home.startswith(("torch.nn.", "transformers.activations")):
        return None
    if isinstance(module, ACTIVATIONS) or home == "transformers.activations":
        return "activation"
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm, *_BATCH_NORMS)):
        return "norm"
    if isinstance(module, nn.Linear):
        return "" if isinstance(module, NonDynamicallyQuantizableLinear) else "linear"
    if home.startswith("torch.nn."):
        return ""
    if (home, name) == ("diffusers.models.activations", "FP32SiLU"):
        return "activation"
    if (home, name) == ("transformers.pytorch_utils", "Conv1D"):
        return "linear"
    if home.startswith(("transformers.", "diffusers.")):
        return "norm" if name.endswith(("RMSNorm", "LayerNorm")) else None
    return next((s.slot for s in _of_slots() if (s.module, s.code) == (home, name)), None)


@functools.cache
def _of_slots() -> list[catalog.System]:
    return [s for s in catalog.load().values() if s.slot in SLOTS]


def out_of_reach(model: nn.Module, slot: str) -> Iterator[tuple[str, nn.Module, str]]:
    """Modules with parts of a slot that are no modules and so cannot be exchanged: their name and the reason.

    Found are calls by name (``F.relu(x)``, ``x.tanh()``) in ``forward`` and the methods that it calls, functions kept as
    attributes, and the kernels of recurrent layers and attention. A function of another name is not found.

    Examples:
        >>> [why for _, _, why in out_of_reach(nn.LSTM(1, 1), "activation")]
        ['its kernel has activations that are no modules']
    """
    words = {"activation": "activations", "norm": "norms", "linear": "linear maps"}[slot]
    for name, module in model.named_modules():
        if isinstance(module, KERNELS[slot]):
            yield name, module, f"its kernel has {words} that are no modules"
            continue
        if known(module) == slot:
            continue
        for key, value in vars(module).items():
            function = getattr(getattr(value, "func", value), "__name__", "")
            if function in FUNCTIONS[slot]:
                yield name, module, f"its {key} is the function {function}, not a module"
        if known(module) is None and (found := sorted(FUNCTIONS[slot] & mentions(module) - module._modules.keys())):
            yield name, module, f"calls {', '.join(found)} in its forward pass, not a module"


def mentions(module: nn.Module) -> set[str]:
    """All names that ``forward`` of a module, and the methods of its class that it calls, mention."""
    return _calls(type(module))  # type: ignore[arg-type]


@functools.cache
def _calls(cls: type[nn.Module]) -> set[str]:
    """All names that ``forward`` of a class, and the methods of the class that it calls, mention."""
    found: set[str] = set()
    todo = ["forward"]
    for name in todo:
        function = inspect.getattr_static(cls, name, None)
        function = inspect.unwrap(function) if callable(function) else function
        if isinstance(function, FunctionType) and function.__module__ != nn.Module.__module__:
            names = _names(function.__code__)
            todo += [
                n for n in names if n not in todo and n not in vars(nn.Module) and n not in FUNCTIONS["activation"]
            ]
            found |= names
    return found


def _names(code: CodeType) -> set[str]:
    inner = [_names(c) for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*inner)


def bypassed(model: nn.Module) -> dict[str, str]:
    """Modules that their parent never calls, so that exchanging them would change nothing: their name and the reason.

    That is the output map of ``nn.MultiheadAttention``, whose weights are read, and an activation whose parent knows it by
    name and hands the name to a kernel (Mamba's, in transformers).
    """
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.MultiheadAttention):
            found[f"{name}.out_proj"] = "MultiheadAttention reads its weights and never calls it"
        for key, value in vars(module).items():
            for child, inner in (
                module.named_children() if isinstance(value, str) and value in FUNCTIONS["activation"] else ()
            ):
                if known(inner) == "activation" and child not in mentions(module):
                    found[f"{name}.{child}"] = f"{type(module).__name__} reads {key}={value!r} and never calls it"
    return {name.lstrip("."): why for name, why in found.items()}


def unfuse(model: nn.Module, changed: set[int]) -> None:
    """Turn off torch's fused Transformer kernels, which pass over modules, where one of these children was exchanged.

    Args:
        model: Changed in place.
        changed: ``id`` of the new modules.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(id(m) in changed for m in module.modules()):
            module.activation_relu_or_gelu = 0
            changed.add(id(module))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(id(m) in changed for m in module.layers):
            module.use_nested_tensor = False


class Swap:
    """A norm, an activation or a linear map by name, made to replace one in any model; ``select.replace`` uses it.

    A norm takes over width, eps, gain and bias of the old one (running statistics too) and a linear map its sizes and
    weights, as far as it has them, so that a trained model stays as near to itself as the new part allows.

    Args:
        spec: What fills the slot ``norm``, ``activation`` or ``linear``, such as ``"rmsnorm"`` or ``"helu(alpha=0.1)"``.

    Raises:
        ValueError: The name fills none of these slots.

    Examples:
        >>> new = Swap("rmsnorm")(nn.LayerNorm(16, eps=1e-3))
        >>> new.width, new.eps
        (16, 0.001)
        >>> Swap("relu").refuses(nn.Linear(2, 2))
        'Linear is no activation'
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        name, self.options = parse_spec(spec)
        system = catalog.load().get(name)
        fits = [s for s in SLOTS if name in catalog.builtins(s) or (system and system.slot == s)]
        if not fits:
            names = {n for s in SLOTS for n in catalog.builtins(s)} | {s.slug for s in _of_slots()}
            raise ValueError(
                f"slots: no norm, activation or linear map is called {name!r}.{catalog.nearest(name, names)} "
                f"There are {sorted(names)}."
            )
        self.slot = fits[0]

    def refuses(self, old: nn.Module, named: bool = False) -> str:
        """Why ``old`` cannot be exchanged; empty if it can.

        Args:
            old: The module.
            named: Whether the caller named this very module or its class; then the class need not be known.
        """
        name, fills = type(old).__name__, known(old)
        if isinstance(old, LazyModuleMixin) and old.has_uninitialized_params():
            return f"{name} has no size yet; run the model once"
        if self.slot == "activation":
            if fills is not None:
                return "" if fills == "activation" else f"{name} is no activation"
            if next(old.children(), None) is not None or any(p.ndim > 1 for p in old.parameters()):
                return f"{name} is no activation"
            return "" if named else f"{name} is not known to be an activation; name it or its class to replace it"
        if self.slot == "linear":
            if fills != "linear":
                return f"{name} is no linear map"
            return "" if _matrix(old) is not None else f"{name} keeps its weight in a form of its own"
        channels = isinstance(old, _BATCH_NORMS)
        if fills is None and not named and name.endswith("Norm"):
            return f"{name} is not known to be a norm; name it or its class to replace it"
        candidate = fills == "norm" or (fills is None and named)
        if not candidate or not (channels or _gain(old) is not None):
            return f"{name} is no norm over one axis"
        axis = "channels" if channels else "features"
        wanted = normed_axis(self.spec) or axis
        return "" if axis == wanted else f"{name} normalises {axis}, {self.spec} {wanted}"

    def __call__(self, old: nn.Module) -> nn.Module:
        """What replaces ``old``."""
        if self.slot == "activation":
            return fill("activation", self.spec)
        if self.slot == "linear":
            weight, bias = _matrix(old), old.bias
            assert weight is not None
            new = fill("linear", self.spec, inputs=weight.shape[1], outputs=weight.shape[0], bias=bias is not None)
            return _filled(new, {"weight": weight, "bias": bias})
        eps = next(
            (e for e in (getattr(old, n, None) for n in ("eps", "epsilon", "variance_epsilon")) if e is not None), None
        )
        known_eps = {} if eps is None else {"eps": eps}
        if isinstance(old, _BATCH_NORMS):
            new = fill("norm", self.spec, width=old.num_features, **known_eps)
            if isinstance(new, nn.BatchNorm2d):  # the name stands for all three
                kind = next(cls for cls in _BATCH_NORMS if isinstance(old, cls))
                new = kind(old.num_features, **{**known_eps, **self.options})
            return _filled(new, old.state_dict())
        gain = _gain(old)
        assert gain is not None
        new = fill("norm", self.spec, width=_width(old), **known_eps)
        return _filled(new, {"weight": gain, "bias": getattr(old, "bias", None)})


def _filled(new: nn.Module, state: dict[str, Any]) -> nn.Module:
    new.to(next(v.device for v in state.values() if v is not None))
    there = new.state_dict()
    fits = {n: v for n, v in state.items() if n in there and v is not None and v.shape == there[n].shape}
    new.load_state_dict(fits, strict=False)
    return new


def _matrix(linear: nn.Module) -> Tensor | None:
    """The weight [outputs, inputs] of a linear map; None if it is packed, as quantised ones are."""
    weight: Any = linear.weight
    if not isinstance(linear, nn.Linear):  # transformers' Conv1D keeps the transpose
        return weight.T
    return weight if tuple(weight.shape) == (linear.out_features, linear.in_features) else None


def _width(norm: nn.Module) -> int:
    """Width of a norm over features; 0 if it is unknown or normalises several axes."""
    weight = getattr(norm, "weight", None)
    sizes: Any = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", None)
    sizes = (
        tuple(weight.shape) if isinstance(weight, Tensor) else sizes if isinstance(sizes, tuple | torch.Size) else ()
    )
    return sizes[0] if len(sizes) == 1 else 0


@torch.no_grad()
def _gain(norm: nn.Module) -> Tensor | None:
    """The gain of a norm over the last axis as it acts (ones without one); None if it computes something else.

    Some classes keep the gain as its distance from one, some normalise another axis under the same name: classes other
    than torch's own are tried on numbers of mean 0.
    """
    width, weight, bias = _width(norm), getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not width:
        return None
    if weight is None:
        weight = torch.ones(width)
    if type(norm) in (nn.LayerNorm, nn.RMSNorm) or weight.is_meta:  # on the meta device there is nothing to try
        return weight
    generator = torch.Generator().manual_seed(0)
    x = F.layer_norm(torch.randn(2, 3, width, generator=generator), (width,)).to(weight)
    try:
        y = norm(3 * x)
    except Exception:  # it wants other inputs: not a norm that another one can replace
        return None
    for gain in (weight, 1 + weight):
        wanted = x * gain + (0 if bias is None else bias)
        if isinstance(y, Tensor) and y.shape == x.shape and (y - wanted).abs().max() <= 0.02 * (1 + wanted.abs().max()):
            return gain
    return None
