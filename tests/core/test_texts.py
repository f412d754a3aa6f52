import json
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from interlayer.cli import app
from interlayer.core.texts import windows
from interlayer.models import Transformer

TEXT = "the quick brown fox jumps over the lazy dog " * 30


@pytest.fixture
def saved(tmp_path):
    """A language model with its tokenizer, as transformers saves them, and a text."""
    torch.manual_seed(0)
    vocab = {w: n for n, w in enumerate(["?", *dict.fromkeys(TEXT.split())])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    config = GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=len(vocab), n_positions=20, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def test_tokens_of_the_models_own_tokenizer(saved):
    model = GPT2LMHeadModel.from_pretrained(saved / "model")
    batches = windows(saved / "texts.txt", model, f"hf:{saved / 'model'}")
    assert [b["input_ids"].shape for b in batches] == [(8, 20), (5, 20)]  # 270 words, windows of at most n_positions
    assert batches[0]["input_ids"][0, :9].tolist() == [1, 2, 3, 4, 5, 6, 1, 7, 8]


def test_bytes_for_a_model_without_a_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("ab" * 40, encoding="utf-8")
    (found,) = windows(tmp_path / "a.txt", Transformer(256, 16, 1, 8, 2))
    assert found.shape == (5, 16) and found[0, :2].tolist() == [97, 98]
    with pytest.raises(ValueError, match=r"a.txt has 80 tokens; expected at least one window of 128"):
        windows(tmp_path / "a.txt", nn.Identity())


def test_apply_takes_a_text_file_and_another_process_loads_the_result(saved):
    arguments = [
        "apply",
        "fptq",
        "--model",
        f"hf:{saved / 'model'}",
        "--data",
        str(saved / "texts.txt"),
        "--out",
        str(saved / "small"),
    ]
    app(arguments, standalone_mode=False)
    code = "import interlayer, torch, sys; m = interlayer.load(sys.argv[1]).eval(); print(m(torch.ones(1, 4).long()).logits.shape)"
    again = subprocess.run(
        [sys.executable, "-c", code, str(saved / "small")], capture_output=True, text=True, check=False
    )
    assert "torch.Size([1, 4, 9])" in again.stdout, again.stderr
    steps = json.loads((saved / "small" / "recipe.json").read_text(encoding="utf-8"))["steps"]
    assert len(steps) == 1
