import cmath

import pytest
import scipy.linalg
import torch

from interlayer.construct.matrix_exp import ALPHAS, MatrixExp, MatrixExpNet, relative_error


def problem(d, seed=0, dtype=torch.complex128):
    return torch.randn(4, d, d, dtype=dtype, generator=torch.Generator().manual_seed(seed)).unbind()


# More than ten times the largest error over ten other seeds.
@pytest.mark.parametrize(("d", "precision"), [(1, 1e-13), (2, 1e-13), (4, 1e-12), (8, 1e-11), (16, 1e-10), (32, 1e-9)])
def test_both_equations_hold_for_random_complex_matrices(d, precision):
    for seed in range(5 if d < 16 else 1):
        given = problem(d, seed)
        assert relative_error(MatrixExp().build(*given), *given) < precision


@pytest.mark.parametrize("alpha", [0.5, 2.0, -1.0, 1j])
def test_weights_are_those_of_scipy(alpha):
    x1, x2, y1, y2 = (m.numpy() for m in problem(4))
    expm, inv = scipy.linalg.expm, scipy.linalg.inv
    w1 = cmath.log(alpha) * inv(x1 - x2)
    inner = expm(w1 @ x2)
    w2 = scipy.linalg.logm(inv(y1) @ y2) @ inv(inner) / (1 - alpha)
    w3 = y2 @ expm(-w2 @ inner)
    model = MatrixExp(alpha=alpha).build(*problem(4))
    for found, expected in zip((model.w1, model.w2, model.w3), (w1, w2, w3), strict=True):
        torch.testing.assert_close(found.detach(), torch.as_tensor(expected), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        model(torch.as_tensor(x1)).detach(), torch.as_tensor(w3 @ expm(w2 @ expm(w1 @ x1))), rtol=1e-8, atol=1e-8
    )


def test_inner_layers_differ_by_the_scalar_alone():
    given = problem(5)
    for alpha in ALPHAS[:4]:
        model = MatrixExp(alpha=alpha).build(*given)
        one, two = (torch.linalg.matrix_exp(model.w1 @ x) for x in given[:2])
        torch.testing.assert_close(one, alpha * two, rtol=1e-9, atol=1e-9)


def test_real_matrices_without_a_real_logarithm():
    eye = torch.eye(3)
    given = eye, torch.zeros(3, 3), eye, torch.diag(torch.tensor([-1.0, 2.0, 3.0]))  # -1 once: no real logarithm
    assert relative_error(MatrixExp().build(*given), *(m.to(torch.complex128) for m in given)) < 1e-13


def test_inputs_themselves_need_not_be_invertible():
    x1, x2, y1, y2 = problem(3)
    x1 = torch.zeros_like(x2)  # X1 is singular, X1 - X2 is not
    assert relative_error(MatrixExp().build(x1, x2, y1, y2), x1, x2, y1, y2) < 1e-11


def test_defective_ratio():
    eye = torch.eye(2, dtype=torch.complex128)
    jordan = torch.tensor([[2, 1], [0, 2]], dtype=torch.complex128)  # one eigenvector only
    given = eye, -eye, eye, jordan
    assert relative_error(MatrixExp().build(*given), *given) < 1e-13


def test_conditioning_grows_with_that_of_the_inputs():
    x1, x2, y1, y2 = problem(4)
    u, _, v = torch.linalg.svd(x1 - x2)
    found = []
    for least in (1.0, 0.1, 1e-2):
        s = torch.tensor([1.0, 1.0, 1.0, least], dtype=torch.complex128)
        found.append(MatrixExp(alpha=0.5).conditioning(x2 + u @ torch.diag(s) @ v, x2, y1, y2))
    assert [round(f.inputs) for f in found] == [1, 10, 100]
    assert found[0].error < found[1].error < found[2].error and found[0].inner < found[2].inner
    assert all(f.logarithm < 1e-12 and f.alpha == 0.5 for f in found)


def test_what_has_no_solution_is_refused():
    x1, x2, y1, y2 = problem(3)
    flat = y1.clone()
    flat[2] = flat[0] + flat[1]
    with pytest.raises(ValueError, match="X1 - X2 is singular"):
        MatrixExp().build(x1, x1, y1, y2)
    for targets in ((flat, y2), (y1, flat)):
        with pytest.raises(ValueError, match=r"Y\d is singular .* no matrix logarithm"):
            MatrixExp().build(x1, x2, *targets)
    near = x2 + 1e-6 * (x1 - x2)  # invertible, but exp(W1 X2) has exponents of about a million
    with pytest.raises(ValueError, match=r"overflows.*alpha closer to 1"):
        MatrixExp(alpha=0.5).build(near, x2, y1, y2)
    with pytest.raises(ValueError, match=r"relative error .* tolerance=1.0e-20"):
        MatrixExp(tolerance=1e-20).build(x1, x2, y1, y2)


def test_bad_input_is_refused_in_one_sentence():
    x1, x2, y1, y2 = problem(3)
    with pytest.raises(ValueError, match=r"Y2 has shape \(3, 2\)"):
        MatrixExp().build(x1, x2, y1, y2[:, :2])
    with pytest.raises(ValueError, match="X2 has elements that are not finite"):
        MatrixExp().build(x1, x2 / 0, y1, y2)
    for alpha in (0, 1, float("nan")):
        with pytest.raises(ValueError, match="alpha="):
            MatrixExp(alpha=alpha)
    with pytest.raises(ValueError, match=r"expected \[..., 3, 3\]"):
        MatrixExpNet(x1, x2, y1)(torch.randn(2, 4, 4))


def test_batches_of_inputs():
    given = problem(3)
    model = MatrixExp().build(*given)
    torch.testing.assert_close(model(torch.stack(given[:2])), torch.stack(given[2:]), rtol=1e-9, atol=1e-9)
