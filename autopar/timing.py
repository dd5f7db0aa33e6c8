"""Timing: what a step of a plan that was found takes once the rest is chosen, and what it may gain by that."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from autopar.gathered import Gathered, beats, gathered
from autopar.hiding import hidden_of
from autopar.narrower import WORTH
from autopar.planner.solution import Solution
from autopar.reductions import reduced
from autopar.report import seconds_text
from autopar.rescheduled import elsewhere, held, is_plain, scheduled
from cost_model.plan import Plan

if TYPE_CHECKING:
    from autopar.planning import Job


def waited_s(job: Job, solution: Solution) -> float:
    """Seconds of a step of a plan that was found, under the schedule that is fastest for its very choices, with sums of
    gradients behind backward where that is worth a look; or of the plan of any mesh that is found for the schedule that
    waits least. Infinite where collectives are to move behind compute and have no room for it."""
    own = held(job, solution)
    if job.options.parallelism.overlap and not job.fits(replace(own.plan, overlap=True)):
        return math.inf
    least_s = job.step_s(own.plan)
    other = elsewhere(job, least_s) if is_plain(job, solution) else None
    other_s = math.inf if other is None else job.step_s(job.plan(other))
    gain_s = hidden_of(job, solution)
    if gain_s > WORTH * least_s and least_s - gain_s < other_s:
        least_s = job.step_s(reduced(job, own)[0])
    return min(least_s, other_s)


def fastest(job: Job, solution: Solution) -> tuple[Plan, tuple[str, ...]]:
    """The plan that was found, or one of another schedule, as its collectives are fastest; or one whose parameters are
    gathered; and what to tell of it.

    What was found may have more to hide behind compute than what another schedule was searched for.
    """
    beaten_by = beats(job, solution)
    if beaten_by is not None:
        return _unless_elsewhere(job, solution, beaten_by)
    ways = [scheduled(job, solution)]
    if ways[0].solution is not solution:
        ways.append(held(job, solution))
    made = [(plan, (*way.notes, *notes)) for way in ways for plan, notes in [reduced(job, way)]]
    plan, notes = min(made, key=lambda each: job.step_s(each[0]))
    with suppress(KeyboardInterrupt):  # the fastest so far stays
        other = gathered(job, solution, job.step_s(plan))
        if other is not None:
            return other.told(job.step_s(plan))
    return plan, notes


def _unless_elsewhere(job: Job, solution: Solution, best: Gathered) -> tuple[Plan, tuple[str, ...]]:
    """The best, or what waits least on any mesh, if that takes less. What was found has not been rewritten: it may not
    fit."""
    other = elsewhere(job, best.step_s) if is_plain(job, solution) else None
    if other is None or job.step_s(job.plan(other)) >= best.step_s:
        return best.told(solution.objective_s)
    plan = job.plan(other)
    seconds = f"{seconds_text(job.step_s(plan))} against {seconds_text(solution.objective_s)}"
    note = f"{plan.schedule_text()} was chosen after the search: {seconds} of {solution.configuration.schedule}"
    return plan, (f"{note}; the gap is that of the best plan under that",)
