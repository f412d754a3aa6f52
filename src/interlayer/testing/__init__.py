"""The contracts that every system passes; public, so that you can hold your own components to them.

>>> import torch
>>> from interlayer.testing import Example, check
>>> class Double(torch.nn.Module):
...     def forward(self, x):
...         if x.shape[-1] != 3:
...             raise ValueError(f"Double: input {tuple(x.shape)}; expected [..., 3].")
...         return 2 * x
>>> outcomes = check(Double, Example(make=Double, inputs=lambda: (torch.randn(4, 3),)))
>>> outcomes["batch"]
'kept'
"""

from interlayer.core.example import Example
from interlayer.testing.contracts import ContractError, check, contracts, example_of, hold, kind_of

__all__ = ["ContractError", "Example", "check", "contracts", "example_of", "hold", "kind_of"]
