import copy
import re
from functools import partial

import families
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer import models
from interlayer.core import recipe
from interlayer.core.extras import need
from interlayer.core.select import blocks, replace, select, where


def net():
    return nn.ModuleDict(
        {
            "body": nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU()) for _ in range(3))),
            "head": nn.Linear(4, 2),
        }
    )


@pytest.mark.parametrize(
    ("at", "names"),
    [
        (nn.Linear, ["body.0.0", "body.1.0", "body.2.0", "head"]),
        ("body.*.0", ["body.0.0", "body.1.0", "body.2.0"]),
        ("body.*", ["body.0", "body.1", "body.2"]),
        ("**.1", ["body.0.1", "body.1", "body.1.1", "body.2.1"]),
        ("body.2.**", ["body.2", "body.2.0", "body.2.1", "body.2.2"]),
        (re.compile(r"\.[01]\.0$"), ["body.0.0", "body.1.0"]),
        (lambda n, m: isinstance(m, nn.Linear) and m.out_features == 2, ["head"]),
        (["head", nn.ReLU], ["body.0.2", "body.1.2", "body.2.2", "head"]),
        (where(nn.Linear) - "head", ["body.0.0", "body.1.0", "body.2.0"]),
        (where(nn.Linear) & "body.1.**", ["body.1.0"]),
        (where("head") | "body.0.0", ["body.0.0", "head"]),
    ],
)
def test_what_is_meant(at, names):
    assert list(select(net(), at).chosen) == names


def test_skipped_with_reasons():
    why = {r.name: r.why for r in select(net(), where(nn.Linear) - "head").skipped}
    assert why["head"] == "left out: named 'head'"
    assert why["body.0.1"] == "LayerNorm, not Linear"
    assert "body.0.2" not in why  # holds no weights


def test_nothing_meant_is_an_error_that_helps():
    with pytest.raises(ValueError, match=r"named 'haed'.*head"):
        select(net(), "haed")
    with pytest.raises(TypeError, match="Wanted a glob"):
        where(3)


def test_shared_module_is_chosen_once_and_replaced_everywhere():
    one = nn.Linear(2, 2)
    model = nn.Sequential(one, nn.ReLU(), one)
    new = replace(model, at=nn.Linear, with_=lambda old: nn.Linear(old.in_features, 2, bias=False)).apply()
    assert new[0] is new[2] and new[0].bias is None
    assert model[0] is one and model[2] is one


def test_any_name_of_a_shared_module_selects_it(tmp_path):
    block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model = nn.ModuleDict({"first": block, "again": block})
    assert list(select(model, "again.1").chosen) == ["again.1"] and list(select(model, "**.1").chosen) == ["first.1"]
    new = replace(model, at="again.1", with_="smelu").apply()
    assert new["first"] is new["again"] and type(new["first"][1]).__name__ == "SmeLU"
    recipe.save(new, tmp_path)
    assert type(recipe.load(tmp_path, base=model)["first"][1]).__name__ == "SmeLU"
    plan = replace(model, at=["first", "again.0"], with_=lambda old: nn.Identity())
    assert [r.name for r in plan.touched] == ["first"] and isinstance(plan.apply()["again"], nn.Identity)
    with pytest.raises(ValueError, match=r"Names there: again\.1"):
        select(model, "agian.1")


def test_replace_gets_the_old_module_of_a_copy():
    model, got = net(), []
    plan = replace(model, at="body.*", with_=lambda old: got.append(old) or nn.Identity())
    assert [r.name for r in plan.touched] == ["body.0", "body.1", "body.2"] and not got
    new = plan.apply()
    assert len(got) == 3 and got[0] is not model["body"][0]
    assert torch.equal(got[0][0].weight, model["body"][0][0].weight)
    assert isinstance(new["body"][1], nn.Identity) and isinstance(model["body"][1], nn.Sequential)


def test_replace_skips_what_lies_within_and_names_broken_ties():
    plan = replace(net(), at="body.0.**", with_=lambda old: old)
    assert [r.name for r in plan.touched] == ["body.0"]
    assert {r.why for r in plan.skipped if r.name == "body.0.0"} == {"within body.0, which is replaced"}
    tied = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4))
    tied[1].weight = tied[0].weight
    assert replace(tied, at="1", with_=lambda old: old).touched[0].why == "its tie with 0.weight ends"
    with pytest.raises(TypeError, match=r"returned int for 'head'"):
        replace(net(), at="head", with_=lambda old: 3).apply()
    with pytest.raises(ValueError, match="a Conv2d"):
        replace(net(), at=nn.Conv2d, with_=lambda old: old)


def test_norms_and_activations_are_exchanged_by_name_and_come_back_from_a_recipe(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from interlayer.layers.norm.rmsnorm import RMSNorm

    small = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 0}
    tokens = torch.arange(6)[None]
    llama = LlamaForCausalLM(LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, rms_norm_eps=1e-3, **small)
    ).eval()  # fmt: skip
    with torch.no_grad():
        llama.model.norm.weight.uniform_(1, 2)
    same = replace(llama, at="**norm", with_="rmsnorm").apply()  # another class for the same maths and the same weights
    assert isinstance(same.model.norm, RMSNorm) and same.model.norm.eps == 1e-3
    torch.testing.assert_close(same(tokens).logits, llama(tokens).logits)

    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, **small)).eval()
    plan = replace(gpt2, at="**", with_="relu")
    assert [r.name for r in plan.touched if r.name.endswith("act")] == [
        "transformer.h.0.mlp.act",
        "transformer.h.1.mlp.act",
    ]
    assert {r.name: r.why for r in plan.skipped}["transformer.ln_f"] == "LayerNorm is no activation"
    changed = replace(
        replace(gpt2, at="**act", with_="leaky-relu(negative_slope=0.2)").apply(), at="**ln_*", with_="rmsnorm"
    )
    changed = changed.apply()
    assert changed.transformer.h[0].mlp.act.negative_slope == 0.2
    recipe.save(changed, tmp_path)
    again = recipe.load(tmp_path)
    assert isinstance(again.transformer.ln_f, RMSNorm)
    torch.testing.assert_close(again(tokens).logits, changed(tokens).logits, rtol=0, atol=0)
    (tmp_path / "recipe.json").write_text((tmp_path / "recipe.json").read_text().replace("transformer.ln_f", "gone"))
    with pytest.raises(ValueError, match="does not say what was replaced in GPT2LMHeadModel"):
        recipe.load(tmp_path)


def test_what_cannot_be_exchanged_by_name_is_skipped_with_the_reason():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.GroupNorm(1, 2), nn.LayerNorm((2, 2)))
    with pytest.raises(
        ValueError, match=r"can become 'rmsnorm' .*1: BatchNorm2d normalises channels, rmsnorm features"
    ):
        replace(model, at="*", with_="rmsnorm")
    plan = replace(model, at="*", with_="batchnorm")
    assert [r.name for r in plan.touched] == ["1"]
    assert {r.why for r in plan.skipped} == {
        f"{n} is no norm over one axis" for n in ("Conv2d", "ReLU", "GroupNorm", "LayerNorm")
    }
    half = replace(model.bfloat16(), at="1", with_="batchnorm(momentum=0.3)").apply()
    assert half[1].weight.dtype == torch.bfloat16 and half[1].momentum == 0.3 and half[1] is not model[1]
    with pytest.raises(
        ValueError, match=r"no norm, activation or linear map is called 'rmsnrm'. Did you mean 'rmsnorm'"
    ):
        replace(model, at="*", with_="rmsnrm")


def family(name):
    """Tiny random models of other libraries: what they are built from, and which activations they hold."""
    import diffusers
    import transformers

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    words = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    classes = {
        "gpt2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2, **words}),
        "llama": ("LlamaForCausalLM", {**small, **words}),
        "gemma": ("GemmaForCausalLM", {**small, **words, "head_dim": 8, "num_key_value_heads": 1}),
        "t5": ("T5ForConditionalGeneration", {**t5, "vocab_size": 32, "eos_token_id": 0, "pad_token_id": 0}),
        "bert": ("BertModel", {**small, "vocab_size": 32}),
        "vit": ("ViTModel", {**small, "image_size": 8, "patch_size": 4, "num_channels": 1}),
        "mamba": ("MambaForCausalLM", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, **words}),
    }
    if name in classes:
        cls = getattr(transformers, classes[name][0])
        return cls(cls.config_class(**classes[name][1])).eval()
    if name == "unet":
        return diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).eval()  # fmt: skip
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, num_layers=1, sample_size=4, norm_num_groups=4,
    ).eval()  # fmt: skip


def forward(name, model):
    """The output that counts."""
    ids = torch.arange(1, 6)[None]
    with torch.no_grad():
        if name == "unet":
            return model(torch.ones(1, 1, 8, 8), 3).sample
        if name == "dit":
            return model(torch.ones(1, 1, 4, 4), torch.tensor([3]), torch.tensor([1])).sample
        if name == "vit":
            return model(torch.ones(1, 1, 8, 8)).pooler_output
        out = model(ids, decoder_input_ids=ids) if name == "t5" else model(ids)
        return out.pooler_output if name == "bert" else out.logits


@pytest.mark.parametrize(
    ("name", "kinds", "count", "calls"),
    [
        ("gpt2", {"NewGELUActivation"}, 2, set()),
        ("llama", {"SiLUActivation"}, 2, set()),
        ("gemma", {"GELUTanh"}, 2, set()),
        ("t5", {"ReLU"}, 2, set()),
        ("bert", {"GELUActivation", "Tanh"}, 3, set()),
        ("vit", {"GELUActivation", "Tanh"}, 3, set()),
        ("unet", {"SiLU"}, 10, set()),
        ("dit", {"SiLU"}, 2, {"GELU", "DiTTransformer2DModel"}),
    ],
)
def test_activations_are_known_by_their_type(name, kinds, count, calls):
    model = family(name)
    plan = replace(model, at="**", with_="smelu")
    assert {r.what for r in plan.touched} == kinds and len(plan.touched) == count
    assert {r.what for r in plan.skipped if "calls" in r.why or "not a module" in r.why} == calls
    before, after = forward(name, model), forward(name, plan.apply())
    assert after.shape == before.shape and after.isfinite().all() and not torch.equal(after, before)
    assert not any(type(m).__name__ == "SmeLU" for m in model.modules())


def test_an_activation_that_is_never_called_stays():
    """Mamba's mixer holds its activation as a module, and gives its name to a kernel."""
    with pytest.raises(ValueError, match=r"mixer.act: MambaMixer reads activation='silu' and never calls it"):
        replace(family("mamba"), at="**", with_="smelu")


@pytest.mark.parametrize("name", ["llama", "gemma", "t5", "mamba"])
def test_norms_of_other_libraries_keep_their_gain(name):
    """Gemma keeps the gain as its distance from one: the new norm gets the gain as it acts."""
    model = family(name)
    norms = [m for m in model.modules() if type(m).__name__.endswith(("RMSNorm", "LayerNorm"))]
    with torch.no_grad():
        for norm in norms:
            norm.weight.add_(torch.rand_like(norm.weight))
    plan = replace(model, at="**", with_="rmsnorm")
    assert len(plan.touched) == len(norms)
    torch.testing.assert_close(forward(name, plan.apply()), forward(name, model))


def test_norms_over_other_axes_and_with_other_inputs_stay():
    from transformers import ConvNextConfig, ConvNextModel

    model = ConvNextModel(
        ConvNextConfig(num_channels=1, hidden_sizes=[4, 4], depths=[1, 1], num_stages=2, patch_size=2)
    )
    plan = replace(model, at="**", with_="rmsnorm")
    over_channels = {n for n, m in model.named_modules() if getattr(m, "data_format", "") == "channels_first"}
    assert over_channels and not over_channels & {r.name for r in plan.touched}
    assert plan.apply()(torch.ones(1, 1, 8, 8)).pooler_output.isfinite().all()
    plan = replace(family("dit"), at="**", with_="rmsnorm")
    assert {r.what for r in plan.touched} == {"LayerNorm"}
    with pytest.raises(ValueError, match="AdaLayerNormZero is no norm over one axis"):
        replace(family("dit"), at="**.norm1", with_="rmsnorm")
    with pytest.raises(ValueError, match="GroupNorm is no norm over one axis"):
        replace(family("unet"), at="**.norm1", with_="rmsnorm")


def test_linear_maps_keep_sizes_and_weights_and_those_that_are_never_called_stay():
    model = family("gpt2")
    plan = replace(model, at="transformer.h.**", with_="linear")
    assert {r.what for r in plan.touched} == {"Conv1D"} and len(plan.touched) == 8
    new = plan.apply()
    assert type(new.transformer.h[0].mlp.c_fc) is nn.Linear and new.transformer.h[0].mlp.c_fc.out_features == 64
    torch.testing.assert_close(forward("gpt2", new), forward("gpt2", model))
    attending = nn.TransformerEncoderLayer(8, 2, 16)
    for with_ in ("linear", lambda old: nn.Linear(old.in_features, old.out_features)):
        plan = replace(attending, at=nn.Linear, with_=with_)
        assert [r.name for r in plan.touched] == ["linear1", "linear2"]
        assert {r.name: r.why for r in plan.skipped}["self_attn.out_proj"].startswith(
            "MultiheadAttention reads its weights"
        )


def test_batch_norms_keep_their_dimension_and_statistics():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2))
    model(torch.randn(20, 3) * 3 + 1)
    new = replace(model.eval(), at="**", with_="batchnorm(momentum=0.3)").apply()
    x = torch.randn(5, 3)
    assert type(new[0]) is nn.BatchNorm1d and new[0].momentum == 0.3
    torch.testing.assert_close(new(x), model(x))


class Gate(nn.Module):
    """Everything that is not an activation by type: containers, a custom function, a gate, sizes and tables."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Dropout(), nn.Unflatten(1, (4, 1, 1)))
        self.norm, self.pool, self.softmax = nn.GroupNorm(2, 4), nn.MaxPool2d(1), nn.Softmax(1)
        self.table, self.gate, self.own = nn.Embedding(2, 4), nn.Sigmoid(), Own()

    def forward(self, x):
        return self.own(self.pool(self.norm(self.body(x))) * self.gate(x)[..., None, None] + self.table.weight[0].sum())


class Own(nn.Module):
    def forward(self, x):
        return x.clamp(-2, 2)


def test_what_is_not_known_to_be_an_activation_is_replaced_only_when_named():
    model = Gate()
    plan = replace(model, at="**", with_="smelu")
    assert [r.name for r in plan.touched] == ["body.2"]
    why = {r.name: r.why for r in plan.skipped}
    assert why["own"] == "Own is not known to be an activation; name it or its class to replace it"
    assert why["gate"].startswith("Sigmoid is not known") and why["table"] == "Embedding is no activation"
    assert "body" not in why  # a container is worth a line only if it is named
    assert plan.apply()(torch.ones(2, 4)).shape == (2, 4, 1, 1)
    for at in ("own", "**.own", Own, re.compile("^own$"), lambda n, m: n == "own", where(nn.ReLU) | "own", ["own"]):
        assert "own" in [r.name for r in replace(model, at=at, with_="smelu").touched]
    for at in ("*", "own**", nn.Module, where("**") - "body.**", where("*") & nn.Module):
        with pytest.raises(ValueError, match="own: Own is not known to be an activation"):
            replace(model, at=where(at) - nn.ReLU, with_="smelu")
    assert [r.name for r in replace(model, at=nn.Sigmoid, with_="relu").touched] == ["gate"]
    for at in (nn.Dropout, nn.MaxPool2d, nn.Flatten, nn.Softmax, "table", "norm", "body"):
        with pytest.raises(ValueError, match="is no activation"):
            replace(model, at=at, with_="smelu")


class RMSNorm(nn.Module):
    """As many write it themselves."""

    def __init__(self, width, epsilon=1e-3):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.rand(width) + 1), epsilon

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.epsilon).rsqrt() * self.weight


class Scaled(RMSNorm):
    def forward(self, x):
        return x * self.weight


def test_a_norm_of_ones_own_is_replaced_when_named_if_it_is_one():
    model = nn.Sequential(nn.Linear(4, 4), RMSNorm(4), Scaled(4), nn.LayerNorm(4))
    plan = replace(model, at="**", with_="rmsnorm")
    assert [r.name for r in plan.touched] == ["3"]
    assert {r.name: r.why for r in plan.skipped}[
        "1"
    ] == "RMSNorm is not known to be a norm; name it or its class to replace it"
    for at in ("1", RMSNorm):
        plan = replace(model, at=at, with_="rmsnorm")
        assert [r.name for r in plan.touched] == ["1"]  # the other one only scales
        new, x = plan.apply(), torch.randn(3, 4)
        assert new[1].eps == 1e-3 and type(new[1]) is not RMSNorm
        torch.testing.assert_close(new(x), model(x))


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.tanh = nn.Linear(4, 4), nn.Linear(4, 4), nn.Tanh()
        self.held, self.last = partial(F.gelu, approximate="tanh"), F.leaky_relu

    def forward(self, x):
        return self.last(self.held(self.a(F.relu(x)))) + self.inner(self.tanh(x))

    def inner(self, x):
        return torch.selu(self.b(x)).mish() if hasattr(x, "mish") else torch.selu(self.b(x))

    def unused(self, x):
        return F.elu(x)


def test_activations_that_are_no_modules_are_listed():
    one = Calls()
    model = nn.ModuleDict({"first": one, "again": one, "lstm": nn.LSTM(4, 4), "act": nn.ReLU()})
    plan = replace(model, at="**", with_="smelu")
    assert [r.name for r in plan.touched] == ["first.tanh", "act"]
    listed = [(r.name, r.why) for r in plan.skipped if "no activation" not in r.why and "not known" not in r.why]
    assert listed == [
        ("first", "its held is the function gelu, not a module"),
        ("first", "its last is the function leaky_relu, not a module"),
        ("first", "calls mish, relu, selu in its forward pass, not a module"),
        ("lstm", "its kernel has activations that are no modules"),
    ]
    new = plan.apply()
    assert new["first"].tanh is new["again"].tanh and type(new["first"].tanh).__name__ == "SmeLU"
    for at in ("a", nn.Linear):  # nothing to replace: the error says what cannot be reached
        with pytest.raises(ValueError, match=r"Calls: its held is the function gelu.*calls mish, relu, selu"):
            replace(one, at=at, with_="smelu")


def test_norms_and_linear_maps_that_are_no_modules_are_listed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.norm, self.up = nn.Parameter(torch.ones(4, 4)), nn.LayerNorm(4), nn.Linear(4, 4)
            self.attend = nn.MultiheadAttention(4, 2)

        def forward(self, x):
            return F.linear(F.layer_norm(F.relu(self.up(self.norm(x))), (4,)), self.weight)

    def listed(with_):
        plan = replace(Net(), at="**", with_=with_)
        return {r.name: r.why for r in plan.skipped if "no modules" in r.why or "not a module" in r.why}

    assert listed("rmsnorm") == {"Net": "calls layer_norm in its forward pass, not a module"}
    calls = {
        "Net": "calls linear in its forward pass, not a module",
        "attend": "its kernel has linear maps that are no modules",
    }
    assert listed("linear") == calls


@pytest.mark.parametrize("with_", ["smelu", "rmsnorm"])
def test_fused_kernels_of_torch_do_not_pass_over_what_is_new(with_):
    """In evaluation torch runs a whole Transformer layer by one kernel that reads weights and never calls the parts."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.ReLU(), batch_first=True)
    model, x, pad = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    pad[0, 3:] = True
    new = replace(model, at="**", with_=with_).apply()
    with torch.no_grad():
        out = new(x, src_key_padding_mask=pad)
        alone = new.layers[0](x)
        for module in new.train().modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        torch.testing.assert_close(
            out[~pad], new(x, src_key_padding_mask=pad)[~pad]
        )  # in training there are no such kernels
        torch.testing.assert_close(alone, new.layers[0](x))
        assert not torch.allclose(alone, model.layers[0](x), atol=1e-3)


def test_modules_without_sizes_or_numbers():
    lazy = nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyLinear(3), nn.BatchNorm1d(3))
    plan = replace(lazy, at="*", with_="batchnorm")
    assert [r.name for r in plan.touched] == ["2"]
    assert {r.name: r.why for r in plan.skipped}["0"] == "LazyBatchNorm1d has no size yet; run the model once"
    with torch.device("meta"):
        model = family("llama")
    new = replace(model, at="**", with_="rmsnorm").apply()
    assert new.model.norm.weight.is_meta and type(new.model.norm) is not type(model.model.norm)


def test_tied_and_shared_modules_stay_one(tmp_path):
    act, norm = nn.GELU(), nn.LayerNorm(4)
    model = nn.Sequential(nn.Linear(4, 4), act, norm, nn.Linear(4, 4), act, norm)
    model[3].weight = model[0].weight
    new = replace(replace(model, at="**", with_="smelu").apply(), at="**", with_="rmsnorm").apply()
    assert new[1] is new[4] and new[2] is new[5] and new[3].weight is new[0].weight
    recipe.save(new, tmp_path)
    back = recipe.load(tmp_path, base=model)
    assert back[1] is back[4] and back[2] is back[5] and back[3].weight is back[0].weight
    x = torch.randn(2, 4)
    assert torch.equal(back(x), new.eval()(x))


def test_blocks_of_hugging_face_models_and_ours():
    from transformers import (
        BertConfig,
        BertModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaModel,
        ViTConfig,
        ViTModel,
    )

    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    cases = {
        "transformer.h": GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=32)),
        "layers": LlamaModel(LlamaConfig(vocab_size=32, **small)),
        "encoder.layer": BertModel(BertConfig(vocab_size=32, **small)),
        "trunk.blocks": models.Transformer(depth=3, width=16, heads=2),
    }
    for name, model in cases.items():
        found, modules = blocks(model)
        assert (found, len(modules)) == (name, 3)
    assert len(blocks(ViTModel(ViTConfig(**small, image_size=8, patch_size=4)))[1]) == 3
    with pytest.raises(ValueError, match="not known which its blocks are"):
        blocks(nn.Linear(2, 2))


def test_missing_extra_names_caller_and_install():
    with pytest.raises(ImportError, match=r'demo needs \'nowhere\': pip install "interlayer\[hf\]"'):
        need("nowhere", "hf", "demo")


def test_save_pretrained_refuses_replaced_modules_and_interlayer_save_keeps_them(tmp_path):
    model = families.model("gpt2")
    new = replace(model, at="**", with_="smelu").apply()
    for each in (new, copy.deepcopy(new)):
        with pytest.raises(ValueError, match="replaced modules, which from_pretrained would lose"):
            each.save_pretrained(tmp_path / "plain")
    recipe.save(new, tmp_path / "own")
    with pytest.raises(ValueError, match="replaced modules"):
        recipe.load(tmp_path / "own").save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "plain")
