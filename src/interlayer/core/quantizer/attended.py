"""What an error of a weight does to the scores and outputs of attention, as a quadratic form that is computed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from interlayer.core import taps
from interlayer.core.blockwise import Part
from interlayer.core.quantizer.gptq import moments
from interlayer.core.quantizer.layers import weight_of

Role = Literal["query", "key", "value"]
ROLES: tuple[Role, ...] = ("query", "key", "value")


@dataclass(frozen=True)
class Form:
    """The mean of a squared change over calibration data: ``sum_g tr(left_g E_g right_g E_g')`` with ``E_g`` the error of group g.

    Args:
        rows: Rows of the weight, by group. Those of all forms of a layer are its outputs, once each.
        left: Moments of what the rows are multiplied with later. None is the identity.
        right: Moments of what the weight is multiplied with; one for all groups, or one for each.

    Shapes: ``rows`` [G, K], ``left`` [G, K, K], ``right`` [1, I, I] or [G, I, I]; errors [G, K, I].

    Examples:
        >>> form = Form(torch.arange(4).view(1, 4), None, torch.eye(3)[None])
        >>> float(form.loss(torch.ones(1, 4, 3)))
        12.0
    """

    rows: Int[Tensor, "G K"]
    left: Float[Tensor, "G K K"] | None
    right: Float[Tensor, "_ I I"]

    def slope(self, error: Float[Tensor, "G K I"]) -> Float[Tensor, "G K I"]:
        """Half the gradient of the loss."""
        found = error @ self.right
        return found if self.left is None else self.left @ found

    def loss(self, error: Float[Tensor, "G K I"]) -> Float[Tensor, ""]:
        """The mean squared change."""
        return (error * self.slope(error)).sum()


@dataclass
class Scores:
    """The arguments of one call of ``scaled_dot_product_attention``."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def read(self, values: Float[Tensor, "B H S D"]) -> Float[Tensor, "B H T D"]:
        """What the heads read from other values."""
        key = self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], 1)
        return F.scaled_dot_product_attention(
            self.query, key, values, self.attn_mask, is_causal=self.is_causal, scale=self.scale
        )


class _Watch(TorchFunctionMode):
    """Hand each call of ``scaled_dot_product_attention`` to a function first."""

    def __init__(self, see: Callable[[Scores], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            with torch._C.DisableTorchFunction():
                self.see(Scores(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


@dataclass
class Piece:
    """Rows of a linear map that attention reads as its queries, keys or values.

    Attributes:
        layer: Name of the map.
        role: What its outputs are.
        call: Which attention of the block, in the order of calls.
        rows: Rows of its weight, by group: what one head reads, or several heads that share keys and values.
        heads: The heads of what attention gets that read each group.
        read: What attention got, still attached to ``made``.
        made: The map's output.
    """

    layer: str
    role: Role
    call: int
    rows: Int[Tensor, "G K"]
    heads: Int[Tensor, "G R"]
    read: Float[Tensor, "B H T K"]
    made: Float[Tensor, "B T out"]

    def pull(self, moment: Float[Tensor, "H K K"]) -> Float[Tensor, "G K K"]:
        """``mean_t J_t' moment J_t`` of each head, summed over the heads of a group.

        ``J_t`` is the derivative of what the head reads at position t by the map's outputs there: the rotation of a position
        encoding, or the identity. One backward pass through this alone for each of the K features.
        """
        values, vectors = torch.linalg.eigh(moment.double())
        root = (vectors * values.clamp_min(0).sqrt()[:, None]).to(self.read)
        found = torch.zeros((), device=root.device)
        for heads in self.heads.unbind(1):
            for column in root[heads].unbind(-1):
                push = torch.zeros_like(self.read)
                push[:, heads] = column[:, None]
                (back,) = torch.autograd.grad(self.read, self.made, push, retain_graph=True)
                picked = back.flatten(0, 1)[:, self.rows]
                found = found + torch.einsum("nga,ngb->gab", picked, picked) / len(picked)
        return found


def attended(run: Callable[[], Any], there: Mapping[str, nn.Module]) -> list[Piece]:
    """Find which rows of which linear maps attention reads: every one whose outputs reach it with nothing but linear maps of
    single positions in between, such as a split into heads or a rotation. Their position in the module tree or name plays no part.

    Args:
        run: Runs the block once. Attention counts if it calls ``torch.nn.functional.scaled_dot_product_attention``.
        there: The linear maps that may be found, by name.
    """
    made, often, calls = dict[str, Tensor](), set[str](), list[Scores]()

    def cut(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            often.update([name] if name in made else [])
            made[name] = output.detach().requires_grad_()
            return made[name]

        return hook

    with ExitStack() as hooks, torch.enable_grad(), _Watch(calls.append):
        for name, module in there.items():
            hooks.callback(module.register_forward_hook(cut(name)).remove)
        run()
    for name in often:
        del made[name]
    found = [
        piece
        for k, call in enumerate(calls)
        for role in ROLES
        if (piece := _traced(getattr(call, role), role, k, made)) is not None
    ]
    keys = {(p.call, p.role) for p in found}
    pairs = [p for p in found if p.role == "value" or {(p.call, "query"), (p.call, "key")} <= keys]
    count = [p.layer for p in pairs]
    taken = {n: torch.cat([p.rows.flatten() for p in pairs if p.layer == n]) for n in count}
    return [
        p for p in pairs if len(taken[p.layer].unique()) == len(taken[p.layer])
    ]  # a row of two roles has no one form


def _traced(read: Tensor, role: Role, call: int, made: Mapping[str, Tensor]) -> Piece | None:
    """The rows behind one argument of attention, if one map alone makes it, position by position."""
    if read.ndim != 4 or not read.requires_grad:
        return None
    draw = torch.Generator().manual_seed(0)
    layer, rows = "", list[tuple[int, ...]]()
    for head in range(read.shape[1]):
        push = torch.zeros_like(read)
        push[:, head, -1] = torch.randn(read.shape[-1], generator=draw).to(read)
        backs = torch.autograd.grad(read, list(made.values()), push, retain_graph=True, allow_unused=True)
        seen = {n: g for n, g in zip(made, backs, strict=True) if g is not None and bool(g.any())}
        if len(seen) != 1 or (layer and layer not in seen):
            return None
        layer, back = next(iter(seen.items()))
        if back.ndim != 3 or back.shape[:2] != (read.shape[0], read.shape[2]) or bool(back[:, :-1].any()):
            return None
        rows.append(tuple(back[:, -1].any(0).nonzero().flatten().tolist()))
    groups = dict.fromkeys(rows)
    heads = [[h for h, r in enumerate(rows) if r == g] for g in groups]
    if len({len(g) for g in groups}) != 1 or len(rows[0]) != read.shape[-1] or len({len(h) for h in heads}) != 1:
        return None
    device = read.device
    piece = Piece(
        layer,
        role,
        call,
        torch.tensor(list(groups), device=device),
        torch.tensor(heads, device=device),
        read,
        made[layer],
    )
    split = made[layer][:, :, piece.rows].transpose(1, 2)  # values must be the map's outputs themselves
    same = all(torch.equal(read[:, each], split) for each in piece.heads.unbind(1))
    return piece if same or role != "value" else None


def forms(part: Part, there: Mapping[str, nn.Module]) -> dict[str, list[Form]]:
    """What errors of the weights of a block do, in closed form, by one pass over its inputs.

    For queries and keys the mean squared change of the scores by one of the two, before their scale; for values that of what
    the heads read; for all other rows that of the layer's own output.

    Memory: for each layer a matrix of [inputs, inputs], for values one for each head.

    Args:
        part: The block, with its weights in floats.
        there: Its layers, by name.
    """
    pieces = attended(lambda: _single(part), there)
    wanted = {(p.call, p.role): p for p in pieces}
    sums: dict[tuple[int, Role], Tensor] = {}
    counts: Counter[tuple[int, Role]] = Counter()
    turn = 0

    def see(scores: Scores) -> None:
        nonlocal turn
        heads = scores.query.shape[1]
        for role in ROLES:
            if piece := wanted.get((turn, role)):
                other = scores.key if role == "query" else scores.query
                if role == "value":
                    x = seen[places[piece.layer]].to(torch.promote_types(scores.query.dtype, torch.float32))
                    other = scores.read(x[:, None].expand(-1, heads, -1, -1))
                rows = other.detach().to(torch.promote_types(other.dtype, torch.float32)).transpose(0, 1).flatten(1, 2)
                moment = _matched(rows.mT @ rows, piece.read.shape[1])
                sums[turn, role] = sums.get((turn, role), torch.zeros((), device=rows.device)) + moment
                counts[turn, role] += rows.shape[1]
        turn += 1

    def watch() -> _Watch:
        nonlocal turn
        turn = 0
        return _Watch(see)

    root = nn.ModuleList([part.block])
    ids = {id(there[p.layer]): p.layer for p in pieces if p.role == "value"}
    places = {ids[id(m)]: n for n, m in root.named_modules() if id(m) in ids}
    with ExitStack() as hooks:
        seen = hooks.enter_context(taps.read(root, list(places.values()), side="input")) if places else {}
        own = moments(part, there, watch=watch)
    found: dict[str, list[Form]] = {}
    for name, layer in there.items():
        mine = [p for p in pieces if p.layer == name]
        for p in mine:
            moment = sums[p.call, p.role] / counts[p.call, p.role]
            left, right = (None, moment[p.heads].sum(1)) if p.role == "value" else (p.pull(moment), own[name])
            found.setdefault(name, []).append(Form(p.rows, left, right))
        rest = set(range(len(weight_of(layer)))).difference(*(p.rows.flatten().tolist() for p in mine))
        if rest:
            rows = torch.tensor(sorted(rest), device=own[name].device).view(len(own[name]), -1)
            found.setdefault(name, []).append(Form(rows, None, own[name]))
    return found


def _single(part: Part) -> Tensor:
    """Run the block on the first example of its first batch; for what is sought here all examples are alike."""
    args, kwargs = part.inputs[0]
    size = next((len(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim > 1), 0)

    def first(leaf: Any) -> Any:
        return leaf[:1] if isinstance(leaf, Tensor) and leaf.ndim > 1 and len(leaf) == size else leaf

    return taps.first(part.block(*tree_map(first, args), **tree_map(first, kwargs)))


def _matched(moment: Float[Tensor, "H K K"], heads: int) -> Float[Tensor, "_ K K"]:
    """Moments of heads for others, more of which share one, or fewer of which are shared."""
    if len(moment) <= heads:
        return moment.repeat_interleave(heads // len(moment), 0)
    return moment.unflatten(0, (heads, -1)).sum(1)
