import pytest
import torch
from torch import nn

from interlayer.layers.stream.denseformer import DenseFormer
from interlayer.models import ConvNet, Transformer


def naive(stream, x, blocks):
    """Equation of the paper: everything is kept, every average is a sum over all of it."""
    table, outputs, y = stream.matrix().to(x.dtype), [x], x
    for i, f in enumerate(blocks, start=1):
        outputs.append(y + f(nn.functional.layer_norm(y, y.shape[-1:])))
        y = sum(table[i - 1, j] * out for j, out in enumerate(outputs))
    return nn.functional.layer_norm(y, y.shape[-1:])


def walk(stream, x, blocks):
    state, most = stream.start(x), 0
    for layer, f in enumerate(blocks):
        state = stream.write(state, layer, f(stream.read(state, layer)))
        most = max(most, len(state.kept))
    return stream.finish(state), most


@pytest.mark.parametrize(("dilation", "period"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 2), (3, 2), (9, 1)])
def test_values_and_gradients_equal_the_equation(dilation, period):
    torch.manual_seed(0)
    stream = DenseFormer(7, 6, dilation=dilation, period=period).double()
    with torch.no_grad():
        for p in stream.alpha.parameters():
            p.normal_()
    blocks = [nn.Linear(6, 6).double() for _ in range(7)]
    x = torch.randn(2, 3, 6, dtype=torch.double)
    y, _ = walk(stream, x, blocks)
    expected = naive(stream, x, blocks)
    torch.testing.assert_close(y, expected)
    weights = [p for f in blocks for p in f.parameters()]
    for a, b in zip(torch.autograd.grad(y.sum(), weights), torch.autograd.grad(expected.sum(), weights), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(lambda x: walk(stream, x, blocks)[0], x.requires_grad_())


def test_it_is_the_plain_transformer_at_the_start():
    sizes = {"vocab": 20, "length": 16, "depth": 5, "width": 16, "heads": 2}
    plain, dense = Transformer(**sizes), Transformer(**sizes, stream="denseformer(dilation=2)")
    missing, extra = dense.load_state_dict(plain.state_dict(), strict=False)
    assert not extra
    assert all("alpha" in name for name in missing)
    tokens = torch.randint(0, 20, (2, 16))
    torch.testing.assert_close(dense(tokens), plain(tokens))


@pytest.mark.parametrize(
    ("dilation", "period", "kept"), [(1, 1, 12), (2, 1, 11), (4, 1, 9), (4, 4, 3), (1, 4, 12), (13, 1, 0)]
)
def test_only_what_is_read_later_is_kept(dilation, period, kept):
    stream = DenseFormer(12, 4, dilation=dilation, period=period)
    _, most = walk(stream, torch.randn(1, 4), [nn.Linear(4, 4) for _ in range(12)])
    assert most == kept
    assert len(stream.last_reader) == kept


def test_weights_follow_dilation_and_period():
    sources = DenseFormer(8, 4, dilation=2, period=3).sources
    assert sources == {3: [1], 6: [0, 2, 4]}
    table = DenseFormer(4, 4).matrix()
    assert torch.equal(table, torch.eye(5)[1:])


def test_the_heat_map_shows_the_learned_weights():
    stream = DenseFormer(4, 4)
    with torch.no_grad():
        stream.alpha["4"][0] = -3.0
    figure = stream.figure()
    shown = figure.axes[0].images[0].get_array()
    assert shown[3, 0] == -3.0
    assert figure.axes[0].images[0].norm.vmax == 3.0


def test_convolutional_stages_keep_what_they_average():
    model = ConvNet(1, 10, depth=14, width=4, stream="denseformer")
    with torch.no_grad():
        model.stream.alpha["6"][0] = 1.0
    assert model(torch.randn(2, 1, 8, 8)).isfinite().all()


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="dilation 0"):
        DenseFormer(4, 4, dilation=0)
