"""Bilinear layers, and their exact form as tensors: one layer, with attention before it, and residual stacks of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.example import Example
from interlayer.core.parts import GLU, Linear, plain_linear


class Bilinear(GLU):
    """A gated linear unit without the non-linearity: ``W_3 (W_1 x * W_2 x)``, a quadratic function that tensors express.

    Paper: Sharkey, "A technical note on bilinear layers for interpretability", arXiv:2305.03452; the layer is Shazeer's
    (arXiv:2002.05202).

    Equation: ``y_i = sum_{jk} B_ijk x_j x_k`` with ``B_ijk = sum_h W3_ih W1_hj W2_hk`` (``tensor``). As ``x_j x_k = x_k x_j``, only the
    symmetric part counts, and ``y`` is a linear map (``symmetric``) of the D (D + 1) / 2 distinct products
    (``symmetric_product``). ``with_attention`` and ``residual_stack`` carry this through heads and residuals.

    The layer costs 3 D hidden multiply-adds for each position; its tensor has D^3 numbers.

    Args:
        width: Features D.
        hidden: Hidden features. Defaults to 8/3 D rounded up to a multiple of 8, for the parameters of an MLP with 4 D.
        linear: Called with ``inputs=, outputs=, bias=``.

    Shapes: [..., D] to [..., D].

    Raises:
        ValueError: An input with another number of features.

    Examples:
        >>> import torch
        >>> layer, x = Bilinear(6).double(), torch.randn(6, dtype=torch.float64)
        >>> torch.allclose(layer(x), torch.einsum("ijk,j,k->i", layer.tensor(), x, x))
        True
    """

    def __init__(self, width: int, *, hidden: int | None = None, linear: Linear = plain_linear) -> None:
        super().__init__(width, hidden=hidden, activation=nn.Identity, linear=linear)
        self.width = width

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Multiply two linear maps of each position."""
        if x.shape[-1:] != (self.width,):
            raise ValueError(f"Bilinear: input {tuple(x.shape)}; expected [..., {self.width}].")
        return super().forward(x)

    def tensor(self) -> Float[Tensor, "D D D"]:
        """B, with the output on the first axis."""
        return torch.einsum("ih,hj,hk->ijk", self.down.weight, self.gate.weight, self.up.weight)

    def symmetric(self) -> Float[Tensor, "D P"]:
        """The map from ``symmetric_product(x)`` to the output; squares have one entry of B, mixed products the sum of two."""
        b_DDD = self.tensor()
        j, k = torch.triu_indices(self.width, self.width, device=b_DDD.device)
        return b_DDD[:, j, k] + torch.where(j == k, 0, b_DDD[:, k, j])


def symmetric_product(x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B P"]:
    """The distinct products ``x_j x_k``, ``j <= k``, row by row: D (D + 1) / 2 of them."""
    j, k = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    return x[..., j] * x[..., k]


def with_attention(layer: Bilinear, ov: Float[Tensor, "H D D"]) -> Float[Tensor, "H H D D D"]:
    """The layer after attention heads, as one tensor over pairs of heads.

    A head h with pattern ``A^h`` gives ``sum_s A^h_ts O_h x_s``, where ``O_h`` is its output times its value map. With the tensor C given
    here, the layer's output at t is ``sum_{h,g,s,r} A^h_ts A^g_tr C[h, g] x_s x_r``. A residual path is one more head, with the
    identity as pattern and as map.

    Args:
        layer: The bilinear layer.
        ov: ``O_h`` of each head.
    """
    return torch.einsum("ijk,hja,gkb->hgiab", layer.tensor(), ov, ov)


def residual_stack(layers: Sequence[Bilinear]) -> list[Tensor]:
    """The residual stack of layers ``x + f(x)`` as one polynomial: tensor m (from 0) maps m + 1 copies of x, [D, D, ..., D].

    ``y = sum_m T_m x^(m+1)``. L layers reach degree 2^L, and the largest tensor has D^(2^L + 1) numbers: for small cases.
    """
    b_DDD = layers[0].tensor()
    terms: list[Tensor] = [torch.eye(layers[0].width, dtype=b_DDD.dtype, device=b_DDD.device)]
    for layer in layers:
        b_DDD, new = layer.tensor(), list(terms)
        new += [torch.zeros(())] * len(terms)
        for m, left in enumerate(terms):
            for n, right in enumerate(terms):
                product = torch.tensordot(torch.tensordot(b_DDD, left, ([1], [0])), right, ([1], [0]))
                new[m + n + 1] = new[m + n + 1] + product
        terms = new
    return terms


def evaluate(terms: Sequence[Tensor], x: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
    """The polynomial of ``residual_stack`` at one x."""
    total = torch.zeros_like(x)
    for term in terms:
        while term.ndim > 1:
            term = term @ x
        total = total + term
    return total


EXAMPLE = Example(
    make=lambda: Bilinear(6, hidden=8),
    inputs=lambda: (torch.randn(2, 5, 6),),
    odd=lambda: (torch.randn(3, 6),),
    axis=1,
    causal=True,
)
