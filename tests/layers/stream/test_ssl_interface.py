import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from interlayer.core.data import DataShape
from interlayer.core.example import Example
from interlayer.layers.stream.ssl_interface import INTERFACES, InterfacedHead, SSLInterface, hidden_states
from interlayer.models import Encoder
from interlayer.testing import hold

STATES = torch.arange(24.0).view(1, 4, 2, 3)  # one item, four layers, two places, three features


def test_weighted_sum_by_hand():
    layer = SSLInterface(3, 4, kind="weighted-sum")
    with torch.no_grad():
        layer.pool.weight.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
    expected = 0.1 * STATES[:, 0] + 0.2 * STATES[:, 1] + 0.3 * STATES[:, 2] + 0.4 * STATES[:, 3]
    torch.testing.assert_close(layer(STATES), expected)
    torch.testing.assert_close(layer(list(STATES.unbind(1))), expected)


def test_groups_are_neighbours_and_projected():
    layer = SSLInterface(3, 4, kind="grouped", groups=3)
    assert layer.pool.sizes == [2, 1, 1]
    sums = torch.cat([STATES[:, :2].mean(1), STATES[:, 2], STATES[:, 3]], -1)
    torch.testing.assert_close(layer(STATES), sums @ layer.pool.project.weight.T + layer.pool.project.bias)


def test_concat_is_a_projection_of_all_layers():
    layer = SSLInterface(3, 4, kind="concat")
    parts = layer.pool.project.weight.split(3, 1)
    expected = sum(STATES[:, i] @ part.T for i, part in enumerate(parts)) + layer.pool.project.bias
    torch.testing.assert_close(layer(STATES), expected)


def naive_hconv(layer, states):
    """Sums written out: y_t = relu(b + sum_k W_k x_{3 t + k - 2}) at every position, layer by layer."""
    out = []
    for place in states.unbind(2):
        x = list(place.unbind(1))
        for conv in layer.pool.convs:
            y = []
            for t in range((len(x) - 1) // 3 + 1):
                terms = [x[3 * t + k - 2] @ conv.weight[:, :, k].T for k in range(5) if 0 <= 3 * t + k - 2 < len(x)]
                y.append((sum(terms) + conv.bias).relu())
            x = y
        out.append(torch.stack(x, -1).flatten(1))
    return torch.stack(out, 1)


@pytest.mark.parametrize("layers", [2, 4, 9, 13])
def test_hierarchical_convolution_equals_the_written_out_sums(layers):
    torch.manual_seed(0)
    layer, states = (
        SSLInterface(6, layers).double(),
        torch.randn(2, layers, 3, 6, dtype=torch.double, requires_grad=True),
    )
    torch.testing.assert_close(layer(states), naive_hconv(layer, states))
    leaves = [states, *layer.parameters()]
    given = torch.autograd.grad(layer(states).square().sum(), leaves)
    for a, b in zip(given, torch.autograd.grad(naive_hconv(layer, states).square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("layers", "convs", "outputs"),
    [
        (2, 1, 12),
        (3, 1, 12),
        (9, 2, 12),
        (13, 2, 12),
        (25, 2, 12),
        (27, 3, 12),
        (243, 5, 12),
        (20, 2, 12),
        (40, 3, 12),
        (8, 1, 12),
        (73, 3, 12),
    ],
)
def test_depth_is_logarithmic_in_the_layers(layers, convs, outputs):
    layer = SSLInterface(12, layers)
    assert len(layer.pool.convs) == convs
    assert layer(torch.randn(1, layers, 2, 12)).shape[-1] == layer.outputs == outputs


def test_outputs_are_rounded_down_where_the_width_does_not_divide():
    assert SSLInterface(7, 13).outputs == 6  # two positions are left of 13 layers
    with torch.device("meta"):
        large = SSLInterface(1024, 25)  # of the authors' code: three positions, 1024 // 3 channels each
    assert large.outputs == 1023 and large(torch.zeros(1, 25, 2, 1024, device="meta")).shape == (1, 2, 1023)
    with pytest.raises(ValueError, match="width 1 for the 3 positions that are left of 25 layers"):
        SSLInterface(1, 25)


def test_cls_token_sees_the_layers_of_its_own_place_only():
    torch.manual_seed(0)
    layer = SSLInterface(8, 4, kind="cls", heads=2).eval()
    states = torch.randn(2, 4, 3, 8)
    found = layer(states)
    token = torch.cat([layer.pool.cls.expand(1, 1, 8), states[1:, :, 2]], 1)
    torch.testing.assert_close(found[1, 2], layer.pool.layer(token)[0, 0])
    changed = states.clone()
    changed[:, :, 0] += 1
    assert torch.allclose(layer(changed)[:, 1:], found[:, 1:]) and not torch.allclose(layer(changed)[:, 0], found[:, 0])


def test_principal_components_find_the_planted_plane():
    torch.manual_seed(0)
    plane = torch.linalg.qr(torch.randn(8, 2)).Q
    states = torch.randn(16, 4, 5, 2) @ plane.T * 3 + 0.01 * torch.randn(16, 4, 5, 8) + 7
    layer = SSLInterface(8, 4, kind="pca").fit(states)
    parts = layer(states).unflatten(-1, (4, 2))
    back = torch.einsum("bslk,ldk->blsd", parts, layer.pool.axes) + layer.pool.mean[:, None]
    assert (back - states).abs().max() < 0.1
    assert not list(layer.parameters()) and layer.outputs == 8


def test_a_fitted_pca_is_saved(tmp_path):
    layer, states = SSLInterface(8, 4, kind="pca"), torch.randn(4, 4, 5, 8)
    with pytest.raises(ValueError, match="not fitted"):
        layer(states)
    save_model(layer.fit(states), str(tmp_path / "pca.safetensors"))
    other = SSLInterface(8, 4, kind="pca")
    load_model(other, str(tmp_path / "pca.safetensors"))
    assert torch.equal(other(states), layer(states))


@pytest.mark.parametrize("kind", [k for k in INTERFACES if k not in ("hconv", "pca")])
def test_the_others_keep_the_contracts_too(kind):
    example = Example(make=lambda: SSLInterface(8, 5, kind=kind), inputs=lambda: (torch.randn(2, 5, 3, 8),))
    for name in ("shapes", "gradient", "autocast", "batch", "export", "wrong"):
        assert hold(name, "layer", example)


def test_normalised_states_have_no_scale():
    layer = SSLInterface(3, 4, kind="weighted-sum", normalize=True)
    torch.testing.assert_close(layer(STATES), layer(100 * STATES + 5), rtol=1e-3, atol=1e-4)


def tiny(name):
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    if name == "Bert":
        return hf.BertModel(hf.BertConfig(vocab_size=20, **sizes)), torch.randint(20, (2, 7))
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embeddings": 4}
    config = getattr(hf, f"{name}Config")(num_conv_pos_embedding_groups=2, **convolutions, **sizes)
    return getattr(hf, f"{name}Model")(config), torch.randn(2, 400)


@pytest.mark.parametrize("name", ["Bert", "Wav2Vec2", "Hubert"])
def test_states_of_hugging_face_models(name):
    model, x = tiny(name)
    model.eval()
    states = hidden_states(model, x)
    assert states.shape[1] == 4 and states.shape[-1] == 16 and not states.requires_grad
    torch.testing.assert_close(states[:, -1], model(x).last_hidden_state)
    for kind in INTERFACES:
        layer = SSLInterface(16, 4, kind=kind).fit(states)
        assert layer(states).shape == (2, states.shape[2], layer.outputs)


def test_states_by_name_train_the_upstream_if_asked():
    model, tokens = Encoder(vocab=20, length=8, depth=3, width=16, heads=2), torch.randint(20, (2, 8))
    states = hidden_states(model, tokens, at=["trunk.blocks.*.mixer"], side="input", detach=False)
    SSLInterface(16, 3)(states).sum().backward()
    assert model.embed.weight.grad.abs().sum() > 0
    torch.testing.assert_close(states[:, 0], nn.functional.layer_norm(model.embed(tokens), (16,)))
    assert not any(m._forward_hooks for m in model.modules())


def test_clear_errors():
    with pytest.raises(ValueError, match="kind 'conv'"):
        SSLInterface(4, 4, kind="conv")
    with pytest.raises(ValueError, match="5 groups for 4 layers"):
        SSLInterface(4, 4, kind="grouped", groups=5)
    with pytest.raises(ValueError, match="expected \\[batch, 4, sequence, 3\\]"):
        SSLInterface(3, 4)(STATES[:, :3])
    with pytest.raises(ValueError, match=r"no hidden states\. Name the modules .* with at="):
        hidden_states(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="several shapes"):
        hidden_states(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), torch.zeros(1, 2), at="*")


def test_one_layer_alone():
    assert torch.equal(SSLInterface(3, 4, kind="one")(STATES), STATES[:, -1])
    assert torch.equal(SSLInterface(3, 4, kind="one", index=1)(STATES), STATES[:, 1])
    with pytest.raises(ValueError, match="index 4 for 4 layers; give -4 to 3"):
        SSLInterface(3, 4, kind="one", index=4)


def test_heads_for_tasks_with_answers_at_each_place_or_one_for_all():
    sizes = {"layers": 4, "length": 2, "features": 3}
    each = InterfacedHead.for_task(DataShape("states", "tokens", vocab=5, **sizes), kind="weighted-sum")
    normed = nn.functional.layer_norm(STATES, (3,)).mean(1)
    torch.testing.assert_close(each(STATES), each.head(normed))
    whole = InterfacedHead.for_task(DataShape("states", "classes", classes=5, **sizes), kind="one")
    torch.testing.assert_close(whole(STATES), whole.head(nn.functional.layer_norm(STATES, (3,))[:, -1].mean(1)))
    with pytest.raises(ValueError, match=r"not tokens and tokens\. Take a task such as 'token-kinds'"):
        InterfacedHead.for_task(DataShape("tokens", "tokens", vocab=5, length=4))
    with pytest.raises(ValueError, match="kind 'pca' is not trained"):
        InterfacedHead(3, 4, 2, kind="pca")
