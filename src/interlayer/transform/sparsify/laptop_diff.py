"""LAPTOP-Diff: whole layers of a diffusion U-Net removed by how far the output moves without each, and distilled back."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from interlayer.core import delivery, recipe, taps
from interlayer.core.allocate import Curve, allocate
from interlayer.core.blockwise import CONTAINERS, call, listed
from interlayer.core.data import answer, run
from interlayer.core.example import Example
from interlayer.core.extras import need
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.select import At, put, select
from interlayer.transform.sparsify._pruning import distortion, outputs

SHORTCUTS = ("conv_shortcut", "nin_shortcut", "skip_connection", "shortcut", "downsample")  # names of it inside a layer
STAGES = ["down_blocks.*", "mid_block", "up_blocks.*"]
Structure = dict[str, dict[str, Any]]


class Skip(nn.Module):
    """What is left of a residual layer without its branch: its input, or the shortcut of it.

    Args:
        shortcut: Brings the input to the output's shape, where the two differ.
        scale: What the layer divides its sum by.
        packed: Whether the layer returned a tuple.

    Examples:
        >>> Skip(packed=True)(torch.ones(1), None)
        (tensor([1.]),)
    """

    def __init__(self, shortcut: nn.Module | None = None, *, scale: float = 1.0, packed: bool = False) -> None:
        super().__init__()
        self.shortcut, self.scale, self.packed = shortcut, scale, packed

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument, whatever else the layer took."""
        x = args[0] if args else next(iter(kwargs.values()))
        x = (x if self.shortcut is None else self.shortcut(x)) / self.scale
        return (x,) if self.packed else x


def removable(model: nn.Module, data: Any, at: At | None = None) -> tuple[Structure, list[Row]]:
    """The layers that can be taken out of a model, with what their ``Skip`` needs, and those that cannot, with the reason.

    Args:
        model: Any module.
        data: Batches; the first one is run.
        at: Which modules. By default the members of lists that have parts of their own; of one that holds several of these, such
            as a stage of a U-Net, these count instead.
    """
    if at is None:
        lists = [(n, m) for n, m in model.named_modules() if isinstance(m, CONTAINERS)]
        there = {
            f"{n}.{child}".lstrip("."): m
            for n, each in lists
            for child, m in each.named_children()
            if next(m.children(), None) is not None
        }
    else:
        there = dict(select(model, at).chosen)
    structure, why, runs = Structure(), dict.fromkeys(there, "never ran on the data"), dict.fromkeys(there, 0)

    def look(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        runs[name] += 1
        x = args[0] if args else next(iter(kwargs.values()), None)
        y = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not isinstance(output, Tensor | tuple) or len(y) != 1 or not isinstance(x, Tensor):
            why[name] = f"gives a {type(output).__name__} with {len(y)} tensors; wanted one, of the first argument"
            return
        shortcut, why[name] = _shortcut(module, x, y[0]), ""
        if not shortcut and x.shape != y[0].shape:
            why[name] = f"makes {tuple(y[0].shape)} of {tuple(x.shape)} and has no shortcut that does"
        scale = float(getattr(module, "output_scale_factor", getattr(module, "rescale_output_factor", 1.0)))
        structure[name] = {"shortcut": shortcut, "scale": scale, "packed": isinstance(output, tuple)}

    handles = [
        m.register_forward_hook(lambda m, a, k, o, n=n: look(n, m, a, k, o), with_kwargs=True) for n, m in there.items()
    ]
    try:
        with taps.at_rest(model), torch.no_grad():
            call(model, listed(data)[0])
    finally:
        for handle in handles:
            handle.remove()
    generates, owners = callable(getattr(model, "generate", None)), dict[int, list[str]]()
    for owner, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), []).append(owner)
    for name, module in there.items():
        if why[name]:
            continue
        shared = [o for p in module.parameters() for o in owners[id(p)] if not o.startswith(f"{name}.")]
        if runs[name] > 1:
            why[name] = f"runs {runs[name]} times in a pass"
        elif not _saves(module, structure[name]):
            why[name] = "has no weights beside its shortcut"
        elif shared:
            why[name] = f"shares weights with {shared[0]}"
        elif generates and name.endswith(".0"):
            why[name] = "the cache counts its tokens by the first layer"
    for name in there if at is None else ():
        inner = [n for n in there if n.startswith(f"{name}.") and not why[n]]
        if len(inner) > 1 and not why[name] and not structure[name]["shortcut"]:
            why[name] = f"a stage of {len(inner)} layers, which go one by one"
    for name in there:
        outer = next((n for n in there if name.startswith(f"{n}.") and not why[n]), None)
        if outer and not why[name]:
            why[name] = f"within {outer}"
    skipped = [Row(n, type(m).__name__, why[n]) for n, m in there.items() if why[n]]
    return {n: structure[n] for n in there if not why[n]}, skipped


def _shortcut(module: nn.Module, x: Tensor, y: Tensor) -> str:
    """The name of a layer's own shortcut, if it has one that gives the output's shape."""
    for name in SHORTCUTS:
        found = getattr(module, name, None)
        if isinstance(found, nn.Module):
            try:
                fits = found(x).shape == y.shape
            except RuntimeError:  # it takes other channels: it is a part of the branch
                fits = False
            if fits:
                return name
    return ""


def _skip(module: nn.Module, how: Mapping[str, Any]) -> Skip:
    shortcut = getattr(module, how["shortcut"]) if how["shortcut"] else None
    return Skip(shortcut, scale=how["scale"], packed=how["packed"]).train(module.training)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _saves(module: nn.Module, how: Mapping[str, Any]) -> int:
    return _size(module) - _size(_skip(module, how))


def without(model: nn.Module, structure: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Take layers out of a model, in place; ``structure`` is part of what ``removable`` found."""
    for name, how in structure.items():
        put(model, name, _skip(model.get_submodule(name), how))
    return model


def losses(model: nn.Module, structure: Mapping[str, Mapping[str, Any]], data: Any) -> dict[str, float]:
    """How far the output moves where each layer alone is missing: the mean square, a pass over the data for each.

    It is infinite where the model does not run without the layer, or overflows.

    Raises:
        ValueError: No data, or an output that is a loss or not finite.
    """
    batches, found = listed(data), dict[str, float]()
    with taps.at_rest(copy.deepcopy(model)) as work, torch.no_grad():
        whole = outputs(work, batches, "laptop-diff")
        for name, how in tqdm(structure.items(), "layers", disable=None, leave=False):
            layer = work.get_submodule(name)
            put(work, name, _skip(layer, how))
            try:
                found[name] = distortion(whole, taps.feed(work, batches), worst=False)
            except AttributeError:  # the model reads parts of this layer
                found[name] = math.inf
            put(work, name, layer)
    return found


class LaptopDiff(Transform):
    r"""Remove the layers of a diffusion U-Net without which its output moves least, for a given share of its parameters.

    Zhang, Li, Chen, Xie and Lu, LAPTOP-Diff: Layer Pruning and Normalized Distillation for Compressing Diffusion Models,
    arXiv:2404.11098. The output loss of a set of removed layers is nearly the sum of each one's own,

    .. math:: \min_r \; \mathbb{E} \lVert \epsilon(r_1, \ldots, r_m) - \epsilon \rVert^2 \approx \min_r \sum_i r_i \,
        \mathbb{E} \lVert \epsilon(r_i) - \epsilon \rVert^2 \quad \text{with} \quad \sum_i r_i p_i \ge P,

    which is a knapsack: here the optimum, by an integer programme (``core.allocate``). A removed layer becomes its input, or its own
    shortcut where it changes the number of channels, so the result has no trace of its branch. Retrain it with ``Distillation``.

    Layers are residual blocks: those of ``UNet2DModel`` and ``UNet2DConditionModel`` of diffusers, and members of lists of any module
    that keep the shape of their input or have a shortcut of their own.

    ``plan`` takes batches as ``taps.feed`` takes them, without targets: noised images at times over the whole range, with their
    conditions; a few hundred do. It costs a pass over them for each layer, and keeps one output of each.

    Args:
        share: Share of the model's parameters that goes, at least, above 0 and below 1.
        at: Which layers may go. By default see ``removable``.

    Shapes: any; the output's first axis counts examples.

    Raises:
        ValueError: A share out of range; from ``plan``: no data, an output that is a loss or not finite, no layer that can go, or
            fewer parameters in those than are to go.

    Examples:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.branch = nn.Linear(8, 8)
        ...     def forward(self, x):
        ...         return x + self.branch(x).tanh()
        >>> net = nn.Sequential(nn.Linear(4, 8), Block(), Block(), Block())
        >>> new = LaptopDiff(share=0.4).plan(net, torch.randn(32, 4)).apply()
        >>> [type(m).__name__ for m in new].count("Skip")
        2
    """

    slug: ClassVar[str] = "laptop-diff"

    def __init__(self, *, share: float = 0.25, at: At | None = None) -> None:
        if not 0 < share < 1:
            raise ValueError(
                f"laptop-diff: share was {share}; wanted above 0 (else there is nothing to do) and below 1."
            )
        self.share, self.at = share, at

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """Measure each layer on ``data`` and choose which go."""
        self.take(others)
        there, skipped = removable(model, data, self.at)
        total, found = _size(model), self.measured(model, there, data)
        saves = {n: _saves(model.get_submodule(n), how) for n, how in there.items() if math.isfinite(found[n])}
        skipped += [Row(n, "stays", "without it the model does not run") for n in there if n not in saves]
        if not there or sum(saves.values()) < self.share * total:
            why = f" ({skipped[0].name} {skipped[0].why})" if skipped else ""
            raise ValueError(
                f"laptop-diff: the layers of {type(model).__name__} that can be removed hold {sum(saves.values())} of {total} "
                f"parameters; wanted residual layers with at least {self.share:.0%}{why}. Lower share, or choose layers with at."
            )
        curves = [Curve([size, 0], [0.0, found[n]]) for n, size in saves.items()]
        best = allocate(curves, sum(saves.values()) - self.share * total, method="integer")
        gone = {n: there[n] for n, level in zip(saves, best.choice, strict=True) if level == 1}
        touched = [Row(n, f"removed: {saves[n]} of {total} parameters", f"alone {found[n]:.3g}") for n in gone]
        skipped += [Row(n, "stays", f"without it the output moves by {found[n]:.3g}") for n in saves if n not in gone]
        options = {"share": self.share}

        def build() -> nn.Module:
            new = copy.deepcopy(model)
            recipe.record(new, self.slug, options, {"layers": gone})
            return delivery.guard(without(new, gone), "removed layers")

        return Plan(self.slug, options, touched, skipped, build)

    def measured(self, model: nn.Module, there: Structure, data: Any) -> dict[str, float]:
        """What each layer counts for: how far the output moves without it."""
        return losses(model, there, data)

    def restore(self, model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        """Take the same layers out of a fresh base."""
        return delivery.guard(without(model, structure["layers"]), "removed layers")


class Distillation:
    r"""The loss by which a pruned model is retrained: the task's, and the distances to the teacher's output and features.

    .. math:: L = L_{task} + o \, \lVert y - y^T \rVert^2 + f \sum_l \lVert h_l - h_l^T \rVert^2 / \lVert h_l^T \rVert^2

    The division by the teacher's features keeps those with large numbers from deciding alone. (The paper weights the terms by norms of
    the teacher's features too; with these squares, the size of the features of a stage does not matter at all.) It is called as
    ``core.fit.fit`` calls a loss: with the student and a batch of inputs and targets. Targets may be None: then nothing but the
    teacher is learned from. Cost beside a training step: a forward pass of the teacher.

    Args:
        teacher: The model before pruning, on which nothing is changed.
        at: Whose outputs are features, in both models. Defaults to the stages of a U-Net of diffusers.
        output: Weight o of the distance to the teacher's output.
        feature: Weight f of the distances of features; 0 leaves them out.
        normalise: Divide by the teacher's features. False gives BK-SDM's loss (Kim et al., arXiv:2305.15798).

    Raises:
        ValueError: A weight below 0, no features of that name, or, when called, features of other shapes.

    Examples:
        >>> from interlayer.core.fit import fit
        >>> teacher, student = (nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)) for _ in range(2))
        >>> loss = Distillation(teacher, at=["1"])
        >>> told = fit(student, [(torch.randn(64, 2), None)] * 50, loss, steps=50, lr=1e-2)
        >>> told[-1] < told[0]
        True
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        at: At | None = None,
        output: float = 1.0,
        feature: float = 1.0,
        normalise: bool = True,
    ) -> None:
        if output < 0 or feature < 0:
            raise ValueError(f"Distillation: output={output}, feature={feature}; wanted none below 0.")
        self.teacher, self.at = teacher, STAGES if at is None else at
        self.output, self.feature, self.normalise = output, feature, normalise
        select(teacher, self.at)  # refuses where there is none

    def __call__(self, student: nn.Module, batch: tuple[Any, Tensor | None]) -> Float[Tensor, ""]:
        """The loss on a batch."""
        inputs, target = batch
        with taps.at_rest(self.teacher), torch.no_grad(), taps.read(self.teacher, self.at) as wanted:
            y = answer(run(self.teacher, inputs))
        with taps.read(student, self.at, detach=False) as found:
            z = answer(run(student, inputs))
        if z.shape != y.shape:
            raise ValueError(
                f"Distillation: the student gives {tuple(z.shape)}, the teacher {tuple(y.shape)}; wanted the same shape."
            )
        loss = self.output * F.mse_loss(z, y) + self.feature * self.distance(found, wanted)
        return loss if target is None else loss + F.mse_loss(z, target)

    def distance(self, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """The sum of the distances of features."""
        terms = []
        for name, h in wanted.items():
            if name not in found or found[name].shape != h.shape:
                had = tuple(found[name].shape) if name in found else "nothing"
                raise ValueError(
                    f"Distillation: {name} gives {had} in the student and {tuple(h.shape)} in the teacher; wanted the same shape. "
                    "Choose other features with at."
                )
            apart = (found[name] - h).square().mean()
            terms.append(apart / h.square().mean().clamp_min(1e-12) if self.normalise else apart)
        return torch.stack(terms).sum()


class _Block(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(width, out, 3, padding=1), nn.ReLU())
        self.shortcut = nn.Conv2d(width, out, 1) if width != out else None

    def forward(self, x: Tensor) -> Tensor:
        return (x if self.shortcut is None else self.shortcut(x)) + self.branch(x)


def _plain() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(_Block(2, 4), _Block(4, 4), _Block(4, 4)), torch.randn(3, 2, 4, 4)


def _unet() -> tuple[nn.Module, dict[str, Tensor]]:
    diffusers: Any = need("diffusers", "hf", "laptop_diff.EXAMPLE")
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([3, 700])}


EXAMPLE = Example(make=lambda: LaptopDiff(share=0.3), inputs=_plain, hf=_unet)
