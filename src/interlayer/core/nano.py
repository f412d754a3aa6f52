"""Small trained models that are made once: built, trained and kept in the user's cache folder by content hash."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes


def cache() -> Path:
    """Interlayer's folder in the user's cache: ``$XDG_CACHE_HOME/interlayer``, by default ``~/.cache/interlayer``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "interlayer"


def keep(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a file at once, so that another process sees the whole file or none.

    Args:
        path: A safetensors file; its folder is made.
        tensors: By name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}))
    part.replace(path)


def nano(
    build: Callable[[], nn.Module],
    train: Callable[[nn.Module], Any],
    *,
    task: str,
    kind: str,
    seed: int = 0,
    **how: Any,
) -> nn.Module:
    """A trained small model, in eval mode; trained on the first call, then read from the cache.

    The cache key is a hash of the arguments, of the initial weights and of torch's version. What ``train`` does is not part of
    it unless ``how`` says so: name everything there that changes the result, such as the number of steps.

    Args:
        build: Makes the model, drawing from torch's global generator.
        train: Trains it in place. Called under the same seed, and only if the cache has no such model.
        task: What it is trained on.
        kind: What sort of model it is.
        seed: Seed of the initial weights and of the training.
        **how: Whatever else determines the result; numbers, strings, and lists of these.

    Raises:
        TypeError: Something in ``how`` is not plain data.

    Examples:
        >>> import os, tempfile
        >>> os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
        >>> def train(model):
        ...     print("training")
        ...     nn.init.ones_(model.weight)
        >>> for _ in range(2):
        ...     model = nano(lambda: nn.Linear(1, 1), train, task="ones", kind="linear", steps=1)
        training
        >>> model.weight.item()
        1.0
    """
    # A pairing that watches draws (core.pairing) is not to watch these, which are the same for every seed.
    with _disable_current_modes(), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        try:
            key = json.dumps([task, kind, seed, how, torch.__version__], sort_keys=True)
        except TypeError as error:
            raise TypeError(f"nano: {error}; expected plain data in {sorted(how)}. Pass numbers or strings.") from None
        digest = hashlib.sha256(key.encode())
        for name, value in model.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        path = cache() / "nano" / f"{digest.hexdigest()[:32]}.safetensors"
        if not path.is_file():
            with torch.enable_grad():
                train(model)
            keep(path, model.state_dict())
    model.load_state_dict(load_file(path))
    return model.eval()
