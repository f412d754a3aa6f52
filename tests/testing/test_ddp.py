import pytest
import torch
from torch import nn

from interlayer.testing.ddp import processes


@pytest.mark.parametrize(("fork", "count"), [(True, 2), (False, 1)])
def test_processes_forked_or_new_give_the_mean_of_the_gradients(fork, count):
    if fork and torch.cuda.is_available():
        pytest.skip("autograd does not survive a fork where torch sees a GPU")
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 2), torch.randn(count, 4, 3)
    layer(x).sum().backward()
    wanted = layer.weight.grad / count
    layer.zero_grad()

    def run(rank):
        wrapped = nn.parallel.DistributedDataParallel(layer)
        wrapped(x[rank]).sum().backward()
        return {"weight": layer.weight.grad}

    for part in processes(count, run, fork=fork):
        torch.testing.assert_close(part["weight"], wanted)


def test_what_fails_in_a_process_is_said():
    def run(rank):
        raise ValueError("no such thing")

    with pytest.raises(AssertionError, match=r"2 processes failed: (.|\n)*no such thing"):
        processes(2, run)
