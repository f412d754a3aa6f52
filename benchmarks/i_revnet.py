"""i-RevNet's training step as a multiple of its ordinary twin's, of checkpointing's and of other libraries', and memory by depth.

i-revnet is ``core.reversible`` around the authors' units for CIFAR images of 32 x 32 pixels.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.harness import compare, version
from interlayer.core.cost import bytes_kept, parameters, peak_bytes
from interlayer.layers.reversible.i_revnet import IRevNet


class Checkpointed(IRevNet):
    """The same with torch's checkpoints around the units; running statistics are then updated twice."""

    def features(self, image):
        pair = self.split(image)
        for unit in self.units:
            pair = checkpoint(unit, *pair, use_reentrant=False)
        return torch.cat(pair, 1)


class Wrapped(IRevNet):
    """The network with another library's chain of couplings around the branches of its units, all of stride 1."""

    def features(self, image):
        return self.chain(
            torch.cat(self.split(image), 1).requires_grad_()
        )  # without that revlib gives its weights no gradient


def wrapped(net, chain):
    made = Wrapped(**net.config)
    made.load_state_dict(net.state_dict())
    made.chain = chain(made.units)
    return made


def memcnn_chain(units):
    """memcnn pairs two functions in a coupling, as in reversible residual networks."""
    import memcnn

    pairs = [(units[i].branches[0], units[i + 1].branches[0]) for i in range(0, len(units), 2)]
    blocks = [memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(f, g)) for f, g in pairs]
    return nn.Sequential(*blocks)


def revlib_chain(units):
    """revlib takes the functions one by one."""
    import revlib

    return revlib.ReversibleSequential(*(unit.branches[0] for unit in units), split_dim=1)


PEERS = {"memcnn": memcnn_chain, "revlib": revlib_chain}


def passes(net, x, y):
    """Forward and backward."""

    def step():
        net.zero_grad(set_to_none=True)
        F.cross_entropy(net(x), y).backward()

    return step


def gradients(net, x, y):
    """In double precision, in which rounding does not hide a mistake."""
    net = copy.deepcopy(net).double()
    torch.manual_seed(0)
    passes(net, x.double(), y)()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def same(nets, x, y):
    """Whether all have the gradients of the last but for rounding."""
    *others, last = (gradients(net, x[:4], y[:4]) for net in nets)
    return all((found - last).norm() <= 1e-8 * last.norm() for found in others)


def main():
    """Times, then memory."""
    torch.set_num_threads(1)
    x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    for blocks, dropout in (((6, 6, 6), 0.0), ((6, 6, 6), 0.1), ((18, 18, 18), 0.1)):
        torch.manual_seed(0)
        net = IRevNet(blocks=blocks, dropout=dropout)
        ordinary, checkpointed = copy.deepcopy(net), Checkpointed(blocks=blocks, dropout=dropout)
        ordinary.recompute = False
        checkpointed.load_state_dict(net.state_dict())
        compare(
            f"step of i-revnet, {blocks} units, dropout {dropout}, {parameters(net) / 1e6:.1f} million weights, 16 images of 32 x 32",
            {
                "i-revnet": passes(net, x, y),
                "ordinary": passes(ordinary, x, y),
                "checkpoints": passes(checkpointed, x, y),
            },
            agree=lambda nets=(net, checkpointed, ordinary): same(nets, x, y),
            rounds=7,
            goal={"ordinary": 1.6},
        )
    torch.manual_seed(0)
    net = IRevNet(blocks=(12,), strides=(1,), widths=(32,), dropout=0.0)
    nets = {"i-revnet": net, **{version(name): wrapped(net, chain) for name, chain in PEERS.items()}}
    compare(
        "step of 12 units at one resolution, without dropout, against other libraries",
        {name: passes(each, x, y) for name, each in nets.items()},
        agree=lambda: same(nets.values(), x, y),
        rounds=7,
    )
    print("bytes kept after the forward pass, and peak of a step, in MB")
    for depth in (2, 8, 32):
        row = []
        for recompute in (True, False):
            net = IRevNet(blocks=(depth,) * 3, dropout=0.1, recompute=recompute)
            kept = bytes_kept(net, lambda net=net: F.cross_entropy(net(x), y))
            row.append(f"{kept / 1e6:7.1f} {peak_bytes(passes(net, x, y)) / 1e6:7.1f}")
        print(
            f"  {3 * depth:3} units: reversible {row[0]}, ordinary {row[1]}; gradients are {4e-6 * parameters(net):.1f}"
        )


if __name__ == "__main__":
    main()
