"""A hand-made decoder whose circuit is known: after (name, year, "to") it predicts the years greater than that year."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from interlayer.models import Transformer

YEARS, NAMES = 10, 10
TO = YEARS + NAMES  # tokens: years 0 to 9, names 10 to 19, and "to"
WIDTH, NAME, FROM, MOVED, OUT = (
    64,
    12,
    24,
    36,
    48,
)  # where names, copied names, copied years and logits lie; years lie at 0


@torch.no_grad()
def greater_than() -> Transformer:
    """Head 0 of block 0 copies the year to the last token; head 1 copies the name, which nothing needs. Block 0's MLP copies
    names on. Neuron t of block 1's MLP fires for years from t up and lowers the logits of year t; another raises all of them, and one
    marks years and names.

    Examples:
        >>> logits = greater_than()(torch.tensor([[13, 6, 20]]))[0, -1]
        >>> (logits > 0).nonzero().flatten().tolist()
        [7, 8, 9]
    """
    model = Transformer(TO + 1, 3, 2, WIDTH, 2, norm=nn.Identity, position="none", activation=nn.ReLU, hidden=YEARS + 2)
    model.head.weight = nn.Parameter(torch.zeros(TO + 1, WIDTH))
    for p in model.parameters():
        p.zero_()
    years, names = torch.arange(YEARS), torch.arange(NAMES)
    embed = model.embed.weight
    embed[years, years], embed[:YEARS, YEARS] = 1.0, 1.0
    embed[YEARS + names, NAME + names], embed[YEARS:TO, 22] = 1.0, 1.0
    embed[TO, 11] = 1.0
    first: Any
    second: Any
    first, second = model.trunk.blocks
    qkv, out = first.mixer.qkv.weight, first.mixer.out.weight
    half = WIDTH // 2
    for head, (kind, source, target) in enumerate(((YEARS, 0, MOVED), (22, NAME, FROM))):
        q, k, v = (part * WIDTH + head * half for part in range(3))
        qkv[q, 11], qkv[k, kind] = 60.0, 1.0  # "to" looks for a year, or for a name
        qkv[v + years, source + years] = 1.0
        out[target + years, head * half + years] = 1.0
    first.mlp.up.weight[years, NAME + years] = 1.0
    first.mlp.down.weight[FROM + years, years] = 1.0
    up, down = second.mlp.up, second.mlp.down
    up.weight[:YEARS, MOVED : MOVED + YEARS] = torch.ones(YEARS, YEARS).triu()
    up.weight[:, 11], up.bias[:YEARS], up.weight[YEARS, 11] = 1.0, -1.0, 1.0
    up.weight[YEARS + 1, YEARS], up.weight[YEARS + 1, 22], down.weight[60, YEARS + 1] = 1.0, 1.0, 1.0
    down.weight[OUT + years, years] = -2.0
    down.weight[OUT : OUT + YEARS, YEARS] = 1.0
    model.head.weight[years, OUT + years] = 1.0
    return model.eval()


def years() -> Int[Tensor, "B 3"]:
    """Every (name, year, "to"); the first year is 4."""
    name, year = torch.meshgrid(torch.arange(NAMES), torch.arange(YEARS).roll(-4), indexing="ij")
    return torch.stack([YEARS + name.flatten(), year.flatten(), torch.full((NAMES * YEARS,), TO)], 1)
