"""Gated linear attention: a matrix-valued memory that the data let fade."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interlayer.core.example import Example
from interlayer.core.parts import Linear, plain_linear
from interlayer.core.recurrent import Recurrent
from interlayer.core.scan import gated


class GLA(Recurrent):
    """Linear attention whose matrix-valued state fades by gates that each token sets for each key feature.

    Paper: Yang, Wang, Shen, Panda and Kim, "Gated Linear Attention Transformers with Hardware-Efficient Training",
    arXiv:2312.06635.

    Equations of the GLA layer, for each head of key width K:

    - ``a_t = sigmoid(x_t W_1 W_2 + b)^(1 / temperature)``, with a rank-16 map, a vector in (0, 1)^K
    - ``S_t = diag(a_t) S_{t-1} + k_t v_t'``, the state [K, V]
    - ``o_t = S_t' q_t / sqrt(K)``
    - ``y_t = (swish(x_t W_r) * RMSNorm(o_t)) W_o``, the norm within each head

    Sizes and defaults are those of the authors' code (fla-org/flash-linear-attention, ``layers/gla.py``): keys of half the
    width, values of the full width, no feature map, no position encoding, an epsilon of 1e-5 and one gain shared by the heads. Its
    short convolutions, fewer key-value heads and clamped gates, which are off there too, are left out. The equations were taken
    from that code. The authors' first release (berlino/gated_linear_attention) has a LayerNorm without gain instead, a bias in the
    swish gate, and Glorot's uniform with gain 2^-2.5 for queries, keys and gates; the paper's own text could not be read.

    A sequence is run in chunks (``core.scan.gated``): S (32 K + 64 V + 2 K V) multiply-adds a head. Decoding carries the state
    alone, H K V numbers however long the text is. States and gates are at least float32. At padding the state stays as it is.

    Args:
        width: Features D.
        heads: Heads H.
        expand_k: Features of all keys together, as a multiple of ``width``.
        expand_v: Features of all values together, as a multiple of ``width``.
        rank: Rank of the map from a token to its gates.
        temperature: Divides the logarithm of the gates; the greater, the slower the memory fades.
        causal: Must be True.
        linear: Called with ``inputs=, outputs=, bias=``.

    Shapes: [B, S, D] to [B, S, D]; the state is [B, H, K, V].

    Raises:
        ValueError: Keys or values that the heads do not divide, a rank or temperature that is not positive, a model that is not
            causal, or an input of another width.

    Examples:
        >>> layer = GLA(16, heads=2)
        >>> layer(torch.randn(3, 100, 16)).shape
        torch.Size([3, 100, 16])
        >>> y, state = layer.step(torch.randn(3, 16), layer.start(3))
        >>> y.shape, state.shape
        (torch.Size([3, 16]), torch.Size([3, 2, 4, 8]))
    """

    def __init__(
        self,
        width: int,
        heads: int = 4,
        *,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        rank: int = 16,
        temperature: float = 16.0,
        causal: bool = True,
        linear: Linear = plain_linear,
    ) -> None:
        super().__init__()
        keys, values = int(width * expand_k), int(width * expand_v)
        if heads < 1 or min(keys, values) < 1 or keys % heads or values % heads:
            raise ValueError(
                f"GLA: keys of {keys} and values of {values} features for {heads} heads; expected positive multiples of heads. "
                "Change width, expand_k or expand_v."
            )
        if rank < 1 or temperature <= 0:
            raise ValueError(f"GLA: rank {rank} and temperature {temperature}; expected both above 0.")
        if not causal:
            raise ValueError("GLA: a recurrence reads in the order of the tokens; it needs a causal model.")
        self.width, self.heads, self.temperature = width, heads, temperature
        self.sizes = [keys, keys, values, values]
        self.inputs = linear(inputs=width, outputs=sum(self.sizes), bias=False)
        self.gate = nn.Sequential(
            linear(inputs=width, outputs=rank, bias=False), linear(inputs=rank, outputs=keys, bias=True)
        )
        self.norm = nn.RMSNorm(values // heads, eps=1e-5)
        self.out = linear(inputs=values, outputs=width, bias=False)

    def start(self, batch: int) -> Float[Tensor, "B H K V"]:
        """An empty memory."""
        weight = self.norm.weight
        shape = (batch, self.heads, self.sizes[0] // self.heads, self.sizes[2] // self.heads)
        return torch.zeros(shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)

    def log_gates(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S HK"]:
        """Logarithms of the gates ``a``."""
        return F.logsigmoid(self.gate(x)) / self.temperature

    def run(  # type: ignore[override]
        self, x: Float[Tensor, "B S D"], state: Float[Tensor, "B H K V"], real: Bool[Tensor, "B S"] | None = None
    ) -> tuple[Float[Tensor, "B S D"], Float[Tensor, "B H K V"]]:
        """Run over all positions from ``state`` on."""
        if x.ndim != 3 or x.shape[-1] != self.width:
            raise ValueError(f"GLA: input {tuple(x.shape)}; expected [batch, sequence, {self.width}].")
        q, k, v, swish = self.inputs(x).split(self.sizes, -1)
        log_a = self.log_gates(x)
        if real is not None:
            k, log_a = k * real.unsqueeze(-1), log_a * real.unsqueeze(-1)
        q, k, v, log_a = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2).to(state.dtype) for t in (q, k, v, log_a))
        with torch.autocast(x.device.type, enabled=False):
            read, state = gated(
                q * q.shape[-1] ** -0.5, k, v, log_a, state, form="step" if x.shape[1] == 1 else "chunked"
            )
        normed = self.norm(read.transpose(1, 2).to(self.norm.weight.dtype)).flatten(2)
        return self.out(normed.to(swish.dtype) * F.silu(swish)), state


EXAMPLE = Example(
    make=lambda: GLA(16, heads=2, temperature=1.0),
    inputs=lambda: (torch.randn(2, 6, 16),),
    odd=lambda: (torch.randn(3, 67, 16),),
    axis=1,
    causal=True,
    streams=True,
    modes={"four heads, wide keys": lambda: GLA(16, heads=4, expand_k=1.0, expand_v=2.0, rank=3)},
)
