import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from interlayer.core import weights
from interlayer.core.renormalise import Moments, absorb, channel, channels, moments, places, renormalise
from interlayer.testing.common import picture, unchanged

LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), (32, 4)),
    "linear of tokens": (lambda: nn.Linear(4, 6), (8, 5, 4)),
    "Conv1D": (lambda: Conv1D(6, 4), (8, 5, 4)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), (8, 4, 7, 7)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3), (8, 4, 7)),
    "batch norm": (lambda: nn.BatchNorm2d(4), (8, 4, 7, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_absorbs_a_scale_and_a_shift(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make().double().eval(), torch.randn(shape, dtype=torch.float64)
    before, axis, count = layer(x), channel(layer), channels(layer)
    scale, shift = torch.rand(count) + 0.5, torch.randn(count)
    absorb(layer, scale, shift)
    view = [count if n == axis % before.ndim else 1 for n in range(before.ndim)]
    torch.testing.assert_close(layer(x), before * scale.double().view(view) + shift.double().view(view))
    if isinstance(layer, Conv1D):
        return  # which always has a bias
    bare = copy.deepcopy(layer)
    bare.bias = None
    before = bare(x)
    absorb(bare, scale, shift)
    torch.testing.assert_close(bare(x), before * scale.double().view(view))


class Zoo(nn.Module):
    """One of everything that cannot be renormalised, and what can."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.plain = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.bare, self.twice, self.masked = nn.BatchNorm2d(4, affine=False), nn.Linear(4, 4), nn.Linear(4, 4)
        weights.mask(self.masked, "weight", torch.ones(4, 4))
        self.tied, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.tied.weight
        self.up, self.attention = nn.ConvTranspose2d(4, 4, 1, groups=2), nn.MultiheadAttention(4, 2, batch_first=True)
        self.pooled, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.up(self.bare(self.plain(self.norm(self.first(x)).relu()))).flatten(2).mT
        x = self.other(self.tied(self.masked(self.twice(self.twice(x)))))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return {"logits": self.head(x) + self.pooled(x.mean((0, 1))).sum()}


def test_places_say_why_a_layer_is_left_alone():
    net, x = Zoo(), torch.randn(3, 2, 6, 6)
    before = picture(net)
    names, skipped = places(net, x)
    unchanged(before, net, "places")
    assert names == ["norm", "plain", "head"]  # what is added to the head's output makes it another tensor
    why = {row.name: row.why for row in skipped}
    assert why == {
        "first": "the batch norm norm behind it",
        "twice": "runs 2 times in a pass",
        "masked": "its weight is computed from others; make it plain first with core.weights.bake",
        "tied": "its weight is shared",
        "other": "its weight is shared",
        "up": "a transposed convolution of several groups",
        "attention": "neither a linear map, a convolution nor a batch norm",
        "attention.out_proj": "is not run as a module",
        "pooled": "gives one position, which has no standard deviation",
    }
    assert {r.name: r.why for r in places(nn.Sequential(nn.Linear(2, 3), nn.Flatten()), torch.randn(4, 2))[1]} == {
        "0": "its output is the model's"
    }


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3)
    )


def test_moments_are_means_over_batches():
    model, data = net(), list(torch.randn(3, 40, 2, 6, 6))
    found = moments(model, ["0"], data)["0"]
    outputs = torch.stack([model[0](x).movedim(1, 0).flatten(1) for x in data])
    torch.testing.assert_close(found.mean, outputs.mean((0, 2)))
    torch.testing.assert_close(found.std, outputs.var(2).mean(0).sqrt())


@pytest.mark.parametrize("parts", ["both", "rescale", "reshift"])
def test_each_layer_gets_its_part_of_the_statistics_as_the_layers_behind_it_see_it(parts):
    model, x = net(), torch.randn(40, 2, 6, 6)
    goals = {n: Moments(torch.rand(c), torch.rand(c) + 0.5) for n, c in (("0", 4), ("2", 5))}
    old = moments(model, ["0"], x)["0"]
    renormalise(model, goals, x, parts)
    new = moments(model, list(goals), x)
    if parts != "reshift":
        for name, goal in goals.items():  # the second layer too, whose inputs have changed
            torch.testing.assert_close(new[name].std, goal.std, rtol=1e-3, atol=0)
    if parts == "both":
        torch.testing.assert_close(new["0"].mean, goals["0"].mean, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(new["2"].mean, goals["2"].mean, atol=0.1)  # it has no bias
    if parts == "rescale":
        torch.testing.assert_close(new["0"].mean / new["0"].std, old.mean / old.std, rtol=1e-3, atol=1e-5)
    if parts == "reshift":
        torch.testing.assert_close(new["0"].mean, goals["0"].mean)
        torch.testing.assert_close(new["0"].std, old.std)


def test_a_layer_that_never_runs_is_an_error():
    with pytest.raises(ValueError, match=r"0 gave out nothing.*at least one batch of two examples"):
        moments(nn.Sequential(nn.Linear(2, 3)), ["0"], torch.randn(1, 2))
