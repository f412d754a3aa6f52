from functools import partial

import pytest
import torch
from scipy.integrate import RK23, RK45
from torch import nn

from interlayer.core.mixer import Cache
from interlayer.core.solve import TABLEAUS, Tableau
from interlayer.core.stream import State
from interlayer.layers.stream.node_transformer import Integrate, NODETransformer
from interlayer.models import ConvNet, Transformer, VisionTransformer


def flow(f):
    """A block that adds f(x) to the state."""
    return lambda state, block: State(state.x + f(state.x))


def solve(x, f, **options):
    order = Integrate(1, **options)
    return order(State(x), flow(f)).x, order


def test_sublayers_are_parallel():
    torch.manual_seed(0)
    stream = NODETransformer(2, 4, branches=2).double()
    sublayers = [nn.Linear(4, 4).double() for _ in range(4)]
    x = torch.randn(3, 4, dtype=torch.double)
    state = stream.start(x)
    for layer, f in enumerate(sublayers):
        state = stream.write(state, layer, f(stream.read(state, layer)))
    for a, b in ((0, 1), (2, 3)):
        n = nn.functional.layer_norm(x, (4,))
        x = x + sublayers[a](n) + sublayers[b](n)
    torch.testing.assert_close(state.x, x)
    assert state.kept == {}


@pytest.mark.parametrize("name", TABLEAUS)
def test_order_of_convergence(name):
    """Of damped pendulums, fitted over halved steps."""
    torch.manual_seed(0)
    x = torch.randn(50, 2, dtype=torch.double)

    def f(x):
        return torch.stack((x[:, 1], -x[:, 0].sin() - 0.2 * x[:, 1]), 1)

    exact = solve(x, f, solver="dormand-prince", steps=200)[0]
    counts = torch.tensor([16.0, 32.0, 64.0], dtype=torch.double)
    errors = torch.stack([(solve(x, f, solver=name, steps=int(n))[0] - exact).norm() for n in counts])
    slope = torch.linalg.lstsq(torch.stack((counts.log(), torch.ones(3)), 1), -errors.log()[:, None]).solution[0, 0]
    assert slope.item() == pytest.approx(TABLEAUS[name].order, abs=0.1)


@pytest.mark.parametrize(("name", "reference"), [("bogacki-shampine", RK23), ("dormand-prince", RK45)])
def test_pairs_are_scipys(name, reference):
    t = TABLEAUS[name]
    for i, row in enumerate(t.a[:-1], start=1):
        assert row == pytest.approx(reference.A[i, :i], abs=1e-15)
    assert t.a[-1] == pytest.approx(reference.B, abs=1e-15)
    error = [b - low for b, low in zip(t.b, t.low, strict=True)]
    assert [abs(e) for e in error] == pytest.approx([abs(e) for e in reference.E], abs=1e-15)


@pytest.mark.parametrize("solver", ["bogacki-shampine", "dormand-prince"])
def test_adapted_steps_keep_the_tolerance_and_are_each_items_own(solver):
    """Rotation with speeds 1 and 20 in one batch, against the closed form and against each item alone."""
    speed = torch.tensor([1.0, 20.0], dtype=torch.double).view(2, 1)

    def f_of(speed):
        return lambda x: speed * torch.stack((-x[:, 1], x[:, 0]), 1)

    x = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.double, requires_grad=True)
    y, order = solve(x, f_of(speed), solver=solver, tolerance=1e-6, limit=2000)
    exact = torch.stack((speed[:, 0].cos(), speed[:, 0].sin()), 1)
    assert (y - exact).abs().max() < 1e-4
    slow = solve(x[:1], f_of(speed[:1]), solver=solver, tolerance=1e-6)
    torch.testing.assert_close(slow[0], y[:1], rtol=1e-12, atol=1e-12)
    assert slow[1].evaluations < order.evaluations / 3
    grad = torch.autograd.grad(y[:, 0].sum(), x)[0]
    torch.testing.assert_close(grad, torch.stack((speed[:, 0].cos(), -speed[:, 0].sin()), 1), rtol=0, atol=1e-4)


def test_evaluations_are_counted():
    seen = []

    def f(x):
        seen.append(1)
        return -x

    for options in (
        {"solver": "rk4", "steps": 3},
        {"solver": "dormand-prince", "tolerance": 1e-3},
        {"solver": "bogacki-shampine", "tolerance": 1e-5},
    ):
        seen.clear()
        assert solve(torch.ones(2, 1), f, **options)[1].evaluations == len(seen)


def test_one_euler_step_is_the_ordinary_stack_with_a_cache():
    torch.manual_seed(0)
    sizes = {"vocab": 20, "length": 16, "depth": 3, "width": 16, "heads": 2, "stream": "node-transformer"}
    plain = Transformer(**sizes).eval()
    euler = Transformer(**sizes, order=Integrate).eval()
    euler.load_state_dict(plain.state_dict())
    tokens, cache = torch.randint(0, 20, (2, 9)), Cache()
    with torch.no_grad():
        torch.testing.assert_close(euler(tokens), plain(tokens), rtol=1e-4, atol=1e-5)
        steps = [euler(tokens[:, i : i + 1], cache=cache) for i in range(9)]
        torch.testing.assert_close(torch.cat(steps, 1), plain(tokens), rtol=1e-4, atol=1e-5)
    rk4 = Transformer(**sizes, order=partial(Integrate, solver="rk4"))
    with pytest.raises(ValueError, match="cannot use a cache"):
        rk4(tokens, cache=Cache())


def test_finer_steps_converge_in_a_vision_transformer():
    torch.manual_seed(0)
    make = partial(VisionTransformer, 1, 8, patch=2, depth=2, width=16, heads=2, stream="node-transformer")
    fine = make(order=partial(Integrate, solver="rk4", steps=8)).double()
    image = torch.randn(3, 1, 8, 8, dtype=torch.double)
    gaps = []
    for options in ({"steps": 4}, {"solver": "rk4"}, {"solver": "dormand-prince", "tolerance": 1e-7}):
        model = make(order=partial(Integrate, **options)).double()
        model.load_state_dict(fine.state_dict())
        gaps.append(float((model(image) - fine(image)).abs().max().detach()))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-6
    assert ConvNet(1, 10, depth=8, width=4, stream="node-transformer")(image.float()).isfinite().all()


def test_what_cannot_work_is_refused():
    sizes = {"vocab": 20, "length": 16, "depth": 2, "width": 16, "heads": 2}
    adapted = partial(Integrate, solver="dormand-prince", tolerance=1e-3)
    with pytest.raises(ValueError, match="a causal model needs fixed steps"):
        Transformer(**sizes, order=adapted)
    shared = Transformer(**sizes, stream="value-residual", order=partial(Integrate, solver="midpoint"))
    with pytest.raises(ValueError, match=r"carries \['v'\] besides the state"):
        shared(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="'rk5' is not one of"):
        Integrate(2, solver="rk5")
    with pytest.raises(ValueError, match="limit=3 has no effect on fixed steps"):
        Integrate(2, limit=3)
    with pytest.raises(ValueError, match="steps 0"):
        Integrate(2, steps=0)
    with pytest.raises(ValueError, match="'rk4' does not estimate its error"):
        Integrate(2, solver="rk4", tolerance=1e-3)
    with pytest.raises(RuntimeError, match="3 steps did not reach the end"):
        solve(torch.ones(1, 1), lambda x: 100 * x.sin(), solver="dormand-prince", tolerance=1e-9, limit=3)
    with pytest.raises(ValueError, match=r"sums are off by 0\.5"):
        Tableau((), (0.5,), (0.0,), 1)
    with pytest.raises(ValueError, match="first same as last"):
        Tableau(((0.5,),), (0.0, 1.0), (0.0, 0.5), 2, (1.0, 0.0))
