"""What a rank spends on a step beside its blocks, its messages and its optimizer's kernels: Python, mostly.

An executor runs steps of a program that computes nothing, with few and with many parameters to update.
"""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import torch

from autopar.calibrate_cold import COLD_PRODUCTS, some_products
from autopar.calibrate_worker import Steps
from autopar.runtime.executor import RankExecutor
from autopar.runtime.optim import capture

STEP_TENSORS = (1, 65)
_STEPS = 5
_WIDTH = 8
_PROGRAM = """
import torch

def setup(buffers, comm, kernels, device):
    return {}

def forward(params, buffers, constants, batch, step, inbox, comm, kernels, device):
    return batch["x"], []

def backward(params, buffers, constants, batch, step, saved, grads, accumulate, comm, kernels, device):
    return None

def prologue(batch, buffers, comm, kernels, device):
    return {}

def feed(run):
    pass

def step(run):
    run.forward(0)
    run.backward(0)
    run.update_parameters()
"""


def step_s(library: str) -> Steps:
    """CPU seconds of steps behind products, as the code of a step that follows on blocks has left the caches."""
    few, many = (_step_s(library, count) for count in STEP_TENSORS)
    each_s = max(0.0, many - few) / (STEP_TENSORS[1] - STEP_TENSORS[0])
    return max(0.0, few - STEP_TENSORS[0] * each_s), each_s


def _step_s(library: str, tensors: int) -> float:
    """The median of several."""
    executor, batch = _executor(tensors), {"x": torch.zeros(())}
    between, samples = some_products(library, *COLD_PRODUCTS[-1]), []
    executor.step(batch)
    for _ in range(_STEPS):
        between()
        start = time.thread_time()
        executor.step(batch)
        samples.append(time.thread_time() - start)
    return statistics.median(samples)


@functools.cache
def _executor(tensors: int) -> RankExecutor:
    """Of one rank alone: what it tells others is measured as messages."""
    names = tuple(f"layers.{index}.weight" for index in range(tensors))
    params = {name: torch.zeros(_WIDTH) for name in names}
    optimizer = capture(torch.optim.AdamW, dict.fromkeys(names, ((_WIDTH,), torch.float32)))
    assert optimizer is not None
    chunk: dict[str, Any] = {"suffix": "", "received": None, "sent": None, "splits_backward": False, "links": {}}
    payload: dict[str, Any] = {
        "source": _PROGRAM,
        "imports": [],
        "kernels": {},
        "batch": ("x",),
        "sliced": {},
        "chunks": [chunk],
        "microbatches": 1,
        "microbatch_size": 1,
        "accumulates": False,
        "window": 1,
        "reports_loss": True,
        "device": "cpu",
        "timeout_s": None,
        "scales_loss": False,
        "stage": 0,
        "dp_index": 0,
        "buckets": [],
        "params": params,
        "masters": {},
        "buffers": {},
        "initial": {"recipes": {}, "files": {}},
        "layouts": {},
        "updates": (),
        "changes": (),
        "gradients": (("float32", names),),
        "norm_spans": (),
        "groups": {},
        "silent": [],
        "optimizer": optimizer.to_tree(),
    }
    return RankExecutor(0, 1, payload)
