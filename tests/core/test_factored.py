import families
import pytest
import torch
from torch import nn

from interlayer import load, save
from interlayer.core.factored import factored, pair, restore

CASES = {
    "linear": (lambda: nn.Linear(6, 5), (3, 2, 6)),
    "without bias": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3, padding="same", padding_mode="circular"), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 7, (3, 2), stride=2, padding=1, dilation=(1, 2)), (2, 3, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 2), (2, 2, 4, 4, 4)),
}


def halves(layer, rank):
    u, s, v = torch.linalg.svd(layer.weight.detach().flatten(1), full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank]


@pytest.mark.parametrize("name", CASES)
def test_a_pair_computes_what_the_layer_does_with_the_product_of_the_factors(name, tmp_path):
    torch.manual_seed(0)
    make, shape = CASES[name]
    net, x = nn.Sequential(make(), nn.ReLU()).eval(), torch.randn(shape)
    tall, wide = halves(net[0], 3)
    new = factored(net, {"0": (tall, wide)}, {"rank": 3})
    whole = net[0].weight.detach().clone()
    with torch.no_grad():
        net[0].weight.copy_((tall @ wide).view_as(whole))
    torch.testing.assert_close(new(x), net(x), rtol=1e-4, atol=1e-5)
    assert new[0][0].weight.shape[0] == 3 and new[0][1].weight.shape[1] == 3 and new[0][0].bias is None
    save(new, tmp_path / "there")
    again = load(tmp_path / "there", base=lambda: nn.Sequential(make(), nn.ReLU()))
    assert torch.equal(again(x), new(x))


def test_a_hugging_face_model_is_saved_whole_and_refuses_its_own_format(tmp_path):
    model, batch = families.model("bert"), families.batch("bert")
    name = "bert.encoder.layer.0.intermediate.dense"
    new = factored(model, {name: halves(model.get_submodule(name), 4)})
    save(new, tmp_path / "there")
    assert torch.equal(families.output(load(tmp_path / "there"), batch), families.output(new, batch))
    with pytest.raises(ValueError, match="layers of low rank as pairs"):
        new.save_pretrained(tmp_path / "hf")
    assert type(model.get_submodule(name)) is nn.Linear


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: pair(nn.Linear(2, 2), 0), "Linear at rank 0; expected"),
        (lambda: pair(nn.Conv2d(4, 4, 3, groups=2), 1), "without groups"),
        (lambda: factored(nn.Sequential(nn.Linear(2, 2)), {}), "no factors"),
        (lambda: restore(nn.Sequential(nn.Linear(2, 2)), {"places": {"0": "x"}}), "expected the rank"),
    ],
)
def test_clear_errors(call, says):
    with pytest.raises(ValueError, match=says):
        call()
