"""AdapterBias: the equation, the authors' numbers, places in Hugging Face models, files, and where the shift lands."""

import math
from functools import partial

import families
import pytest
import torch
from torch import nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertOutput

from interlayer.core import aside
from interlayer.core import attach as at
from interlayer.core.attach import active, attached, bake
from interlayer.core.data import DataShape
from interlayer.models import Transformer
from interlayer.transform.adapt.adapterbias import AdaptedBytes, AdapterBias, adapt, as_lora, shifts

# PEFT asks transformers by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
HF = ("gpt2", "llama", "t5", "bert", "vit")


def naive(part, x, y):
    """The paper's equation, token by token."""
    rows = [
        torch.stack(
            [y[b, s] + (part.gate.weight[0].dot(x[b, s]) + part.gate.bias) * part.vector for s in range(x.shape[1])]
        )
        for b in range(len(x))
    ]
    return torch.stack(rows)


def stirred(model, task="default"):
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for part in attached(model)[task].values():
            for p in part.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def out(model, name):
    with torch.no_grad():
        return families.output(model, families.batch(name))


def wave(*shape, k=1):
    """Numbers that any machine makes again."""
    return (0.7 * k * torch.arange(math.prod(shape), dtype=torch.float64)).sin().reshape(shape)


def test_the_shift_is_the_equation_and_zero_at_the_start():
    torch.manual_seed(0)
    part, x, y = AdapterBias(nn.Linear(7, 3)), torch.randn(2, 5, 7), torch.randn(2, 5, 3)
    assert torch.equal(part(x, y), y)
    nn.init.normal_(part.vector)
    grads = []
    for shifted in (part(x, y), naive(part, x, y)):
        part.zero_grad()
        shifted.square().sum().backward()
        grads.append([p.grad.clone() for p in part.parameters()])
    torch.testing.assert_close(part(x, y), naive(part, x, y))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("share", [False, True])
def test_numbers_are_those_of_the_authors_code(share):
    """Their ``BertOutput`` (Allen0307/AdapterBias), in evaluation, and in training with half of the features dropped."""
    config = BertConfig(hidden_size=4, intermediate_size=6, layer_norm_eps=1e-12, hidden_dropout_prob=0.5)
    block = nn.ModuleDict({"output": BertOutput(config).double()})
    with torch.no_grad():
        block.output.dense.weight.copy_(wave(4, 6))
        block.output.dense.bias.copy_(wave(4, k=2))
    model = adapt(block, share=share)
    part = attached(model)["default"]["output.dense"]
    with torch.no_grad():
        part.vector.copy_(wave(4, k=3))
        part.gate.weight.copy_(wave(1, 6, k=5))
        part.gate.bias.fill_(0.3)
    h, residual = wave(2, 3, 6, k=7), wave(2, 3, 4, k=11)
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    wanted = [-0.035881545166815215, 1.6433485236039684, -0.748311917149016, -0.8591550612881369]
    close(model.output.eval()(h, residual)[0, 0], torch.tensor(wanted, dtype=torch.float64))
    torch.manual_seed(0)
    got = model.output.train()(h, residual)
    wanted = [-0.4255663465325452, 1.724313825731631, -0.6157388788236454, -0.6830086003754405]
    close(got[1, 0], torch.tensor(wanted, dtype=torch.float64))
    (got * wave(2, 3, 4, k=13)).sum().backward()
    wanted = [0.4340832465774944, -0.04129709078701623, 0.6225968082545692, -1.0153829640450478]
    close(part.vector.grad, torch.tensor(wanted, dtype=torch.float64))
    wanted = [-1.2272355722754915, 1.7154020737160804, 1.8671229828378508]
    close(part.gate.weight.grad[0, :3], torch.tensor(wanted, dtype=torch.float64))
    assert part.gate.bias.grad.item() == pytest.approx(0.9523677433227316)


@pytest.mark.parametrize("name", HF)
def test_every_feed_forward_of_a_hugging_face_model_gets_a_vector_and_a_gate(name, tmp_path):
    model = families.model(name)
    first = out(model, name)
    adapt(model)
    layers, hidden = (8 if name == "t5" else 4), (64 if name == "gpt2" else 24)
    assert len(attached(model)["default"]) == layers and torch.equal(out(model, name), first)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == layers * (16 + hidden + 1)
    assert (out(stirred(model), name) - first).abs().max() > 1e-3
    at.save(model, tmp_path)
    again = at.load(families.model(name), tmp_path)
    assert torch.equal(out(again, name), out(model, name))
    with pytest.raises(ValueError, match="attach"):
        model.save_pretrained(tmp_path / "whole")
    assert torch.equal(out(active(model), name), first)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_in_evaluation_it_is_a_matrix_of_rank_one_and_a_bias_in_plain_weights(name, tmp_path):
    model, base = stirred(adapt(families.model(name))), families.model(name)
    plain = bake(model)
    torch.testing.assert_close(out(plain, name), out(model, name), rtol=1e-4, atol=1e-5)
    for site in at.feed_forwards(base):
        change = at.matrix(plain.get_submodule(site)) - at.matrix(base.get_submodule(site))
        assert torch.linalg.matrix_rank(change.detach(), rtol=1e-4) == 1
    plain.save_pretrained(tmp_path)
    assert torch.equal(out(type(plain).from_pretrained(tmp_path).eval(), name), out(plain, name))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_peft_reads_it_as_lora_of_rank_one(name, tmp_path):
    import peft

    model = stirred(adapt(families.model(name), norms=name == "bert"))
    wanted = out(model, name)
    torch.testing.assert_close(out(as_lora(model), name), wanted, rtol=1e-4, atol=1e-5)
    at.save(model, tmp_path, task="lora")
    theirs = peft.PeftModel.from_pretrained(families.model(name), tmp_path).eval()
    torch.testing.assert_close(out(theirs, name), wanted, rtol=1e-4, atol=1e-5)


def test_a_base_without_biases_keeps_the_shift_as_a_part(tmp_path):
    with pytest.raises(ValueError, match=r"Linear has no bias .*attach\.save\(model, directory\)"):
        bake(stirred(adapt(families.model("llama"))))
    model = adapt(families.model("llama"))
    assert torch.equal(out(bake(model), "llama"), out(model, "llama"))  # the vector is zero: there is nothing to add


def test_one_gate_may_serve_all_layers_and_stays_one_in_the_file(tmp_path):
    model = stirred(adapt(families.model("bert"), share=True))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * 16 + 25
    at.save(model, tmp_path)
    again = at.load(families.model("bert"), tmp_path)
    assert torch.equal(out(again, "bert"), out(model, "bert"))
    assert len({id(p.gate.weight) for p in attached(again)["default"].values()}) == 1


def test_the_norms_that_the_authors_train_are_copies():
    model = adapt(families.model("bert"), norms=True)
    copies = [n for n, p in attached(model)["default"].items() if isinstance(p, at.Whole)]
    assert copies == ["bert.embeddings.LayerNorm", *(f"bert.encoder.layer.{i}.output.LayerNorm" for i in range(4))]


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_generate_with_cache(name):
    model = stirred(adapt(families.model(name)))
    ids = families.batch(name)["input_ids"]
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, use_cache=True, **how), model.generate(ids, use_cache=False, **how))


def test_shifts_are_the_lengths_of_what_was_added():
    torch.manual_seed(0)
    model = stirred(adapt(Transformer(vocab=16, length=8, depth=2, width=8, heads=2)))
    tokens = torch.randint(16, (3, 6))
    found = shifts(model, tokens)
    host = model.trunk.blocks[1].mlp.down
    with at_output(host) as seen:
        model(tokens)
    assert found.shape == (3, 2, 6)
    torch.testing.assert_close(
        found[:, 1], (seen[0] - nn.functional.linear(seen[1], host.weight, host.bias)).norm(dim=-1)
    )
    with aside.collect() as told:
        model(tokens)
    torch.testing.assert_close(torch.stack(told.metrics["shift"]), found.mean((0, 2)))


class at_output:
    """What a module gives, and what it reads."""

    def __init__(self, host):
        self.host, self.seen = host, []

    def __enter__(self):
        self.handle = self.host.register_forward_hook(lambda m, x, y: self.seen.extend((y.detach(), x[0].detach())))
        return self.seen

    def __exit__(self, *error):
        self.handle.remove()


def test_the_network_trains_parts_and_head_alone():
    model = AdaptedBytes.for_task(
        DataShape("tokens", "classes", classes=2, vocab=256, length=64), depth=1, width=16, steps=1
    )
    x, y = torch.randint(256, (4, 12)), torch.tensor([0, 1, 0, 1])
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    for _ in range(2):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"head.weight", "head.bias"} | {
        f"base.trunk.blocks.0.mlp.down.attached.default.{p}" for p in ("vector", "gate.weight", "gate.bias")
    }
    sizes = {"depth": 1, "width": 16, "steps": 1}
    counts = {
        kind: sum(p.numel() for p in AdaptedBytes(2, kind=kind, **sizes).parameters() if p.requires_grad) - 34
        for kind in AdaptedBytes.ways
    }
    assert counts["head"] == 0 and counts["constant"] == 16 and counts["adapterbias"] == counts["shared"] == 16 + 64 + 1
    assert (
        counts["lora"] == 16 + 48
        and counts["adapters"] == 2 * (2 * 4 * 16 + 4 + 16)
        and counts["bitfit"] < counts["full"]
    )


def test_what_cannot_be_adapted_says_why():
    cases = [
        (lambda: adapt(nn.Sequential(nn.Linear(3, 3))), "no such module under a name that is known"),
        (lambda: adapt(families.model("gpt2"), norms=True), "no module called LayerNorm"),
        (lambda: AdapterBias(nn.ReLU()), "expected a linear map"),
        (lambda: AdapterBias(nn.Linear(4, 4), gate=nn.Linear(3, 1)), r"a gate \[1, 3\]"),
        (lambda: as_lora(families.model("bert")), "has no AdapterBias"),
        (lambda: shifts(families.model("bert")), "has no AdapterBias"),
        (lambda: shifts(adapt(families.model("t5")), **families.batch("t5")), "sequences of one length"),
        (lambda: AdaptedBytes(2, kind="prompt"), "'prompt' is not one of"),
        (lambda: AdaptedBytes.for_task(DataShape("image", "classes")), "takes tokens data"),
        (lambda: AdaptedBytes.for_task(DataShape("tokens", "classes", 2, vocab=999, length=9)), "999 kinds"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
