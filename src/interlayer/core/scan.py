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
CHUNK = 64  # positions of a chunk
SEGMENT = 1024  # positions whose chunks are run at once: as much as stays in a processor's cache


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

    ``chunked`` scores pairs within chunks of 64 and passes the state from chunk to chunk: T (32 K + 64 V + 2 K V) multiply-adds.
    Chunks are cut again (secondary chunking; Yang et al., arXiv:2312.06635), here into halves down to single
    positions: a key decays until the border between two halves, a query from there on. No gate is divided by, so gates as
    strong as you like neither overflow nor lose what follows them.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        log_a: Logarithms of the gates, at most 0; minus infinity forgets everything. Positive ones grow.
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
    gate = log_a.exp()
    if form == "step":
        return _steps(q, k, v, gate, s0)
    if form == "parallel":
        return _chunks(q, k, v, gate, s0, 2 ** (q.shape[-2] - 1).bit_length())
    if form == "chunked":
        parts, state = [], s0
        for q_, k_, v_, gate_ in zip(*(t.split(SEGMENT, -2) for t in (q, k, v, gate)), strict=True):
            y, state = _chunks(q_, k_, v_, gate_, state, CHUNK)
            parts.append(y)
        assert state is not None
        return torch.cat(parts, -2), state
    raise ValueError(f"gated: form {form!r} is not one of 'step', 'parallel', 'chunked'.")


def _steps(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, s0: Tensor | None) -> tuple[Tensor, Tensor]:
    state = k.new_zeros(*k.shape[:-2], k.shape[-1], v.shape[-1]) if s0 is None else s0
    out = []
    for t in range(q.shape[-2]):
        state = gate[..., t, :, None] * state + k[..., t, :, None] * v[..., t, None, :]
        out.append((q[..., t, :, None] * state).sum(-2))
    return torch.stack(out, -2), state


def _chunks(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    length = q.shape[-2]
    more = -length % chunk
    # Padding adds nothing to the state (k = 0) and does not decay it (a = 1).
    q, k, v = (F.pad(t, (0, 0, 0, more)).unflatten(-2, (-1, chunk)) for t in (q, k, v))
    gate = F.pad(gate, (0, 0, 0, more), value=1.0).unflatten(-2, (-1, chunk))
    scores, late, early, total = _joined(q, k, gate)
    added = early.transpose(-1, -2) @ v  # [..., chunks, K, V]
    states = [torch.zeros_like(added[..., 0, :, :]) if state is None else state]
    for factor, new in zip(total.unsqueeze(-1).unbind(-3), added.unbind(-3), strict=True):
        states.append(factor * states[-1] + new)
    y = scores @ v + late @ torch.stack(states[:-1], -3)
    return y.flatten(-3, -2)[..., :length, :], states[-1]


def _joined(q: Tensor, k: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores ``q_i' diag(a_{j+1} ... a_i) k_j`` for j <= i, [..., n, n], with n a power of 2; and for what lies outside of the n
    positions: queries decayed since before the first, keys decayed until the last, and all gates together.

    Blocks of 1, 2, 4, ... positions are joined two by two. What lies between a pair in different halves is taken up to their border
    by the keys, and from there by the queries: products of gates, nothing divided.
    """
    late, early, total = q * gate, k, gate  # of blocks of one position
    scores = (q * k).sum(-1)[..., None, None]  # [..., n blocks, 1, 1]
    while (size := scores.shape[-1]) < q.shape[-2]:
        late0, late1 = late.unflatten(-2, (-1, 2, size)).unbind(-3)
        early0, early1 = early.unflatten(-2, (-1, 2, size)).unbind(-3)
        scores0, scores1 = scores.unflatten(-3, (-1, 2)).unbind(-3)
        total0, total1 = total.unflatten(-2, (-1, 2)).unbind(-2)
        upper = torch.cat((scores0, torch.zeros_like(scores0)), -1)
        scores = torch.cat((upper, torch.cat((late1 @ early0.transpose(-1, -2), scores1), -1)), -2)
        late = torch.cat((late0, late1 * total0.unsqueeze(-2)), -2).flatten(-3, -2)
        early = torch.cat((early0 * total1.unsqueeze(-2), early1), -2).flatten(-3, -2)
        total = total0 * total1
    return scores.squeeze(-3), late, early, total.squeeze(-2)
