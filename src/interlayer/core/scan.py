"""Linear recurrences: the same numbers step by step, all at once, or chunk by chunk.

- ``scan`` runs ``s_t = a_t s_{t-1} + b_t``, element by element.
- ``gated`` runs ``S_t = diag(a_t) S_{t-1} + k_t v_t'`` and reads ``y_t = S_t' q_t``: linear attention with gates.

``step`` is the naive form and the one for decoding; ``parallel`` and ``chunked`` are for training.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Form = Literal["step", "parallel", "chunked"]
CHUNK, BLOCK = 64, 16  # positions of a chunk, and of a block within it


def scan(
    a: Float[Tensor, "B T ..."],
    b: Float[Tensor, "B T ..."],
    s0: Float[Tensor, "B ..."] | None = None,
    *,
    form: Form = "parallel",
) -> tuple[Float[Tensor, "B T ..."], Float[Tensor, "B ..."]]:
    """Run ``s_t = a_t s_{t-1} + b_t`` for t = 1 to T.

    Args:
        a: Factors; broadcast against ``b`` in the dimensions of the state.
        b: What is added.
        s0: The state before; zero by default.
        form: ``step``, one position after the other; ``parallel``, 2 T multiply-adds in log T rounds; ``chunked``, the same within
            chunks of 64, one after the other.

    Returns:
        All states, and the last one.

    Raises:
        ValueError: ``a`` and ``b`` differ in batch or length, the length is 0, or the form is unknown.

    Examples:
        >>> a, b = torch.tensor([[0.5, 0.5, 2.0]]), torch.ones(1, 3)
        >>> scan(a, b)
        (tensor([[1.0000, 1.5000, 4.0000]]), tensor([4.]))
    """
    if a.shape[:2] != b.shape[:2] or a.ndim != b.ndim or not b.shape[1]:
        raise ValueError(
            f"scan: a {tuple(a.shape)}, b {tuple(b.shape)}; expected the same batch and a length of at least 1."
        )
    if s0 is not None:
        b = torch.cat((b[:, :1] + a[:, :1] * s0.unsqueeze(1), b[:, 1:]), 1)
    if form == "step":
        states = [b[:, 0]]
        for factor, more in zip(a.unbind(1)[1:], b.unbind(1)[1:], strict=True):
            states.append(factor * states[-1] + more)
        whole = torch.stack(states, 1)
    elif form == "parallel":
        whole = _doubled(a, b)[1]
    elif form == "chunked":
        parts: list[Tensor] = []
        for factors, added in zip(a.split(CHUNK, 1), b.split(CHUNK, 1), strict=True):
            gains, states_ = _doubled(factors, added)
            parts.append(states_ + gains * parts[-1][:, -1:] if parts else states_)
        whole = torch.cat(parts, 1)
    else:
        raise ValueError(f"scan: form {form!r} is not one of 'step', 'parallel', 'chunked'.")
    return whole, whole[:, -1]


def _doubled(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Products of the factors so far, and the states from zero: pairs are joined, run, and the places between filled in."""
    length = b.shape[1]
    if length == 1:
        return a, b
    odd_a, odd_b = a[:, 1::2], b[:, 1::2]
    even_a, even_b = a[:, : length // 2 * 2 : 2], b[:, : length // 2 * 2 : 2]
    gains, states = _doubled(odd_a * even_a, odd_a * even_b + odd_b)  # at positions 1, 3, 5, ...
    later = (length + 1) // 2 - 1  # even positions after the first
    more_a, more_b = a[:, 2::2], b[:, 2::2]
    even_gains = torch.cat((a[:, :1], more_a * gains[:, :later]), 1)
    even_states = torch.cat((b[:, :1], more_a * states[:, :later] + more_b), 1)
    return _woven(even_gains, gains, length), _woven(even_states, states, length)


def _woven(even: Tensor, odd: Tensor, length: int) -> Tensor:
    if odd.shape[1] < even.shape[1]:
        odd = torch.cat((odd, odd[:, :1]), 1)  # one more, which is cut off
    return torch.stack((even, odd), 2).flatten(1, 2)[:, :length]


def gated(
    q: Float[Tensor, "*B T K"],
    k: Float[Tensor, "*B T K"],
    v: Float[Tensor, "*B T V"],
    log_a: Float[Tensor, "*B T K"],
    s0: Float[Tensor, "*B K V"] | None = None,
    *,
    form: Form = "chunked",
) -> tuple[Float[Tensor, "*B T V"], Float[Tensor, "*B K V"]]:
    """Run ``S_t = diag(a_t) S_{t-1} + k_t v_t'`` and read ``y_t = S_t' q_t``.

    ``chunked`` scores pairs within chunks of 64 and passes the state from chunk to chunk: T (64 K + 64 V + 2 K V) multiply-adds.
    However strong the gates are, no number in it exceeds those of the recurrence: between blocks of 16 positions decays are
    taken from the block's beginning, within a block pair by pair (secondary chunking; Yang et al., arXiv:2312.06635).

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        log_a: Logarithms of the gates, at most 0; minus infinity forgets everything.
        s0: The state before; zero by default.
        form: ``step``, ``parallel`` (all pairs of positions, T^2 scores: for short sequences and for tests) or ``chunked``.

    Returns:
        What is read at each position, and the last state.

    Raises:
        ValueError: Shapes that do not fit, a length of 0, or an unknown form.

    Examples:
        >>> q, k, v = (torch.ones(1, 3, 1) for _ in range(3))
        >>> gated(q, k, v, torch.full((1, 3, 1), 0.5).log())[0].flatten()
        tensor([1.0000, 1.5000, 1.7500])
    """
    if not (q.shape == k.shape == log_a.shape and v.shape[:-1] == k.shape[:-1] and q.shape[-2]):
        raise ValueError(
            f"gated: q {tuple(q.shape)}, k {tuple(k.shape)}, log_a {tuple(log_a.shape)}, v {tuple(v.shape)}; expected "
            "q, k and log_a of one shape [..., T, K], v [..., T, V], and a length of at least 1."
        )
    log_a = log_a.clamp(min=-1e3)  # forgets everything; infinities would give NaN in gradients
    if form == "step":
        return _steps(q, k, v, log_a, s0)
    if form == "parallel":
        return _whole(q, k, v, log_a, s0)
    if form == "chunked":
        return _chunks(q, k, v, log_a, s0)
    raise ValueError(f"gated: form {form!r} is not one of 'step', 'parallel', 'chunked'.")


def _steps(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, s0: Tensor | None) -> tuple[Tensor, Tensor]:
    state = k.new_zeros(*k.shape[:-2], k.shape[-1], v.shape[-1]) if s0 is None else s0
    out = []
    for t in range(q.shape[-2]):
        state = log_a[..., t, :, None].exp() * state + k[..., t, :, None] * v[..., t, None, :]
        out.append((q[..., t, :, None] * state).sum(-2))
    return torch.stack(out, -2), state


def _pairs(q: Tensor, k: Tensor, log_a: Tensor) -> Tensor:
    """``sum_K q_i k_j exp(log_a_{j+1} + ... + log_a_i)`` for j <= i, [..., n, n].

    The sums are taken for each pair, not as differences of one cumulated sum, which would lose what follows a strong gate.
    """
    n = log_a.shape[-2]
    after = torch.ones(n, n, dtype=torch.bool, device=log_a.device).tril(-1)[..., None]  # t > j
    decay = (log_a[..., :, None, :] * after).cumsum(-3)
    seen = torch.ones(n, n, dtype=torch.bool, device=log_a.device).tril()[..., None]
    return torch.einsum("...ik,...jk,...ijk->...ij", q, k, decay.masked_fill(~seen, -torch.inf).exp())


def _rest(log_a: Tensor) -> Tensor:
    """The sum of the log gates after each position."""
    return F.pad(log_a[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _whole(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, s0: Tensor | None) -> tuple[Tensor, Tensor]:
    y, state = _pairs(q, k, log_a) @ v, (k * _rest(log_a).exp()).transpose(-1, -2) @ v
    if s0 is not None:
        y = y + (q * log_a.cumsum(-2).exp()) @ s0
        state = state + log_a.sum(-2)[..., None].exp() * s0
    return y, state


def _chunks(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, s0: Tensor | None) -> tuple[Tensor, Tensor]:
    length = q.shape[-2]
    more = -length % CHUNK
    # Padding adds nothing to the state (k = 0) and does not decay it (log a = 0).
    q, k, v, log_a = (F.pad(t, (0, 0, 0, more)).unflatten(-2, (-1, CHUNK)) for t in (q, k, v, log_a))
    added = (k * _rest(log_a).exp()).transpose(-1, -2) @ v  # [..., chunks, K, V]
    total = log_a.sum(-2)[..., None].exp()
    states, last = scan(total.flatten(0, -4), added.flatten(0, -4), None if s0 is None else s0.flatten(0, -3))
    first = torch.zeros_like(states[:, :1]) if s0 is None else s0.reshape(states[:, :1].shape)
    before = torch.cat((first, states[:, :-1]), 1).reshape(added.shape)
    y = _within(q, k, log_a) @ v + (q * log_a.cumsum(-2).exp()) @ before
    return y.flatten(-3, -2)[..., :length, :], last.reshape(*added.shape[:-3], *added.shape[-2:])


def _within(q: Tensor, k: Tensor, log_a: Tensor) -> Tensor:
    """The scores of a chunk: between blocks from the beginning of the later one, within a block pair by pair."""
    blocks = CHUNK // BLOCK
    q, k, log_a = (t.unflatten(-2, (blocks, BLOCK)) for t in (q, k, log_a))  # [..., blocks, BLOCK, K]
    late, early = q * log_a.cumsum(-2).exp(), k * _rest(log_a).exp()
    index = torch.arange(blocks, device=q.device)
    lies = (index[:, None, None] > index) & (index > index[None, :, None])  # block n lies between i and j
    between = torch.einsum("ijn,...nk->...ijk", lies.to(q.dtype), log_a.sum(-2))
    between = between.masked_fill((index[:, None] <= index)[..., None], -torch.inf).exp()
    scores = torch.einsum("...ipk,...jrk,...ijk->...ipjr", late, early, between)
    own = torch.eye(blocks, dtype=q.dtype, device=q.device)[:, None, :, None] * _pairs(q, k, log_a)[..., None, :]
    return (scores + own).flatten(-4, -3).flatten(-2, -1)
