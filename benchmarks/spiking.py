"""Leaky integrate-and-fire beside spikingjelly and snntorch: forward and backward over 100 steps, alone and with its linear layer.

    python -m benchmarks.spiking [--compiled]

Each in its fastest form on a CPU: spikingjelly's multi-step LIF (one operator of its own), snntorch's Leaky in a loop over time after
one matrix product for all steps. `soft-reset-mpr` is the same operator with other constants and another slope. With ``--compiled``,
spikingjelly's also by torch.compile, which needs minutes to unroll and fuse the steps; the operator here is not compiled further.
"""

from __future__ import annotations

import sys

import snntorch
import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn

from benchmarks.harness import compare, version
from interlayer.core.spike import LIF, Atan
from interlayer.layers.spiking.soft_reset_mpr import SoftResetMPR

STEPS, BATCH, INPUTS, NEURONS, DECAY, GOAL = 100, 32, 700, 512, 0.5, 0.7


class Jelly(nn.Module):
    """spikingjelly's, for [T, B, N]; the decay is 1 - 1 / tau."""

    def __init__(self):
        super().__init__()
        self.lif = neuron.LIFNode(
            tau=1 / (1 - DECAY),
            decay_input=False,
            v_threshold=1.0,
            v_reset=None,
            surrogate_function=surrogate.ATan(2.0),
            step_mode="m",
        )

    def forward(self, x):
        functional.reset_net(self.lif)
        return self.lif(x)


class Compiled(nn.Module):
    """spikingjelly's, all steps fused by torch.compile."""

    def __init__(self):
        super().__init__()
        slope = surrogate.ATan(2.0)

        def run(x):
            return functional.lif_multi_step(x, torch.zeros_like(x[0]), 1 / (1 - DECAY), False, 1.0, None, slope)[0]

        self.run = torch.compile(run)

    def forward(self, x):
        return self.run(x)


class Leaky(nn.Module):
    """snntorch's, for [T, B, N]: the threshold is subtracted a step later, after the decay, which is a drop of threshold / decay."""

    def __init__(self):
        super().__init__()
        self.lif = snntorch.Leaky(beta=DECAY, reset_mechanism="subtract", spike_grad=snntorch.surrogate.atan(alpha=2.0))

    def forward(self, x):
        state, spikes = torch.zeros_like(x[0]), []
        for each in x:
            spike, state = self.lif(each, state)
            spikes.append(spike)
        return torch.stack(spikes)


class Parallel(nn.Module):
    """snntorch's form by ``nn.RNN``, linear layer included, which never resets: timed though it is not the same neuron."""

    def __init__(self):
        super().__init__()
        self.lif = snntorch.LeakyParallel(INPUTS, NEURONS, beta=DECAY, spike_grad=snntorch.surrogate.atan(alpha=2.0))

    def forward(self, x):
        return self.lif(x)


def passes(layer, x, weight):
    """A function that runs a layer forward and backward; gives spikes and gradients of the input or of the parameters."""
    leaves = [p for p in layer.parameters() if p.requires_grad] or [x.requires_grad_()]

    def run():
        spikes = layer(x)
        return spikes.detach(), *torch.autograd.grad(spikes, leaves, weight)

    return run


def close(found, wanted, parameters):
    """Spikes are equal but for the few neurons that rounding takes across the threshold; so are the gradients of the rest."""
    spikes, (grad, *_) = found[0].transpose(0, 1), found[1:]
    same = (spikes == wanted[0]).all(0)
    if parameters:
        near = (grad - wanted[1]).norm() < 0.02 * grad.norm()
    else:
        near = torch.allclose(grad.transpose(0, 1)[:, same], wanted[1][:, same], rtol=1e-3, atol=1e-4)
    return bool(same.float().mean() > 0.999 and near)


def main():
    """Both cases; nothing is timed unless spikes and gradients agree."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    peers = {
        version("spikingjelly"): Jelly(),
        version("snntorch"): Leaky(),
    }
    compiled = Compiled() if "--compiled" in sys.argv else None
    weight = torch.randn(BATCH, STEPS, NEURONS)
    events = (torch.rand(BATCH, STEPS, INPUTS) < 0.07).float()
    linear = nn.Linear(INPUTS, NEURONS)
    nn.init.normal_(linear.weight, std=0.15)
    currents = linear(events).detach()
    goal = dict.fromkeys([*peers, "snntorch's LeakyParallel"], GOAL)
    for with_linear in (False, True):
        x, title = (events, "linear layer and neurons") if with_linear else (currents, "neurons alone")

        def layer(neurons, with_linear=with_linear):
            return nn.Sequential(linear, neurons) if with_linear else nn.Sequential(neurons)

        def turned(t):
            return t.transpose(0, 1).contiguous()

        ours = [
            passes(layer(LIF(decay=DECAY, surrogate=Atan(), **options)), x.clone(), weight)
            for options in ({}, {"drop": 1 / DECAY, "detach": True})
        ]
        theirs = {name: passes(layer(peer), turned(x), turned(weight)) for name, peer in peers.items()}

        def agree(ours=ours, theirs=theirs, with_linear=with_linear):
            return all(close(mine(), run(), with_linear) for mine, run in zip(ours, theirs.values(), strict=True))

        candidates = {"interlayer": ours[0], **theirs}
        if compiled:
            candidates["spikingjelly, compiled"] = passes(layer(compiled), turned(x), turned(weight))
        if with_linear:
            candidates["snntorch's LeakyParallel"] = passes(Parallel(), turned(x), turned(weight))
        compare(
            f"LIF, {STEPS} steps, batch {BATCH}, {INPUTS} to {NEURONS}: {title}", candidates, agree=agree, goal=goal
        )
        compare(
            f"Soft reset with MPR: {title}",
            {"soft-reset-mpr": passes(layer(SoftResetMPR()), x.clone(), weight), "interlayer LIF": ours[0]},
        )


if __name__ == "__main__":
    main()
