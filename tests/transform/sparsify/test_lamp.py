import families
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from interlayer.core import recipe, weights
from interlayer.testing.transforms import carried
from interlayer.transform.sparsify.lamp import SCOPES, Lamp, allocate, lamp_score, lamp_score_naive


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def kept(model):
    return {name: int(mask.sum()) for name, mask in weights.masks(model).items()}


def test_score_by_hand():
    # squares 1, 4, 4, 16: of the two equal ones the later counts as larger
    score = lamp_score(torch.tensor([[2.0, -1.0], [-2.0, 4.0]]))
    expected = torch.tensor([[4 / 24, 1 / 25], [4 / 20, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(score, expected)


@pytest.mark.parametrize(
    "weight", [torch.randn(7, 3), torch.randn(5, 1, 3, 3), torch.zeros(4), torch.randn(6).bfloat16()]
)
def test_fast_score_is_the_naive_one(weight):
    torch.testing.assert_close(lamp_score(weight), lamp_score_naive(weight))


def test_threshold_over_layers_by_hand():
    # scores: [1/14, 4/13, 1] and [100/1400, 400/1300, 1]: a common factor within a layer changes nothing
    small, large = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0])
    assert [m.tolist() for m in allocate([small, large], 4)] == [[False, True, True], [False, True, True]]
    assert [m.tolist() for m in allocate([small, large], 4, "global")] == [[False, False, True], [True, True, True]]


def test_erdos_renyi_kernel_by_hand():
    # dimensions sum to 4 and 20: with 30 to keep 5 and 25, but the first has 4 weights and stays whole
    masks = allocate([torch.randn(2, 2), torch.randn(10, 10)], 30, "erdos-renyi-kernel")
    assert [int(m.sum()) for m in masks] == [4, 26]
    masks = allocate([torch.randn(8, 4, 3, 3), torch.randn(10, 8)], 36, "erdos-renyi-kernel")
    assert [int(m.sum()) for m in masks] == [18, 18]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("sparsity", [0.01, 0.5, 0.98, 0.998])
def test_exact_sparsity_and_no_layer_dies(scope, sparsity):
    model = net()
    new = Lamp(sparsity=sparsity, scope=scope, bake=False).plan(model).apply()
    assert sum(kept(new).values()) == round(1476 * (1 - sparsity)) and min(kept(new).values()) >= 1
    for name, mask in weights.masks(new).items():
        before = model.get_parameter(name)
        assert torch.equal(new.get_submodule(name[:-7]).weight, before * mask)
        if mask.any() and not mask.all():  # within a layer the largest stay
            assert before[mask].abs().min() >= before[~mask].abs().max()


def test_equal_weights_and_dead_layers_are_exact_too():
    same = [torch.ones(4, 4), torch.zeros(3, 3)]
    for scope in SCOPES:
        masks = allocate(same, 9, scope)
        assert sum(int(m.sum()) for m in masks) == 9 and masks[1].any()


def test_model_untouched_and_same_result_twice():
    model, x = net().eval(), torch.randn(2, 1, 8, 8)
    before, out = {k: v.clone() for k, v in model.state_dict().items()}, model(x)
    plan = Lamp(sparsity=0.9, bake=False).plan(model)
    one, two = plan.apply(), plan.apply()
    assert torch.equal(one(x), two(x)) and not torch.equal(one(x), out)
    assert model.state_dict().keys() == before.keys() and torch.equal(model(x), out)
    assert [r.name for r in plan.touched] == ["0.weight", "4.weight"] and {r.name: r.why for r in plan.skipped} == {
        "1": "no matrix or kernel"
    }
    assert f"keeps {kept(one)['0.weight']} of 36" in str(plan)


def test_rounds_train_and_rewind():
    model = net()
    early = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    left, starts = [], []

    def train(pruned):
        assert pruned is not model
        left.append(sum(kept(pruned).values()))
        starts.append(pruned[4].bias.detach().clone())
        with torch.no_grad():
            pruned[4].bias.add_(1.0)
            pruned[4].parametrizations.weight.original.mul_(torch.rand(10, 144))

    new = Lamp(sparsity=0.9375, rounds=4, train=train, rewind=early, bake=False).plan(model).apply()
    # the same share each time: 1476 * (92 / 1476) ** (r / 4)
    assert left == [737, 368, 184, 92] and sum(kept(new).values()) == 92
    assert all(torch.equal(s, early["4.bias"]) for s in starts)
    mask = weights.masks(new)["0.weight"]
    assert torch.equal(new[0].weight, early["0.weight"] * mask)
    left.clear()
    plain = Lamp(sparsity=0.9375, rounds=2, train=train).plan(model).apply()
    assert not weights.masks(plain) and int((plain[0].weight != 0).sum() + (plain[4].weight != 0).sum()) == 92
    assert left == [368, 92] and torch.equal(starts[-1], model[4].bias + 1)


@pytest.mark.parametrize("bake", [True, False])
def test_pruning_goes_on_from_a_pruned_model(bake):
    once = Lamp(sparsity=0.5, bake=bake).plan(net()).apply()
    twice = Lamp(sparsity=0.8, bake=bake).plan(once).apply()
    for name in ("0.weight", "4.weight"):
        before, after = (m.get_submodule(name[:-7]).weight != 0 for m in (once, twice))
        assert (after <= before).all()
    assert sum(int((m.weight != 0).sum()) for m in (twice[0], twice[4])) == 295
    with pytest.raises(ValueError, match="nothing to do"):
        Lamp(sparsity=0.5).plan(twice)


def test_rewinding_without_training_keeps_the_zeros():
    model = net()
    early = {k: v + 1 for k, v in model.state_dict().items()}
    new = Lamp(sparsity=0.75, rewind=early).plan(model).apply()
    assert sum(int((m.weight != 0).sum()) for m in (new[0], new[4])) == 369
    for m, name in ((new[0], "0.weight"), (new[4], "4.weight")):
        assert torch.equal(m.weight, early[name] * (m.weight != 0))


@pytest.mark.parametrize("name", ["mha", "mixtral", "tied"])
def test_masks_and_plain_weights_are_the_same_function(name):
    masked, plain = (Lamp(sparsity=0.7, bake=bake).plan(families.model(name)).apply() for bake in (False, True))
    outs = [families.output(m, families.batch(name)) for m in (masked, plain, weights.bake(masked))]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[1], outs[2])


def test_masks_bake_into_plain_weights_of_the_same_size():
    model, x = net().eval(), torch.randn(2, 1, 8, 8)
    masked, plain = (Lamp(sparsity=0.7, bake=bake).plan(model).apply() for bake in (False, True))
    assert torch.equal(masked(x), plain(x)) and not weights.masks(plain)
    shapes = [{k: (v.shape, v.dtype) for k, v in m.state_dict().items()} for m in (model, plain)]
    assert shapes[0] == shapes[1] and [type(m) for m in plain] == [type(m) for m in model]


def on_disk(folder):
    return sum(p.stat().st_size for p in folder.iterdir() if p.suffix == ".safetensors")


def test_hugging_face_gpt2_and_round_trip(tmp_path):
    model = families.model("gpt2").bfloat16()
    plan = Lamp(sparsity=0.9, bake=False).plan(model)
    assert len(plan.touched) == 16
    why = {r.name: r.why for r in plan.skipped}
    assert why["lm_head.weight"] == "shared by transformer.wte.weight and lm_head.weight"
    new, tokens = plan.apply(), torch.arange(5)[None]
    total = sum(model.get_parameter(r.name).numel() for r in plan.touched)
    assert sum(kept(new).values()) == round(total * 0.1)
    recipe.save(new, tmp_path / "masked")
    back = recipe.load(tmp_path / "masked")
    assert torch.equal(new(tokens).logits, back(tokens).logits) and recipe.steps(back) == recipe.steps(new)
    assert all(torch.equal(m, weights.masks(back)[n]) for n, m in weights.masks(new).items())
    for masked in (new, back):
        with pytest.raises(ValueError, match=r"masked weights.*weights.bake\(model\) first"):
            masked.save_pretrained(tmp_path / "hf")
        plain = weights.bake(masked)
        assert torch.equal(plain(tokens).logits, new(tokens).logits)
        assert carried(plain, tokens) == ""


def test_it_leaves_no_larger_than_it_came(tmp_path):
    model = families.model("gpt2")
    recipe.save(model, tmp_path / "before")
    recipe.save(Lamp(sparsity=0.9).plan(model).apply(), tmp_path / "after")
    assert on_disk(tmp_path / "after") <= on_disk(tmp_path / "before")


# How many weights are layers in each family.
LAYERS = {
    "twice": 4, "tied": 1, "functional": 2, "unnamed": 2, "lstm": 5, "mha": 4, "gpt2": 16, "llama": 29, "mixtral": 29,
    "mamba": 20, "bert": 26, "vit": 26, "resnet": 15, "t5": 64, "bart": 64, "unet": 83, "dit": 39,
}  # fmt: skip


@pytest.mark.parametrize("name", families.NAMES)
def test_families(name, tmp_path):
    transform = Lamp(sparsity=0.6)
    touched = [r.name for r in transform.plan(families.model(name)).touched]
    new = families.transformed(transform, name, tmp_path)
    pruned = [new.get_parameter(n) for n in touched]
    assert len(pruned) == LAYERS[name] and all((p != 0).any() for p in pruned)
    assert sum(int((p != 0).sum()) for p in pruned) == round(0.4 * sum(p.numel() for p in pruned))


def test_every_matrix_is_a_layer_and_every_expert_one_of_its_own():
    touched = {name: {r.name for r in Lamp().plan(families.model(name)).touched} for name in ("mha", "lstm", "unnamed")}
    assert touched["mha"] == {"enter.weight", "attention.in_proj_weight", "attention.out_proj.weight", "leave.weight"}
    assert touched["lstm"] == {*(f"lstm.weight_{k}_l{n}" for k in ("ih", "hh") for n in (0, 1)), "head.weight"}
    assert touched["unnamed"] == {"kernel", "readout"}
    model = families.model("mixtral")
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.down_proj[2] *= 1e-6  # small beside the other experts, which LAMP does not mind
    new = Lamp(sparsity=0.9).plan(model).apply()
    kept_share = [(w != 0).double().mean().item() for w in new.model.layers[1].mlp.experts.down_proj]
    assert min(kept_share) > 0.03 and kept_share[2] > 0.03


def test_tables_are_left_alone_unless_chosen():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_table, self.kernel = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4, 4))
            self.shift, self.norm = nn.Parameter(torch.randn(1, 4)), weight_norm(nn.Linear(4, 4))

        def forward(self, x):
            return self.norm((x + self.pos_table + self.shift) @ self.kernel)

    model = nn.Sequential(Table(), nn.Linear(4, 2))
    plan = Lamp().plan(model)
    assert [r.name for r in plan.touched] == ["0.kernel", "1.weight"]
    why = {r.name: r.why for r in plan.skipped}
    assert why["0.pos_table"].startswith("is a table") and why["0.shift"].startswith("is a vector")
    assert why["0.norm.weight"].startswith("is computed from others")
    chosen = Lamp(at=Table).plan(model)
    assert [r.name for r in chosen.touched] == ["0.pos_table", "0.kernel", "0.shift"]


def test_masks_that_a_recurrent_layer_would_not_see_are_refused():
    for options in ({"bake": False}, {"train": lambda model: None}):
        with pytest.raises(ValueError, match=r"lstm.weight_ih_l0 belongs to a recurrent layer.*Prune with bake"):
            Lamp(**options).plan(families.model("lstm"))
    assert Lamp(bake=False, at=nn.Linear).plan(families.model("lstm")).touched


def test_diffusers_unet_and_round_trip(tmp_path):
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ).eval()  # fmt: skip
    new, x = Lamp(sparsity=0.8, at=nn.Conv2d, bake=False).plan(model).apply(), torch.randn(1, 1, 8, 8)
    assert all(isinstance(new.get_submodule(n[:-7]), nn.Conv2d) for n in kept(new))
    recipe.save(new, tmp_path)
    assert torch.equal(recipe.load(tmp_path)(x, 3).sample, new(x, 3).sample)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sparsity": 0.0}, "nothing to do"),
        ({"sparsity": 1.0}, "below 1"),
        ({"sparsity": 0.9999}, "each of which keeps at least one"),
        ({"scope": "layer"}, "expected one of lamp, global"),
        ({"rounds": 0}, "expected at least 1"),
        ({"at": nn.BatchNorm2d}, "nothing to prune in Sequential: 1 no matrix or kernel"),
        ({"at": nn.Embedding}, "a Embedding"),
        ({"rewind": {}}, "rewind does not fit Sequential"),
    ],
)
def test_clear_errors(options, says):
    with pytest.raises(ValueError, match=says):
        Lamp(**options).plan(net())
