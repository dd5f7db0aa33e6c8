"""Timing: what a step of a plan that was found takes once the rest is chosen, and what it may gain by that."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from autopar.narrower import WORTH
from autopar.planner.search import Configuration
from autopar.planner.solution import Solution
from autopar.reductions import reduced
from autopar.rescheduled import Scheduled, elsewhere, is_plain, sketches
from autopar.schedules import may_fit

if TYPE_CHECKING:
    from autopar.planning import Job

_BACKWARD = 2 / 3
"""Of the time of a microbatch that recomputes nothing: a backward multiplies twice what the forward did once."""


def waited_s(job: Job, solution: Solution) -> float:
    """Seconds of a step of a plan that was found, under the schedule that is fastest for its very choices, with sums of
    gradients behind backward where that is worth a look; or of the plan of any mesh that is found for the schedule that
    waits least. Infinite where collectives are to move behind compute and have no room for it."""
    held, c = _held(job, solution), solution.configuration
    if job.options.parallelism.overlap and not job.fits(replace(held.plan, overlap=True)):
        return math.inf
    least_s = job.step_s(held.plan)
    other = elsewhere(job, least_s) if is_plain(job, solution) else None
    other_s = math.inf if other is None else job.step_s(job.plan(other))
    gain_s = hidden_s(job, c, solution.objective_s / c.objective.balanced[0])
    if gain_s > WORTH * least_s and least_s - gain_s < other_s:
        least_s = job.step_s(reduced(job, held)[0])
    return min(least_s, other_s)


def _held(job: Job, solution: Solution) -> Scheduled:
    """The plan under the fastest schedule that its choices fit under."""
    plan = job.plan(solution)
    program, step_s = job.program(plan), job.step_s(plan)
    for sketched_s, c in sketches(job, solution):
        same = replace(solution, configuration=c)
        if sketched_s >= step_s:
            break
        if may_fit(same, c, program, job.static_bytes(plan), job.stage_caps(plan)) and job.fits(job.plan(same)):
            if job.step_s(job.plan(same)) < step_s:
                return Scheduled(job.plan(same), same, ())
            break
    return Scheduled(plan, solution, ())


def hidden_s(job: Job, c: Configuration, along_s: float) -> float:
    """The most that sums of gradients over replicas can hide behind the last microbatch's backward; nothing where they
    may not move, or have to be of parts since the state of all parameters has no room on every replica.

    along_s: of a microbatch through all stages.
    """
    pins = job.options.parallelism
    if c.dp == 1 or pins.overlap is False or pins.zero or job.state_bytes > job.cap_bytes * c.tp * c.pp:
        return 0.0
    ranks = tuple(range(0, c.dp * c.tp, c.tp))
    sums_s = job.cluster.collective_time_s("all_reduce", job.reduced_bytes / (c.tp * c.pp), ranks)
    return min(sums_s, _BACKWARD * along_s / c.pp)
