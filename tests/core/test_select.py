import re

import pytest
import torch
from torch import nn

from interlayer import models
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

    from interlayer.core import recipe
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
    with pytest.raises(ValueError, match=r"no norm or activation is called 'rmsnrm'. Did you mean 'rmsnorm'"):
        replace(model, at="*", with_="rmsnrm")


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
