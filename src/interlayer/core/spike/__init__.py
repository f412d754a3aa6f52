"""Spiking neurons: charge, fire, reset; surrogate gradients; a fast form for whole sequences.

>>> import torch
>>> from torch import nn
>>> net = nn.Sequential(nn.Linear(700, 512), LIF(decay=0.9), nn.Linear(512, 20))
>>> net(torch.rand(2, 100, 700).gt(0.95).float()).mean(1).shape  # logits from 100 steps of spikes in 700 channels
torch.Size([2, 20])
"""

from __future__ import annotations

from interlayer.core.spike.neuron import LIF, Neuron, Unrolled
from interlayer.core.spike.surrogate import Atan, Clamp, Sigmoid, Surrogate

__all__ = ["LIF", "Atan", "Clamp", "Neuron", "Sigmoid", "Surrogate", "Unrolled"]
