"""The task on a frozen model's states: labels are Python's own, held-out windows lie apart, states are the model's."""

import keyword

import torch

from interlayer.layers.stream.ssl_interface import hidden_states
from interlayer.study.token_kinds import (
    COMMENT,
    HOW,
    KEYWORD,
    OPERATOR,
    PROBES,
    labelled,
    token_kinds,
    upstream,
    windows,
)


def words(text, where):
    """The runs of bytes at which ``where`` holds."""
    marked = bytes(b if w else 0 for b, w in zip(text.tolist(), where.tolist(), strict=True))
    return {word.decode() for word in marked.split(b"\0") if word}


def test_labels_are_those_of_pythons_tokenizer():
    text, labels = labelled(3)
    kinds = labels[:, 2]
    found = words(text, kinds == KEYWORD)
    assert {"def", "return", "if"} <= found and all(keyword.iskeyword(word) for word in found)
    assert all(word.startswith("#") for word in words(text, kinds == COMMENT))
    assert not any(c.isalnum() for word in words(text, kinds == OPERATOR) for c in word)
    assert torch.equal(labels[1:, 1], text[:-1])
    assert (labels[:-1, 3] != text[1:]).sum() <= 2  # at the ends of the files


def test_held_out_windows_come_from_the_last_fifth():
    text, _ = labelled(3)
    border = len(text) * 4 // 5
    train, held = windows(200, 32, 0, 3)[0], windows(200, 32, 1, 3)[0]
    inside = {bytes(w) for w in text[:border].unfold(0, 32, 1).to(torch.uint8).numpy()}
    assert all(bytes(w) in inside for w in train.to(torch.uint8).numpy())
    assert sum(bytes(w) in inside for w in held.to(torch.uint8).numpy()) < 20  # text that occurs twice


def test_inputs_are_the_states_of_the_frozen_model():
    task, model = token_kinds(), upstream()
    states, kinds = next(task.batches(0, 4, "validation"))
    text, labels = windows(64, 64, 2 * (HOW["seed"] + 10**6) + 1, HOW["files"])
    expected = hidden_states(model, text, at=["trunk.blocks.*.mixer"], side="input")
    torch.testing.assert_close(states, expected[: len(states)])
    assert torch.equal(kinds, labels[: len(kinds), :, 2]) and int(kinds.max()) < PROBES["token"]
    assert not states.requires_grad
