"""Streams of experiences: how they are made, what a run over one calls, and the numbers made of its accuracies."""

import math

import pytest
import torch
from torch import nn

from interlayer.core.data import Experience
from interlayer.core.datasets import Split, photos, split_digits
from interlayer.core.experiences import Learned, Learner, by_classes, in_a_row, permuted, rotated, run_stream
from interlayer.core.kinds import Rule

MATRIX = torch.tensor([[0.9, 0.3, 0.2], [0.8, 0.7, 0.4], [0.6, 0.75, 0.95]], dtype=torch.float64)


def test_transfer_and_forgetting_by_hand():
    found = Learned(["a", "b", "c"], MATRIX, torch.tensor([0.1, 0.2, 0.25], dtype=torch.float64))
    assert found.average == pytest.approx((0.6 + 0.75 + 0.95) / 3)
    assert found.backward == pytest.approx(((0.6 - 0.9) + (0.75 - 0.7)) / 2)
    assert found.forward == pytest.approx(((0.3 - 0.2) + (0.4 - 0.25)) / 2)
    assert found.forgetting == pytest.approx(((0.9 - 0.6) + (0.7 - 0.75)) / 2)
    one = Learned(["a"], MATRIX[:1, :1], MATRIX[0, :1])
    assert one.average == pytest.approx(0.9) and all(map(math.isnan, (one.backward, one.forward, one.forgetting)))


def test_streams_split_permute_turn_and_follow_one_another():
    data = split_digits()
    low, high = by_classes(data, [[0, 1], [7, 4]])
    assert low.classes == high.classes == 2 and set(high.train[1].tolist()) == {0, 1}
    seven = data.train[0][data.train[1] == 7]
    assert torch.equal(high.train[0][high.train[1] == 0], seven)
    (open_,) = by_classes(data, [[7, 4]], known=False)
    assert open_.classes == 10 and set(open_.test[1].tolist()) == {4, 7}
    plain, mixed = permuted(data, 2)
    assert torch.equal(plain.train[0], data.train[0]) and not torch.equal(mixed.train[0], data.train[0])
    assert torch.equal(mixed.test[0].flatten(1).sort(1).values, data.held[0].flatten(1).sort(1).values)
    still, quarter = rotated(data, [0, 90])
    assert torch.equal(still.train[0], data.train[0])
    torch.testing.assert_close(quarter.test[0], data.held[0].rot90(1, (2, 3)), atol=1e-5, rtol=0)
    colour = Split((torch.zeros(4, 3, 9, 9), torch.arange(4)), (torch.zeros(2, 3, 9, 9), torch.arange(2)))
    row = in_a_row({"digits": data, "photos": photos(), "colour": colour}, side=16)
    assert [tuple(e.train[0].shape[1:]) for e in row] == [(3, 16, 16)] * 3
    assert [e.classes for e in row] == [10, 16, 4]


class Notes(Rule):
    """Notes how it is called, and answers with the number of experiences so far."""

    slug = "notes"

    def __init__(self):
        self.model, self.calls, self.draws = nn.Linear(1, 1), [], []
        self.optimizer = torch.optim.SGD(self.model.parameters(), 8.0)

    def optimizers(self):
        return (self.optimizer,)

    def begin(self, experience):
        self.calls.append(("begin", experience.name))

    def end(self, experience):
        self.calls.append(("end", experience.name))

    def at(self, experience):
        self.calls.append(("at", experience.name))

    def step(self, batch):
        self.calls.append(("step", self.optimizer.param_groups[0]["lr"]))
        self.draws.append((float(batch[0].sum()), float(torch.rand(()))))
        return {"loss": 0.0}

    def predict(self, inputs):
        return torch.eye(2)[[0] * len(inputs)]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def tiny(name, targets=(0, 1, 0)):
    data = torch.randn(len(targets), 1), torch.tensor(targets)
    return Experience(name, data, data, 2)


def test_a_run_calls_the_rule_in_order_with_equal_draws_and_leaves_the_generator_alone():
    stream = [tiny("a"), tiny("b", (0, 0, 1, 0))]
    rules = [Notes(), Notes()]
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    results = [
        run_stream(rule, stream, steps=2, batch=3, seed=1, known=known, rate=lambda share: 1 - share)
        for rule, known in zip(rules, (True, False), strict=True)
    ]
    assert torch.equal(torch.rand(1), wanted)
    assert rules[0].draws == rules[1].draws and len(set(rules[0].draws)) == 4
    learning = [c for c in rules[0].calls if c[0] != "at"]
    assert learning == rules[1].calls
    one = [("step", 8.0), ("step", 4.0)]
    assert learning == [("begin", "a"), *one, ("end", "a"), ("begin", "b"), *one, ("end", "b")]
    assert [r.accuracy.tolist() for r in results] == [[[2 / 3, 0.75]] * 2] * 2


def test_what_was_not_begun_has_no_accuracy():
    stream = by_classes(split_digits(), [[0, 1], [2, 3]])
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    found = run_stream(Learner(model, lr=1e-2), stream, steps=40)
    assert found.before.isnan().all() and found.accuracy.isnan().tolist() == [[False, True], [False, False]]
    assert math.isnan(found.forward) and found.accuracy.diagonal().min() > 0.9


def test_class_incremental_learning_forgets_with_one_head():
    stream = by_classes(split_digits(), [[0, 1], [2, 3]], known=False)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    found = run_stream(Learner(model, lr=1e-2, own_heads=False), stream, steps=40, known=False)
    assert found.accuracy[0, 0] > 0.9 and found.accuracy[1, 1] > 0.9 and found.forgetting > 0.3


def test_clear_errors():
    x, y = torch.zeros(3, 1), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"targets 0 to 2 in train; expected integers from 0 to 1"):
        Experience("e", (x, y), (x, y), 2)
    with pytest.raises(ValueError, match="3 inputs and 2 targets in test"):
        Experience("e", (x, y), (x, y[:2]), 3)
    with pytest.raises(ValueError, match="class 11 has no samples"):
        by_classes(split_digits(), [[0, 11]])
    with pytest.raises(ValueError, match="class 1 is in two groups"):
        by_classes(split_digits(), [[0, 1], [1, 2]])
    with pytest.raises(ValueError, match=r"inputs \(3, 1\) of 'flat'; expected images"):
        in_a_row({"flat": Split((x, y), (x, y))}, side=8)
    with pytest.raises(ValueError, match="at least one, and a name of its own"):
        run_stream(Notes(), [], steps=1)
    with pytest.raises(ValueError, match="a name of its own"):
        run_stream(Notes(), [tiny("a"), tiny("a")], steps=1)
    with pytest.raises(ValueError, match="steps 0, batch 32; expected at least 1"):
        run_stream(Notes(), [tiny("a")], steps=0)
