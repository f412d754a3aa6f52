"""Where parts are usually attached, found by the names that modules have in torch, transformers and ``interlayer.models``."""

from __future__ import annotations

import posixpath
import re

from torch import nn

from interlayer.core.attach.attaching import own
from interlayer.core.swap import bypassed

# The last linear map of a feed-forward, and the dropout behind it, relative to that map ("" where there is none).
FEED_FORWARDS = {
    r"(?<!attention\.)output\.dense": "../dropout",  # BERT, RoBERTa, ELECTRA
    r"mlp\.c_proj": "../dropout",  # GPT-2
    r"DenseReluDense\.wo": "../../dropout",  # T5
    r"mlp\.fc2": "../../dropout",  # ViT; CLIP has no dropout
    r"(mlp|feed_forward)\.down_proj": "",  # Llama, Mistral, Qwen, Gemma
    r"ffn\.lin2": "../dropout",  # DistilBERT
    r"mlp\.down": "",  # interlayer.models
    r"linear2": "../dropout2",  # torch.nn.TransformerEncoderLayer
    r"fc2": "",  # BART and OPT, which drop out by a function
}
ATTENTIONS = r"attention\.output\.dense|attn\.c_proj|self_attn\.(o_proj|out_proj)|(Self|EncDec)Attention\.o|mixer\.out|attention\.o_proj"


def feed_forwards(model: nn.Module) -> dict[str, str]:
    """The last linear map of every feed-forward, with the module behind whose output a part may act: the dropout after it, or the map.

    Raises:
        ValueError: None is known by its name.

    Examples:
        >>> feed_forwards(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1, enable_nested_tensor=False))
        {'layers.0.linear2': 'layers.0.dropout2'}
    """
    names, found = _own(model), dict[str, str]()
    for name in names:
        for pattern, dropout in FEED_FORWARDS.items():
            if re.search(rf"(^|\.){pattern}$", name):
                late = posixpath.normpath(f"{name.replace('.', '/')}/{dropout}").replace("/", ".")
                found[name] = late if isinstance(names.get(late), nn.Dropout) else name
                break
    return _known(model, found)


def attention_outputs(model: nn.Module) -> list[str]:
    """The last linear map of every attention.

    Raises:
        ValueError: None is known by its name.
    """
    found = {n: n for n in _own(model) if re.search(rf"(^|\.)({ATTENTIONS})$", n)}
    return list(_known(model, found))


def biased(model: nn.Module) -> list[str]:
    """Every linear map and norm with a bias, as BitFit trains them; those whose module is never called are left out.

    Raises:
        ValueError: There is none.
    """
    kinds = (nn.Linear, nn.LayerNorm, nn.GroupNorm)
    found = {
        n: n
        for n, m in _own(model).items()
        if (isinstance(m, kinds) or type(m).__name__ == "Conv1D") and getattr(m, "bias", None) is not None
    }
    return list(_known(model, {n: n for n in found if n not in bypassed(model)}))


def host_of(model: nn.Module, at: str) -> str:
    """The host of a part that spans a list of blocks: the last block, or the first module in it that is no container.

    Args:
        model: Any model.
        at: Name of the list.

    Examples:
        >>> host_of(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU())), "")
        '1.0'
    """
    last = [name for name, _ in model.get_submodule(at).named_children() if name.isdigit()][-1]
    name = f"{at}.{last}".lstrip(".")
    while isinstance(model.get_submodule(name), nn.Sequential | nn.ModuleList):
        name += ".0"
    return name


def _own(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if own(name)}


def _known(model: nn.Module, found: dict[str, str]) -> dict[str, str]:
    if not found:
        raise ValueError(
            f"attach: {type(model).__name__} has no such module under a name that is known; expected those of torch, "
            "transformers or interlayer.models. Name the modules yourself."
        )
    return found
