"""What a model costs: parameters, FLOPs, bytes kept for backward, peak memory and time of a step.

Everything is counted, nothing is estimated: FLOPs by ``torch.utils.flop_counter`` (a multiply-add is two; matrix
products, convolutions and attention count, element-wise work does not), kept bytes by ``saved_tensors_hooks``, and peak
memory by the allocator itself: on CUDA ``max_memory_allocated``, on the CPU the allocation events of
``torch.profiler`` over one step on top of the bytes that were alive before it.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from torch.utils.module_tracker import ModuleTracker


def parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """Number of parameters, a shared one counted once; weights that a layer keeps packed count too.

    Args:
        model: Any module.
        trainable: Count only those that require a gradient.

    Examples:
        >>> parameters(nn.Linear(3, 2))
        8
    """
    packed = 0 if trainable else sum(getattr(m, "packed_weights", 0) for m in model.modules())
    return packed + sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def _attention_on_cpu(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """The counter of torch knows the CUDA kernels only: q k^T and p v, causal or not, as for those."""
    batch, heads, length, width = query
    return int(2 * batch * heads * length * key[2] * (width + value[3]))


def _integers(left: Any, right: Any, *_: Any, **__: Any) -> int:
    return int(2 * left[0] * left[1] * right[1])


_OWN = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu,
    torch.ops.aten._int_mm: _integers,
}


class _Whole(ModuleTracker):
    """Counts for the whole model alone: hooks on every module would cost more than the counting."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None: ...


def flops(model: nn.Module, *inputs: Any, **keywords: Any) -> int:
    """FLOPs of one forward pass in evaluation mode; a multiply-add is two.

    Examples:
        >>> flops(nn.Linear(3, 2), torch.zeros(5, 3))
        60
    """
    was = model.training
    model.eval()
    counter = FlopCounterMode(display=False, custom_mapping=_OWN)
    counter.mod_tracker = _Whole()
    try:
        with torch.no_grad(), counter:
            model(*inputs, **keywords)
    finally:
        model.train(was)
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Operations:
    """Operations of matrix products and convolutions, where zeros in spikes cost nothing.

    Attributes:
        accumulates: Additions of a weight for a spike of 1.
        multiplies: Multiply-accumulates, where the input is not binary.
    """

    accumulates: int
    multiplies: int

    ACCUMULATE = 0.9  # picojoules of a 32-bit floating-point addition in 45 nm
    MULTIPLY = 4.6  # and of a multiplication (3.7) with it

    @property
    def picojoules(self) -> float:
        """Energy of the arithmetic alone: 0.9 pJ an accumulate and 4.6 pJ a multiply-accumulate, 32-bit floating point in 45 nm.

        Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, doi:10.1109/ISSCC.2014.6757323. Memory,
        which costs more than arithmetic on most hardware, does not count.
        """
        return self.ACCUMULATE * self.accumulates + self.MULTIPLY * self.multiplies


def operations(model: nn.Module, *inputs: Any) -> Operations:
    """Count the operations of one forward pass in evaluation mode on these inputs, by what they really hold.

    An input of a product is taken for spikes if all its numbers are 0 or 1; then only the ones count, padding and strides considered.
    Element-wise work does not count, neurons and normalisation included, as for ``flops``.

    Examples:
        >>> operations(nn.Linear(3, 2), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
        Operations(accumulates=4, multiplies=0)
        >>> operations(nn.Linear(5, 2), torch.full((1, 5), 0.5)).picojoules
        46.0
    """
    was = model.training
    model.eval()
    try:
        with torch.no_grad(), _Counting() as counted:
            model(*inputs)
    finally:
        model.train(was)
    return Operations(counted.accumulates, counted.multiplies)


class _Counting(TorchDispatchMode):
    """Adds up the operations of each product; where both factors are spikes, the pairs of ones."""

    def __init__(self) -> None:
        super().__init__()
        self.accumulates = self.multiplies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, packet, aten = func(*args, **(kwargs or {})), func._overloadpacket, torch.ops.aten
        count = {**flop_registry, **_OWN}.get(packet)
        if count is None:
            return out
        factors = args[1:3] if packet in (aten.addmm, aten.baddbmm) else args[:2]
        if packet is aten.convolution and _binary(args[0]):
            rest = (None, *args[3:])  # without the bias
            self.accumulates += int(aten.convolution(args[0].double(), torch.ones_like(args[1]).double(), *rest).sum())
        elif packet in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm) and any(map(_binary, factors)):
            a, b = (t.double() if _binary(t) else torch.ones_like(t).double() for t in factors)
            self.accumulates += int((a.sum(-2) * b.sum(-1)).sum())
        else:
            self.multiplies += int(count(*args, **(kwargs or {}), out_val=out)) // 2
        return out


def _binary(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all())


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind the tensors, each storage counted once however many views it has.

    Examples:
        >>> x = torch.zeros(4)
        >>> storage_bytes([x, x[:2]])
        16
    """
    seen = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(seen.values())


def bytes_kept(model: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass of ``run()``, beside the model's own weights and buffers.

    Args:
        model: The module whose parameters and buffers don't count, since they live anyway.
        run: Calls the model with gradients on.

    Examples:
        >>> m = nn.Linear(3, 2, bias=False)
        >>> bytes_kept(m, lambda: m(torch.zeros(5, 3)).square().sum())  # input 5x3 and output 5x2 of 4 bytes
        100
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept.append(t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        run()
    return storage_bytes(kept)


def peak_bytes(run: Callable[[], Any], alive: Iterable[Tensor] = (), device: torch.device | str = "cpu") -> int:
    """Most bytes of tensors that are alive at once while ``run()`` works.

    Args:
        run: What is measured, once.
        alive: Tensors that live before it (weights, optimiser state, the batch): on the CPU their storages are added,
            since only what ``run`` allocates can be watched there. Gradients should be ``None``.
        device: CUDA reads the allocator's own ``max_memory_allocated`` and needs no ``alive``.

    Examples:
        >>> 8000 <= peak_bytes(lambda: torch.zeros(1000).add(1).sum()) < 8100
        True
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr otherwise
    before, collecting = storage_bytes(alive), gc.isenabled()
    gc.disable()  # garbage of before must not be freed, and counted, in between
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
            run()
    finally:
        if collecting:
            gc.enable()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        watch.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        (e["args"]["Ev Idx"], e["args"]["Bytes"])
        for e in events
        if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0
    )
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return before + peak


def latency(model: nn.Module, *inputs: Any, calls: int = 7) -> float:
    """Median seconds of a forward pass in evaluation mode, without gradients; the first calls, which warm up, don't count.

    Args:
        model: The model; its mode is as before afterwards.
        inputs: Positional arguments.
        calls: How many passes.

    Examples:
        >>> 0 < latency(nn.Linear(3, 2), torch.zeros(4, 3)) < 1
        True
    """
    was, times = model.training, list[float]()
    model.eval()
    with torch.inference_mode():
        for _ in range(calls):
            begin = time.perf_counter()
            model(*inputs)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
    model.train(was)
    return median_time(times)


def median_time(seconds: Iterable[float], warmup: int = 2) -> float:
    """Median of the step times without the first ``warmup``, which pay for allocation and kernel choice.

    Examples:
        >>> median_time([9.0, 9.0, 1.0, 2.0, 3.0])
        2.0
    """
    times = list(seconds)
    return statistics.median(times[warmup:] or times) if times else float("nan")
