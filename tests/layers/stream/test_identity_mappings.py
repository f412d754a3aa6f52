import pytest
import torch
from torch import nn

from interlayer.layers.stream.identity_mappings import ORDERS, SHORTCUTS, IdentityMappings, Order
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
        "relu-only-pre": stem + bn(f(relu(stem))),
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
        path = s.paths[0].map(start) if shortcut == "conv" else start
        gate = torch.sigmoid(s.paths[0].gate(start)) if shortcut.endswith("gate") else 0.0
        expected = {
            "identity": start + y,
            "constant": 0.5 * start + 0.5 * y,
            "dropout": start + y,
            "conv": path + y,
            "exclusive-gate": (1 - gate) * start + gate * y,
            "shortcut-gate": (1 - gate) * start + y,
        }[shortcut]
        torch.testing.assert_close(state.x, expected, msg=shortcut)


def test_gates_are_nearly_open_at_initialisation_and_dropout_drops_in_training():
    assert all((p.gate.bias == -6.0).all() for p in stream(shortcut="shortcut-gate").paths)
    assert all((p.gate.bias == 2.0).all() for p in stream(shortcut="exclusive-gate(gate_bias=2.0)").paths)
    x = torch.ones(1, 4, 8, 8, dtype=torch.double)
    for rate, values in ((0.5, {0.0, 2.0}), (0.75, {0.0, 4.0})):
        dropped = stream(shortcut=f"dropout(rate={rate})").paths[0](x, torch.zeros_like(x))
        assert set(dropped.unique().tolist()) == values


def test_orders_and_shortcuts_of_ones_own():
    class Half(nn.Module):
        def forward(self, x, branch):
            return x + branch / 2

    x, f = torch.randn(2, 4, 6, 6, dtype=torch.double), convs(5)[0]
    twice = Order(before=("act",), end=("act", "norm"))
    state, _, _ = walk(stream(order=twice, shortcut=Half), x, [f])
    stem = torch.relu(norm(4)(x))
    torch.testing.assert_close(state.x, stem + norm(4)(torch.relu(f(torch.relu(stem)))) / 2)
    for wrong in ({"before": ("act",)}, {"before": ("norm",), "after": ("norm",)}, {"end": ("norm", "pool")}):
        with pytest.raises(ValueError, match="Order: steps"):
            Order(**wrong)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shortcut", ["identity", "conv"])
def test_whole_networks_train(order, shortcut):
    model = ConvNet(1, 10, depth=8, width=4, stream=f"identity-mappings(order={order!r}, shortcut={shortcut!r})")
    model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bottleneck_units_are_the_authors():
    """Parameters of the pre-activated ResNet-164 for CIFAR-10, summed over convolutions, norms and the head by hand."""
    with torch.device("meta"):
        net = ConvNet(3, 10, depth=164, unit="bottleneck")
    wanted, inputs = 3 * 9 * 16, 16
    for stage in range(3):
        inner = 16 * 2**stage
        for unit in range(18):
            outputs = 4 * inner
            wanted += inputs * inner + 9 * inner * inner + inner * outputs + 2 * (inputs + 2 * inner)
            wanted += inputs * outputs if unit == 0 else 0
            inputs = outputs
    wanted += 2 * 256 + 256 * 10 + 10
    assert sum(p.numel() for p in net.parameters()) == wanted
    assert len(net.blocks) == 54 and list(net.shortcuts) == ["0", "18", "36"]
    with pytest.raises(ValueError, match=r"depth 21 is not 9 n \+ 2; take 11, 20"):
        ConvNet(depth=21, unit="bottleneck")
    with pytest.raises(ValueError, match="unit 'wide'"):
        ConvNet(unit="wide")


def test_where_channels_change_a_bottlenecks_shortcut_reads_what_its_branch_reads():
    torch.manual_seed(0)
    net = ConvNet(1, 3, depth=11, width=2, unit="bottleneck").double().eval()
    x = torch.randn(2, 1, 8, 8, dtype=torch.double)
    state = net.embed(x)
    for layer, stride in enumerate((1, 2, 2)):
        inputs = net.stream.norms[layer](state).relu()
        shortcut = torch.nn.functional.conv2d(inputs, net.shortcuts[str(layer)].weight, stride=stride)
        state = shortcut + net.blocks[layer](inputs)
    torch.testing.assert_close(net(x), net.head(net.stream.last(state).relu().mean((2, 3))))
    assert state.shape == (2, 32, 2, 2)
    for stream in ("denseformer", "identity-mappings(order='original', shortcut='shortcut-gate')", "rezero"):
        other = ConvNet(1, 3, depth=11, width=2, unit="bottleneck", stream=stream, norm="batchnorm")
        other(x.float()).sum().backward()


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match=r"shortcut 'constant\(rate=0.1\)' has no option 'rate'; it has \['scale'\]"):
        stream(shortcut="constant(rate=0.1)")
    with pytest.raises(ValueError, match="'conv\\(width=3\\)' has no option 'width'"):
        stream(shortcut="conv(width=3)")
    with pytest.raises(ValueError, match="order 'post'"):
        stream(order="post")
    with pytest.raises(ValueError, match="shortcut 'none'"):
        stream(shortcut="none")
