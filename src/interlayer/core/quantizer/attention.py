"""Attention whose operands are modules' outputs, so that they can be observed and rounded: queries, keys, values, probabilities."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.extras import need
from interlayer.core.kinds import Row
from interlayer.core.mixer import Attention, meetings
from interlayer.core.quantizer.grid import Grid, LogGrid
from interlayer.core.select import At, exchange, select
from interlayer.core.swap import mentions

OPERANDS = ("queries", "keys", "values", "probabilities")
NAME = "interlayer_open"  # of the attention function that transformers calls
LOST = ("softcap", "s_aux")  # what some models of transformers pass beside the mask
PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")  # of diffusers, whose function Processor has
FITS = 2**18  # scores that stay in a processor's cache until they are read


class Observed(nn.Identity):
    """Passes on an activation for others to observe.

    Attributes:
        part: Where each call gets a part: how many of the activation's values came before it, and how many there are in all.
    """

    part: tuple[int, int] | None = None


class Attend(nn.Module):
    """Attention by its two products, with a module at each operand: ``probabilities(softmax(q k' scale + bias)) v``.

    The four modules are identities until ``Round`` takes their places.

    Shapes: q [B, H, S, K], k and v [B, G, T, K] with G dividing H, to [B, H, S, K]; as ``core.mixer.attend``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queries: nn.Module = nn.Identity()
        self.keys: nn.Module = nn.Identity()
        self.values: nn.Module = nn.Identity()
        self.probabilities: Any = Observed()
        self.apart = False

    def forward(
        self,
        q: Float[Tensor, "B H S K"],
        k: Float[Tensor, "B G T K"],
        v: Float[Tensor, "B G T K"],
        *,
        causal: bool,
        mask: Tensor | None = None,
        scale: float | None = None,
        allowed: Tensor | None = None,
        bias: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Float[Tensor, "B H S K"]:
        """Let every query read."""
        met: Any = {"causal": causal, "mask": mask, "allowed": allowed, "bias": bias}
        return _joined([read for read, _ in self.parts(q, k, v, scale=scale, dropout=dropout, **met)])

    def weigh(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        """What is read, and the probabilities."""
        reads, each = zip(*self.parts(q, k, v, **given), strict=True)
        return _joined(reads), _joined(each)

    def parts(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, dropout: float = 0.0, **given: Any
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What is read, and the probabilities, of some examples at a time; of all at once unless they come ``apart``."""
        seen = meetings(q, k, **given)
        q, k, v = self.queries(q), self.keys(k), self.values(v)
        if q.shape[1] != k.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        before = 0
        for some_q, some_k, some_v, met in _split(q, k, v, seen) if self.apart else [(q, k, v, seen)]:
            scores = (some_q * scale) @ some_k.mT
            if met is not None:
                scores = scores.masked_fill(~met, -torch.inf) if met.dtype == torch.bool else scores + met
            p = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
            if self.apart:
                self.probabilities.part = before, max(len(q), len(k)) * p.shape[1:].numel()
                before += p.numel()
            p = self.probabilities(p)
            yield F.dropout(p, dropout, self.training) @ some_v, p


def _split(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Iterable[tuple[Any, ...]]:
    """The same by parts of as many examples as fit."""
    if not len(q) == len(k) == len(v):  # examples share some of it
        return [(q, k, v, seen)]
    some = max(1, FITS // (q.shape[1] * q.shape[2] * k.shape[2]))
    met = seen.split(some) if seen is not None and seen.ndim == 4 and len(seen) == len(q) else repeat(seen)
    return zip(q.split(some), k.split(some), v.split(some), met, strict=False)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """While the context is open, opened attentions pass on their probabilities by parts of some examples, which cost less time and memory.

    Hooks get these parts one by one; outputs stay as they are.
    """
    found = [m for m in model.modules() if isinstance(m, Attend) and isinstance(m.probabilities, Observed)]
    for m in found:
        m.apart = True
    try:
        yield
    finally:
        for m in found:
            m.apart, m.probabilities.part = False, None


class Multihead(nn.Module):
    """``nn.MultiheadAttention`` made of layers: a linear map for each of queries, keys and values, ``Attend``, and the output map.

    Args:
        old: Without added biases of keys and values.

    Shapes: those of ``nn.MultiheadAttention``.
    """

    in_proj_bias = None  # tells torch's Transformer layers that there is nothing for their fused kernel

    def __init__(self, old: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.dropout = old.embed_dim, old.num_heads, old.dropout
        self.batch_first, self._qkv_same_embed_dim = old.batch_first, old._qkv_same_embed_dim
        weights: Any = (old.q_proj_weight, old.k_proj_weight, old.v_proj_weight)
        if old.in_proj_weight is not None:
            weights = old.in_proj_weight.detach().chunk(3)
        biases: Any = (None,) * 3 if old.in_proj_bias is None else old.in_proj_bias.detach().chunk(3)
        self.query, self.key, self.value = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.attend = Attend()
        self.out_proj = _linear(old.out_proj.weight, old.out_proj.bias)
        self.train(old.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,  # a hint only: the mask is given too
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``."""
        single = query.ndim == 2
        parts = [m(x) for m, x in ((self.query, query), (self.key, key), (self.value, value))]
        if single:
            parts = [x[None] for x in parts]
        elif not self.batch_first:
            parts = [x.transpose(0, 1) for x in parts]
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in parts)
        met = _added(attn_mask, q)
        if met is not None:
            met = met.unflatten(0, (-1, self.num_heads)) if met.ndim == 3 else met[None, None]
        if key_padding_mask is not None:
            padded: Any = _added(key_padding_mask, q)
            padded = padded[None, None, None] if padded.ndim == 1 else padded[:, None, None]
            met = padded if met is None else met + padded
        given: Any = {"causal": False, "bias": met, "dropout": self.dropout if self.training else 0.0}
        read, p = self.attend.weigh(q, k, v, **given) if need_weights else (self.attend(q, k, v, **given), None)
        out = self.out_proj(read.transpose(1, 2).flatten(2))
        out = out[0] if single else out if self.batch_first else out.transpose(0, 1)
        if p is None:
            return out, None
        p = p.mean(1) if average_attn_weights else p
        return out, p[0] if single else p


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    new = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    new.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone())
    return new


def _added(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask of torch, in which True hides, as scores to add."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)


def refuses(module: nn.Module) -> str | None:
    """Why attention stays as it is; empty if it can be opened, None for a module that is no attention."""
    if isinstance(module, nn.MultiheadAttention):
        odd = module.bias_k is not None or module.add_zero_attn
        return "it adds keys and values of its own, which stay in float" if odd else ""
    if isinstance(module, Attention):
        plain = type(module).mix is Attention.mix and type(module).read is Attention.read
        return "" if plain else "an attention of another kind, its products stay in float"
    if isinstance(module, Attend | Multihead):
        return None
    if hasattr(module, "processor") and hasattr(module, "set_processor"):
        known = type(module.processor).__name__ in PROCESSORS
        return "" if known else f"its processor is a {type(module.processor).__name__}, its products stay in float"
    calls = mentions(module)
    if "ALL_ATTENTION_FUNCTIONS" in calls:
        return ""
    if {"scaled_dot_product_attention", "softmax", "attend"} & calls and next(module.children(), None) is not None:
        return "its products or its softmax are function calls, which stay in float"
    return None


def attentions(model: nn.Module) -> tuple[list[str], list[Row]]:
    """The names of the modules whose attention can be opened, and the others with the reason."""
    names, rows = list[str](), list[Row]()
    for name, module in model.named_modules():
        why = refuses(module)
        if why:
            rows.append(Row(name or type(module).__name__, type(module).__name__, why))
        elif why is not None and name:
            names.append(name)
    return names, rows


def opening(model: nn.Module, at: At | None = None) -> tuple[nn.Module, list[str], list[Row]]:
    """A copy to observe, with the weights of the model itself and its attentions opened; their names; the others with the reason.

    Args:
        model: Any module. It is not changed.
        at: Among which modules. Defaults to all.
    """
    names, rows = attentions(model)
    if at is not None:
        chosen = select(model, at).chosen
        rows = [r for r in rows if r.name in chosen]
        names = [n for n in names if n in chosen]
    own = [*model.parameters(), *model.buffers()]
    return opened(copy.deepcopy(model, {id(t): t for t in own}), names), names, rows


def operands(names: Iterable[str], grid: Grid, probabilities: Grid | LogGrid) -> dict[str, Grid | LogGrid]:
    """The grids of the operands of opened attentions, by the names of their modules."""
    return {f"{n}.attend.{o}": probabilities if o == OPERANDS[-1] else grid for n in names for o in OPERANDS}


def opened(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Make the operands of these attentions modules, in place; the function stays. ``Attend`` is their ``attend``."""
    names = list(names)
    several = [n for n in names if isinstance(model.get_submodule(n), nn.MultiheadAttention)]
    if several:
        exchange(model, several, Multihead)  # type: ignore[arg-type]
    rest: list[Any] = [model.get_submodule(n) for n in names if n not in several]
    for module in rest:
        module.attend = Attend().train(module.training)
    for module in rest:
        if hasattr(module, "set_processor"):
            module.set_processor(Processor())
    if any(not isinstance(m, Attention) and not hasattr(m, "set_processor") for m in rest):
        hf: Any = need("transformers", "hf", "opened attention")
        hf.AttentionInterface.register(NAME, _transformers)
        hf.AttentionMaskInterface.register(NAME, hf.masking_utils.eager_mask)
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, "_attn_implementation"):
                config._attn_implementation = NAME
    return model


class Processor:
    """What an ``Attention`` of diffusers calls: its maps and norms, and ``attend`` for the products."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """As the processors in ``PROCESSORS``."""
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        read = encoder_hidden_states
        length = (x if read is None else read).shape[1]
        mask = attn.prepare_attention_mask(attention_mask, length, len(x))
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        if read is not None and attn.norm_cross:
            read = attn.norm_encoder_hidden_states(read)
        read = x if read is None else read
        q, k, v = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (attn.to_q(x), attn.to_k(read), attn.to_v(read))
        )
        q, k = (t if norm is None else norm(t) for norm, t in ((attn.norm_q, q), (attn.norm_k, k)))
        bias = None if mask is None else mask.unflatten(0, (-1, attn.heads))
        out = attn.attend(q, k, v, causal=False, bias=bias, scale=attn.scale)
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        if hidden_states.ndim == 4:
            out = out.transpose(1, 2).view(hidden_states.shape)
        return (out + hidden_states if attn.residual_connection else out) / attn.rescale_output_factor


def _transformers(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of transformers: by the module's ``attend`` if it has one."""
    given = [k for k in LOST if more.get(k) is not None]
    if given:
        raise ValueError(
            f"quantizer: {type(module).__name__} passes {given[0]} to its attention; expected scores with a mask alone. "
            "Leave its products in float with attention=False."
        )
    if (moved := more.get("position_bias")) is not None:
        attention_mask = moved if attention_mask is None else attention_mask + moved
    causal = attention_mask is None and bool(getattr(module, "is_causal", False))
    attend = getattr(module, "attend", None) or _plain
    read, p = attend.weigh(query, key, value, causal=causal, bias=attention_mask, scale=scaling, dropout=dropout)
    return read.transpose(1, 2).contiguous(), p


_plain = Attend()
