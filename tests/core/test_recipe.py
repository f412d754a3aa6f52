import json
import os
import resource
import socket

import pytest
import torch
from torch import nn

from interlayer import catalog, models
from interlayer.core import recipe, record, select, weights
from interlayer.core.equal import named_tensors


def same(a, b):
    x, y = named_tensors(a), named_tensors(b)
    assert x.keys() == y.keys()
    for name, value in x.items():
        assert value.dtype == y[name].dtype and torch.equal(value, y[name]), name


def gpt2(**options):
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16, **options)).eval()


def base_net():
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def test_hugging_face_model_by_config(tmp_path):
    model = gpt2(attn_implementation="eager").to(torch.bfloat16)
    recipe.save(model, tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["model.safetensors", "recipe.json"]
    state = torch.get_rng_state()
    new = recipe.load(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), state)
    same(model, new)
    assert type(new) is type(model) and new.lm_head.weight is new.transformer.wte.weight and not new.training
    assert new.config._attn_implementation == "eager"
    tokens = torch.arange(5)[None]
    assert torch.equal(model(tokens).logits, new(tokens).logits)


def test_buffers_outside_the_state_dict_are_kept(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=32
    )
    model = LlamaForCausalLM(config).eval().to(torch.bfloat16)
    recipe.save(model, tmp_path)
    new, tokens = recipe.load(tmp_path), torch.arange(5)[None]
    same(model, new)
    assert torch.equal(model(tokens).logits, new(tokens).logits)


def test_diffusers_model_by_config(tmp_path):
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    recipe.save(model, tmp_path)
    new, x = recipe.load(tmp_path), torch.randn(1, 1, 8, 8)
    same(model, new)
    assert torch.equal(model(x, 3).sample, new(x, 3).sample)


def test_a_configuration_with_an_infinity(tmp_path):
    """Transformers writes it as an object, for JSON has none."""
    from transformers import Mamba2Config, Mamba2Model

    small = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1}
    model = Mamba2Model(Mamba2Config(vocab_size=32, **small)).eval()
    recipe.save(model, tmp_path)
    assert "Infinity" in (tmp_path / recipe.RECIPE).read_text()
    new = recipe.load(tmp_path)
    same(model, new)
    assert new.config.time_step_limit[1] == float("inf")


def test_a_model_with_a_backbone_by_config(tmp_path):
    from transformers import DetrConfig, DetrModel, ResNetConfig

    inner = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], out_features=["stage2"], layer_type="basic"
    )
    small = {
        "d_model": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
        "num_queries": 3,
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = DetrModel(DetrConfig(backbone_config=inner, use_timm_backbone=False, **small, **heads)).eval()
    recipe.save(model, tmp_path)
    new, x = recipe.load(tmp_path), torch.randn(1, 3, 32, 32)
    same(model, new)
    assert torch.equal(model(x).last_hidden_state, new(x).last_hidden_state)


def test_own_model_by_its_arguments(tmp_path):
    model = models.Transformer(vocab=32, length=16, depth=2, width=16, heads=2, stream="rezero").eval()
    recipe.save(model, tmp_path)
    new = recipe.load(tmp_path)
    same(model, new)
    assert new.head.weight is new.embed.weight
    strange = models.Transformer(vocab=32, length=16, depth=2, width=16, heads=2, activation=nn.Tanh)
    recipe.save(strange, tmp_path)
    with pytest.raises(ValueError, match="Pass base="):
        recipe.load(tmp_path)


def test_any_module_with_a_base(tmp_path):
    model = base_net()
    model(torch.randn(9, 3))
    recipe.save(model, tmp_path)
    given = base_net()
    before = given[0].weight.clone()
    same(model, recipe.load(tmp_path, base=base_net))
    same(model, recipe.load(tmp_path, base=given))
    assert torch.equal(given[0].weight, before)
    with pytest.raises(ValueError, match=r"Sequential, which a recipe cannot build. Pass base="):
        recipe.load(tmp_path)
    with pytest.raises(TypeError, match="base made int"):
        recipe.load(tmp_path, base=lambda: 3)


def test_ties_made_after_building_come_back(tmp_path):
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4))
    weights.tie(model, "1.weight", "0.weight")
    recipe.save(model, tmp_path)
    new = recipe.load(tmp_path, base=lambda: nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4)))
    assert new[1].weight is new[0].weight
    same(model, new)


def test_steps_are_kept_through_copies_saves_and_loads(tmp_path):
    model = base_net()
    plan_structure = {"masks": ["0.weight"]}
    weights.mask(model[0], "weight", torch.rand(3, 3) > 0.5)
    recipe.record(model, "lamp", {"sparsity": 0.5}, plan_structure)
    plan_structure["masks"].append("2.weight")  # the record is a copy
    recipe.save(model, tmp_path)
    new = recipe.load(tmp_path, base=base_net)
    assert recipe.steps(new) == [{"system": "lamp", "options": {"sparsity": 0.5}, "structure": {"masks": ["0.weight"]}}]
    same(model, new)
    baked = weights.bake(model)
    recipe.save(baked, tmp_path)
    new = recipe.load(tmp_path, base=base_net)
    assert [s["system"] for s in recipe.steps(new)] == ["lamp", "bake"] and not weights.masks(new)
    same(baked, new)
    with pytest.raises(TypeError, match="JSON-able"):
        recipe.record(model, "lamp", {"train": print}, {})


def test_replaced_modules_need_a_base(tmp_path):
    model = select.replace(gpt2(), at="**.act", with_=lambda old: nn.ReLU()).apply()
    recipe.save(model, tmp_path)
    with pytest.raises(ValueError, match="GPT2LMHeadModel, which a recipe cannot build"):
        recipe.load(tmp_path)
    same(model, recipe.load(tmp_path, base=model))


def test_other_files_are_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(notes.txt\)"):
        recipe.save(base_net(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_text("another library's")
    with pytest.raises(ValueError, match="holds other files"):
        recipe.save(base_net(), tmp_path / "weights")
    with pytest.raises(ValueError, match="is a file"):
        recipe.save(base_net(), tmp_path / "notes.txt")
    recipe.save(base_net(), tmp_path / "new" / "deep")
    recipe.save(base_net(), tmp_path / "new" / "deep")
    assert len(list((tmp_path / "new" / "deep").iterdir())) == 2


def change(path, **entries):
    content = json.loads((path / recipe.RECIPE).read_text())
    (path / recipe.RECIPE).write_text(json.dumps({**content, **entries}))


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"format": 99}, "has format 99"),
        ({"steps": 3}, "lacks steps"),
        ({"steps": [{"system": "lamp"}]}, "lacks steps"),
        ({"steps": [{"system": "lamp", "structure": {"modules": [[]]}}]}, "step 'lamp' does not fit GPT2LMHeadModel"),
        (
            {"steps": [{"system": "replace", "structure": {"with": "relu", "places": [[]]}}]},
            "does not say what was replaced",
        ),
        ({"steps": [{"system": "replace", "structure": {"with": "relu", "places": ["lm_head"]}}]}, "does not say what"),
        ({"base": {}}, "lacks base"),
        ({"base": {"kind": [], "class": "GPT2LMHeadModel", "config": {}}}, "lacks base"),
        ({"base": {"kind": "transformers", "class": "GPT2LMHeadModel"}}, "without configuration"),
        ({"base": {"kind": "interlayer", "class": "Transformer", "config": {"stream": {"a": []}}}}, "cannot be built"),
        (
            {"base": {"kind": "interlayer", "class": "Transformer", "config": {"depth": 10**9}}},
            "depth=1000000000 is more",
        ),
        ({"base": {"kind": "interlayer", "class": "MLP", "config": {"inputs": 3, "classes": 10**15}}}, "is more than"),
        (
            {
                "base": {
                    "kind": "interlayer",
                    "class": "Transformer",
                    "config": {"depth": 10**5, "width": 16, "heads": 2},
                }
            },
            "no saved tensor has the shape",
        ),
        ({"shared": {"lm_head.weight": []}}, "lacks shared"),
        ({"steps": [{"system": "os", "structure": {}}]}, "no transform 'os'"),
        ({"steps": [{"system": "rezero", "structure": {}}]}, "no transform 'rezero'"),
        ({"base": {"kind": "pickle", "class": "x", "config": {}}}, "a base of kind 'pickle'"),
        ({"base": {"kind": "transformers", "class": "pipeline", "config": {}}}, "no model class 'pipeline'"),
        ({"base": {"kind": "transformers", "class": "AutoModel", "config": {}}}, "no model class 'AutoModel'"),
        ({"base": {"kind": "diffusers", "class": "DDPMScheduler", "config": {}}}, "no model class 'DDPMScheduler'"),
        ({"base": {"kind": "interlayer", "class": "build", "config": {}}}, "no model class 'build'"),
        ({"base": {"kind": "interlayer", "class": "MLP", "config": {"depht": 3}}}, "cannot be built"),
        ({"base": {"kind": "interlayer", "class": "ConvNet", "config": {}}}, "no saved tensor has the shape"),
        (
            {"shared": {"lm_head.weight": "transformer.wte.weight", "0.weight": "nowhere"}},
            "has more than the model: 1 tensors, such as 0.weight",
        ),
        (
            {"shared": {"lm_head.weight": "nowhere"}},
            "shares with tensors that it lacks: 1 tensors, such as lm_head.weight",
        ),
    ],
)
def test_broken_recipes_are_one_clear_error(tmp_path, entries, says):
    recipe.save(gpt2(), tmp_path)
    change(tmp_path, **entries)
    with pytest.raises(ValueError, match=says):
        recipe.load(tmp_path)


def test_broken_files_are_one_clear_error(tmp_path):
    recipe.save(base_net(), tmp_path)
    with pytest.raises(ValueError, match=r"0.bias is \(3,\) in .* \(4,\) in the rebuilt"):
        recipe.load(tmp_path, base=nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(3), nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=r"lacks 2 tensors, such as 3\.bias"):
        recipe.load(tmp_path, base=nn.Sequential(*base_net(), nn.Linear(1, 1)))
    (tmp_path / recipe.WEIGHTS).write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        recipe.load(tmp_path, base=base_net)
    (tmp_path / recipe.RECIPE).write_text("{")
    with pytest.raises(ValueError, match=r"recipe.json cannot be read"):
        recipe.load(tmp_path)
    with pytest.raises(ValueError, match=r"recipe.json cannot be read"):
        recipe.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("sizes", "steps", "says"),
    [
        ({"depth": 10**6}, [], "it wants more than 14"),
        ({"width": 10**6}, [], "no saved tensor has the shape"),
        ({"width": 10**6}, [{"system": "bake", "structure": {}}], "no saved tensor has the shape"),
        ({"stream": "denseformer(dilation=1000000000)"}, [], "is more than the saved weights can fill"),
    ],
)
def test_sizes_that_the_weights_do_not_have_cost_nothing(tmp_path, sizes, steps, says):
    recipe.save(models.Transformer(vocab=32, length=16, depth=2, width=16, heads=2), tmp_path)
    base = json.loads((tmp_path / recipe.RECIPE).read_text())["base"]
    change(tmp_path, base={**base, "config": {**base["config"], **sizes}}, steps=steps)
    with pytest.raises(ValueError, match=says):
        recipe.load(tmp_path)


def test_deep_nesting_is_one_clear_error(tmp_path):
    recipe.save(gpt2(), tmp_path)
    (tmp_path / recipe.RECIPE).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"recipe.json cannot be read: maximum recursion"):
        recipe.load(tmp_path)
    recipe.save(gpt2(), tmp_path)
    nested = '{"a":' * 900 + "1" + "}" * 900
    content = json.loads((tmp_path / recipe.RECIPE).read_text())
    content["base"]["config"]["inner"] = "HERE"
    (tmp_path / recipe.RECIPE).write_text(json.dumps(content).replace('"HERE"', nested))
    with pytest.raises(ValueError, match="cannot be"):
        recipe.load(tmp_path)


def test_what_could_fetch_is_dropped_from_configurations():
    config = {
        "attn_implementation": "evil/repo", "auto_map": {}, "inner": [{"use_pretrained_backbone": True}], "n": 3,
        "trust_remote_code": True, "quantization_config": {}, "custom_pipelines": {},
    }  # fmt: skip
    assert record.scrub(config) == {"inner": [{"use_pretrained_backbone": False}], "n": 3}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_backbones_by_name_are_refused_and_nothing_is_fetched(tmp_path, no_network):
    recipe.save(gpt2(), tmp_path)
    config = {"backbone": "microsoft/resnet-50", "use_pretrained_backbone": False, "use_timm_backbone": False}
    for nested in (config, {"vision_config": config}):
        change(tmp_path, base={"kind": "transformers", "class": "DetrForObjectDetection", "config": nested})
        with pytest.raises(ValueError, match="backbone='microsoft/resnet-50' names a model that would be fetched"):
            recipe.load(tmp_path)
    named = gpt2(backbone="microsoft/resnet-50")  # such a model asks for a base when it is loaded
    recipe.save(named, tmp_path)
    assert json.loads((tmp_path / recipe.RECIPE).read_text())["base"]["kind"] == "given"
    same(named, recipe.load(tmp_path, base=gpt2))


def test_a_configuration_that_asks_the_hub_gets_no_answer(tmp_path, monkeypatch, no_network):
    import huggingface_hub
    from transformers import GPT2Config

    recipe.save(gpt2(), tmp_path)
    monkeypatch.setattr(GPT2Config, "from_dict", lambda config: huggingface_hub.HfApi().repo_exists("some/model"))
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(ValueError, match="OfflineModeIsEnabled"):
        recipe.load(tmp_path)
    assert before == huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_network_of_the_catalogue_by_its_arguments(tmp_path):
    from interlayer.layers.mixing.mlp_mixer import MLPMixer

    model = MLPMixer(1, 8, patch=4, classes=3, depth=2, width=8).eval()
    recipe.save(model, tmp_path)
    new = recipe.load(tmp_path)
    same(model, new)
    assert type(new) is MLPMixer and new.config == model.config


def test_class_names_of_the_catalogue_are_unique():
    names = [n for s in catalog.load().values() for n in (s.code, s.network) if n]
    assert len(names) == len(set(names)) and not set(names) & set(models.__all__)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_that_the_umask_leaves(tmp_path, mask):
    before = os.umask(mask)
    try:
        recipe.save(base_net(), tmp_path / "m")
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "m").iterdir()} == {0o666 & ~mask}


def test_a_full_disk_is_one_clear_error_and_leaves_what_was_there(tmp_path):
    recipe.save(base_net(), tmp_path)
    before = (tmp_path / recipe.WEIGHTS).read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(OSError, match=rf"recipe.save: {tmp_path} cannot be written: .*File too large"):
            recipe.save(nn.Linear(100, 100), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(p.name for p in tmp_path.iterdir()) == [recipe.WEIGHTS, recipe.RECIPE]
    assert (tmp_path / recipe.WEIGHTS).read_bytes() == before


def test_extra_state_is_refused(tmp_path):
    class Odd(nn.Module):
        def get_extra_state(self):
            return {}

    with pytest.raises(ValueError, match="extra state"):
        recipe.save(Odd(), tmp_path)


def test_a_transform_of_the_catalogue_is_what_steps_name():
    assert catalog.load()["lamp"].kind == "transform"
