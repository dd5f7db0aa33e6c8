"""Measure one rank: step times by phase, ops by kind, peak memory of the allocator and of the process."""

from __future__ import annotations

import gc
import resource
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from autopar.runtime.executor import RankExecutor

Tree = Any


def measure(executor: RankExecutor, request: Tree) -> Tree:
    """Warm up, time steps, then one step by phases, one by ops and one for memory; all of them train.

    request: batch, warmup, steps, kinds (profiler event -> kind of op). Returns seconds and bytes of this rank.
    """
    batch = request["batch"]
    for _ in range(request["warmup"]):
        executor.step(batch)
    steps_s = [_timed_step(executor, batch) for _ in range(request["steps"])]
    return {
        "steps_s": tuple(steps_s),
        "phases_s": _phases(executor, batch),
        "kinds_s": _kinds(executor, batch, request["kinds"]),
        "peak_bytes": _peak_bytes(executor, batch),
        "resident_bytes": resident_peak_bytes(),
    }


def _timed_step(executor: RankExecutor, batch: Tree) -> float:
    """One step from the moment all ranks are ready."""
    if executor.world_size > 1:
        dist.barrier()
    start = time.perf_counter()
    executor.step(batch)
    _synchronise(executor)
    return time.perf_counter() - start


def _synchronise(executor: RankExecutor) -> None:
    if executor.device.type == "cuda":
        torch.cuda.synchronize(executor.device)


def _phases(executor: RankExecutor, batch: Tree) -> dict[str, float]:
    """Seconds of one step by phase (forward, backward, receive_*, send_*, reduce, optimizer), all microbatches."""
    executor.events = []
    try:
        _timed_step(executor, batch)
        totals: defaultdict[str, float] = defaultdict(float)
        for name, start, end in executor.events:
            totals[name] += end - start
    finally:
        executor.events = None
    return dict(totals)


def _kinds(executor: RankExecutor, batch: Tree, kinds: Tree) -> dict[str, float]:
    """Self seconds of one step by kind of op, from torch.profiler; "other" for events the program does not name."""
    with torch.profiler.profile(activities=_activities(executor)) as profile:
        _timed_step(executor, batch)
    totals: defaultdict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        on_device = executor.device.type == "cuda"
        micros = event.self_device_time_total if on_device else event.self_cpu_time_total
        totals[kinds.get(event.key, "other")] += micros * 1e-6
    return dict(totals)


def _activities(executor: RankExecutor) -> list[Any]:
    activity = torch.profiler.ProfilerActivity
    return [activity.CPU, activity.CUDA] if executor.device.type == "cuda" else [activity.CPU]


def _peak_bytes(executor: RankExecutor, batch: Tree) -> int:
    """Most bytes the allocator held during a step: its own statistics on CUDA, its events on CPU.

    On CPU collectives run on persistent buffers meanwhile, since frees on the backend's threads are not seen.
    """
    if executor.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(executor.device)
        _timed_step(executor, batch)
        return int(torch.cuda.max_memory_allocated(executor.device))
    executor.comm.stage_buffers = True
    try:
        _timed_step(executor, batch)
        base = live_bytes() - executor.comm.buffer_bytes()
        with torch.profiler.profile(activities=_activities(executor), profile_memory=True) as profile:
            executor.step(batch)
        return base + _largest_rise(profile)
    finally:
        executor.comm.stage_buffers = False
        executor.comm.drop_buffers()


def live_bytes() -> int:
    """Bytes of all tensor storages alive in this process."""
    gc.collect()
    storages: dict[int, int] = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter) and item.device.type == "cpu":
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _largest_rise(profile: Any) -> int:
    """Highest running sum of the allocator's events."""
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def resident_peak_bytes() -> int:
    """Largest resident size of this process so far; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
