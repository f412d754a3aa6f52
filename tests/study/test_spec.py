"""Studies as data: reading, writing and the wording of mistakes."""

import pytest

from interlayer.learn.continual import EWC
from interlayer.study.arms import Arm, Training, parse
from interlayer.study.spec import StudyError, StudySpec, split_top

GOOD = """
task = "digits"
base = "mlp(depth=3)"
seeds = 3
steps = 50
arms = ["plain", "rezero", { name = "wide", use = "width=128+lr=0.002" }]
"""


def test_toml_reads_and_writes_back(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(GOOD)
    spec = StudySpec.from_toml(path)
    assert [a.name for a in spec.arms] == ["plain", "rezero", "wide"]
    assert spec.arms[2].use == "width=128+lr=0.002"
    path.write_text(spec.to_toml())
    assert StudySpec.from_toml(path) == spec
    path.write_text(StudySpec.default().to_toml())
    assert StudySpec.from_toml(path) == StudySpec.default()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('lr = "fast"', ["line 2", "'lr'", "peak learning rate", "number", "'fast'"]),
        ("seeds = 0", ["'seeds'", "how many seeds", "greater than 0", "got 0"]),
        ("seed = 3", ["'seed'", "Did you mean 'seeds'"]),
        ('schedule = "linear"', ["'schedule'", "'cosine' or 'constant'", "'linear'"]),
        ("arms = []", ["'arms'", "at least 1 item"]),
        ('arms = [{ name = "x", user = "plain" }]', ["'use'"]),
        ('arms = ["plain", "plain"]', ["'plain'", "name of its own"]),
        ("steps = 5\nseconds = 2", ["steps and seconds", "give one"]),
        ("steps = = 5", ["not a TOML file", "line 2"]),
        ("lr = inf", ["line 2", "'lr'", "finite number", "inf"]),
        ("rates = [nan]", ["'rates'", "finite number", "nan"]),
        ("seconds = inf", ["'seconds'", "finite number", "inf"]),
        ("steps = inf", ["'steps'", "finite number", "inf"]),
        ("weight_decay = inf", ["'weight_decay'", "finite number"]),
    ],
)
def test_mistakes_name_the_key_and_what_was_wanted(tmp_path, line, words):
    path = tmp_path / "study.toml"
    path.write_text(f'task = "digits"\n{line}\n')
    with pytest.raises(StudyError) as error:
        StudySpec.from_toml(path)
    assert all(word in str(error.value) for word in ["study.toml", *words])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'task = "d\xe9j\xe0"\n', "not a TOML file: it is not UTF-8"),
        (b"arms = " + b"[" * 5000, "not a TOML file: it is nested too deeply"),
        (b"steps = " + b"9" * 5000, "not a TOML file"),
    ],
)
def test_files_that_are_no_toml_are_one_clear_error(tmp_path, content, words):
    path = tmp_path / "study.toml"
    path.write_bytes(content)
    with pytest.raises(StudyError, match=words) as error:
        StudySpec.from_toml(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_missing_file_is_told(tmp_path):
    with pytest.raises(StudyError, match="no such study file"):
        StudySpec.from_toml(tmp_path / "none.toml")


def test_command_line_goes_over_the_file_and_the_default(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(GOOD)
    spec = StudySpec.from_values(path, {"seconds": 2.0, "seeds": 1})
    assert (spec.seconds, spec.steps, spec.seeds, spec.base) == (2.0, None, 1, "mlp(depth=3)")
    assert StudySpec.from_values(None, {}) == StudySpec.default()
    assert StudySpec.from_values(None, {"steps": 10}).steps == 10
    own = StudySpec.from_values(None, {"task": "digits", "arms": ["plain", "rezero"]})
    assert own.base is None and len(own.arms) == 2


def test_identity_ignores_arms_and_seeds_only():
    spec = StudySpec(task="digits", arms=["plain"], steps=5, seeds=3)
    assert spec.model_copy(update={"seeds": 9}).identity == spec.identity
    assert spec.model_copy(update={"steps": 6}).identity != spec.identity


def test_seeds_are_a_number_or_a_range_with_looks():
    assert StudySpec(seeds=3).looks == (3,) and StudySpec(seeds="3").looks == (3,)
    assert StudySpec().seeds == "4..12" and StudySpec().looks == (4, 6, 8, 12)
    assert StudySpec(seeds="5..10").looks == (5, 6, 8, 10)
    for wrong in ("12..4", "2..8", "few", 0, 1.5, True):
        with pytest.raises(StudyError, match=r"'seeds'.*such as 4\.\.12"):
            StudySpec.parse({"seeds": wrong})


def test_arms_are_read_by_the_kind_of_their_terms():
    assert parse("a", "plain", "mlp") == Arm("a", "mlp")
    arm = parse("a", "denseformer(dilation=4)+norm=rmsnorm+depth=12+lr=0.002", "transformer")
    assert arm.options == {"stream": "denseformer(dilation=4)", "norm": "rmsnorm", "depth": 12}
    assert arm.training == Training(lr=0.002)
    assert parse("a", "mlp-mixer", "vit").base == "mlp-mixer"
    assert parse("a", "scalable-ff", "mlp").rule == ("scalable-ff", {})
    assert parse("a", "rezero+lamp(sparsity=0.5)", "mlp").transforms == (("lamp", {"sparsity": 0.5}),)
    assert parse("a", "vit(depth=2)+norm=rmsnorm", "mlp") == Arm("a", "vit(depth=2)", {"norm": "rmsnorm"})
    assert parse("a", "interlayer.models:MLP", "mlp").base == "interlayer.models:MLP"
    assert parse("a", "interlayer.learn.continual:EWC(strength=1.0)", "mlp").rule == (EWC, {"strength": 1.0})


def test_arms_on_a_trained_base_are_chains_of_transforms():
    assert parse("a", "plain", "trained:mlp(depth=2)") == Arm("a", "mlp(depth=2)", trained=True)
    arm = parse("a", "lamp(sparsity=0.5)+painters(plan='skip 1')", "trained:mlp")
    assert arm.transforms == (("lamp", {"sparsity": 0.5}), ("painters", {"plan": "skip 1"})) and arm.trained
    for use in ("rezero", "lr=0.1", "depth=3+lamp", "scalable-ff", "transformer"):
        with pytest.raises(StudyError, match="trained once for all arms"):
            parse("a", use, "trained:mlp")


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("rezeros", "Did you mean 'rezero'"),
        ("rezero+denseformer", "'stream' is set twice"),
        ("transcoders", "probe"),
        ("matrix-exp", "is a construction"),
        ("deep-plain+scalable-ff", "both learning rules"),
    ],
)
def test_arms_that_cannot_be_are_refused(use, words):
    with pytest.raises(StudyError, match=words):
        parse("a", use, "mlp")


def test_split_keeps_brackets_and_quotes_together():
    assert split_top("a(b=1,c='x,y'), d=[1,2]", ",") == ["a(b=1,c='x,y')", "d=[1,2]"]


def test_a_star_stands_for_all_ready_systems_of_a_slot():
    names = [arm.name for arm in StudySpec(arms="plain,stream=*").arms]
    assert names[0] == "plain" and {"rezero", "denseformer", "value-residual"} <= set(names)
    assert "rmsnorm" not in names
    with pytest.raises(StudyError, match=r"no slot 'streem'\. Did you mean 'stream'"):
        StudySpec.parse({"arms": "streem=*"})


def test_a_base_named_after_a_task_brings_it_and_a_trained_base_is_judged_beside_its_transforms():
    spec = StudySpec.from_values(None, {"base": "trained:vit-digits", "arms": "lamp(sparsity=0.5)"})
    assert (
        spec.task == "digits" and spec.steps == 1500 and [a.use for a in spec.arms] == ["plain", "lamp(sparsity=0.5)"]
    )
    assert StudySpec.from_values(None, {"base": "trained:vit", "task": "photos"}).task == "photos"
    assert StudySpec.from_values(None, {"base": "mlp", "arms": "rezero"}).task == "stdlib-bytes"
