import json
import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from interlayer.cli import app

run = CliRunner().invoke


def test_list_filters_and_counts():
    everything = json.loads(run(app, ["list", "--json"]).stdout)
    assert len(everything) == 212
    assert {"slug", "title", "room", "kind", "state"} <= everything[0].keys()
    layers = json.loads(run(app, ["list", "--json", "--room", "layers", "--kind", "layer"]).stdout)
    assert layers
    assert all(r["room"].startswith("layers.") and r["kind"] == "layer" for r in layers)
    assert [r["slug"] for r in json.loads(run(app, ["list", "modulo permutation", "--json"]).stdout)] == ["git-rebasin"]
    assert "rezero" in run(app, ["list", "--room", "layers.stream"]).stdout


def test_list_shows_what_is_ready_first_and_says_what_is_planned():
    result = run(app, ["list"])
    states = [line.split()[0] for line in result.stdout.splitlines()]
    assert len(states) == 212 and states == sorted(states, key=("ready", "partial", "planned").index)
    assert re.search(r"212 systems: \d+ ready, \d+ partial, \d+ planned\.\nPlanned: no code yet", result.stderr)
    assert "Planned" not in run(app, ["list", "--state", "ready"]).stderr
    assert [r["state"] for r in json.loads(run(app, ["list", "--json"]).stdout)] == states


def test_list_without_options_is_the_same_in_less_time():
    """The parser of options is not loaded; a closed pipe is no error."""
    whole = subprocess.run([sys.executable, "-m", "interlayer", "list"], capture_output=True, text=True, check=True)
    parsed = run(app, ["list"])
    assert (whole.stdout, whole.stderr) == (parsed.stdout, parsed.stderr)
    code = "import sys; sys.argv = ['interlayer', 'list']; from interlayer.cli import main; main(); sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        cut = subprocess.run(
            [sys.executable, "-m", "interlayer", "list"], stdout=closed, stderr=subprocess.PIPE, check=False
        )
    assert cut.stderr == b"" and cut.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["list", "--room", "layer.stream"], "Did you mean 'layers.stream'"),
        (["list", "--kind", "layers"], "Did you mean 'layer'"),
        (["list", "--state", "done"], "no state 'done'"),
        (["show", "rezeor"], "Did you mean 'rezero'"),
        (["claim", "no-claim-here"], "no system 'no-claim-here'"),
        (["apply", "rezero", "--model", "x:y", "--plan"], "of kind layer, not transform"),
        (["apply", "lamp", "--model", "x:y"], "--out DIR"),
        (["apply", "lamp", "--model", "json:dums", "--plan"], "dumps"),
        (["apply", "lamp", "--model", "nothing_there:f", "--plan"], "nothing_there"),
        (["apply", "lamp", "--model", "hf:/no/such/model", "--plan"], "no/such/model"),
        (["compare", "--task", "digts", "--arms", "plain"], "digits"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, told):
    result = run(app, arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert "Traceback" not in result.stderr


def test_show_names_the_comparison_on_the_task_of_the_idea():
    done = run(app, ["show", "two-point"])
    assert "interlayer compare --task audiovisual --arms plain,two-point" in done.output


def test_show_tells_what_there_is():
    out = run(app, ["show", "denseformer"]).stdout
    for word in (
        "arXiv:2402.02622",
        "from interlayer.layers.stream.denseformer import DenseFormer",
        "dilation=1",
        "goal",
    ):
        assert word in out


def test_version_and_module_entry():
    out = subprocess.run(
        [sys.executable, "-m", "interlayer", "--version"], capture_output=True, text=True, check=True
    ).stdout
    assert re.fullmatch(r"interlayer \d+\.\d+\.\d+\n", out)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--model", "mine", "--plan"],
            "--model 'mine'; expected package.module:function, a saved folder, or hf:NAME_OR_PATH",
        ),
        (["--model", "mine", "--out", "o"], "--model 'mine'"),
        (["--model", "mine:", "--plan"], "--model 'mine:'"),
        (["--model", "mine.net()", "--plan"], "--model 'mine.net()'"),
        (
            ["--model", "mine:net", "--data", "mine", "--plan"],
            "--data 'mine'; expected package.module:function, or a text file.",
        ),
        (["--model", "mine:net", "--plan", "-o", "sparsity"], "option 'sparsity' is not name=value"),
    ],
)
def test_apply_imports_nothing_before_it_complains(tmp_path, arguments, says):
    (tmp_path / "mine.py").write_text("open('imported', 'w').close()\n", encoding="utf-8")
    code = (
        "import sys; from interlayer.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "finally: print(sorted({'torch', 'mine'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "apply", "lamp", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("interlayer: apply: ") and says in done.stderr
    assert done.stdout == "[]\n" and not (tmp_path / "imported").exists()


def test_apply_plans_and_saves(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from interlayer.models import MLP\ndef net():\n    return MLP(8, 3, depth=2, width=16)\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    planned = run(app, ["apply", "lamp", "--model", "mine:net", "--plan", "-o", "sparsity=0.5"])
    assert planned.exit_code == 0, planned.stderr
    assert "lamp" in planned.stdout
    done = run(app, ["apply", "lamp", "--model", "mine:net", "--out", "pruned", "-o", "sparsity=0.5"])
    assert done.exit_code == 0, done.stderr
    assert {p.name for p in (tmp_path / "pruned").iterdir()} == {"model.safetensors", "recipe.json"}


def test_apply_takes_a_hugging_face_model_with_its_head(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=6, n_head=2, vocab_size=32, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    done = run(
        app,
        [
            "apply",
            "painters",
            "--model",
            f"hf:{tmp_path / 'gpt2'}",
            "-o",
            "variant=skip",
            "--out",
            str(tmp_path / "new"),
        ],
    )
    assert done.exit_code == 0, done.stderr
    recipe = json.loads((tmp_path / "new" / "recipe.json").read_text(encoding="utf-8"))
    assert "GPT2LMHeadModel" in json.dumps(recipe["base"])
    assert "left out" in done.stdout


def test_apply_takes_a_diffusers_model(tmp_path):
    import families

    families.model("dit").save_pretrained(tmp_path / "dit")
    out = applied(
        "painters", "--model", f"hf:{tmp_path / 'dit'}", "-o", "variant=reverse", "--out", str(tmp_path / "new")
    )
    assert "transformer_blocks" in out
    recipe = json.loads((tmp_path / "new" / "recipe.json").read_text(encoding="utf-8"))
    assert recipe["base"]["class"] == "DiTTransformer2DModel"


MINE = """
import torch
from interlayer.models import MLP

class Net(torch.nn.Sequential):
    pass

def net(seed=0):
    torch.manual_seed(seed)
    return MLP(8, 3, depth=2, width=16)

def own(seed=0):
    torch.manual_seed(seed)
    return Net(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))

def second():
    return own(1)

def data():
    torch.manual_seed(2)
    return [(torch.randn(5, 8), torch.zeros(5, dtype=torch.long))]

def halve(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_models.py").write_text(MINE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("mine_models", None)


def applied(*arguments):
    done = run(app, ["apply", *arguments])
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["lamp", "-o", "sparsty=0.5"], "apply lamp: no option 'sparsty'. Did you mean 'sparsity'?"),
        (["lamp", "-o", "sparsity=high"], "apply lamp: sparsity was 'high'; expected a valid number."),
        (["lamp", "-o", "rounds=1.5"], "apply lamp: rounds was 1.5; expected a valid integer"),
        (["lamp", "-o", "scope=layer"], "apply lamp: scope was 'layer'; expected 'lamp', 'global', 'uniform'"),
        (["lamp", "-o", "train=3"], "apply lamp: train was 3; expected callable"),
        (["lamp", "-o", "sparsity"], "option 'sparsity' is not name=value"),
        (["painters", "--no-bake"], "apply painters: no option 'bake'."),
        (
            ["git-rebasin", "--data", "mine_models:data"],
            "git-rebasin: 0 other models; expected 1. Pass them as others=",
        ),
        (["lamp", "--other", "mine_models:own"], "lamp: 1 other models; expected none."),
        (["lamp", "--other", "nowhere"], "apply: --other 'nowhere'; expected package.module:function"),
        (["lamp", "--base", "mine_models:own"], "--base makes the base of a saved folder, and none was given"),
    ],
)
def test_wrong_options_are_one_line(mine, arguments, says):
    result = run(app, ["apply", *arguments, "--model", "mine_models:own", "--plan"])
    assert result.exit_code == 2 and says in result.stderr and "Traceback" not in result.stderr


def test_apply_goes_on_from_what_it_saved_and_merges(mine):
    from interlayer.core import recipe, weights

    own, base = ["--model", "mine_models:own"], ["--base", "mine_models:own"]
    applied("lamp", *own, "--no-bake", "-o", "sparsity=0.5", "--out", "masked")
    masked = recipe.load("masked", base=sys.modules["mine_models"].own)
    assert len(weights.masks(masked)) == 2
    applied("lamp", "--model", "masked", *base, "--bake", "-o", "sparsity=0.8", "--out", "plain")
    merged = ["--other", "mine_models:second", "--data", "mine_models:data", "-o", "merge=0.25"]
    assert "permute 6 units" in applied("git-rebasin", "--model", "plain", *merged, *base, "--out", "merged")
    applied("lamp", "--model", "merged", *base, "-o", "sparsity=0.3", "-o", "train=mine_models:halve", "--out", "last")
    last = recipe.load("last", base=sys.modules["mine_models"].own)
    assert [s["system"] for s in recipe.steps(last)] == ["lamp", "lamp", "git-rebasin", "lamp"]
    assert not weights.masks(last) and int((last[0].weight != 0).sum() + (last[2].weight != 0).sum()) == round(0.7 * 66)
    nothing = run(app, ["apply", "lamp", "--model", "merged", "--plan"])
    assert nothing.exit_code == 2 and "--base package.module:function" in nothing.stderr


def test_an_own_model_chains_without_a_base(mine):
    from interlayer.core import recipe

    applied("lamp", "--model", "mine_models:net", "--out", "once", "-o", "sparsity=0.5")
    applied("lamp", "--model", "once", "--out", "twice", "-o", "sparsity=0.9")
    matrices = [p for p in recipe.load("twice").parameters() if p.ndim > 1]
    assert sum(int((p != 0).sum()) for p in matrices) == round(0.1 * sum(p.numel() for p in matrices))
