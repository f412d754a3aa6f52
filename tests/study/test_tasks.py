"""Tasks: real data, fixed splits, the same batches for the same seed."""

import datasets
import pytest
import torch
from torch.utils._pytree import tree_leaves

from interlayer import catalog
from interlayer.study import TensorTask, tasks
from interlayer.study.spec import StudyError


def main(batch):
    """The tensor that comes first among the inputs."""
    return next(iter(tree_leaves(batch[0])))


@pytest.mark.parametrize("name", catalog.tasks())
def test_builtin_tasks_give_seeded_batches_of_their_shape(name):
    task = tasks.load(name)
    if not task.learns:
        assert not list(task.batches(0, 6))
        return
    one, two, other = (next(task.batches(seed, 6)) for seed in (3, 3, 4))
    assert torch.equal(main(one), main(two)) and torch.equal(one[1], two[1])
    assert not torch.equal(main(one), main(other))
    shape = task.shape
    wanted = {
        "tokens": (6, shape.length),
        "image": (6, shape.channels, shape.height, shape.width),
        "vector": (6, shape.features),
        "series": (6, shape.length, shape.features),
        "seq2seq": (6, shape.source),
        "vectors": (6, *shape.senses[:1]),
        "states": (6, shape.layers, shape.length, shape.features),
    }[shape.kind]
    assert tuple(main(one).shape) == wanted
    sizes = {"tokens": (*one[1].shape, shape.vocab), **dict.fromkeys(("image", "noise"), one[1].shape)}
    sizes = sizes.get(shape.outputs, (6, shape.classes))
    assert task.loss(torch.zeros(sizes), one[1]).isfinite()
    first, again = list(task.batches(0, 6, "validation")), list(task.batches(9, 2, "validation"))
    assert all(torch.equal(main(a), main(b)) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", ["digits", "photos", "series"])
def test_no_validation_sample_is_trained_on(name):
    data = tasks.load(name).data
    train, held = ({x.numpy().tobytes() for x in data[split][0]} for split in ("train", "validation"))
    assert not train & held


def test_language_targets_are_the_next_bytes():
    x, y = next(tasks.load("stdlib-bytes").batches(0, 2))
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_perfect_prediction_is_judged_perfect():
    task = tasks.load("digits")
    answers = {x.numpy().tobytes(): int(y) for b in task.batches(0, 8, "validation") for x, y in zip(*b, strict=True)}
    found = task.evaluate(lambda inputs: torch.eye(10)[[answers[x.numpy().tobytes()] for x in inputs]] * 100, 8)
    assert found["accuracy"] == 1 and found["loss"] < 1e-6


def test_text_file(tmp_path):
    path = tmp_path / "my text.txt"
    path.write_bytes(bytes(range(256)) * 20)
    task = tasks.load(f"file:{path}")
    x, y = next(task.batches(0, 4))
    assert x.shape == (4, 128) and torch.equal((x + 1) % 256, y)


def test_hugging_face_data_saved_to_disk(tmp_path):
    rows = {"body": [f"line {i} of the text, long enough to be cut into windows" for i in range(60)]}
    split = datasets.Dataset.from_dict(rows)
    datasets.DatasetDict({"train": split, "test": split.select(range(10))}).save_to_disk(str(tmp_path / "saved"))
    task = tasks.load(f"hf:{tmp_path / 'saved'}:body")
    text = bytes(next(task.batches(0, 1))[0][0].tolist()).decode()
    assert "of the text" in text
    with pytest.raises(StudyError, match="Did you mean 'body'"):
        tasks.load(f"hf:{tmp_path / 'saved'}:bodi")
    folder = tmp_path / "files"
    folder.mkdir()
    split.to_csv(str(folder / "train.csv"))
    assert tasks.load(f"hf:{folder}:body").shape.outputs == "tokens"


def test_tensors_of_a_user_become_a_task(tmp_path, monkeypatch):
    (tmp_path / "mydata.py").write_text(
        "import torch\n"
        "def pair():\n    x = torch.randn(30, 5); return (x, (x[:, 0] > 0).long()), (x[:9], (x[:9, 0] > 0).long())\n"
        "def wrong():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    task = tasks.load("mydata:pair")
    assert (task.shape.kind, task.shape.features, task.shape.classes) == ("vector", 5, 2)
    with pytest.raises(StudyError, match="got a int; expected a Task"):
        tasks.load("mydata:wrong")
    with pytest.raises(StudyError, match=r"no 'pairs'\. Did you mean 'pair'"):
        tasks.load("mydata:pairs")
    with pytest.raises(StudyError, match="no module 'nodata'"):
        tasks.load("nodata:pair")


def test_unknown_task_suggests_the_nearest():
    with pytest.raises(StudyError, match="Did you mean 'digits'"):
        tasks.load("digit")


def test_nan_in_a_users_data_is_told():
    x, y = torch.randn(10, 3), torch.arange(10) % 2
    x[2, 1], x[3, 0] = float("nan"), float("inf")
    with pytest.raises(
        ValueError, match="'mine': 2 of the 30 numbers in the validation inputs are NaN or infinite; leave"
    ):
        TensorTask("mine", (x.nan_to_num(0, 0), y), (x, y))


@pytest.mark.parametrize(
    ("name", "metric", "low", "high"),
    [
        ("digits", "accuracy", 0.05, 0.15),
        ("mnist1d", "loss", 2.29, 2.32),
        ("stdlib-bytes", "loss", 3.0, 3.4),
        ("photos", "loss", 2.76, 2.78),
        ("series", "loss", 0.3, 3.0),
        ("sequential-digits", "accuracy", 0.05, 0.15),
        ("audiovisual", "loss", 0.4, 0.6),
        ("photograph", "psnr", 9, 12),
        ("translation", "loss", 2.6, 2.9),
        ("token-kinds", "loss", 1.4, 1.9),
    ],
)
def test_a_trivial_predictor_scores_what_the_targets_alone_give(name, metric, low, high):
    assert low < tasks.load(name).trivial()[metric] < high


def test_each_batch_of_corrupted_digits_has_one_corruption_and_the_same_images():
    batches = list(tasks.load("corrupted-digits").batches(0, 256, "validation"))
    labels = [torch.cat([y for _, y in batches[at : at + 5]]) for at in range(0, 25, 5)]
    assert len(batches) == 25 and {len(y) for _, y in batches} == {70}
    for found in labels:
        assert torch.equal(found.bincount(), labels[0].bincount())
    contrast = torch.cat([x for x, _ in batches[15:20]])
    others = torch.cat([x for x, _ in batches[:15]])
    assert contrast.std() < others.std() / 3  # the fourth kind and no other
