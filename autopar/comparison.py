"""Compare: what a program measures beside what was estimated for it, part by part."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from rich.console import Group

from autopar.executable import Executable
from autopar.planning import Planned
from autopar.report import bytes_text, make_table, render, seconds_text
from autopar.runtime.measure import COMPILED, OPTIMIZER, OTHER, OUTSIDE, STEP
from cost_model.block_price import VIEW
from cost_model.cluster import Cluster
from cost_model.errors import BatchError, ConfigError
from cost_model.prices import price_stages
from cost_model.program import Instruction, Program
from cost_model.rank_clock import Event
from cost_model.simulate import SimulationResult, simulate

PHASES = ("forward", "backward", "transfer", "reduce", "optimizer", "other")
_BLOCK_PHASES = {"forward": "forward", "backward": "backward", "weight": "backward"}
WORLD_SUFFIX = " world"
_ATTENTION = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
)
_KERNEL_EVENTS: Mapping[str, tuple[str, ...]] = {
    "autopar.attention.default": _ATTENTION,
    "autopar.attention_backward.default": tuple(f"{name}_backward" for name in _ATTENTION),
    "autopar.accumulate.default": ("aten::copy_", "aten::add_"),
    "autopar.accumulate_product.default": ("aten::mm", "aten::addmm"),
    "autopar.put.default": ("aten::copy_",),
    "autopar.put_product.default": ("aten::mm",),
}
"""Events of the ops that ``autopar.runtime.kernels`` and the executor implement by ops of another name."""
Measured: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """One figure as estimated and as measured, seconds or bytes."""

    estimated: float
    measured: float

    @property
    def error(self) -> float | None:
        """Signed, relative to measured; None where nothing was measured."""
        return (self.estimated - self.measured) / self.measured if self.measured else None


@dataclass(frozen=True)
class StageComparison:
    """phases_s: seconds of a step by ``PHASES``, which sum to the step; measured: mean over the stage's ranks.

    transfer, reduce: waiting for other ranks included; other: everything else, the loss's all_reduce included.
    peak_bytes: measured on the rank that holds most.
    """

    stage: int
    phases_s: Mapping[str, Pair] = field(hash=False)
    peak_bytes: Pair


@dataclass(frozen=True)
class Comparison:
    """Measured beside estimated.

    steps_s: each timed step, on the slowest rank; measured_peak_bytes: of the allocator, on the rank that holds most;
    resident_bytes: largest resident size of a rank's process, Python and libraries included: no estimate is made of it.
    kinds_s: seconds of a step by kind of op, one rank of each stage, summed over stages; measured under a profiler.
    """

    steps_s: tuple[float, ...]
    estimated_step_time_s: float
    estimated_peak_bytes: int
    measured_peak_bytes: int
    resident_bytes: int
    stages: tuple[StageComparison, ...]
    kinds_s: Mapping[str, Pair] = field(hash=False)

    @property
    def measured_step_time_s(self) -> float:
        """Median of the timed steps."""
        return statistics.median(self.steps_s)

    @property
    def step_time_error(self) -> float:
        """(estimated - measured) / measured."""
        return (self.estimated_step_time_s - self.measured_step_time_s) / self.measured_step_time_s

    @property
    def peak_memory_error(self) -> float:
        """(estimated - measured) / measured."""
        return (self.estimated_peak_bytes - self.measured_peak_bytes) / self.measured_peak_bytes

    def as_dict(self) -> dict[str, Any]:
        """Every figure, for JSON."""
        names = ("measured_step_time_s", "step_time_error", "peak_memory_error")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}

    def summary(self) -> str:
        """Tables of text."""
        return render(_whole_table(self), _stage_table(self), _kind_table(self))


def check_steps(steps: int, warmup: int = 0) -> None:
    """Errors: ConfigError where so many cannot be run."""
    for name, value, least in (("steps", steps, 1), ("warmup", warmup, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be a whole number of at least {least}, not {value!r}")


def compare(exe: Executable, batch: Any, steps: int = 10, *, warmup: int = 3) -> Comparison:
    """Run warm-up and timed steps on a batch and lay what they took beside the estimate.

    Every step trains: parameters and optimizer state move on. Under a launcher all ranks call this and get the
    same answer. Errors: ConfigError for fewer than one step, and those of ``Executable.step``.
    """
    check_steps(steps, warmup)
    planned = _planned(exe, batch)
    program = planned.linked.program
    request = {"warmup": warmup, "steps": steps, "kinds": event_kinds(program)}
    requests = {rank: {**request, "batch": part} for rank, part in exe.parts(exe.batch_tensors(batch)).items()}
    return comparison(planned, exe.cluster, exe.call("measure", requests))


def _planned(exe: Executable, batch: Any) -> Planned:
    try:
        return exe.planned
    except BatchError:
        exe.prepare(batch)
        return exe.planned


def comparison(planned: Planned, cluster: Cluster, ranks: Sequence[Measured]) -> Comparison:
    """The measures of all ranks, in order, beside the estimate of the program they ran."""
    program, estimate = planned.linked.program, planned.estimate
    of_stage: list[list[Measured]] = [[] for _ in program.stages]
    for (stage, _, _), device in program.devices.items():
        of_stage[stage].append(ranks[device])
    phases = _estimated_phases(program, cluster, estimate.step_time_s)
    stages = tuple(
        StageComparison(
            stage,
            _pairs(phases[stage], _measured_phases(measured)),
            Pair(estimate.stages[stage].peak_bytes, max(rank["peak_bytes"] for rank in measured)),
        )
        for stage, measured in enumerate(of_stage)
    )
    return Comparison(
        steps_s=tuple(max(times) for times in zip(*(rank["steps_s"] for rank in ranks), strict=True)),
        estimated_step_time_s=estimate.step_time_s,
        estimated_peak_bytes=estimate.peak_bytes,
        measured_peak_bytes=max(rank["peak_bytes"] for rank in ranks),
        resident_bytes=max(rank["resident_bytes"] for rank in ranks),
        stages=stages,
        kinds_s=_pairs(_estimated_kinds(program, cluster), _measured_kinds(of_stage)),
    )


def _pairs(estimated: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, Pair]:
    names = dict.fromkeys((*estimated, *measured))
    return {name: Pair(estimated.get(name, 0.0), measured.get(name, 0.0)) for name in names}


# --- Phases


def _measured_phases(ranks: Sequence[Measured]) -> dict[str, float]:
    """Mean over ranks; what no phase covers is ``other``."""
    means: defaultdict[str, float] = defaultdict(float)
    for rank in ranks:
        for name, seconds in rank["phases_s"].items():
            kind = "transfer" if name.startswith(("receive", "send")) else _BLOCK_PHASES.get(name, name)
            means[kind] += seconds / len(ranks)
    phases = {name: means[name] for name in PHASES}
    return {**phases, "other": max(0.0, means[STEP] - sum(phases.values()))}


def _estimated_phases(program: Program, cluster: Cluster, step_time_s: float) -> list[dict[str, float]]:
    """The simulated step of each stage cut up as the executor's clock cuts it."""
    result = simulate(program, cluster)
    return [_simulated_phases(result, stage.stage, step_time_s) for stage in program.stages]


def _simulated_phases(result: SimulationResult, stage: int, step_time_s: float) -> dict[str, float]:
    """What is left of the schedule beside compute is transfers and waiting; the loss's all_reduce is ``other``."""
    events = [event for event in result.timeline if event.stage == stage]
    phases = dict.fromkeys(PHASES, 0.0)
    for event in events:
        if event.name in _BLOCK_PHASES:
            phases[_BLOCK_PHASES[event.name]] += event.end_s - event.start_s
    now = max((event.end_s for event in events if event.microbatch >= 0), default=0.0)
    phases["transfer"] = now - phases["forward"] - phases["backward"]
    for event in sorted((e for e in events if e.microbatch < 0), key=lambda e: e.end_s):
        phases[_step_phase(event)] += event.end_s - now
        now = event.end_s
    phases["other"] += step_time_s - now
    return phases


def _step_phase(event: Event) -> str:
    if event.name == OPTIMIZER:
        return OPTIMIZER
    return "other" if event.name.endswith(WORLD_SUFFIX) else "reduce"


# --- Kinds of ops


def event_kinds(program: Program) -> dict[str, str]:
    """Profiler event -> kind, for every op and every collective of the program."""
    kinds: dict[str, str] = {}
    for stage in program.stages:
        for instruction in (i for chunk in stage.chunks for block in chunk.blocks for i in block.instructions):
            is_kernel = instruction.cost is not None and instruction.cost.parts
            for event in (COMPILED,) if is_kernel else op_events(instruction.op):
                kinds.setdefault(event, _kind(instruction))
        for collective in (*stage.step.collectives, *stage.step.gathers):
            kinds.setdefault(f"autopar.{collective.kind}_", collective.kind)
    return kinds


def op_events(op: str) -> tuple[str, ...]:
    """Events that an op of a program shows as: "aten.mm.default" as "aten::mm", a collective by its Comm method."""
    if op in _KERNEL_EVENTS:
        return _KERNEL_EVENTS[op]
    namespace, _, rest = op.partition(".")
    name = rest.partition(".")[0]
    return (f"autopar.{name}", f"autopar.{name}_") if namespace == "autopar" else (f"{namespace}::{name}",)


def _kind(instruction: Instruction) -> str:
    if instruction.collective is not None:
        return instruction.collective.kind
    return VIEW if instruction.cost is None else instruction.cost.kind


def _estimated_kinds(program: Program, cluster: Cluster) -> dict[str, float]:
    """As ``StageEstimate.op_kinds_s``, but the whole update as one kind, since its ops are the blocks' ops too."""
    kinds: defaultdict[str, float] = defaultdict(float)
    prices = price_stages(program, cluster)
    for estimate, price in zip(simulate(program, cluster).stages, prices, strict=True):
        for kind, seconds in estimate.op_kinds_s.items():
            kinds[kind] += seconds - price.optimizer_kinds_s.get(kind, 0.0)
        kinds[OPTIMIZER] += price.optimizer_s
    return {kind: max(0.0, seconds) for kind, seconds in kinds.items() if seconds > 1e-12}


def _measured_kinds(of_stage: Sequence[Sequence[Measured]]) -> dict[str, float]:
    kinds: defaultdict[str, float] = defaultdict(float)
    for ranks in of_stage:
        for rank in ranks:
            for kind, seconds in rank["kinds_s"].items():
                kinds[kind] += seconds / len(ranks)
    return dict(kinds)


# --- Tables


def _error_text(pair: Pair) -> str:
    if pair.error is None or not pair.estimated:
        return ""
    return f"{round(pair.error, 3) + 0.0:+.1%}"  # + 0.0: no "-0.0%"


def _whole_table(found: Comparison) -> Group:
    time = Pair(found.estimated_step_time_s, found.measured_step_time_s)
    peak = Pair(found.estimated_peak_bytes, found.measured_peak_bytes)
    rows = [
        ("step time", seconds_text(time.estimated), seconds_text(time.measured), _error_text(time)),
        ("peak memory of a rank", bytes_text(peak.estimated), bytes_text(peak.measured), _error_text(peak)),
        ("resident size of a rank", "", bytes_text(found.resident_bytes), ""),
    ]
    spread = f"{seconds_text(min(found.steps_s))} to {seconds_text(max(found.steps_s))}"
    title = f"Estimated and measured (median of {len(found.steps_s)} steps, {spread})"
    return make_table(title, ("", "estimated", "measured", "error"), rows)


def _stage_table(found: Comparison) -> Group:
    rows = []
    for stage in found.stages:
        for name, pair in stage.phases_s.items():
            if max(pair.estimated, pair.measured) > 0:
                rows.append((str(stage.stage), name, *_seconds_row(pair)))
        peak = stage.peak_bytes
        rows.append(("", "peak memory", bytes_text(peak.estimated), bytes_text(peak.measured), _error_text(peak)))
    title = "Each stage, per step (transfer and reduce include waiting)"
    return make_table(title, ("stage", "part", "estimated", "measured", "error"), rows, words=2)


def _kind_table(found: Comparison) -> Group:
    """Largest first; what is measured only comes last."""

    def place(item: tuple[str, Pair]) -> tuple[bool, float]:
        return item[0] in (OUTSIDE, OTHER), -max(item[1].estimated, item[1].measured)

    rows = [(kind, *_seconds_row(pair)) for kind, pair in sorted(found.kinds_s.items(), key=place)]
    title = "Each kind of op, per step (measured: profiled, collectives and receives include waiting)"
    return make_table(title, ("kind", "estimated", "measured", "error"), rows)


def _seconds_row(pair: Pair) -> tuple[str, str, str]:
    estimated = seconds_text(pair.estimated) if pair.estimated else ""
    return estimated, seconds_text(pair.measured), _error_text(pair)
