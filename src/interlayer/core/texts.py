"""A text file as batches of token ids: calibration data for language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.core.extras import need

LENGTH, ROWS, MOST = 128, 8, 32  # tokens of a window, windows of a batch, batches
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def windows(path: str | Path, model: nn.Module, source: str = "") -> list[Any]:
    """Windows of a text's tokens, one after the other, in batches of 8; at most 256 windows.

    Args:
        path: A text file, UTF-8.
        model: What the batches are for. Its longest input bounds the windows of 128 tokens.
        source: ``hf:NAME`` or a folder, whose tokenizer is taken; batches are then mappings with ``input_ids``. A model without one
            gets bytes, [B, S].

    Raises:
        ValueError: A text shorter than one window.

    Examples:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        ...     _ = file.write("a short text " * 40), file.flush()
        ...     [x.shape for x in windows(file.name, nn.Identity())]
        [torch.Size([4, 128])]
    """
    text = Path(path).read_text(encoding="utf-8")
    folder = Path(source.removeprefix("hf:"))
    tokens = source.startswith("hf:") if not folder.is_dir() else any((folder / name).is_file() for name in TOKENIZERS)
    if tokens:
        tokenizer: Any = need("transformers", "hf", "texts.windows").AutoTokenizer.from_pretrained(str(folder))
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    else:
        ids = torch.tensor(list(text.encode()), dtype=torch.long)
    length = min(LENGTH, _longest(model))
    count = min(len(ids) // length, ROWS * MOST)
    if not count:
        raise ValueError(
            f"texts.windows: {path} has {len(ids)} tokens; expected at least one window of {length}. Give a longer text."
        )
    rows: list[Tensor] = list(ids[: count * length].view(count, length).split(ROWS))
    return [{"input_ids": x} for x in rows] if tokens else list(rows)


def _longest(model: nn.Module) -> int:
    """The longest input that a model's configuration names."""
    config: Any = getattr(model, "config", None)
    held = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    sizes = [held.get(key) for key in ("max_position_embeddings", "n_positions", "length")]
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=LENGTH)
