import copy
from functools import partial

import families
import pytest
import torch
from torch import nn

from interlayer.core import recipe
from interlayer.core.cost import flops, parameters
from interlayer.core.wiring import masked, run, take, trace
from interlayer.models import MLP
from interlayer.testing.common import picture, unchanged
from interlayer.testing.transforms import carried


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def traced(name):
    net, given = families.model(name), families.batch(name)
    args, kwargs = ((), given) if isinstance(given, dict) else ((given,), {})
    return net, given, args, kwargs, trace(net, *args, **kwargs)


def named(wiring, part, every=True):
    """Every second unit of the outermost groups whose name has a part."""
    found = [g for g in wiring.groups.values() if part in g.name and not g.parent]
    return {g.name: range(g.size)[1::2] for g in (found if every else found[:1])}


# By family: a part of the names of groups, and whether a plain model of the family's configuration results.
CUTS = [
    ("twice", "", False), ("tied", "embed", False), ("unnamed", "", False), ("lstm", "lstm", False),
    ("gpt2", "c_fc", True), ("gpt2", "c_attn", False), ("llama", "gate_proj", True), ("llama", "q_proj", True),
    ("llama", "embed", True), ("mixtral", "experts", True), ("mixtral", "q_proj", True), ("mamba", "A_log", True),
    ("bert", "intermediate", True), ("bert", "query", False), ("vit", "mlp", True), ("vit", "q_proj", False), ("resnet", "layer", False),
    ("t5", "Attention.q", True), ("t5", "wi", True), ("bart", "fc1", True), ("bart", "k_proj", False), ("unet", "ff", False),
    ("unet", "to_q", False), ("unet", "down_blocks.0.resnets.0.conv1", False), ("dit", "ff", False), ("dit", "attn1", False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "part", "plain"), CUTS)
def test_families(name, part, plain, tmp_path):
    """Smaller, equal to masks, the input untouched, saved and rebuilt, and plain where the configuration can say it."""
    net, given, args, kwargs, wiring = traced(name)
    keep, seen = named(wiring, part), picture(net)
    small = take(net, keep, wiring, *args, **kwargs)
    unchanged(seen, net, f"take on {name}")
    assert keep and parameters(small) < parameters(net)
    if (name, part) != ("mixtral", "experts"):  # torch does not count grouped products
        assert flops(small, *args, **kwargs) < flops(net, *args, **kwargs)
    expected, found = run(net, masked(net, keep, wiring), *args, **kwargs), families.output(small, given)
    for field in ("logits", "sample"):
        expected = getattr(expected, field, expected)
    if part != "embed" or name == "tied":  # a norm over fewer features has other statistics
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    recipe.save(small, tmp_path / "small")
    back = recipe.load(tmp_path / "small", base=partial(families.model, name) if name in families.PLAIN else None)
    assert torch.equal(families.output(back, given), found)
    assert plain != bool(recipe.steps(small))
    if name not in families.PLAIN:
        refusal = carried(small, given)
        assert not refusal if plain else "units removed" in refusal


@pytest.mark.parametrize("name", ["gpt2", "resnet", "lstm"])
def test_keeping_everything_gives_the_same_bits(name):
    net, given, args, kwargs, wiring = traced(name)
    same = take(net, {g.name: range(g.size) for g in wiring.groups.values()}, wiring, *args, **kwargs)
    assert same is not net and torch.equal(families.output(same, given), families.output(net, given))


def test_units_that_nobody_reads_can_go_without_a_change():
    net, x = (
        nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3)),
        torch.randn(2, 2, 8, 8),
    )
    wiring = trace(net.eval(), x)
    with torch.no_grad():
        net[4].weight.view(3, 6, 36)[:, 3:] = 0
    small = take(net, {"0.weight:0": [2, 0, 1]}, wiring, x)
    torch.testing.assert_close(small(x), net(x))
    assert (small[0].out_channels, small[1].num_features, small[4].in_features) == (3, 3, 108)
    small.train()(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_query_heads_that_share_keys_go_with_them_or_one_of_each(tmp_path):
    config = dict(
        vocab_size=32, num_key_value_heads=2, **{**families.SIZES, "num_attention_heads": 4, "num_hidden_layers": 1}
    )
    net = families.hf(families.LlamaForCausalLM, **config)().eval()
    ids = torch.randint(32, (2, 5))
    wiring = trace(net, input_ids=ids)
    both = [g for g in wiring.groups.values() if "self_attn" in g.name and g.size == 2]
    shared, queries = [g for g in both if not g.parent], [g for g in both if g.parent]
    for keep, heads in (
        ({shared[0].name: [1]}, (2, 1)),
        ({g.name: [0] for g in queries if "q_proj" in g.name}, (2, 2)),
    ):
        small = take(net, keep, wiring, input_ids=ids)
        assert (small.config.num_attention_heads, small.config.num_key_value_heads) == heads
        torch.testing.assert_close(small(ids).logits, run(net, masked(net, keep, wiring), ids).logits)
    with pytest.raises(ValueError, match="insists on a size"):
        take(net, {queries[0].name: [0]}, wiring, input_ids=ids)


def test_heads_of_torchs_attention_go_with_as_much_of_the_stream():
    net, given, args, _, wiring = traced("mha")
    with pytest.raises(ValueError, match=r"take: Attending does not work .*masked\(\)"):
        take(net, {"attention.in_proj_weight:0": [1]}, wiring, *args)
    small = take(net, {"attention.in_proj_weight:0": [1], "enter.weight:0": range(4)}, wiring, *args)
    assert (small.attention.num_heads, small.attention.embed_dim) == (1, 4)
    assert small(given).shape == net(given).shape


def test_grouped_and_depthwise_convolutions_and_group_norm():
    net = nn.Sequential(
        nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1, groups=2), nn.GroupNorm(4, 8), nn.Conv2d(8, 3, 1)
    )  # fmt: skip
    x = torch.randn(2, 2, 5, 5)
    wiring = trace(net, x)
    outer = [g for g in wiring.groups.values() if not g.parent]
    small = take(net, {g.name: [0] for g in outer if g.size == 2}, wiring, x)
    assert [m.groups for m in small if isinstance(m, nn.Conv2d)] == [1, 4, 1, 1] and small[3].num_groups == 2
    torch.testing.assert_close(small(x), run(net, masked(net, {g.name: [0] for g in outer if g.size == 2}, wiring), x))


def test_a_model_of_interlayer_is_built_with_the_new_sizes():
    net, x = MLP(4, 3, depth=2, width=8), torch.randn(5, 4)
    wiring = trace(net, x)
    small = take(net, {n: [0, 1, 5] for n in wiring.groups}, wiring, x)
    assert small.config["width"] == 3 and not recipe.steps(small)


def test_a_model_that_was_shrunk_is_shrunk_again_and_copied(tmp_path):
    net, given, args, _, wiring = traced("unnamed")
    once = take(net, {"kernel:1": range(5)}, wiring, *args)
    twice = take(once, {"kernel:1": [0, 3]}, trace(once, *args), *args)
    recipe.save(twice, tmp_path / "twice")
    back = recipe.load(tmp_path / "twice", base=partial(families.model, "unnamed"))
    assert torch.equal(back(given), twice(given)) and torch.equal(copy.deepcopy(twice)(given), twice(given))
    assert back.kernel.shape == (5, 2)


def test_a_constant_of_the_code_is_refused_with_the_way_out():
    net, _, args, _, wiring = traced("functional")
    with pytest.raises(
        ValueError, match=r"take: Functional does not work with fewer units of up.weight:0 .*normalized_shape"
    ):
        take(net, {"up.weight:0": [0, 1]}, wiring, *args)


class Scaled(nn.Module):
    """Divides by the number of its hidden units."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.up(x).relu()
        return self.down(h / h.shape[-1])


def test_a_scale_that_follows_from_the_size_is_refused():
    net, x = Scaled(), torch.randn(2, 4)
    with pytest.raises(ValueError, match="its outputs are not those with the removed units set to zero"):
        take(net, {"up.weight:0": [0, 1]}, trace(net, x), x)


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        ({"kernel:9": [0]}, r"take: no group named 'kernel:9'; the groups are kernel:1"),
        ({"kernel:1": []}, r"to keep \[\]; expected different units from 0 to 6, at least one"),
        ({"kernel:1": [7]}, r"to keep \[7\]"),
        ({"kernel:1": [1, 1]}, r"to keep \[1, 1\]"),
    ],
)
def test_wrong_units_are_refused(keep, says):
    net, _, args, _, wiring = traced("unnamed")
    with pytest.raises(ValueError, match=says):
        take(net, keep, wiring, *args)
    with pytest.raises(ValueError, match=says):
        masked(net, keep, wiring)


@pytest.mark.parametrize(
    "structure",
    [
        {"shapes": {"kernel": [5, 9]}, "attributes": {}},
        {"shapes": {"kernel": [5]}, "attributes": {}},
        {"shapes": {}, "attributes": {"": {"training": 3}}},
    ],
)
def test_a_damaged_recipe_is_refused(structure):
    from interlayer.core.wiring.shrink import restore

    with pytest.raises(ValueError, match="take: "):
        restore(families.model("unnamed"), structure)
