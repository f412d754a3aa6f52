"""Parts on frozen models: their formulas, switching, files that PEFT shares, baking, and what is refused."""

import copy
import json
import re
import warnings
from functools import partial

import families
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer.core import attach as at
from interlayer.core.attach import Bias, Bottleneck, Lora, Part, Scale, Whole, active, attach, attached, bake, detach
from interlayer.testing.common import make, picture, same, unchanged
from interlayer.testing.ddp import two_processes

# PEFT asks transformers by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
HF = ("gpt2", "llama", "t5", "bert", "vit")
LORA = {
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "down_proj"],
    "t5": ["q", "wo"],
    "bert": ["query", "value"],
    "vit": ["q_proj", "v_proj"],
}


def targets(name):
    return [f"**.{last}" for last in LORA[name]]


def stirred(model, task="default", seed=3, by=0.1):
    """The parts of a task with other numbers than they start with."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for part in attached(model)[task].values():
            for p in part.parameters():
                p.add_(by * torch.randn(p.shape, generator=generator))
    return model


def out(model, name):
    with torch.no_grad():
        return families.output(model, families.batch(name))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3))


FORMULAS = {
    "lora": (partial(Lora, rank=2, alpha=3), lambda p, h, x: h(x) + 1.5 * x @ p.lora_A.weight.T @ p.lora_B.weight.T),
    "lora, bias": (partial(Lora, bias=True), lambda p, h, x: h(x) + 2 * p.lora_B(p.lora_A(x))),
    "ia3": (Scale, lambda p, h, x: h(x) * p.ia3_l[:, 0]),
    "ia3 inputs": (partial(Scale, inputs=True), lambda p, h, x: h(x * p.ia3_l[0])),
    "bitfit": (Bias, lambda p, h, x: x @ h.weight.T + p.bias),
    "bottleneck": (partial(Bottleneck, hidden=2), lambda p, h, x: h(x) + p.up(F.gelu(p.down(h(x))))),
    "whole": (Whole, lambda p, h, x: F.linear(x, p.copy.weight, p.copy.bias)),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMULAS)
def test_each_part_is_its_formula_with_gradients_and_nothing_at_the_start(kind):
    build, formula = FORMULAS[kind]
    plain, x = net(), torch.randn(4, 7, 5)
    model = attach(copy.deepcopy(plain), "0", build)
    assert torch.equal(model(x), plain(x))
    part = attached(stirred(model))["default"]["0"]
    model(x).square().sum().backward()
    got = [p.grad.clone() for p in part.parameters()]
    part.zero_grad()
    wanted = plain[1:](formula(part, plain[0], x))
    wanted.square().sum().backward()
    torch.testing.assert_close(model(x), wanted)
    torch.testing.assert_close(got, [p.grad for p in part.parameters()])
    assert all(p.grad is None for n, p in model.named_parameters() if ".attached." not in n)


@pytest.mark.parametrize("name", HF)
def test_modules_keep_class_name_and_weights_and_detach_leaves_no_trace(name):
    model = families.model(name)
    before, state, first = picture(model), dict(model.state_dict()), out(model, name)
    types = {n: type(m) for n, m in model.named_modules()}
    attach(model, at.feed_forwards(model), partial(Lora, rank=2), task="a")
    attach(model, at.attention_outputs(model), Bottleneck, task="a")
    assert torch.equal(out(model, name), first)
    assert {n: type(m) for n, m in model.named_modules() if ".attached" not in n} == types
    same(state, {k: v for k, v in model.state_dict().items() if ".attached." not in k}, "the base")
    assert (out(stirred(model, "a"), name) - first).abs().max() > 1e-3
    assert torch.equal(out(active(model), name), first)
    detach(model)
    unchanged(before, model, "attach and detach")
    assert "save_pretrained" not in vars(model)


@pytest.mark.parametrize("name", HF)
def test_feed_forwards_of_hugging_face_models_are_found_with_their_dropout(name):
    model = families.model(name)
    sites = at.feed_forwards(model)
    assert len(sites) == (8 if name == "t5" else 4) and len(at.attention_outputs(model)) == (12 if name == "t5" else 4)
    for site, late in sites.items():
        assert at.matrix(model.get_submodule(site)).shape == (16, 64 if name == "gpt2" else 24)
        assert (late == site) == (name == "llama") and (late == site or "dropout" in late)


def test_tasks_are_named_switched_and_act_together():
    model, x = net(), torch.randn(3, 5)
    plain = model(x)
    attach(model, "0", Lora, task="a")
    attach(model, "0", Bias, task="b")
    attach(model, ["1", "3"], Whole, task="b")
    attach(model, "3", Whole, task="a")
    assert list(attached(attach(copy.deepcopy(model), nn.Linear, Lora, task="c"))["c"]) == [
        "0",
        "3",
    ]  # not those in parts
    for task in "ab":
        stirred(model, task, ord(task))
    alone = {task: active(model, task)(x) for task in "ab"}
    assert torch.equal(active(model)(x), plain) and not torch.equal(alone["a"], alone["b"])
    host, (a, b) = copy.deepcopy(net()[0]), (attached(model)[t]["0"] for t in "ab")
    both = b(x, a(x, host(x)))
    tail = [attached(model)["b"]["1"].copy, nn.ReLU(), attached(model)["b"]["3"].copy]
    torch.testing.assert_close(active(model, "a", "b")(x), nn.Sequential(*tail)(both))
    active(model, "b")
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"b"}
    assert list(attached(detach(model, "a"))) == ["b"] and torch.equal(model(x), alone["b"])


def test_a_part_reads_one_module_and_acts_behind_another_in_training_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Identity())
    attach(model, {"0": "1"}, partial(Lora, rank=1))
    part, x = attached(stirred(model))["default"]["0"], torch.randn(4, 5)
    update = part(x, torch.zeros(4, 6))
    torch.manual_seed(1)
    got = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(got, F.dropout(F.linear(x, model[0].weight, model[0].bias), 0.5) + update)
    assert model[0].attached.held is None
    with pytest.raises(ValueError, match="act at '1' already"):
        attach(model, "0", Bias, task="b")


def trained(model, steps=3):
    """A few steps of SGD on the parts; what the model gives afterwards."""
    batch = families.batch("gpt2")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    for _ in range(steps):
        loss = model(**batch).logits.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model(**batch).logits.detach()


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_trains_as_pefts_and_files_go_both_ways(tmp_path, rslora):
    import peft

    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_rslora=rslora,
        alpha_pattern={"c_proj": 2},
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = peft.get_peft_model(families.model("gpt2"), config)
    theirs.save_pretrained(tmp_path / "fresh")
    ours = at.load(families.model("gpt2"), tmp_path / "fresh")
    torch.testing.assert_close(trained(ours), trained(theirs), atol=1e-6, rtol=1e-5)
    at.save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(families.model("gpt2"), tmp_path / "ours")
    batch = families.batch("gpt2")
    torch.testing.assert_close(again(**batch).logits, theirs(**batch).logits, atol=1e-6, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    read = at.load(families.model("gpt2"), tmp_path / "theirs")
    torch.testing.assert_close(read(**batch).logits, theirs(**batch).logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(bake(read)(**batch).logits, theirs(**batch).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_ia3_and_heads_go_both_ways(tmp_path, name):
    import peft

    model = families.model(name)
    forwards = list(at.feed_forwards(model))
    attach(model, "**.k_proj" if name == "llama" else "**.k", Scale)
    attach(model, {n: n for n in forwards}, partial(Scale, inputs=True))
    at.save(stirred(model), tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(families.model(name), tmp_path / "ours").eval()
    torch.testing.assert_close(out(theirs, name), out(model, name), atol=1e-6, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    read = at.load(families.model(name), tmp_path / "theirs")
    torch.testing.assert_close(out(read, name), out(model, name), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out(bake(model), name), out(model, name), atol=1e-5, rtol=1e-4)


def test_heads_that_are_trained_whole_are_in_pefts_file(tmp_path):
    import peft

    model = attach(families.model("bert"), targets("bert"), Lora)
    attach(model, "classifier", Whole)
    at.save(stirred(model), tmp_path)
    theirs = peft.PeftModel.from_pretrained(families.model("bert"), tmp_path).eval()
    torch.testing.assert_close(out(theirs, "bert"), out(model, "bert"), atol=1e-6, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    read = at.load(families.model("bert"), tmp_path / "theirs", task="read")
    torch.testing.assert_close(out(read, "bert"), out(model, "bert"), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "build", [partial(Lora, rank=3, bias=True, dropout=0.25), Bias, Bottleneck, partial(Scale, inputs=True), Whole]
)
def test_every_kind_is_saved_alone_and_comes_back(tmp_path, build):
    model = stirred(attach(net(), nn.Linear, build, task="a"), "a")
    at.save(model, tmp_path, task="a")
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    again = at.load(net(), tmp_path, task="b")
    x = torch.randn(3, 5)
    assert torch.equal(again(x), model.eval()(x)) or build.keywords.get("dropout")
    same(
        [p.state() for p in attached(model)["a"].values()],
        [p.state() for p in attached(again)["b"].values()],
        "the file",
    )
    assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_peft_trained_beside_lora_are_read(tmp_path, bias):
    import peft

    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["query"], bias=bias)
    theirs = peft.get_peft_model(families.model("bert"), config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    theirs.save_pretrained(tmp_path)
    read = at.load(families.model("bert"), tmp_path)
    torch.testing.assert_close(out(read, "bert"), out(theirs, "bert"), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out(bake(read), "bert"), out(theirs, "bert"), atol=1e-5, rtol=1e-4)


def test_ranks_and_scales_may_differ_by_module(tmp_path):
    import peft

    model = attach(families.model("llama"), "**.q_proj", partial(Lora, rank=2))
    attach(model, "**.layers.1.mlp.down_proj", partial(Lora, rank=4, alpha=1))
    at.save(stirred(model), tmp_path)
    theirs = peft.PeftModel.from_pretrained(families.model("llama"), tmp_path).eval()
    torch.testing.assert_close(out(theirs, "llama"), out(model, "llama"), atol=1e-6, rtol=1e-5)
    read = at.load(families.model("llama"), tmp_path)
    assert torch.equal(out(read, "llama"), out(model, "llama"))


@pytest.mark.parametrize("name", HF)
def test_a_hugging_face_model_refuses_and_the_baked_one_saves(tmp_path, name):
    model = stirred(attach(families.model(name), targets(name), partial(Lora, rank=2)))
    with pytest.raises(ValueError, match=re.escape("interlayer.core.attach.save(model, directory)")):
        model.save_pretrained(tmp_path)
    plain = bake(model)
    torch.testing.assert_close(out(plain, name), out(model, name), atol=1e-4, rtol=1e-3)
    assert set(plain.state_dict()) == set(families.model(name).state_dict())
    plain.save_pretrained(tmp_path)
    assert torch.equal(out(type(plain).from_pretrained(tmp_path).eval(), name), out(plain, name))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generate_with_cache_sees_the_parts(name):
    model = families.model(name)
    stirred(attach(model, at.feed_forwards(model), partial(Lora, rank=2)), by=0.5)
    ids = families.batch(name)["input_ids"]
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cached, whole = (model.generate(ids, use_cache=use, **how) for use in (True, False))
        base = active(model).generate(ids, **how)
    assert torch.equal(cached, whole) and not torch.equal(cached, base)


def test_the_adapted_model_compiles_exports_copies_and_runs_in_two_processes():
    model = stirred(attach(net(), {"0": "1"}, partial(Lora, rank=2)))
    attach(model, "3", partial(Scale, inputs=True))
    x = torch.randn(4, 5)
    wanted = model(x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=0)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), wanted)
    with torch.no_grad():
        free = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
        torch.testing.assert_close(free(x.repeat(3, 1)), wanted.repeat(3, 1))
    again = attach(attach(net(), {"0": "1"}, partial(Lora, rank=2)), "3", partial(Scale, inputs=True))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), model(x))

    def step(wrapped, rank):
        wrapped(x[2 * rank : 2 * rank + 2]).square().mean().backward()
        return None, {n.removeprefix("module."): p.grad for n, p in wrapped.named_parameters() if p.requires_grad}

    got = two_processes(model, step)
    model.zero_grad()
    model(x).square().mean().backward()
    for name, grad in got.items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad)


def test_parts_of_a_half_precision_base_are_single_and_autocast_is_followed():
    model = attach(net().bfloat16(), nn.Linear, Lora)
    assert all(p.dtype == torch.float32 for p in attached(model)["default"]["0"].parameters())
    assert model(torch.randn(2, 5).bfloat16()).dtype == torch.bfloat16
    model = stirred(attach(net(), nn.Linear, Lora))
    x = torch.randn(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    assert half.dtype == torch.bfloat16 and (half - model(x)).norm() < 0.1 * model(x).norm()


def test_torch_encoders_leave_their_fused_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    stirred(attach(model, at.feed_forwards(model), partial(Lora, rank=2)))
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, model(x.requires_grad_()))


def test_adapters_of_another_base_are_refused_by_name_and_shape(tmp_path):
    at.save(stirred(attach(families.model("bert"), targets("bert"), Lora)), tmp_path)
    with pytest.raises(ValueError, match=r"made for BertForSequenceClassification.*does not fit ViTFor"):
        at.load(families.model("vit"), tmp_path)
    with pytest.raises(ValueError, match=r"with other weights.*other_base=True"):
        at.load(families.other("bert"), tmp_path)
    assert attached(at.load(families.other("bert"), tmp_path, other_base=True))
    at.save(stirred(attach(net(), "0", Lora)), tmp_path / "net")
    wide = nn.Sequential(nn.Linear(7, 6))
    with pytest.raises(ValueError, match=r"lora_A.weight \(8, 5\) has no place in 0 \(Linear \(6, 7\)\)"):
        at.load(wide, tmp_path / "net")
    assert not attached(wide)


def test_broken_and_foreign_files_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        at.load(net(), tmp_path)
    at.save(attach(net(), "0", Lora), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for changed, message in (({"peft_type": "LOHA"}, "of the kind 'loha'"), ({"use_dora": True}, "uses use_dora")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(ValueError, match=message):
            at.load(net(), tmp_path)


def test_what_cannot_be_attached_baked_or_saved_says_why(tmp_path):
    tied = attach(families.model("tied"), "head", Lora)
    stirred(attach(families.model("llama"), "**.q_proj", Lora))
    cases = [
        (lambda: attach(net(), "9", Lora), "nothing in Sequential"),
        (lambda: attach(net(), {"0": "9"}, Lora), "no module '9'"),
        (lambda: attach(net(), "2", Lora), "expected a linear map"),
        (lambda: attach(net(), "0", partial(Lora, rank=0)), "rank was 0"),
        (lambda: attach(net(), "0", Lora, task="a.b"), "task was 'a.b'"),
        (lambda: attach(net(), "0", Lora, task="keys"), "task was 'keys'"),
        (lambda: attach(attach(net(), "0", Lora), "0", Bias), "already"),
        (lambda: attach(nn.Sequential(nn.Linear(2, 2, bias=False)), "0", Bias), "without a bias"),
        (lambda: attach(families.model("mha"), "attention.out_proj", Lora), "never calls it"),
        (lambda: active(net(), "a"), "no task 'a'"),
        (lambda: detach(net(), "a"), "no task 'a'"),
        (lambda: bake(net()), "no part acts"),
        (lambda: bake(attach(net(), "0", Bottleneck)), "cannot become plain weights.*attach.save"),
        (lambda: bake(tied), "its weight is shared by embed and head"),
        (lambda: at.save(net(), tmp_path), "no task 'default'"),
        (lambda: at.save(attach(attach(net(), "0", Lora), "3", Bias), tmp_path), "kinds"),
        (lambda: at.feed_forwards(net()), "no such module under a name that is known"),
        (lambda: at.biased(nn.Sequential(nn.ReLU(), nn.Flatten())), "no such module"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"expected an interlayer\.core\.attach\.Part"):
        attach(net(), "0", lambda host: nn.Identity())


def test_a_part_of_your_own_is_two_methods():
    class Shift(Part):
        kind = "shift"

        def __init__(self, host):
            super().__init__()
            self.by = nn.Parameter(torch.zeros(len(host.weight)))

        def forward(self, x, y):
            return y + self.by

    model = attach(make(net), nn.Linear, Shift)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 9


class Shift(at.Part):
    """Adds a learned vector behind the first block of a list."""

    kind, spans = "shift", True

    def __init__(self, host):
        super().__init__()
        self.vector = nn.Parameter(torch.ones(4))

    def between(self, number, x):
        return x + self.vector if number == 1 else x


def test_a_part_that_spans_blocks_acts_between_them_and_is_switched_and_taken_off():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)))
    x = torch.randn(5, 3)
    plain, wanted = net(x), net[1][2](net[1][1](net[1][0](net[0](x)) + 1))
    assert at.host_of(net, "1") == "1.2"
    at.attach(net, {at.host_of(net, "1"): "1"}, Shift)
    torch.testing.assert_close(net(x), wanted)
    torch.testing.assert_close(copy.deepcopy(net)(x), wanted)
    net(x).sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is not None] == ["1.2.attached.default.vector"]
    assert torch.equal(at.active(net)(x), plain)
    assert torch.equal(at.detach(net)(x), plain) and not net[1][0]._forward_pre_hooks
