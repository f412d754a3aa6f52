"""The user's own models, data and objects in a study; and runs that are cut off and go on."""

import io
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import interlayer
from interlayer.core.data import DataShape
from interlayer.core.task import Budget
from interlayer.study import LoaderTask, StudyError, bases, compare, train
from interlayer.study.arms import Arm
from interlayer.study.objects import Objects
from interlayer.study.subject import Learner
from interlayer.study.train import Job

X, Y = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
SHAPE = DataShape("vector", "classes", classes=3, features=6)


class Net(nn.Module):
    """A model without slots: a norm, an activation, a linear map; it is built without arguments."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.act, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.last(self.drop(self.act(self.norm(self.first(x)))))


def loaders(batch_size=16):
    data = TensorDataset(X, Y)
    return DataLoader(data, batch_size, shuffle=True), DataLoader(data, batch_size)


def study(out, **options):
    settings = {
        "model": Net,
        "task": loaders(),
        "arms": ["plain"],
        "seeds": 1,
        "steps": 6,
        "lr": 1e-2,
        "evaluations": 2,
    }
    return compare(**{**settings, **options}, out=out, console=Console(file=io.StringIO(), width=200))


def curves(result, arm="plain"):
    return [(r.record.train, r.record.curve[-1]["loss"]) for r in result.of(arm)]


def errors(result):
    return {r.arm: r.error for r in result.runs if r.error}


def test_a_class_and_loaders_are_compared_and_slots_are_filled_by_replacement(tmp_path):
    arms = [
        "plain",
        "norm=rmsnorm",
        "smelu",
        "activation=gelu+norm=rmsnorm",
        "stream=rezero",
        "norm=gelu",
        "linear=nosuch",
    ]
    result = study(tmp_path, arms=arms)
    states = {r.arm: r.state for r in result.runs}
    assert states == {a: "done" if a in arms[:4] else "failed" for a in arms}
    assert len({curves(result, a)[0][1] for a in arms[:4]}) == 4
    assert "Net takes no 'stream'" in errors(result)["stream=rezero"]
    assert "norm='gelu' names no norm" in errors(result)["norm=gelu"]
    assert "nosuch" in errors(result)["linear=nosuch"]
    assert result.about["name"] == "data" and result.base == "Net"


def test_functions_instances_tuples_and_mappings_are_arms(tmp_path):
    def wide(shape, *, width=8):
        assert shape.features == 6 and shape.classes == 3
        return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))

    trained = Net()
    arms = {"plain": Net, "wide": wide, "mine": trained, "normed": {"norm": "rmsnorm", "lr": 0.1}, "text": "smelu"}
    result = study(tmp_path, arms=arms)
    assert errors(result) == {} and [a.name for a in result.spec.arms] == list(arms)
    listed = study(tmp_path / "list", arms=[Net, wide, ("mine", trained), {"norm": "rmsnorm"}])
    assert [a.name for a in listed.spec.arms] == ["Net", "wide", "mine", "norm=rmsnorm"]
    assert curves(listed, "mine") == curves(result, "mine")
    before = [p.clone() for p in trained.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, trained.parameters(), strict=True))


def test_an_instance_begins_at_its_weights_and_a_class_at_those_of_the_seed():
    torch.manual_seed(5)
    model = Net()
    made = bases.make(model, SHAPE, {})
    assert made is not model and torch.equal(made.first.weight, model.first.weight)
    assert not torch.equal(bases.make(Net, SHAPE, {}).first.weight, model.first.weight)


def test_the_data_is_recognised_and_the_seed_orders_it():
    train_loader, held = loaders()
    task = LoaderTask("mine", train_loader, held)
    assert (task.shape, task.metric, task.about) == (SHAPE, "accuracy", "train: 4 batches, validation: 4 batches.")
    first, again, other = ([y.tolist() for _, y in islice(task.batches(s, 0), 6)] for s in (0, 0, 1))
    assert (
        first == again != other
        and sorted(y for part in first[:4] for y in part) == sorted(Y.tolist())
        and first[4:] != first[:2]
    )
    state = torch.get_rng_state()
    next(task.batches(3, 0))
    assert torch.equal(state, torch.get_rng_state())


def test_augmentation_is_alike_for_all_arms(tmp_path):
    class Noisy(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + torch.randn(6), y

    noisy = DataLoader(Noisy(X, Y), 16, shuffle=True), DataLoader(TensorDataset(X, Y), 64)
    result = study(tmp_path, task=noisy, arms={"plain": Net, "again": Net}, allow_equal=True)
    assert curves(result, "plain") == curves(result, "again")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (lambda: (iter([(X, Y)]), [(X, Y)]), "can be read only once"),
        (lambda: ([], [(X, Y)]), "the train loader gave no batch"),
        (lambda: ([[X, "label"]], [(X, Y)]), "a train batch is a list of 2; expected (inputs, targets)"),
        (lambda: [{"x": X}, 3, 4], "expected a Task"),
        (lambda: (3, 4), "expected a DataLoader"),
        (lambda: ((X, Y[:3]), (X, Y)), "64 inputs and 3 targets"),
    ],
)
def test_data_of_another_form_is_one_clear_error(tmp_path, task, message):
    with pytest.raises(StudyError) as error:
        study(tmp_path, task=task())
    assert message in str(error.value)


def test_arrays_and_functions_are_tasks(tmp_path):
    arrays = (X.double().numpy(), Y.int().numpy())
    assert errors(study(tmp_path, task=(arrays, arrays), batch_size=8)) == {}
    assert errors(study(tmp_path / "f", task=loaders)) == {}
    with pytest.raises(StudyError, match="come from its own loaders"):
        study(tmp_path / "g", batch_size=8)
    with pytest.raises(StudyError, match="beside a StudySpec"):
        compare(interlayer.StudySpec(), model=Net)
    with pytest.raises(StudyError, match="Did you mean 'steps'"):
        study(tmp_path / "h", stesp=3)


def test_what_cannot_be_built_says_how(tmp_path):
    def needs(shape, width):
        return Net()

    def wrong():
        return 3

    found = errors(study(tmp_path, arms={"plain": Net, "needs": needs, "wrong": wrong, "number": 3}))
    assert "needs needs width" in found["needs"] and "gave a int" in found["wrong"] and "got int" in found["number"]


def test_the_same_objects_go_on_and_changed_ones_start_anew(tmp_path):
    first = study(tmp_path, arms={"plain": Net, "mine": {"norm": "rmsnorm"}})
    again = study(tmp_path, arms={"plain": Net, "mine": {"norm": "rmsnorm"}})
    assert [r.record.seconds for r in again.runs] == [r.record.seconds for r in first.runs]
    changed = study(tmp_path, arms={"plain": Net, "mine": {"activation": "gelu"}})
    assert changed.of("plain")[0].record.seconds == first.of("plain")[0].record.seconds
    assert curves(changed, "mine") != curves(first, "mine")
    with pytest.raises(StudyError, match="given as an object of Python"):
        compare(first.spec, console=Console(file=io.StringIO()))


def test_the_text_of_an_object_is_its_content():
    given = Objects()
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert given.text(one) == given.text(one) != given.text(other) and given.text("mlp") == "mlp"
    with torch.no_grad():
        before, _ = given.text(one), one.weight.zero_()
    assert given.text(one) != before and given.get_or_text(before) is one
    texts = {given.text(f, "f") for f in (lambda: 1, lambda: 2, Net, X, X.numpy(), loaders(), loaders(8))}
    assert len(texts) == 7


def test_hugging_face_models_and_their_batches(tmp_path):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=20, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    gpt = hf.GPT2LMHeadModel(config)
    ids = torch.randint(0, 20, (12, 8))
    data = [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in ids.split(4)]
    arms = {"plain": gpt, "rms": {"norm": "rmsnorm"}, "smelu": "smelu"}
    result = study(tmp_path / "lm", model=gpt, task=(data, data), arms=arms, steps=4, evaluations=1)
    assert errors(result) == {} and len({curves(result, a)[0][1] for a in arms}) == 3
    with torch.no_grad():
        own = sum(float(gpt(**b).loss) for b in data) / 3
    assert result.of("plain")[0].record.train[0][1] == pytest.approx(own, rel=0.1)
    gpt.save_pretrained(tmp_path / "saved")
    pairs = [(b["input_ids"], b["labels"]) for b in data]
    for base in (str(tmp_path / "saved"), f"hf:{tmp_path / 'saved'}"):
        saved = study(tmp_path / "again", model=base, task=(pairs, pairs), steps=2, evaluations=1)
        assert errors(saved) == {}
    classes = [(part, torch.arange(4) % 2) for part in ids.split(4)]
    headed = study(tmp_path / "head", model=f"hf:{tmp_path / 'saved'}", task=(classes, classes), steps=2)
    assert "pad" in errors(headed)["plain"].lower() or headed.finished  # GPT-2 has no padding token of its own


def test_a_folder_that_save_wrote_is_a_base(tmp_path):
    interlayer.save(interlayer.MLP(6, 3, depth=1, width=4), tmp_path / "mlp")
    result = study(tmp_path / "out", model=str(tmp_path / "mlp"), arms=["plain", "activation=gelu"], keep=True)
    assert errors(result) == {}
    kept = interlayer.load(tmp_path / "out" / "weights" / "activation-gelu" / "seed-0")
    loss = F.cross_entropy(kept(X), Y).item()
    assert loss == pytest.approx(result.values("activation=gelu", "loss")[0], rel=1e-5)


def test_a_result_shows_itself_and_gives_a_data_frame(tmp_path):
    result = study(tmp_path, arms=["plain", "norm=rmsnorm"], seeds=2)
    page = result._repr_html_()
    assert page.count("<tr>") == 3 and "norm=rmsnorm" in page and "±" in page and "<script" not in page
    frame = result.frame()
    assert list(frame["arm"]) == ["plain"] * 2 + ["norm=rmsnorm"] * 2 and (frame["loss"] > 0).all()


class Stop(Exception):
    """Cuts a run off."""


@pytest.mark.parametrize("arm", ["plain", "scalable-ff"])
def test_a_run_that_is_cut_off_goes_on_bit_for_bit(tmp_path, monkeypatch, arm):
    """Dropout, moments, batch statistics and a rule's state are all there."""
    from interlayer.models.classic import ResNet18
    from interlayer.study.arms import parse

    images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    task = LoaderTask("mine", [(images[:16], Y[:16]), (images[16:], Y[16:32])], [(images, Y[:32])])
    given = Objects()
    base = given.text(
        lambda: nn.Sequential(ResNet18(1, 3, width=4), nn.Dropout(0.1)) if arm == "plain" else ResNet18(1, 3, width=4)
    )
    job = Job(steps=6, evaluations=2)
    read = parse(arm, arm, base, given)
    monkeypatch.setattr(train, "CHECKPOINT", 0.0)
    whole = train.train(read, task, job, 0, lr=1e-2)
    path, steps = tmp_path / "run.pt", []

    def emit(event, at=4):
        steps.append(event["step"])
        if event["step"] == at and event["what"] == "step":
            raise Stop

    with pytest.raises(Stop):
        train.train(read, task, job, 0, lr=1e-2, emit=emit, checkpoint=path)
    assert path.is_file()
    again = train.train(read, task, job, 0, lr=1e-2, emit=lambda e: emit(e, 0), checkpoint=path)
    assert steps[:6] == [1, 2, 3, 3, 4, 5] and not path.exists()
    assert again.train == whole.train and again.metrics == whole.metrics
    timeless = [[{k: v for k, v in p.items() if k != "seconds"} for p in r.curve] for r in (again, whole)]
    assert timeless[0] == timeless[1]


def test_worker_processes_give_the_same_numbers_and_get_what_is_defined_here(tmp_path):
    class Local(nn.Module):
        """No module has it, so that it is sent by value."""

        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            return self.last(self.norm(self.first(x)).relu())

    one, two = study(tmp_path / "a", model=Local), study(tmp_path / "b", model=Local, workers=2)
    assert curves(one) == curves(two) and one.finished
    with pytest.raises(StudyError, match="cannot be sent to worker processes"):
        study(tmp_path / "c", model=Local, task=lambda: LoaderTask("mine", [(X, Y)], Lock()), workers=2)


class Lock(list):
    """Batches that no other process can have."""

    def __init__(self):
        super().__init__([(X, Y)])

    def __reduce__(self):
        raise TypeError("not to be copied")


def test_records_leave_as_parquet_and_for_tensorboard(tmp_path):
    pandas = pytest.importorskip("pandas")
    result = study(tmp_path, arms=["plain", "norm=rmsnorm"], export="parquet,tensorboard")
    table = pandas.read_parquet(tmp_path / "results.parquet")
    assert list(table["loss"]) == [r.record.metrics["loss"] for r in result.runs] and table["lr"].dtype == float
    curve = pandas.read_parquet(tmp_path / "curves.parquet")
    assert len(curve) == len((tmp_path / "curves.csv").read_text().splitlines()) - 1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard" / "norm-rmsnorm" / "seed-0")).Reload()
    shown = [(e.step, e.value) for e in events.Scalars("loss/validation")]
    wanted = [(p["step"], p["loss"]) for p in result.of("norm=rmsnorm")[0].record.curve]
    assert shown == [(step, pytest.approx(loss)) for step, loss in wanted]
    (tmp_path / "results.parquet").unlink()
    interlayer.study.report(tmp_path, console=Console(file=io.StringIO()), export="parquet")
    assert (tmp_path / "results.parquet").exists()
    with pytest.raises(StudyError, match="parquet"):
        study(tmp_path, export="parket")


def test_evaluation_leaves_the_random_numbers_alone():
    class Sampling(Net):
        """Draws in evaluation too."""

        def forward(self, x):
            return super().forward(x) + torch.randn(())

    learner = Learner(Arm("plain", Sampling), Sampling(), LoaderTask("mine", [(X, Y)], [(X, Y)]), 16, lr=0.1)
    before = torch.get_rng_state()
    learner.judge()
    assert torch.equal(torch.get_rng_state(), before)


def test_weight_decay_acts_on_matrices_alone():
    from interlayer.study.arms import Training

    class Unused(nn.Module):
        """Gradients of zero, so that only the decay moves a weight."""

        def __init__(self):
            super().__init__()
            self.line, self.gain = nn.Linear(6, 3), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return 0 * self.gain * self.line(x)

    torch.manual_seed(0)
    model = Unused()
    arm = Arm("plain", Unused, training=Training(weight_decay=0.5, warmup=0.0, schedule="constant"))
    learner = Learner(arm, model, LoaderTask("mine", [(X, Y)], [(X, Y)]), 16, lr=0.1)
    before = {n: p.clone() for n, p in model.named_parameters()}
    learner.step((X, Y), Budget(16, steps=4, done=2))
    assert torch.allclose(model.line.weight, before["line.weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(model.line.bias, before["line.bias"]) and torch.equal(model.gain, before["gain"])


class Two(nn.Module):
    """Takes two inputs."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 3), nn.Linear(2, 3)

    def forward(self, first, second):
        return self.one(first) + self.two(second)


class Own(nn.Module):
    """Rebuilds its input and says itself how well."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(6, 2), nn.Linear(2, 6)

    def forward(self, x):
        out = self.up(self.down(x))
        return {"logits": out, "loss": (out - x).square().mean()}


def test_batches_of_several_inputs_and_without_targets(tmp_path):
    second = torch.randn(len(X), 2)
    result = study(tmp_path / "a", model=Two, task=([(X, second, Y)], [(X, second, Y)]), arms=["plain", "lr=0.02"])
    assert result.finished, [r.error for r in result.runs]
    assert result.about["metric"] == "accuracy"
    for name, batch in (("b", {"x": X}), ("c", X), ("d", (X,))):
        result = study(tmp_path / name, model=Own, task=([batch], [batch]), arms=["plain"])
        assert result.finished and result.runs[0].record.curve[0]["loss"] > result.values("plain", "loss")[0]
    bad = study(tmp_path / "e", model=Net, task=([X], [X]), arms=["plain"])
    assert "a batch without targets, and the model returned Tensor without a loss" in bad.runs[0].error


def test_graphs_are_batches(tmp_path):
    data = pytest.importorskip("torch_geometric.data")
    loader = pytest.importorskip("torch_geometric.loader")
    nn_ = pytest.importorskip("torch_geometric.nn")

    class Graphs(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.last = nn_.GCNConv(2, 8), nn.Linear(8, 2)

        def forward(self, batch):
            hidden = self.one(batch.x, batch.edge_index).relu()
            return self.last(nn_.global_mean_pool(hidden, batch.batch))

    edges = torch.tensor([[0, 1, 2], [1, 2, 0]])
    graphs = [data.Data(x=torch.randn(3, 2) + i % 2, edge_index=edges, y=torch.tensor([i % 2])) for i in range(16)]
    task = (loader.DataLoader(graphs, 8, shuffle=True), loader.DataLoader(graphs, 8))
    result = study(tmp_path, model=Graphs, task=task, arms=["plain", "activation=gelu"], steps=20)
    plain = result.of("plain")[0]
    assert plain.state == "done" and plain.record.cost["flops"] > 0 and result.about["metric"] == "accuracy"


class Turned(Net):
    """A net with a complex parameter, for which AdamW has no fused kernel."""

    def __init__(self):
        super().__init__()
        self.turn = nn.Parameter(torch.ones(6, dtype=torch.complex64))

    def forward(self, x):
        return super().forward((x * self.turn).real)


@pytest.mark.parametrize(("make", "fused"), [(Net, True), (Turned, False)])
def test_adamw_is_one_kernel_unless_a_parameter_is_complex(make, fused):
    task = LoaderTask("mine", [(X, Y)], [(X, Y)])
    learner = Learner(Arm("plain", make), make(), task, 16, lr=0.1)
    assert learner.optimizer.defaults["fused"] == fused
    losses = [learner.step((X, Y), Budget(16, steps=20)) for _ in range(20)]
    assert losses[-1] < losses[0]
