import pytest
import torch
from torch import nn

from interlayer.layers.stream.identity_mappings import ORDERS, SHORTCUTS, IdentityMappings
from interlayer.models import ConvNet


def walk(stream, x, blocks):
    state, branches, inputs = stream.start(x), [], []
    for layer, f in enumerate(blocks):
        y = f(stream.read(state, layer))
        inputs.append(state.x)
        branches.append(y)
        state = stream.write(state, layer, y)
    return state, inputs, branches


def convs(n, channels=4):
    torch.manual_seed(0)
    return [nn.Conv2d(channels, channels, 3, padding=1).double() for _ in range(n)]


def norm(width):
    return nn.BatchNorm2d(width).double()


def stream(**options):
    return IdentityMappings(5, 4, norm=norm, **options).double()


def test_the_closed_form_of_identity_mappings():
    """Equation 4: x_L = x_l + the sum of all branches between."""
    s = stream()
    state, inputs, branches = walk(s, torch.randn(2, 4, 6, 6, dtype=torch.double), convs(5))
    for start in range(5):
        torch.testing.assert_close(state.x, inputs[start] + sum(branches[start:]))


@pytest.mark.parametrize("order", [o for o in ORDERS if o not in ("pre", "relu-only-pre")])
def test_the_closed_form_does_not_hold_where_something_follows_the_addition(order):
    state, inputs, branches = walk(stream(order=order), torch.randn(2, 4, 6, 6, dtype=torch.double), convs(5))
    assert not torch.allclose(state.x, inputs[0] + sum(branches))


def test_each_order_is_its_figure():
    relu, x, f = torch.relu, torch.randn(2, 4, 6, 6, dtype=torch.double), convs(5)[0]
    bn = norm(4)  # fresh norms are all alike
    stem = relu(bn(x))
    expected = {
        "pre": relu(bn(x)) + f(relu(bn(x))),
        "relu-only-pre": stem + f(relu(stem)),
        "original": relu(stem + bn(f(stem))),
        "bn-after-add": relu(bn(stem + f(stem))),
        "relu-before-add": stem + relu(bn(f(stem))),
    }
    for order in ORDERS:
        state, _, _ = walk(stream(order=order), x, [f])
        torch.testing.assert_close(state.x, expected[order], msg=order)


def test_each_shortcut_is_its_row():
    x, f = torch.randn(2, 4, 6, 6, dtype=torch.double), convs(5)[0]
    start = torch.relu(norm(4)(x))
    y = f(start)
    for shortcut in SHORTCUTS:
        s = stream(shortcut=shortcut).eval()
        for m in s.modules():
            m.train(isinstance(m, nn.BatchNorm2d))
        state, _, _ = walk(s, x, [f])
        path = s.paths[0](start) if shortcut in ("exclusive-gate", "shortcut-gate", "conv") else start
        gate = torch.sigmoid(path)
        expected = {
            "identity": start + y,
            "constant": 0.5 * start + 0.5 * y,
            "dropout": start + y,
            "conv": path + y,
            "exclusive-gate": (1 - gate) * start + gate * y,
            "shortcut-gate": (1 - gate) * start + y,
        }[shortcut]
        torch.testing.assert_close(state.x, expected, msg=shortcut)


def test_gates_start_nearly_open_and_dropout_drops_in_training():
    s = stream(shortcut="shortcut-gate", gate_bias=-6.0)
    assert all((p.bias == -6.0).all() for p in s.paths)
    s = stream(shortcut="dropout")
    x = torch.ones(1, 4, 8, 8, dtype=torch.double)
    dropped = s._join(x, torch.zeros_like(x), 0)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shortcut", ["identity", "conv"])
def test_whole_networks_train(order, shortcut):
    model = ConvNet(1, 10, depth=8, width=4, stream=f"identity-mappings(order={order!r}, shortcut={shortcut!r})")
    model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_unknown_options_are_told():
    with pytest.raises(ValueError, match="order 'post'"):
        stream(order="post")
    with pytest.raises(ValueError, match="shortcut 'none'"):
        stream(shortcut="none")
