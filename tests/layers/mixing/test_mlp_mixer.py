import pytest
import torch
import torch.nn.functional as F

from interlayer.core.cost import parameters
from interlayer.core.data import DataShape
from interlayer.layers.mixing.mlp_mixer import MLPMixer


def naive(model, image):
    """Equation 1, channel by channel and patch by patch."""
    x = model.patches(image)
    for number in range(0, len(model.layers), 2):
        tokens, channels = model.layers[number].mlp, model.layers[number + 1]
        y = F.layer_norm(x, x.shape[-1:])
        mixed = torch.stack([tokens.down(F.gelu(tokens.up(y[:, :, i]))) for i in range(x.shape[2])], 2)
        x = x + mixed
        y = F.layer_norm(x, x.shape[-1:])
        x = x + torch.stack([channels.down(F.gelu(channels.up(y[:, j]))) for j in range(x.shape[1])], 1)
    return model.head(F.layer_norm(x, x.shape[-1:]).mean(1))


def test_it_equals_the_equation():
    model = MLPMixer(1, (8, 12), patch=4, classes=5, size="nano").double()
    torch.nn.init.normal_(model.head.weight)
    image = torch.randn(2, 1, 8, 12, dtype=torch.double)
    torch.testing.assert_close(model(image), naive(model, image))


@pytest.mark.parametrize(
    ("size", "patch", "millions"), [("S", 32, 19), ("S", 16, 18), ("B", 32, 60), ("B", 16, 59), ("L", 16, 208)]
)
def test_parameters_are_those_of_the_papers_table(size, patch, millions):
    with torch.device("meta"):
        model = MLPMixer(3, 224, patch=patch, classes=1000, size=size)
    assert int(parameters(model) / 1e6) == millions  # the table cuts, it does not round


def test_a_new_network_is_undecided():
    assert torch.equal(MLPMixer(1, 8, patch=2, classes=10, size="nano")(torch.randn(3, 1, 8, 8)), torch.zeros(3, 10))


def test_streams_fit_and_patches_mix():
    model = MLPMixer(1, 8, patch=4, classes=3, size="nano", stream="rezero(start=1.0)")
    torch.nn.init.normal_(model.head.weight)
    image = torch.randn(1, 1, 8, 8)
    other = image.clone()
    other[..., :4, :4] += 1
    seen = model.patches(other)
    state = model.stream.start(seen)
    mixed = model.stream.write(state, 0, model.layers[0](seen)).x
    assert not torch.allclose(mixed[:, -1], model.layers[0](model.patches(image))[:, -1] + model.patches(image)[:, -1])


def test_clear_errors():
    with pytest.raises(ValueError, match="size 'XL'"):
        MLPMixer(size="XL")
    with pytest.raises(ValueError, match="does not divide"):
        MLPMixer(1, 9, patch=2)
    with pytest.raises(ValueError, match="expected \\[batch, 1, 8, 8\\]"):
        MLPMixer(1, 8, patch=2, size="nano")(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="needs attention"):
        MLPMixer(1, 8, patch=2, size="nano", stream="value-residual")
    with pytest.raises(ValueError, match="takes image data"):
        MLPMixer.for_task(DataShape("tokens", "tokens", vocab=3, length=4))
