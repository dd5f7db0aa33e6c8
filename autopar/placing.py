"""Placing: what placed plans take on an uneven network, each under the schedule that suits its devices."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from autopar.grouped import group_sizes
from autopar.planner.search import Configuration
from autopar.planner.solution import Pins, Solution
from autopar.schedules import windows
from autopar.uneven import MOST_REWRITTEN, faster_cut, fitted
from cost_model.prices import Replicas, price_replicas
from cost_model.program import Program
from cost_model.replicas import LIKELY, schedule_bound_s, slowest_first
from cost_model.simulate import step_time_s

if TYPE_CHECKING:
    from autopar.planning import Job


def fastest_placed(job: Job, pins: Pins, solution: Solution, limit_s: float) -> tuple[float, Solution]:
    """Seconds of a step of a placed plan, and it as its devices run it best: cut by how fast they are, with ends of
    stages moved where sketches gain by that, under the faster of 1f1b, in any window, and gpipe, gradients summed in
    groups or not. Infinite where it takes longer than a limit.
    """
    best = math.inf, solution

    def worth_s() -> float:
        return min(limit_s, best[0])

    for each in fitted(job, solution, worth_s):
        found = _fastest_schedule(job, pins, each, worth_s())
        best = min(best, found, key=lambda pair: pair[0])
    for _ in range(MOST_REWRITTEN):
        cut = faster_cut(job, best[1], worth_s())
        found = (math.inf, solution) if cut is None else _fastest_schedule(job, pins, cut, worth_s())
        if not found[0] < best[0]:
            break
        best = found
    return best


def _fastest_schedule(job: Job, pins: Pins, solution: Solution, limit_s: float) -> tuple[float, Solution]:
    """The schedule is chosen by the replicas that are likely to take longest, and timed with all of them."""
    own, pinned, placed = solution.configuration, job.options.parallelism, PlacedPlan(job, solution)
    if placed.bound_s > limit_s:
        return math.inf, solution
    found = [(placed.least_s(placed.program), own)]
    if own.pp > 1 and own.schedule == "1f1b":
        wider = windows(placed.program, pinned, placed.least_s)
        found += [(seconds, replace(own, window=window)) for window, seconds in wider]
        if pins.schedule is None:
            gpipe = replace(own, schedule="gpipe", window=1)
            found.append((placed.least_s(placed.under(gpipe)), gpipe))
    least_s, best = min(found, key=lambda each: each[0])
    timed = [(placed.step_s(placed.under(best), limit_s) if least_s <= limit_s else math.inf, best)]
    if pinned.dp_inner is None:
        for size in group_sizes(job.plan(solution), job.cluster):
            grouped = replace(best, dp_inner=size)
            timed.append((timed_s(job, replace(solution, configuration=grouped), limit_s), grouped))
    step_s, best = min(timed, key=lambda each: each[0])
    return step_s, replace(solution, configuration=best)


def timed_s(job: Job, solution: Solution, limit_s: float = math.inf) -> float:
    """Seconds of a step of a placed plan; infinite where it does not fit, or one replica takes longer than a limit."""
    placed = PlacedPlan(job, solution)
    return placed.step_s(placed.program, limit_s)


@dataclass(frozen=True, eq=False)
class PlacedPlan:
    """A plan on its devices, its stages priced once for all schedules that its program may run under."""

    job: Job
    solution: Solution

    @cached_property
    def program(self) -> Program:
        return self.job.program(self.job.plan(self.solution))

    def under(self, c: Configuration) -> Program:
        """The program under another schedule of the same blocks."""
        return replace(self.program, schedule=c.schedule, window=c.window)

    @cached_property
    def _replicas(self) -> Replicas:
        return slowest_first(price_replicas(self.program, self.job.cluster), self.program.microbatches)

    @cached_property
    def bound_s(self) -> float:
        """No schedule takes less."""
        return schedule_bound_s(self._replicas, self.program.microbatches)

    @cached_property
    def _caps(self) -> tuple[int, ...]:
        return self.job.stage_caps(self.job.plan(self.solution))

    def step_s(self, program: Program, limit_s: float = math.inf) -> float:
        """Seconds of a step of the program, under any schedule; infinite where it does not fit, or one replica takes
        longer than a limit."""
        if self.bound_s > limit_s or not self.job.has_room(program, self._caps):
            return math.inf
        return step_time_s(program, self._replicas, limit_s=limit_s)

    def least_s(self, program: Program) -> float:
        """Seconds of a step of the replicas that are likely to take longest."""
        return step_time_s(program, self._replicas[:LIKELY]) if self.job.has_room(program, self._caps) else math.inf
