import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from interlayer import load
from interlayer.cli import app
from interlayer.core.quantizer import AdaRound, Grid, Packed, learned, reconstruct
from interlayer.core.quantizer.after import lost
from interlayer.transform.quantize.mrecg import STRIDE, Mrecg, capacity, neighbours
from tests.families import batch, model, output, transformed


def block(i, o):
    return nn.Sequential(nn.Linear(i, o), nn.ReLU())


@pytest.fixture(scope="module")
def chain():
    torch.manual_seed(0)
    net = nn.Sequential(block(12, 16), block(16, 16), block(16, 4), block(4, 24), nn.Linear(24, 5))
    return net.eval(), list((torch.randn(96, 12) @ torch.randn(12, 12)).split(32))


def joined(plan):
    return [row.why.rpartition("with block ")[2] for row in plan.touched]


def test_capacity_is_weights_times_bits_and_more_with_a_stride():
    conv, strided, linear = nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 8, 3, stride=2), nn.Linear(5, 6)
    assert capacity([conv], 4) == 36 * 4 and capacity([linear], 3) == 90
    assert capacity([strided, linear], 2) == pytest.approx(2 * (288 * STRIDE + 30)) and STRIDE > 1


def test_the_largest_differences_choose_neighbours_and_runs_grow_together():
    names, free = list("abcde"), [False, True, True, True, True]
    sizes = [4.0, 5.0, 1.0, 9.0, 8.0]  # squared differences 1, 16, 64, 1
    assert neighbours(names, free, sizes, 1) == [["c", "d"]]
    assert neighbours(names, free, sizes, 2) == [["b", "c", "d"]]
    assert neighbours(names, [False, True, True, False, True], sizes, 2) in (
        [["a", "b", "c"]],
        [["b", "c"], ["d", "e"]],
    )
    assert neighbours(names, free, sizes, 9) == [names]
    # By hand, over all choices of two pairs: none has a larger sum of squared differences.
    gaps = [(b - a) ** 2 for a, b in itertools.pairwise(sizes)]
    assert gaps[1] + gaps[2] == max(sum(pair) for pair in itertools.combinations(gaps, 2))


def test_what_is_joined_is_trained_as_one_and_all_else_is_adaround(chain):
    net, data = chain
    before = copy.deepcopy(net.state_dict())
    rule = Mrecg(bits=3, inputs=4, pairs=2, steps=20)
    plan = rule.plan(net, data)
    # Weights 192, 256, 64, 96, 120: the largest squared differences are those of the first three.
    assert joined(plan) == ["0+1+2", "0+1+2", "0+1+2", "3", "4"]
    new = plan.apply().eval()

    def solve(part, *rest):  # joined blocks take the steps of all of them
        steps = 20 * len(part.name.split("+"))
        return learned(AdaRound, steps=steps, lr=3e-2, decay=False, inputs=1e-2)(part, *rest)

    twin = reconstruct(
        net, data, Grid(3, 0, "asymmetric"), solve, inputs=Grid(4, None, "asymmetric"), joined=[("0", "1", "2")]
    ).apply()
    assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(), twin.state_dict().values(), strict=True))
    alone = reconstruct(net, data, Grid(3, 0, "asymmetric"), solve, inputs=Grid(4, None, "asymmetric")).apply()
    assert not torch.equal(alone[0][0].codes, new[0][0].codes)
    x = torch.cat(data)
    middle, wanted = nn.Sequential(*new[:3])(x), nn.Sequential(*net[:3])(x)
    error = float(((middle - wanted).square().sum() / wanted.square().sum()).detach())
    assert lost(net, new, data, ["2"]) == {"2": pytest.approx(error, rel=1e-4)} and 0 < error < 1
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_with_data_the_losses_of_single_blocks_choose(chain):
    net, data = chain
    single = Mrecg(bits=3, steps=10)
    errors = lost(net, single.reconstructed(net, data, ()).apply(), data, list("01234"))
    losses = list(errors.values())
    rule = Mrecg(bits=3, steps=10, pairs=1, capacity="loss")
    plan = rule.plan(net, data)
    assert joined(plan)[0].startswith("0, or joined where the losses of neighbours differ most")
    gaps = [(b - a) ** 2 for a, b in itertools.pairwise(losses)]
    k = gaps.index(max(gaps))
    wanted = single.reconstructed(net, data, [(str(k), str(k + 1))]).apply()
    found = plan.apply()
    assert all(
        torch.equal(a, b) for a, b in zip(found.state_dict().values(), wanted.state_dict().values(), strict=True)
    )


def test_options_act(chain):
    net, data = chain
    base, seen = {"steps": 3, "bits": 3, "inputs": 4, "pairs": 1}, {}
    for name, options in {
        "base": {}, "inputs": {"inputs": 5}, "float": {"inputs": "float"}, "pairs": {"pairs": 3}, "by": {"by": "minmax"},
        "steps": {"steps": 20}, "lr": {"lr": 0.5}, "rate": {"rate": 0.1}, "seed": {"seed": 1}, "at": {"at": ["0.0", "1.0"]},
        "bits": {"bits": 4}, "blocks": {"blocks": ["0", "1", "2"]},
    }.items():  # fmt: skip
        seen[name] = Mrecg(**{**base, **options}).plan(net, data).apply().eval()(data[0]).detach()
    assert [n for n, out in seen.items() if torch.equal(seen["base"], out)] == ["base"]
    plain = Mrecg(packed=False, **{**base, "inputs": "float"}).plan(net, data).apply().eval()
    torch.testing.assert_close(plain(data[0]), seen["float"])
    assert type(plain[0][0]) is nn.Linear


def test_an_interrupted_run_goes_on_and_gives_the_same(chain, tmp_path):
    net, data = chain
    options = {"steps": 3, "bits": 3, "folder": tmp_path}
    whole = Mrecg(**options).plan(net, data).apply()
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 3
    kept[1].unlink()
    again = Mrecg(**options).plan(net, data).apply()
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_every_family_is_rounded_packed_saved_and_generates(name, tmp_path):
    transformed(Mrecg(steps=2, bits=8, inputs=8), name, tmp_path / "there", refuses="packed weights")


def test_floats_on_the_grid_are_a_hugging_face_model(tmp_path):
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=16, n_positions=8)
    start, text = GPT2LMHeadModel(config).eval(), torch.randint(16, (4, 8))
    plain = Mrecg(steps=2, packed=False).plan(start, text).apply().eval()
    plain.save_pretrained(tmp_path / "plain")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(again(text).logits, plain(text).logits)


def calibration():
    return [{"input_ids": torch.randint(32, (2, 6))} for _ in range(2)]


def test_the_command_rounds_a_hugging_face_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    model("gpt2").save_pretrained(tmp_path / "start")
    source = f"hf:{tmp_path / 'start'}"
    arguments = ["apply", "mrecg", "--model", source, "--data", "test_mrecg:calibration", "-o", "steps=1"]
    out = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "there")])
    assert out.exit_code == 0 and "with block transformer.h.0+transformer.h.1" in out.output, out.output
    new = load(tmp_path / "there")
    assert isinstance(new.transformer.h[0].attn.c_attn, Packed) and output(new, batch("gpt2")).isfinite().all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Mrecg(bits=1), "bits 1; expected an integer from 2 to 8"),
        (lambda: Mrecg(inputs="same"), "inputs 'same'; expected 'float' or an integer"),
        (lambda: Mrecg(capacity="size"), "capacity 'size'; expected 'weights' or 'loss'"),
        (lambda: Mrecg(pairs=0), "pairs 0"),
        (lambda: Mrecg(steps=0), "steps 0"),
        (lambda: Mrecg(rate=0.0), r"rate 0\.0"),
        (lambda: Mrecg(inputs=4, packed=False), "cannot become plain floats"),
        (lambda: Mrecg().plan(nn.Sequential(block(2, 2), block(2, 2))), "no calibration data"),
        (lambda: Mrecg().plan(nn.Sequential(block(2, 2), block(2, 2)), torch.ones(3, 5)), "does not run on a batch"),
        (lambda: Mrecg().plan(nn.Sequential(nn.ReLU()), torch.ones(3, 5)), "no layer of Sequential can be quantised"),
        (
            lambda: Mrecg().plan(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), torch.ones(3, 2)),
            r"no two of the blocks \(0, 2\) can be joined",
        ),
    ],
)
def test_bad_input_is_one_clear_error(call, says):
    with pytest.raises(ValueError, match=says):
        call()
