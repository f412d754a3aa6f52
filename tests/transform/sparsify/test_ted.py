import copy

import families
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer.core import taps
from interlayer.models import Transformer, VisionTransformer
from interlayer.transform.sparsify.ted import Ted, divergence, shallow


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def vit(depth=4, width=16):
    return VisionTransformer(1, 8, patch=4, depth=depth, width=width, heads=2)


def batch(n=8):
    return torch.randn(n, 1, 8, 8), torch.arange(n)


KL = 0.382549  # what the authors' function gave on these numbers


def test_the_divergence_of_the_outputs_is_the_authors():
    i, j = torch.arange(3.0)[:, None], torch.arange(4.0)[None]
    student, teacher = torch.sin(1.3 * i + j), 2 * torch.cos(0.7 * i * (j + 1))
    assert abs(float(divergence(student, teacher)) - KL) < 1e-5


def test_a_shallow_student_has_evenly_spaced_blocks_of_the_teacher_and_all_else():
    teacher = families.model("bert")
    student = shallow(teacher, 2)
    layers, held = student.bert.encoder.layer, teacher.bert.encoder.layer
    assert len(layers) == student.config.num_hidden_layers == 2 and teacher.config.num_hidden_layers == 4
    for mine, its in ((0, 1), (1, 3)):
        for a, b in zip(layers[mine].parameters(), held[its].parameters(), strict=True):
            assert torch.equal(a, b) and a is not b
    assert torch.equal(student.bert.embeddings.word_embeddings.weight, teacher.bert.embeddings.word_embeddings.weight)
    assert shallow(vit(), 3).config["depth"] == 3


def test_stage_one_trains_filters_alone_by_the_mean_loss_of_their_heads():
    teacher = vit()
    rule = Ted(shallow(teacher, 2), teacher=teacher, filter_steps=2, filter_lr=1e-2)
    before = copy.deepcopy((rule.model.state_dict(), rule.teacher.state_dict()))
    x, y = batch()
    told = rule.step((x, y))
    rule.step((x, y))
    for old, new in zip(before, (rule.model.state_dict(), rule.teacher.state_dict()), strict=True):
        assert all(torch.equal(old[k], new[k]) for k in old)
    again = Ted(shallow(teacher, 2), teacher=teacher, filter_steps=2)
    again._prepare(x)
    losses = []
    for side, model, at, places in (
        ("student", again.model.eval(), again.mine, (0, 1)),
        ("teacher", again.teacher, again.theirs, (1, 3)),
    ):
        states = again._run(model, x, at)[1]
        assert len(states) == len(places)
        losses += [
            F.cross_entropy(head(f(h)).mean(1), y)
            for f, head, h in zip(again.filters[side], again.filters[f"{side} heads"], states, strict=True)
        ]
    torch.manual_seed(0)
    assert abs(again.step((x, y))["loss"] - float(torch.stack(losses).mean().detach())) < 1e-6
    assert set(told) == {"loss"}


def test_stage_two_is_the_sum_of_the_three_losses_and_leaves_the_teacher():
    teacher = families.model("bert").eval()
    student = shallow(teacher, 2)
    for p in student.parameters():
        p.data += 0.05 * torch.randn_like(p)
    rule = Ted(student, teacher=teacher, filter_steps=1, kl=3.0, mse=7.0, lr=0.0)
    given, y = families.batch("bert"), torch.tensor([0, 1])
    rule.step((given, y))
    rule.model.eval()
    names = [f"bert.encoder.layer.{i}" for i in range(4)]
    with taps.read(rule.model, names[:2]) as mine, taps.read(rule.teacher, names) as its:
        ours, theirs = rule.model(**given).logits, rule.teacher(**given).logits
    far = sum(
        float((f(mine[names[i]]) - t(its[names[j]])).square().mean().detach())
        for f, t, i, j in zip(rule.filters["student"], rule.filters["teacher"], (0, 1), (1, 3), strict=True)
    )
    drops = [m for m in rule.model.modules() if isinstance(m, nn.Dropout)]
    for m in drops:
        m.p = 0.0
    held = copy.deepcopy(rule.filters["teacher"].state_dict())
    told = rule.step((given, y))
    assert abs(told["mse"] - far / 2) < 1e-4 * far
    assert abs(told["kl"] - float(divergence(ours, theirs).detach())) < 1e-5
    assert abs(told["loss"] - float(F.cross_entropy(ours, y).detach())) < 1e-5
    whole = rule.second.param_groups[0]["params"]
    assert {id(p) for p in whole} == {id(p) for p in [*student.parameters(), *rule.filters["student"].parameters()]}
    for g in rule.second.param_groups:
        g["lr"] = 1e-2
    rule.step((given, y))
    assert all(torch.equal(held[k], v) for k, v in rule.filters["teacher"].state_dict().items())
    assert all(p.grad is None for p in rule.teacher.parameters())


@pytest.mark.parametrize("options", [{}, {"nonlinear": True}, {"width": 5}, {"kl": 0.0}, {"mse": 0.0}])
def test_options_are_used_and_students_of_another_width_fit(options):
    teacher = vit(width=24)
    rule = Ted(vit(2), teacher=teacher, filter_steps=2, lr=1e-2, **options)
    told = [rule.step(batch()) for _ in range(3)]
    expected = {"loss", "kl", "mse"} - {name for name in options if options[name] == 0.0}
    assert set(told[-1]) == expected
    assert rule.filter_steps == (0 if options.get("mse") == 0.0 else 2)
    last = rule.filters["student"][0]
    assert isinstance(last, nn.Sequential if options.get("nonlinear") else nn.Linear)
    assert (last[-1] if options.get("nonlinear") else last).out_features == options.get("width", 24)


def masked(ids):
    """Every fourth token hidden, and asked for."""
    targets = torch.full_like(ids, -100)
    targets[:, ::4] = ids[:, ::4]
    return torch.where(targets >= 0, 0, ids), targets


def test_continual_pre_training_judges_masked_tokens_alone():
    teacher = Transformer(32, 12, 4, 16, 2)
    rule = Ted(shallow(teacher, 2), teacher=teacher, filter_steps=2, lr=1e-2, filter_lr=1e-2)
    x, targets = masked(torch.randint(1, 32, (6, 12)))
    first = rule.step((x, targets))
    rule.model.eval()
    assert rule.filters["student heads"][0].out_features == 32 and set(first) == {"loss"}
    rule.step((x, targets))
    with torch.no_grad():
        ours, theirs = rule.model(x), rule.teacher(x)
    told = [rule.step((x, targets)) for _ in range(8)]
    rows = targets >= 0
    assert abs(told[0]["loss"] - float(F.cross_entropy(ours[rows], targets[rows]))) < 1e-5
    assert abs(told[0]["kl"] - float(divergence(ours[rows], theirs[rows]))) < 1e-5
    assert told[-1]["loss"] < told[0]["loss"] and told[-1]["mse"] < told[0]["mse"]


def test_a_masked_language_model_of_transformers(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24, max_position_embeddings=16
    )  # fmt: skip
    teacher = BertForMaskedLM(config)
    rule = Ted(shallow(teacher, 2), teacher=teacher, filter_steps=1, lr=1e-2)
    x, targets = masked(torch.randint(1, 32, (6, 12)))
    told = [rule.step(({"input_ids": x}, targets)) for _ in range(8)]
    assert told[-1]["loss"] < told[1]["loss"]
    rule.result().save_pretrained(tmp_path / "student")
    again = BertForMaskedLM.from_pretrained(tmp_path / "student").eval()
    torch.testing.assert_close(again(input_ids=x).logits, rule.predict({"input_ids": x}))
    assert len(again.bert.encoder.layer) == 2


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Ted(vit(), filter_steps=-1), "Ted: filter_steps=-1"),
        (lambda: Ted(vit(), kl=-1.0), "kl=-1.0"),
        (lambda: Ted(vit(), width=0), "width=0"),
        (lambda: Ted(vit(4), teacher=vit(2)), "4 blocks in the student and 2 in the teacher"),
        (lambda: shallow(vit(4), 4), "depth 4; expected 1 to 3"),
        (lambda: shallow(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 1), "no configuration of Sequential"),
        (
            lambda: Ted(vit(2), teacher=VisionTransformer(1, 8, patch=2, depth=2, width=16, heads=2)).step(batch()),
            r"Ted: outputs .* expected equal shapes",
        ),
    ],
)
def test_clear_errors(call, says):
    with pytest.raises(ValueError, match=says):
        call()
