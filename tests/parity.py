"""Sharded against one device: the same model, batches and optimizer, step by step."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

import autopar
from passes.trace import find_loss

ADAMW = functools.partial(torch.optim.AdamW, lr=1e-2)
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def cpu_cluster(num_devices: int, bandwidth: float = 1e9) -> autopar.Cluster:
    """A made-up cluster of CPU ranks, so near to each other that what can be sharded is."""
    shape = (num_devices, num_devices)
    return autopar.Cluster.from_matrix(
        device="cpu", latency_s=np.full(shape, 2e-6), bandwidth_bytes_per_s=np.full(shape, bandwidth)
    )


Given = Callable[[int], AbstractContextManager[None]]
"""What a step of plain PyTorch runs in: where its random numbers come from."""


def reference(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    optimizer: Any,
    steps: int = 3,
    given: Given = lambda step: nullcontext(),
) -> tuple[list[float], nn.Module]:
    """Losses and the trained model of plain PyTorch on one device."""
    trained = copy.deepcopy(model)
    update = optimizer(trained.parameters())
    losses = []
    for step in range(steps):
        update.zero_grad()
        with given(step):
            output = trained(**batch)
        loss = find_loss(output)
        loss.backward()
        update.step()
        losses.append(float(loss.detach()))
    return losses, trained


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference relative to the tensor's largest value, or a hundredth of the model's largest."""
    dense = {k: v for k, v in expected.items() if not v.is_sparse}
    floating = {k: v for k, v in dense.items() if v.is_floating_point() and v.numel()}
    floor = max(float(v.abs().max()) for v in floating.values()) / 100
    return max(float((found[k] - v).abs().max()) / max(float(v.abs().max()), floor) for k, v in floating.items())


def check_parity(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    num_devices: int,
    tolerance: float,
    optimizer: Any = SGD,
    given: Given = lambda step: nullcontext(),
    **pins: Any,
) -> autopar.Plan:
    """Train three steps both ways and compare every loss and every parameter; returns the plan that ran."""
    losses, trained = reference(model, batch, optimizer, given=given)
    parallelism = autopar.Parallelism(**pins)
    with autopar.compile(model, cpu_cluster(num_devices), batch, optimizer=optimizer, parallelism=parallelism) as exe:
        found = [exe.step(batch) for _ in range(3)]
        state = exe.full_state_dict()
        plan = exe.plan
    for step, (a, b) in enumerate(zip(found, losses, strict=True)):
        assert abs(a - b) <= tolerance * abs(b), f"loss of step {step}: {a} against {b} ({plan.dp, plan.tp, plan.pp})"
    assert state.keys() == trained.state_dict().keys()
    error = largest_error(state, trained.state_dict())
    assert error <= tolerance, f"parameters differ by {error} ({plan.dp, plan.tp, plan.pp})"
    return plan
