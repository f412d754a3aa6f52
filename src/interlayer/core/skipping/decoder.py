"""Skipping on unmodified Hugging Face decoders: around their attention, or around whole blocks."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from interlayer.core import taps
from interlayer.core.skipping.skip import Skip, scatter

CACHES = ("past_key_values", "layer_past")
MASK = "attention_mask"
PLACES = ("position_ids", "position_embeddings")
FOREIGN = ("alibi", "residual")  # of attentions that add the residual themselves, or a bias for each head


def attention_of(block: nn.Module) -> str:
    """The name of a decoder block's attention that ``SkipDecoder`` can wrap; empty if there is none."""
    for name, part in block.named_children():
        if isinstance(getattr(part, "layer_idx", None), int) and not getattr(part, "is_cross_attention", False):
            takes = inspect.signature(part.forward).parameters
            if MASK in takes and any(c in takes for c in CACHES) and not any(f in takes for f in FOREIGN):
                return name
    return ""


class SkipDecoder(Skip):
    """An attention or a block of a Hugging Face decoder that runs only for what its router keeps.

    Sequences: the first tokens that come with a cache decide, as a rule the prompt. A sequence that skips goes on skipping, and its
    layer of the cache holds neither keys nor values of it. Without a cache each pass decides anew. Tokens: each token decides for
    itself, and what is kept attends to what was kept before it. In both the cache counts all tokens, so positions and masks stay those
    of the plain model; beams and cropping act on what is held.

    Args:
        module: What ``attention_of`` finds in a block, or the block.
        width: Features D.
        **options: See ``Skip``.

    Shapes: as the module's, [B, S, D] to [B, S, D].

    Costs what the module costs on what is kept, and O(B S D) for the mean, gathering and scattering. Where the tokens of a
    batch differ in what they keep, the cache has holes: its length is that of what any sequence keeps.

    Raises:
        ValueError: A cache of another model or batch or one that does not grow, a tensor argument that it does not support, a mask that is
            not [B, 1, S, T] where tokens skip, or attention scores (around a block, hidden states too) that transformers is to return.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, pad_token_id=0)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> block = model.transformer.h[0]
        >>> block.attn = SkipDecoder(block.attn, 16).eval()
        >>> model.generate(torch.ones(2, 3, dtype=torch.long), max_new_tokens=2, do_sample=False).shape
        torch.Size([2, 5])
    """

    def __init__(self, module: nn.Module, width: int, **options: Any) -> None:
        super().__init__(module, width, **options)
        if _index(module) < 0:
            raise ValueError(
                f"SkipDecoder: {type(module).__name__} has no layer_idx; expected an attention or a block of a Hugging Face decoder."
            )

    @torch.compiler.disable(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module for what is kept."""
        x, named = _named(self.module, args, kwargs)
        mask, tokens = named.get(MASK), self.per == "token"
        if odd := [n for n, v in named.items() if isinstance(v, Tensor) and n not in (MASK, *PLACES)]:
            raise ValueError(
                f"SkipDecoder: {type(self.module).__name__} gets the tensor {odd[0]!r}, which skipping does not support."
            )
        if tokens and mask is not None and mask.ndim != 4:
            raise ValueError(
                f"SkipDecoder: mask {tuple(mask.shape)}; expected [batch, 1, new, all] where tokens skip. Load the model with "
                "attn_implementation='sdpa'."
            )
        if self.training:
            keep, gate = self.decide(x, _real(mask, x))
            if tokens:
                named[MASK] = _among(keep, mask, x)
            return self.gated(self.module(x, **named), x, gate)
        if asked := _recorded() & ({"attentions", "hidden_states"} if self.passes else {"attentions"}):
            raise ValueError(
                f"SkipDecoder: output_{min(asked)} was asked for, but what skips has none. Leave it out, or read with core.taps."
            )
        name = next((c for c in CACHES if named.get(c) is not None), "")
        layer = None
        if name:
            from interlayer.core.skipping.kept import layer_of

            layer = layer_of(named[name], _index(self.module), tokens=tokens, batch=len(x))
            named[name] = layer
        out = self._tokens(x, named, layer) if tokens else self._sequences(x, named, layer)
        if layer is not None:
            layer.length += x.shape[1]
        return out

    def _sequences(self, x: Tensor, named: dict[str, Any], layer: Any) -> Any:
        """Run for the sequences that are kept."""
        held = None if layer is None else layer.keep
        keep = self.decide(x, _real(named.get(MASK), x))[0] if held is None else held
        rows, size = keep.nonzero().squeeze(1), len(x)
        if layer is not None:
            layer.keep = keep
            if len(rows):
                layer.await_rows(rows)
        if not len(rows):
            return self._nothing(x)
        if len(rows) == size:
            return self.module(x, **named)
        picked = {n: tree_map(lambda t: _rows(t, rows), v) if n in (MASK, *PLACES) else v for n, v in named.items()}
        out = self.module(x[rows], **picked)
        if self.passes:
            return taps.swap(out, x.index_copy(0, rows, taps.first(out).to(x.dtype)))
        return tree_map(lambda t: scatter(t, rows, size) if isinstance(t, Tensor) else t, out)

    def _tokens(self, x: Tensor, named: dict[str, Any], layer: Any) -> Any:
        """Run for the tokens that are kept, those of a sequence in their order, with repeats to fill the shorter rows."""
        keep = self.decide(x, _real(named.get(MASK), x))[0]
        batch, length, width = x.shape
        counts = keep.sum(1)
        rows = counts.nonzero().squeeze(1)
        if not len(rows):
            return self._nothing(x)
        start, most = 0 if layer is None else layer.length, int(counts.max())
        at = keep[rows].byte().sort(dim=1, descending=True, stable=True).indices[:, :most]
        valid = keep[rows].gather(1, at)
        spots = torch.where(valid, at + start, -1)
        if layer is not None:
            layer.await_rows(rows)
            new = spots.new_full((batch, most), -1).index_copy(0, rows, spots)
            layer.spots = new if layer.spots is None else torch.cat((layer.spots, new), 1)
            spots = layer.spots[rows]
        named[MASK] = _visible(named.get(MASK), rows, at, spots, start, length, bool(valid.all()))
        there = [n for n in PLACES if named.get(n) is not None]
        named |= {n: tree_map(lambda t: _at(_rows(t, rows), at), named[n]) for n in there}
        out = self.module(_at(x[rows], at), **named)
        y = taps.first(out)[valid]
        whole = (x.to(y.dtype) if self.passes else y.new_zeros(x.shape)).reshape(batch * length, width)
        whole = whole.index_copy(0, (rows[:, None] * length + at)[valid], y).view(x.shape)
        return whole if isinstance(out, Tensor) else (whole, *[None] * (len(out) - 1))

    def _nothing(self, x: Tensor) -> Any:
        """What comes back if nothing is kept: a block's input, or an attention's output 0 without scores."""
        return x if self.passes else (torch.zeros_like(x), None)


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The input of a call, and its other arguments by name."""
    signature = inspect.signature(type(module).forward)
    named = dict(signature.bind(module, *args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    names = list(named)
    return named[names[1]], {n: named[n] for n in names[2:]}


def _index(module: nn.Module) -> int:
    """The number of a module's layer in a cache; -1 if it has none."""
    return next((i for m in module.modules() if isinstance(i := getattr(m, "layer_idx", None), int)), -1)


def _recorded() -> set[str]:
    """What transformers collects in this pass from inside the modules, such as ``attentions``."""
    collector = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    return set((collector.get() if collector else None) or ())


def _real(mask: Tensor | None, x: Tensor) -> Bool[Tensor, "B S"] | None:
    """Which tokens are no padding: those that may see themselves."""
    if mask is None:
        return None
    length = x.shape[1]
    if mask.ndim == 2:
        return mask[:, -length:].bool()
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    real = allowed.diagonal(mask.shape[-1] - length, -2, -1)[:, 0]
    return real.expand(len(x), length)


def _rows(t: Any, rows: Tensor) -> Any:
    """The rows of a tensor; one that all rows share stays."""
    return t[rows] if isinstance(t, Tensor) and len(t) > 1 else t


def _at(t: Float[Tensor, "r S ..."], at: Int[Tensor, "r n"]) -> Float[Tensor, "r n ..."]:
    """The positions of each row."""
    t = t.expand(len(at), *t.shape[1:])
    return t.gather(1, at.view(*at.shape, *[1] * (t.ndim - 2)).expand(*at.shape, *t.shape[2:]))


def _among(keep: Tensor, mask: Tensor | None, x: Tensor) -> Tensor:
    """The mask with which all is computed as if only what is kept were there; what skips sees itself too, to see something."""
    length = x.shape[1]
    if mask is not None and mask.shape[-1] != length:
        raise ValueError("SkipDecoder: a cache in training where tokens skip; expected none. Pass use_cache=False.")
    seen = keep[:, None, None] | torch.eye(length, dtype=torch.bool, device=x.device)
    if mask is None:
        return seen & torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def _visible(
    mask: Tensor | None, rows: Tensor, at: Tensor, spots: Tensor, start: int, length: int, full: bool
) -> Tensor | None:
    """Which stored tokens each kept one sees: earlier ones that are no holes, as far as the model's own mask allows.

    Args:
        mask: The model's, over all tokens, or over the last ones if it has a window.
        rows: Sequences that keep a token.
        at: Which of the new tokens these are.
        spots: Positions of all stored tokens; -1 is a hole.
        start: Tokens before the new ones.
        length: New tokens.
        full: Whether all of ``at`` is kept.
    """
    if mask is None and full and not start:
        return None
    seen = (spots >= 0)[:, None] & (spots[:, None] <= (at + start)[:, :, None])
    if mask is None:
        return seen[:, None]
    first = start + length - mask.shape[-1]  # the position of the mask's first column
    seen = (seen & (spots >= first)[:, None])[:, None]
    found = mask.expand(int(rows.max()) + 1, *mask.shape[1:]) if len(mask) == 1 else mask
    found = found[rows].gather(2, at[:, None, :, None].expand(-1, -1, -1, mask.shape[-1]))
    column = (spots - first).clamp(min=0)[:, None, None].expand(-1, -1, at.shape[1], -1)
    found = found.gather(3, column)
    return found & seen if mask.dtype == torch.bool else found.masked_fill(~seen, torch.finfo(mask.dtype).min)
