"""Schedules: which others a plan that was found may run under, fastest first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import add

from autopar.planner.placed_prices import MAX_WINDOW
from autopar.planner.search import Configuration
from autopar.planner.solution import FEWEST_PARTS, Solution
from autopar.planner.virtual import recut
from cost_model.cluster import Cluster
from cost_model.parallelism import Parallelism
from cost_model.program import Program
from cost_model.schedule import refusal
from cost_model.simulate import SimulationResult
from cost_model.sketch import (
    least_saved_bytes,
    most_kept_bytes,
    most_saved_bytes,
    sketched_step_s,
    with_virtual_stages,
    with_weight_blocks,
)

_ROUNDING = 1e-9
"""Of a segment: what whole numbers may lack after divisions."""


def faster_schedules(
    solution: Solution, program: Program, base: SimulationResult, cluster: Cluster, pins: Parallelism
) -> list[tuple[float, Configuration]]:
    """Seconds of a step, as far as sketches of ``program`` tell, and the configuration that runs the same choices under
    another schedule; the fastest first. base: a step of the program itself.

    Where hardly any time is spent waiting for other stages and their messages, none is looked at.
    """
    waits_s = base.breakdown.bubble_s + max(stage.op_kinds_s.get("receive", 0.0) for stage in base.stages)
    if solution.configuration.pp == 1 or waits_s <= 0.0:
        return []
    found = [(seconds, c) for seconds, c in _sketched(solution, program, cluster, pins) if seconds < base.step_time_s]
    return sorted(found, key=lambda each: each[0])


def _sketched(
    solution: Solution, program: Program, cluster: Cluster, pins: Parallelism
) -> Iterator[tuple[float, Configuration]]:
    """Seconds of a step under each other schedule that the pins allow; more virtual stages while they are faster."""
    c = solution.configuration
    for window, seconds in windows(program, pins, lambda wider: sketched_step_s(wider, cluster)):
        yield seconds, replace(c, window=window)
    if pins.schedule is None:
        yield sketched_step_s(with_weight_blocks(program), cluster), replace(c, schedule="zero_bubble", window=1)
    best_s = float("inf")
    for virtual_stages in _numbers_of_parts(solution, pins):
        other = replace(c, schedule="interleaved", virtual_stages=virtual_stages, window=1)
        if refusal(other.schedule, other.pp, other.microbatches, virtual_stages) is not None:
            return
        ends = [part.last for part in recut(solution.stages, c.pp * virtual_stages)]
        seconds = sketched_step_s(with_virtual_stages(program, ends), cluster)
        if seconds >= best_s:
            return
        best_s = seconds
        yield seconds, other


def may_fit(
    solution: Solution, c: Configuration, program: Program, static_bytes: Sequence[int], caps_bytes: Sequence[int]
) -> bool:
    """Whether the same choices under one of those schedules may fit, for all that is known before they are rewritten.

    static_bytes: what each stage of ``program`` holds during its whole step. Other parts are other stages', but all of
    them together hold as much, and what they save.
    """
    if c.virtual_stages == 1:
        sketch = with_weight_blocks(program) if c.schedule == "zero_bubble" else replace(program, window=c.window)
        held = map(add, static_bytes, most_saved_bytes(sketch))
        return all(each <= cap for each, cap in zip(held, caps_bytes, strict=True))
    ends = [part.last for part in recut(solution.stages, c.pp * c.virtual_stages)]
    return sum(static_bytes) + least_saved_bytes(program, ends) <= sum(caps_bytes)


def may_hold(
    solution: Solution,
    c: Configuration,
    program: Program,
    static_bytes: Sequence[int],
    caps_bytes: Sequence[int],
    samples: int,
    slower: float,
) -> bool:
    """Whether stages of the same mesh may hold what zero bubble keeps for gradients of parameters, in microbatches of
    so many samples, if its step may take so many times what it does with the stages that were found.

    Prices know nothing of what is kept, which no recompute lets go of. A guess: parameters and what is kept are thought
    to lie as they do in ``program``, and to be as much, and take as long, in each segment of a stage. One that has no
    room for all of its segments gives some to others, as whole ones and as long as these are not too slow then.
    """
    if c.schedule != "zero_bubble":
        return True
    kept = [nbytes * samples / c.microbatch_size for nbytes in most_kept_bytes(with_weight_blocks(program))]
    count = c.microbatches * c.microbatch_size / samples
    longest_s = slower * max(stage.time_s for stage in solution.stages) * _filled(c, c.microbatches) / _filled(c, count)
    own = zip(solution.stages, static_bytes, kept, caps_bytes, strict=True)
    parts = (
        (stage, min(longest_s / stage.time_s if stage.time_s else math.inf, cap / max(static + more, 1)))
        for stage, static, more, cap in own
    )
    room = sum(int((stage.last - stage.first) * part + _ROUNDING) for stage, part in parts)
    return room >= solution.stages[-1].last


def _filled(c: Configuration, microbatches: float) -> float:
    """How many times as long as its slowest stage computes a step takes that waits a third of what 1f1b does."""
    return 1 + (c.pp - 1) / 3 / microbatches


def windows(program: Program, pins: Parallelism, seconds: Callable[[Program], float]) -> Iterator[tuple[int, float]]:
    """Each wider window of 1f1b, and what a step takes with it, while that is less."""
    best_s = float("inf")
    for window in range(2, min(MAX_WINDOW, program.microbatches) + 1):
        if program.schedule != "1f1b" or pins.window is not None:
            return
        found_s = seconds(replace(program, window=window))
        if found_s >= best_s:
            return
        best_s = found_s
        yield window, found_s


def _numbers_of_parts(solution: Solution, pins: Parallelism) -> Iterator[int]:
    """Twice as many each time, as many as there are segments for; those that the plan has already are left out.

    None where stages have meshes of their own.
    """
    c = solution.configuration
    if pins.schedule not in (None, "interleaved") or pins.virtual_stages is not None or solution.meshes is not None:
        return
    parts = FEWEST_PARTS if c.virtual_stages == 1 else 2 * c.virtual_stages
    while c.pp * parts <= solution.stages[-1].last:
        yield parts
        parts *= 2
