import pytest
import torch

from interlayer.core.mixer import Attention, Cache
from interlayer.core.stream import State
from interlayer.layers.stream.value_residual import MODES, ValueResidual
from interlayer.models import Transformer

SIZES = {"vocab": 30, "length": 32, "depth": 6, "width": 24, "heads": 3}


def mixed(mode, block):
    """What a layer's values become, given 1 in the first layer and 10 in this one."""
    stream = ValueResidual(6, 4, mode=mode)
    state = State(torch.zeros(1))
    one = torch.ones(1, 1, 1, 1)
    stream.share(state, 0, one, one)
    k, v = stream.share(state, 2 * block, one, None if mode == "shared" else 10 * one)
    assert torch.equal(k, one)
    return v.item()


def test_the_equation_of_each_mode():
    assert mixed("identity", 3) == 5.5
    assert mixed("learnable", 3) == 5.5
    assert mixed("constant", 3) == 12.0
    assert mixed("constant(weight=0.5)", 3) == 10.5
    assert mixed("learnable(weights=(0, 1))", 3) == 10.0
    assert [mixed("sparse(weight=1, share=0.5)", b) for b in (2, 3)] == [10.0, 11.0]
    assert [mixed("sparse", b) for b in (1, 3, 4, 5)] == [10.0, 10.0, 12.0, 12.0]
    assert mixed("shared", 3) == 1.0


def test_svformer_projects_and_caches_values_once():
    plain, shared = Transformer(**SIZES), Transformer(**SIZES, stream="value-residual(mode='shared')")
    projections = [m.qkv.weight.shape[0] for m in shared.modules() if isinstance(m, Attention)]
    assert projections == [72, 48, 48, 48, 48, 48]
    tokens = torch.randint(0, 30, (1, 20))
    sizes = []
    for model in (plain, shared):
        cache = Cache()
        for i in range(20):
            model(tokens[:, i : i + 1], cache=cache)
        sizes.append(cache.bytes)
    assert sizes[1] / sizes[0] == pytest.approx((6 + 1) / 12)


def test_learnable_weights_get_gradients_in_all_layers_but_the_first():
    model = Transformer(**SIZES, stream="value-residual(mode='learnable')")
    model(torch.randint(0, 30, (2, 8))).square().sum().backward()
    assert (model.trunk.stream.mode.weights.grad.abs().sum(1) > 0).tolist() == [False, *[True] * 5]


@pytest.mark.parametrize("mode", MODES)
def test_every_layer_hears_of_the_first_layers_values(mode):
    model = Transformer(**SIZES, stream=f"value-residual(mode={mode!r})")
    with torch.no_grad():
        first = model.trunk.blocks[0].mixer
        first.out.weight.zero_()  # so that the first layer reaches later ones through its values alone
    tokens = torch.randint(0, 30, (2, 8))
    before = model(tokens)
    with torch.no_grad():
        first.qkv.weight[-24:] += 1.0
    assert not torch.allclose(model(tokens), before)


def test_a_mode_of_ones_own():
    class Difference(torch.nn.Module):
        def forward(self, first, own, block):
            return own - block * first

    assert mixed(Difference, 3) == 7.0


def test_unknown_modes_and_options_without_effect_are_refused():
    with pytest.raises(ValueError, match=r"mode 'idendity' is not one of .* Did you mean 'identity'"):
        ValueResidual(2, 4, mode="idendity")
    for mode, option in (
        ("identity", "weight"),
        ("shared", "weight"),
        ("constant", "weights"),
        ("learnable", "weight"),
    ):
        with pytest.raises(ValueError, match=rf"has no option '{option}'"):
            ValueResidual(2, 4, mode=f"{mode}({option}=1)")
    with pytest.raises(ValueError, match="no option 'weight'"):
        Transformer(**SIZES, stream="value-residual(mode='constant', weight=1)")
