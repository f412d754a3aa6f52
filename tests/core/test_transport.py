import sys

import pytest
import torch

from interlayer.core.transport import transport, transport_naive


def costs(n: int, m: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(k, 3, generator=generator, dtype=torch.float64) for k in (n, m))
    return torch.cdist(x, y)


@pytest.mark.parametrize(("n", "m"), [(6, 6), (7, 4), (3, 8), (1, 5)])
def test_exact_plans_cost_what_the_linear_programme_costs(n, m):
    c = costs(n, m)
    fast, slow = transport(c), transport_naive(c)
    assert (fast * c).sum().item() == pytest.approx((slow * c).sum().item(), rel=1e-9)
    assert torch.allclose(fast.sum(1), torch.full((n,), 1 / n).double()) and fast.min() >= 0
    assert torch.allclose(fast.sum(0), torch.full((m,), 1 / m).double())
    assert int((fast > 0).sum()) <= n + m - 1


def test_an_exact_plan_between_equal_numbers_is_a_permutation():
    c = costs(20, 20)
    order = torch.randperm(20)
    assert torch.equal(transport(c[:, order]) > 0, (transport(c) > 0)[:, order])
    assert torch.equal(transport(c + 100 * torch.rand(20, 1) + 100 * torch.rand(20)), transport(c))
    assert torch.allclose(transport(torch.cdist(torch.eye(5), torch.eye(5)[[2, 0, 1, 4, 3]])) * 5,
                          torch.eye(5)[[2, 0, 1, 4, 3]].T.double())  # fmt: skip


@pytest.mark.parametrize("reg", [0.05, 0.5])
def test_sinkhorn_agrees_with_its_scalings_entry_by_entry(reg):
    c = costs(5, 4)
    assert torch.allclose(transport(c, reg=reg), transport_naive(c, reg=reg), atol=1e-7)
    assert torch.allclose(transport(1e4 * c, reg=reg), transport(c, reg=reg), atol=1e-9)  # the unit plays no role


def test_entropy_blurs_and_its_absence_is_the_limit():
    c = costs(8, 6)
    near = [float((transport(c, reg=reg) - transport(c)).abs().sum()) for reg in (1.0, 0.1, 0.005)]
    assert near[0] > near[1] > near[2] and near[2] < 0.2
    assert torch.allclose(transport(c, reg=1e3), torch.full((8, 6), 1 / 48).double(), atol=1e-4)


def test_a_small_entropy_does_not_underflow():
    c = costs(6, 6)
    c[0, 0] = 60.0  # exp(-cost / reg) is zero in float64
    plan = transport(c, reg=0.01)
    assert torch.allclose(plan.sum(0), torch.full((6,), 1 / 6).double(), atol=2e-3) and plan[0, 0] == 0


def test_clear_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"costs of shape \(3,\); expected a matrix"):
        transport(torch.ones(3))
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="negative or not finite"):
            transport(torch.tensor([[bad, 1.0]]))
    for reg in (-0.1, float("inf")):
        with pytest.raises(ValueError, match="reg was"):
            transport(torch.ones(2, 2), reg=reg)
    monkeypatch.setattr("interlayer.core.transport.ITERATIONS", 1)
    with pytest.raises(ValueError, match=r"after 1 iterations of Sinkhorn .* Raise reg, 0.02 now"):
        transport(costs(9, 9), reg=0.02)
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=r'transport needs .ot.: pip install "interlayer\[merge\]"'):
        transport(torch.ones(2, 2))
