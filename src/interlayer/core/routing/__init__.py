"""Routing: which experts see which tokens, and the products of each expert with its own tokens.

One sort puts the tokens of each expert beside each other; each expert then multiplies its run. Nothing has the size tokens x
experts x capacity.

>>> import torch
>>> x, up, down = torch.randn(2, 5, 4), torch.randn(3, 4, 8), torch.randn(3, 8, 4)
>>> routed = route(torch.randn(2, 5, 3), k=2, capacity=4)
>>> hidden = dispatch(x.flatten(0, 1), routed, up).relu()  # the tokens of each expert times its weight
>>> combine(hidden, routed, down).shape  # times the second weight, weighted by the gates, back in the tokens' order
torch.Size([10, 4])
"""

from __future__ import annotations

from interlayer.core.routing.parallel import exchange, share
from interlayer.core.routing.products import combine, dispatch, grouped
from interlayer.core.routing.routes import Routed, balance, route, z_loss

__all__ = ["Routed", "balance", "combine", "dispatch", "exchange", "grouped", "route", "share", "z_loss"]
