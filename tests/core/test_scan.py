"""Linear recurrences: every form gives the numbers and gradients of the naive one."""

import itertools

import pytest
import torch

from interlayer.core.scan import CHUNK, gated, scan

LENGTHS = (1, 2, 3, 7, 16, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 13)


def gradients(run, leaves):
    leaves = [t.clone().requires_grad_() for t in leaves]
    y, last = run(*leaves)
    weight = torch.linspace(-1, 1.3, y.numel(), dtype=y.dtype).view(y.shape)
    return y.detach(), last.detach(), torch.autograd.grad((y * weight).sum() + last.sin().sum(), leaves)


@pytest.mark.parametrize("length", LENGTHS)
def test_all_forms_of_a_scan_agree(length):
    torch.manual_seed(length)
    a, b = torch.randn(2, length, 3, dtype=torch.float64) * 0.9, torch.randn(2, length, 3, dtype=torch.float64)
    s0 = torch.randn(2, 3, dtype=torch.float64)
    wanted = gradients(lambda *t: scan(*t, form="step"), (a, b, s0))
    state = s0
    for t in range(length):
        state = a[:, t] * state + b[:, t]
        torch.testing.assert_close(wanted[0][:, t], state)
    for form in ("parallel", "chunked"):
        found = gradients(lambda *t, form=form: scan(*t, form=form), (a, b, s0))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(scan(a, b, form=form), scan(a, b, torch.zeros_like(s0), form="step"))


def test_factors_broadcast_and_whatever_is_split_goes_on():
    a, b = torch.rand(2, 9, 4, 1), torch.randn(2, 9, 4, 5)
    whole, last = scan(a, b)
    torch.testing.assert_close(whole, scan(a.expand_as(b), b, form="step")[0])
    _, middle = scan(a[:, :4], b[:, :4])
    torch.testing.assert_close(scan(a[:, 4:], b[:, 4:], middle), (whole[:, 4:], last))


def inputs(length, strength, dtype=torch.float64):
    torch.manual_seed(length)
    q, k = (torch.randn(2, 2, length, 4, dtype=dtype) for _ in range(2))
    v, gate = torch.randn(2, 2, length, 3, dtype=dtype), torch.rand(2, 2, length, 4, dtype=dtype)
    return q, k, v, -strength * gate, torch.randn(2, 2, 4, 3, dtype=dtype)


@pytest.mark.parametrize(
    ("length", "strength"), [*zip(LENGTHS, itertools.repeat(0.5)), (CHUNK + 5, 40.0), (CHUNK + 5, 0.0)]
)
def test_all_forms_of_gated_linear_attention_agree(length, strength):
    given = inputs(length, strength)
    wanted = gradients(lambda *t: gated(*t, form="step"), given)
    for form in ("parallel", "chunked"):
        found = gradients(lambda *t, form=form: gated(*t, form=form), given)
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(gated(*given[:4]), gated(*given[:4], torch.zeros_like(given[4]), form="step"))


def test_strong_gates_are_safe_in_single_precision():
    q, k, v, log_a, s0 = inputs(3 * CHUNK + 1, 0.0, torch.float32)
    log_a = torch.where(torch.rand_like(log_a) < 0.3, -200.0, -1e-3).requires_grad_()
    log_a.data[..., 50, :] = -torch.inf  # forgets everything
    found, last = gated(q, k, v, log_a, s0)
    wanted, end = gated(q, k, v, log_a, s0, form="step")
    torch.testing.assert_close((found, last), (wanted, end), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(found.square().sum(), log_a)
    assert torch.isfinite(gradient).all()
    other = gated(q[..., 50:, :], k[..., 50:, :], v[..., 50:, :], log_a[..., 50:, :])[0]
    torch.testing.assert_close(found[..., 50:, :], other, rtol=1e-4, atol=1e-4)


def test_no_form_sees_the_future_and_a_sequence_can_be_cut():
    q, k, v, log_a, s0 = inputs(CHUNK + 9, 1.0)
    for form in ("step", "parallel", "chunked"):
        whole, last = gated(q, k, v, log_a, s0, form=form)
        early, middle = gated(*(t[..., :70, :] for t in (q, k, v, log_a)), s0, form=form)
        torch.testing.assert_close(early, whole[..., :70, :])
        torch.testing.assert_close(
            gated(*(t[..., 70:, :] for t in (q, k, v, log_a)), middle, form=form), (whole[..., 70:, :], last)
        )


def test_compiled_and_exported_with_a_dynamic_length():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, log_a):
            return gated(q, k, v, log_a)[0]

    given = inputs(2 * CHUNK + 3, 0.5, torch.float32)[:4]
    wanted = Layer()(*given)
    compiled = torch.compile(Layer(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), wanted)
    batch = torch.export.Dim.DYNAMIC
    program = torch.export.export(Layer(), given, dynamic_shapes=({0: batch},) * 4).module()
    torch.testing.assert_close(program(*(t[:1] for t in given)), wanted[:1])


def test_clear_errors():
    x = torch.zeros(1, 3, 2)
    for wrong in (lambda: scan(x, x[:, :2]), lambda: scan(x[:, :0], x[:, :0])):
        with pytest.raises(ValueError, match=r"scan: a .*expected the same batch and a length of at least 1"):
            wrong()
    with pytest.raises(ValueError, match="form 'fast' is not one of"):
        scan(x, x, form="fast")
    with pytest.raises(ValueError, match="form 'fast' is not one of"):
        gated(x, x, x, x, form="fast")
    for wrong in ((x, x, x[:, :2], x), (x, x, x, x[..., :1]), (x[:, :0],) * 4):
        with pytest.raises(ValueError, match=r"gated: q .*expected"):
            gated(*wrong)
