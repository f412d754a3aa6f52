from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from interlayer import load
from interlayer.cli import app
from interlayer.core.quantizer import Form, Grid, Packed
from interlayer.models import Transformer
from interlayer.transform.quantize.aespa import Aespa, damped
from tests.families import batch, model, output, transformed


def texts(count=4):
    return [torch.randint(16, (4, 8), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def net():
    torch.manual_seed(0)
    return Transformer(16, 8, 1, 16, 2).eval()


def test_the_rounding_that_is_found_has_less_loss_than_gptq_and_the_nearest_levels():
    torch.manual_seed(0)
    x, keys = torch.randn(200, 16) @ torch.randn(16, 16), torch.randn(2, 50, 4) @ torch.randn(4, 4)
    form = damped(Form(torch.arange(8).view(2, 4), keys.mT @ keys / 50, (x.T @ x / 200)[None]))
    weight = torch.randn(2, 4, 16)

    def loss(**options):
        scaled, codes = Aespa(bits=2, **options).rounded(weight, form)
        assert codes.dtype == torch.uint8 and int(codes.max()) <= 3
        return float(form.loss(scaled.values(codes).view_as(weight) - weight))

    nearest, by_columns = loss(start="nearest", steps=0), loss(start="gptq", steps=0)
    learned = [loss(start=start, steps=150, lr=0.2) for start in ("gptq", "nearest")]
    assert max(learned) < 0.8 * min(nearest, by_columns)  # GPTQ knows nothing of the keys


def test_ranges_have_the_least_loss_of_the_moment():
    torch.manual_seed(1)
    weight, x = torch.randn(3, 8), torch.randn(40, 8) * torch.tensor([10.0, *[0.1] * 7])
    moment, grid = x.T @ x, Grid(2, 0, "asymmetric")

    def loss(held):
        error = held.fake(weight) - weight
        return (error @ moment * error).sum(1)

    found = loss(grid.fit(weight, lambda off: (off @ moment * off).sum(1)))
    assert (found <= loss(grid.fit(weight, "mse"))).all() and found.sum() < 0.9 * loss(grid.fit(weight)).sum()


def test_a_block_runs_once_for_its_moments_and_never_while_rounding_is_learned():
    start, calls = net(), []
    plan = Aespa(bits=3, steps=20).plan(start, texts())
    few = Aespa(bits=3, steps=0).plan(start, texts())
    hook = nn.modules.module.register_module_forward_hook(
        lambda m, args, out: calls.append(1) if isinstance(m, nn.LayerNorm | nn.GELU) else None
    )
    counts = []
    for each in (few, plan):
        calls.clear()
        each.apply()
        counts.append(len(calls))
    hook.remove()
    assert counts[0] and counts[0] == counts[1]


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit"])
def test_families_are_rounded_packed_saved_and_generate(name, tmp_path):
    transformed(Aespa(steps=2), name, tmp_path / "there", refuses="packed weights")


@pytest.mark.parametrize("name", ["tied", "mha", "resnet"])
def test_models_without_such_attention_are_refused_at_plan_time(name):
    with pytest.raises(ValueError, match="has no attention between linear maps that are rounded"):
        Aespa().plan(model(name), batch(name))


def test_the_plan_names_what_each_layer_keeps():
    plan = Aespa(steps=2).plan(model("llama"), batch("llama"))
    kept = {row.name.rsplit(".", 1)[-1]: row.why.rsplit(", ", 1)[-1] for row in plan.touched}
    assert kept["q_proj"] == kept["k_proj"] == "keeps scores" and kept["v_proj"] == "keeps what heads read"
    assert kept["o_proj"] == kept["down_proj"] == "keeps its own output"


def test_options_act():
    start, x, seen = net(), texts(), {}
    for name, options in {
        "base": {}, "bits": {"bits": 4}, "symmetric": {"kind": "symmetric"}, "start": {"start": "nearest"}, "steps": {"steps": 5},
        "lr": {"lr": 0.3}, "strength": {"strength": 0.0},
    }.items():  # fmt: skip
        new = Aespa(**{"bits": 3, "steps": 4, **options}).plan(start, x).apply().eval()
        seen[name] = torch.cat([m.weight.flatten() for m in new.modules() if isinstance(m, Packed)])
    same = [n for n, w in seen.items() if n != "base" and torch.equal(w, seen["base"])]
    assert not same, same
    only = Aespa(at="**.qkv", steps=1).plan(start, x)
    assert all("qkv" in row.name for row in only.touched)
    plain = Aespa(bits=2, steps=1, packed=False).plan(start, x).apply()
    qkv = next(m for n, m in plain.named_modules() if n.endswith("qkv"))
    assert type(qkv) is nn.Linear and all(len(row.unique()) <= 4 for row in qkv.weight)


def test_an_interrupted_run_goes_on(tmp_path):
    plan = Aespa(bits=3, steps=3, folder=tmp_path).plan(Transformer(16, 8, 2, 16, 2).eval(), texts())
    whole = plan.apply().state_dict()
    kept = sorted(tmp_path.iterdir())
    assert len(kept) > 1
    before = kept[0].stat().st_mtime_ns
    kept[-1].unlink()
    again = plan.apply().state_dict()
    assert all(torch.equal(whole[n], again[n]) for n in whole) and kept[0].stat().st_mtime_ns == before
    assert sorted(tmp_path.iterdir()) == kept


def calibration():
    return [{"input_ids": torch.randint(32, (2, 6))} for _ in range(2)]


def test_the_command_rounds_a_hugging_face_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    model("llama").save_pretrained(tmp_path / "start")
    arguments = [
        "apply",
        "aespa",
        "--model",
        f"hf:{tmp_path / 'start'}",
        "--data",
        "test_aespa:calibration",
        "-o",
        "steps=1",
    ]
    out = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "there")])
    assert out.exit_code == 0 and "keeps scores" in out.output, out.output
    assert output(load(tmp_path / "there"), batch("llama")).isfinite().all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Aespa(bits=1), "bits 1; expected an integer from 2 to 8"),
        (lambda: Aespa(kind="midrise"), "kind 'midrise'; expected 'asymmetric' or 'symmetric'"),
        (lambda: Aespa(start="zero"), "start 'zero'; expected 'gptq' or 'nearest'"),
        (lambda: Aespa(steps=-1), "steps -1"),
        (lambda: Aespa(lr=0.0), r"lr 0\.0"),
        (lambda: Aespa(strength=-1.0), r"strength -1\.0"),
        (lambda: Aespa().plan(net()), "no calibration data"),
        (lambda: Aespa().plan(net(), []), "no calibration data"),
        (lambda: Aespa().plan(net(), ["text"]), "does not run on a batch of type str"),
    ],
)
def test_bad_input_is_one_clear_error(call, says):
    with pytest.raises(ValueError, match=says):
        call()
