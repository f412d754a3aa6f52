"""A tiny diffusion Transformer of diffusers, for the examples of this room."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from interlayer.core.extras import need


def tiny_dit() -> tuple[nn.Module, dict[str, Any]]:
    """The model and a call of it."""
    diffusers: Any = need("diffusers", "hf", "tiny_dit")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=2, num_layers=1, sample_size=4, patch_size=2,
        num_embeds_ada_norm=10, norm_num_groups=1,
    )  # fmt: skip
    times, classes = torch.tensor([3, 7]), torch.tensor([1, 2])
    return model, {"hidden_states": torch.randn(2, 2, 4, 4), "timestep": times, "class_labels": classes}
