import pytest
import torch
from torch import nn

from interlayer.core.stream import Feedforward, PostNorm, PreNorm, Residual, State, widths
from interlayer.layers.stream.denseformer import DenseFormer


def walk(stream, x, branches):
    state = stream.start(x)
    for layer, branch in enumerate(branches):
        state = stream.write(state, layer, branch(stream.read(state, layer)))
    return stream.finish(state)


@pytest.fixture
def branches():
    torch.manual_seed(0)
    return [nn.Linear(8, 8).double() for _ in range(4)]


def test_each_plain_stream_is_its_equation(branches):
    x = torch.randn(3, 8, dtype=torch.double)
    residual, plain, post = x, x, x
    for f in branches:
        residual, plain, post = residual + f(residual), f(plain), nn.functional.layer_norm(post + f(post), (8,))
    torch.testing.assert_close(walk(Residual(4), x, branches), residual)
    torch.testing.assert_close(walk(Feedforward(2, branches=2), x, branches), plain)
    torch.testing.assert_close(walk(PostNorm(4, 8).double(), x, branches), post)
    pre = x
    for f in branches:
        pre = pre + f(nn.functional.layer_norm(pre, (8,)))
    torch.testing.assert_close(
        walk(PreNorm(2, 8, branches=2).double(), x, branches), nn.functional.layer_norm(pre, (8,))
    )


def test_block_ends_and_counts():
    stream = Residual(3, branches=2)
    assert stream.layers == 6
    assert [stream.ends_block(i) for i in range(6)] == [False, True] * 3


def test_resample_brings_everything_kept_along():
    state = State(torch.ones(2, 4), {1: torch.ones(2, 4)})
    state = Residual(1).resample(state, 0, lambda x: x[:, ::2])
    assert state.x.shape == state.kept[1].shape == (2, 2)


def test_bytes_kept_counts_each_storage_once():
    x, y = torch.zeros(4), torch.zeros(8)
    assert State(x, {"x": x, "y": y, "again": y[2:]}).bytes_kept == 32


def test_bad_sizes_are_told():
    with pytest.raises(ValueError, match=r"Residual: depth 0"):
        Residual(0)
    with pytest.raises(ValueError, match="3 widths for 2 sublayers"):
        widths([1, 2, 3], 2)


def test_saved_weights_of_another_depth_are_told_in_one_sentence():
    saved = DenseFormer(3, 4).state_dict()
    with pytest.raises(
        ValueError, match=r"DenseFormer: the saved weights .* 'norms.3.weight' is not there in them .* depth is 4"
    ):
        DenseFormer(4, 4).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"'alpha.1' is \(2,\) in them and \(1,\) here"):
        DenseFormer(3, 4, dilation=2).load_state_dict(saved, strict=False)
    model = nn.Sequential(PreNorm(3, 4))
    model.load_state_dict({f"0.{name}": t for name, t in saved.items()}, strict=False)  # what does not clash is taken
    assert DenseFormer(3, 4).load_state_dict(saved).missing_keys == []
