"""Statistics of what layers give out, channel by channel, and layers that absorb a scale and a shift of it into their weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from interlayer.core import taps
from interlayer.core.kinds import Row
from interlayer.core.quantizer.layers import is_conv1d

Parts = Literal["both", "rescale", "reshift"]
EPS = 1e-5  # added to a variance before a division, as batch norm does


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of each channel: the mean over batches of their means, and of their unbiased variances."""

    mean: Float[Tensor, " channels"]
    std: Float[Tensor, " channels"]


def channel(layer: nn.Module) -> int | None:
    """The axis of a layer's output that holds its channels, if the layer can absorb a scale and a shift of each.

    >>> channel(nn.Conv2d(1, 2, 3)), channel(nn.Linear(1, 2)), channel(nn.ReLU())
    (-3, -1, None)
    """
    if isinstance(layer, nn.Linear) or is_conv1d(layer):
        return -1
    if isinstance(layer, _ConvNd):
        return -1 - len(layer.kernel_size)
    return 1 if isinstance(layer, _BatchNorm) and layer.affine and layer.track_running_stats else None


def absorb(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Change the weights in place so that the layer gives out ``scale * output + shift``; without a bias, ``scale * output``."""
    weight: Any = layer.weight
    bias: Any = layer.bias
    axis = 1 if isinstance(layer, _ConvTransposeNd) or is_conv1d(layer) else 0
    shape = [-1 if n == axis else 1 for n in range(weight.ndim)]
    with torch.no_grad():
        weight.mul_(scale.to(weight).view(shape))
        if bias is not None:
            bias.copy_((bias * scale.to(bias.device) + shift.to(bias.device)).to(bias.dtype))


def places(model: nn.Module, batch: Any) -> tuple[list[str], list[Row]]:
    """The layers whose output can be renormalised, in the order in which they run, and what is left alone with the reason.

    These are linear maps, convolutions and batch norms that run once in a pass and whose output is not the model's own. Of a layer
    with a batch norm behind it, the batch norm stands for both.

    Args:
        model: Any module. It is left as it was.
        batch: One batch, as ``taps.feed`` takes it.
    """
    layers = {name: m for name, m in model.named_modules() if channel(m) is not None}
    calls: Counter[str] = Counter()
    given: dict[str, Tensor] = {}
    behind: dict[int, str] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            calls[name] += 1
            given[name] = output
            if isinstance(module, _BatchNorm):
                behind[id(args[0])] = name

        return keep

    handles = [m.register_forward_hook(hook(name)) for name, m in layers.items()]
    try:
        with taps.at_rest(model), torch.no_grad():
            whole = next(taps.feed(model, [batch]))
    finally:
        for handle in handles:
            handle.remove()
    own = {
        leaf.untyped_storage().data_ptr()
        for leaf in tree_leaves(dict(whole) if isinstance(whole, Mapping) else whole)
        if isinstance(leaf, Tensor)
    }
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)

    def why(name: str, layer: nn.Module) -> str:
        weight: Any = layer.weight
        if parametrize.is_parametrized(layer):
            return "its weight is computed from others; make it plain first with core.weights.bake"
        if holders[id(weight)] > 1:
            return "its weight is shared"
        if calls[name] != 1:
            return f"runs {calls[name]} times in a pass" if calls[name] else "is not run as a module"
        if given[name].untyped_storage().data_ptr() in own:
            return "its output is the model's"
        if isinstance(layer, _ConvTransposeNd) and layer.groups > 1:
            return "a transposed convolution of several groups"
        if given[name].numel() < 2 * channels(layer):
            return "gives one position, which has no standard deviation"
        return f"the batch norm {behind[id(given[name])]} behind it" if id(given[name]) in behind else ""

    refused = {name: why(name, layer) for name, layer in layers.items()}
    skipped = [Row(name, type(layers[name]).__name__, reason) for name, reason in refused.items() if reason]
    for name, module in model.named_modules():
        wide = any(p is not None and p.ndim > 1 for p in module._parameters.values())
        if wide and name not in layers and "parametrizations" not in name.split("."):
            why_not = "neither a linear map, a convolution nor a batch norm"
            skipped.append(Row(name or "(root)", type(module).__name__, why_not))
    return [name for name in given if not refused[name]], skipped


def channels(layer: nn.Module) -> int:
    """Number of channels of the output."""
    weight: Any = layer.weight
    return int(weight.shape[1 if isinstance(layer, _ConvTransposeNd) or is_conv1d(layer) else 0])


def moments(model: nn.Module, names: Sequence[str], data: Iterable[Any]) -> dict[str, Moments]:
    """Mean and standard deviation of each channel of what layers give out, over batches.

    Args:
        model: Any module; it runs in evaluation mode and is left as it was.
        names: Layers of which ``channel`` knows the axis.
        data: Batches as ``taps.feed`` takes them.

    Raises:
        ValueError: A layer did not run.
    """
    seen = _Seen(model, names)
    with seen.watching(), taps.at_rest(model), torch.no_grad():
        for _ in taps.feed(model, _shown(data)):
            pass
    return {name: seen.moments(name) for name in names}


def renormalise(model: nn.Module, goals: Mapping[str, Moments], data: Iterable[Any], parts: Parts = "both") -> None:
    """Give layers the statistics of ``goals``, in place, by scales and shifts that go into their weights.

    One pass: as batch norm does in training, each layer is renormalised by the statistics of the batch, so that those behind it see
    what they will see in the end; the statistics that are absorbed are means over batches. With one batch they are exact.

    Args:
        model: Changed in place.
        goals: The statistics wanted, by name of the layer.
        data: Batches as ``taps.feed`` takes them.
        parts: ``both``; ``rescale``, a standard deviation without a change of the sign or place of zero; or ``reshift``, a mean alone.

    Raises:
        ValueError: A layer did not run.

    Examples:
        >>> layer, x = nn.Linear(3, 2), torch.randn(100, 3)
        >>> net = nn.Sequential(layer, nn.ReLU())
        >>> renormalise(net, {"0": Moments(torch.zeros(2), torch.ones(2))}, x)
        >>> bool(layer(x).std(0).sub(1).abs().max() < 1e-3)
        True
    """
    seen = _Seen(model, list(goals), goals, parts)
    with seen.watching(), taps.at_rest(model), torch.no_grad():
        for _ in taps.feed(model, _shown(data)):
            pass
    for name, goal in goals.items():
        absorb(model.get_submodule(name), *change(seen.moments(name), goal, parts))


def change(found: Moments, goal: Moments, parts: Parts) -> tuple[Tensor, Tensor]:
    """The scale and the shift that take channels from the statistics found to those wanted."""
    scale = torch.ones_like(goal.std) if parts == "reshift" else goal.std / (found.std.square() + EPS).sqrt()
    return scale, torch.zeros_like(goal.mean) if parts == "rescale" else goal.mean - scale * found.mean


class _Seen:
    """Statistics of layers while they run; with goals, the layers behind see renormalised outputs."""

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        goals: Mapping[str, Moments] | None = None,
        parts: Parts = "both",
    ) -> None:
        self.layers = {name: model.get_submodule(name) for name in names}
        self.goals, self.parts = goals or {}, parts
        self.sums: dict[str, tuple[int, Tensor, Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [layer.register_forward_hook(self._hook(name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        axis = channel(self.layers[name])
        assert axis is not None

        def note(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            rows = output.movedim(axis, 0).flatten(1).to(torch.promote_types(output.dtype, torch.float32))
            if rows.shape[1] < 2:
                return None
            count, means, variances = self.sums.get(name, (0, 0, 0))
            var, mean = torch.var_mean(rows, 1)
            self.sums[name] = count + 1, means + mean, variances + var
            if name not in self.goals:
                return None
            scale, shift = change(Moments(mean, var.sqrt()), self.goals[name], self.parts)
            if module.bias is None:
                shift = torch.zeros_like(shift)
            shape = [-1 if n == axis % output.ndim else 1 for n in range(output.ndim)]
            return (output * scale.view(shape) + shift.view(shape)).to(output.dtype)

        return note

    def moments(self, name: str) -> Moments:
        if name not in self.sums:
            raise ValueError(
                f"renormalise: {name} gave out nothing that statistics can be taken of; expected at least one batch of two "
                "examples. Give data on which every layer runs."
            )
        count, means, variances = self.sums[name]
        return Moments(means / count, (variances / count).sqrt())


def _shown(data: Any) -> Any:
    """Batches with a progress bar, where they are many."""
    return tqdm(data, desc="statistics", disable=None, leave=False) if isinstance(data, Sequence) else data
