"""Measure one rank: step times by phase, ops by kind, peak memory of the allocator and of the process."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves

from autopar.runtime.comm import Comm
from cost_model.rank_clock import event_title

if TYPE_CHECKING:
    from autopar.runtime.executor import RankExecutor

Tree = Any
PHASE_STEPS = 3
STEP = "step"
OPTIMIZER = "optimizer"
RECEIVE, SEND = "receive", "send"
OTHER = "other"
OUTSIDE = "outside ops"
COMPILED = "Torch-Compiled Region"
"""What torch.compile calls a kernel's event, followed by a number."""
_ROOT = "autopar.step"
ONCE = (-1, 0)  # the microbatch, and chunk, of what is done once per step


class Event(NamedTuple):
    """Something a rank did, from start to end on its own clock, seconds.

    label: its name in the trace of the estimate, where that is another.
    """

    name: str
    microbatch: int
    label: str
    start_s: float
    end_s: float
    chunk: int = 0


def title_of(name: str, microbatch: int, label: str, chunk: int) -> str:
    """What an event is called, as the estimated trace calls it."""
    plain = RECEIVE if name.startswith(RECEIVE) else SEND if name.startswith(SEND) else name
    return event_title(label or plain, microbatch, chunk)


def stream_of(name: str) -> str:
    """As the simulator has them."""
    if name.startswith(RECEIVE):
        return RECEIVE
    return name if name.startswith(SEND) else "compute"


def measure(executor: RankExecutor, request: Tree) -> Tree:
    """Warm up, time steps, then some by phases, one by ops and one for memory; all of them train.

    request: batch, warmup, steps, kinds (profiler event -> kind of op). Returns seconds and bytes of this rank.
    """
    batch = request["batch"]
    for _ in range(request["warmup"]):
        executor.step(batch)
    steps_s = tuple(_timed_step(executor, batch) for _ in range(request["steps"]))
    resident_bytes = resident_peak_bytes()  # before the profiler, which holds its events
    return {
        "steps_s": steps_s,
        "phases_s": _phases(executor, batch),
        "kinds_s": _kinds(executor, batch, request["kinds"]),
        "peak_bytes": _peak_bytes(executor, batch),
        "resident_bytes": resident_bytes,
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
    """Mean seconds of a step ("step") and of its phases, all microbatches: forward, backward, receive_*, send_*, ..."""
    totals: defaultdict[str, float] = defaultdict(float)
    for _ in range(PHASE_STEPS):
        seconds, events = _step_with_events(executor, batch)
        totals[STEP] += seconds
        for event in events:
            totals[event.name] += event.end_s - event.start_s
    return {name: total / PHASE_STEPS for name, total in totals.items()}


def _step_with_events(executor: RankExecutor, batch: Tree) -> tuple[float, list[Event]]:
    events: list[Event] = []
    executor.events = events
    try:
        return _timed_step(executor, batch), events
    finally:
        executor.events = None


def traced_step(executor: RankExecutor, batch: Tree) -> tuple[float, float, list[Event]]:
    """(loss, when it began, what was done) of one step from the moment all ranks are ready."""
    events: list[Event] = []
    if executor.world_size > 1:
        dist.barrier()
    start_s = time.perf_counter()
    executor.events = events
    try:
        return executor.step(batch), start_s, events
    finally:
        executor.events = None


# --- Ops by kind


class _Recorded:
    """A Comm, or the kernels, whose every call is one profiler event, "autopar.<method>", waiting for the other ranks
    included."""

    def __init__(self, recorded: Any) -> None:
        self._recorded = recorded

    def segment(self, label: str | None = None) -> None:
        """Kinds are told apart by op alone."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._recorded, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"autopar.{name}"):
                return method(*args, **kwargs)

        return call


def _kinds(executor: RankExecutor, batch: Tree, kinds: Tree) -> dict[str, float]:
    """Seconds of one step by kind of op; they sum to the step.

    An event counts for its kind with all that runs inside it. "other": ops the program does not name;
    "receive": waiting included; "outside ops": Python, and waiting for sends.
    """
    known = {**kinds, **_optimizer_event(executor)}
    comm, kernels = executor.comm, executor.kernels
    executor.comm, executor.kernels = cast(Comm, _Recorded(comm)), cast(ModuleType, _Recorded(kernels))
    try:
        with profile(activities=_activities(executor)) as profiled, record_function(_ROOT):
            seconds, events = _step_with_events(executor, batch)
    finally:
        executor.comm, executor.kernels = comm, kernels
    totals: defaultdict[str, float] = defaultdict(float)
    for event in profiled.events():
        kind = op_kind(event, known)
        if kind is not None:
            totals[kind] += (event.device_time_total if executor.device.type == "cuda" else event.cpu_time_total) * 1e-6
    for timed in events:
        if timed.name.startswith(RECEIVE):
            totals[RECEIVE] += timed.end_s - timed.start_s
    totals[OUTSIDE] = max(0.0, seconds - sum(totals.values()))
    return dict(totals)


def _optimizer_event(executor: RankExecutor) -> dict[str, str]:
    """The event that torch.optim.Optimizer.profile_hook_step makes of a whole update."""
    if executor.optimizer is None:
        return {}
    return {f"Optimizer.step#{type(executor.optimizer).__name__}.step": OPTIMIZER}


def op_kind(event: Any, known: dict[str, str]) -> str | None:
    """Kind of an op of the step that no counted op contains; None for any other event."""
    kind = known.get(_name(event), OTHER if event.name.startswith("aten::") else None)
    if kind is None:
        return None
    parents = [_name(parent) for parent in _parents(event)]
    if _ROOT not in parents or any(name in known or name.startswith("aten::") for name in parents):
        return None
    return kind


def _name(event: Any) -> str:
    """Of an op; of a kernel without its number."""
    return COMPILED if event.name.startswith(COMPILED) else str(event.name)


def _parents(event: Any) -> Iterator[Any]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event


def _activities(executor: RankExecutor) -> list[ProfilerActivity]:
    on_device = executor.device.type == "cuda"
    return [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_device else [ProfilerActivity.CPU]


# --- Memory


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
        with profile(activities=_activities(executor), profile_memory=True) as profiled:
            executor.step(batch)
        return held_bytes(executor, batch) + _largest_rise(profiled)
    finally:
        executor.comm.stage_buffers = False
        executor.comm.drop_buffers()


def held_bytes(executor: RankExecutor, batch: Tree) -> int:
    """Bytes of memory a rank keeps between steps, with its batch; views of one storage count once.

    What else lives in the process (under a launcher: the user's own model) is not the program's.
    """
    optimizer = executor.optimizer
    state = [] if optimizer is None else [list(optimizer.state.values()), optimizer.param_groups]
    leaves = tree_leaves([list(vars(executor).values()), state, batch])
    spans: dict[int, list[int]] = {}
    for tensor in leaves:
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and tensor.numel():
            spans.setdefault(tensor.untyped_storage().data_ptr(), []).extend(_span(tensor))
    return sum(max(ends) - min(ends) for ends in spans.values())


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Bytes [first, last) of its storage that a tensor lies in."""
    first = int(tensor.storage_offset())
    last = first + sum((int(n) - 1) * int(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return first * tensor.element_size(), (last + 1) * tensor.element_size()


def _largest_rise(profiled: Any) -> int:
    """Highest running sum of the allocator's events."""
    changes = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def resident_peak_bytes() -> int:
    """Largest resident size of this process so far, libraries included; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
