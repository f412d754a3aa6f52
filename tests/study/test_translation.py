"""The task of translation: targets follow from the source exactly, and ``exact`` is what greedy decoding gets right."""

import torch
import torch.nn.functional as F

from interlayer.models import build
from interlayer.study.translation import END, HUNDERT, HUNDRED, SHIFT, START, TENS, UND, UNITS, VOCAB, translation


def translated(source):
    """Word by word: (hundred, HUNDERT, unit, UND, ten) to (hundred, HUNDRED, ten, unit)."""
    found = []
    for a, hundert, unit, und, ten in zip(*[iter(source[:-1])] * 5, strict=True):
        assert (hundert, und) == (HUNDERT, UND) and UNITS <= a < TENS <= ten < HUNDRED and UNITS <= unit < TENS
        found += [a + SHIFT, HUNDRED, ten + SHIFT, unit + SHIFT]
    return [*found, END]


def test_targets_are_translations_and_come_one_token_late():
    (source, before), target = next(translation().batches(3, 5))
    assert [translated(row) for row in source.tolist()] == target.tolist()
    assert before[:, 0].eq(START).all() and torch.equal(before[:, 1:], target[:, :-1])


def test_one_wrong_token_makes_a_sentence_inexact():
    task = translation()
    answers = iter([y.clone() for _, y in task.batches(0, 8, "validation")])

    def predict(inputs, change=None):
        y = next(answers)
        if change:
            y[change] = (y[change] + 1) % VOCAB
        return 50.0 * F.one_hot(y, VOCAB)

    assert task.evaluate(predict, 8)["exact"] == 1
    answers = iter([y.clone() for _, y in task.batches(0, 8, "validation")])
    assert task.evaluate(lambda inputs: predict(inputs, (4, 7)), 8)["exact"] == 1 - 2 / 256


def test_exact_sentences_are_those_that_greedy_decoding_gets_right():
    torch.manual_seed(0)
    task = translation()
    model = build("encoder-decoder", task.shape, depth=1, width=32)
    optimiser, batches = torch.optim.AdamW(model.parameters(), 1e-2), task.batches(0, 32)
    for _ in range(150):
        inputs, targets = next(batches)
        loss = task.loss(model(*inputs), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        found = task.evaluate(lambda inputs: model(*inputs), 8)["exact"]
    held = list(task.batches(0, 8, "validation"))
    greedy = torch.cat([model.generate(source, 13, start=START) for (source, _), _ in held])
    assert found == (greedy == torch.cat([y for _, y in held])).all(1).float().mean().item()
    assert found > 0
