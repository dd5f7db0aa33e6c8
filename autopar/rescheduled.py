"""Rescheduled: what was found, under the schedule that is fastest for it; or a plan made for such a schedule.

The search prices all schedules as 1f1b, which holds least. Others wait less and hold more: a plan that fills the cap
does not fit under them, while one of smaller microbatches, or that recomputes more, may, and be faster.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from autopar.options import FLAT
from autopar.planner.search import Configuration, Pins, Solution, search
from autopar.report import seconds_text
from autopar.schedules import WORTH, faster_schedules
from cost_model.plan import Plan

if TYPE_CHECKING:
    from autopar.planning import Job

_MOST_REWRITTEN = 2  # plans of one search that are rewritten to see whether they fit
_SMALLER = 2  # sizes of microbatches below the one that was found


@dataclass(frozen=True)
class Scheduled:
    """A plan as it is to run. gap: of its price above the bound on all plans, both with the waiting of 1f1b."""

    plan: Plan
    gap: float
    notes: tuple[str, ...]


class _NotWorthIt(Exception):
    """No plan of a search is worth more time."""


def scheduled(job: Job, solution: Solution) -> Scheduled:
    """The fastest plan.

    Where a faster schedule holds too much for the plan that was found, others are searched for under the first such
    one, on the same mesh.
    """
    plan = job.plan(solution)
    best, gap, limit_s, searched = plan, solution.gap, (1 - WORTH) * job.step_s(plan), not _is_plain(job, solution)
    for sketched_s, c in faster_schedules(solution, job.program(plan), job.cluster, job.options.parallelism):
        same = job.plan(replace(solution, configuration=c))
        if job.fits(same):
            if job.step_s(same) < limit_s:
                best, gap = same, solution.gap
                break
        elif not searched:
            searched = True
            for other in _searched(job, c, solution.objective_s * limit_s / sketched_s):
                planned = job.plan(other)
                if job.step_s(planned) < limit_s:
                    best, limit_s = planned, job.step_s(planned)
                    gap = max(0.0, other.objective_s / solution.bound_s - 1)
    if best is plan:
        return Scheduled(plan, gap, ())
    seconds = f"{seconds_text(job.step_s(best))} against {seconds_text(job.step_s(plan))}"
    note = f"{best.schedule_text()} was chosen after the search: {seconds} of {plan.schedule}"
    priced = f"{note}, whose price is {solution.gap:.2%} above the bound" if gap != solution.gap else note
    return Scheduled(best, gap, (priced,))


def _is_plain(job: Job, solution: Solution) -> bool:
    """Whether a search of one mesh of equal stages gave it, on devices in their own order."""
    placed = (solution.meshes, solution.placement, solution.configuration.tp_axes)
    return placed == (None, None, None) and job.options.solver != FLAT


def _searched(job: Job, c: Configuration, worth_s: float) -> Iterator[Solution]:
    """Plans of the same mesh that fit under the schedule of a configuration, of smaller microbatches or of as large.

    worth_s: the search's price above which a plan costs more than the schedule saves.
    """
    pinned = job.options.parallelism.microbatch_size
    smaller = [size for size in range(c.microbatch_size - 1, 0, -1) if c.microbatch_size % size == 0]
    for size in [c.microbatch_size] if pinned else [*smaller[:_SMALLER], c.microbatch_size]:
        found = _searched_on_mesh(job, c, size, worth_s)
        if found is not None:
            yield found
            return


def _searched_on_mesh(job: Job, c: Configuration, size: int, worth_s: float) -> Solution | None:
    """The best plan that fits, if one of the first does."""
    parts = c.virtual_stages if c.virtual_stages > 1 else None
    pins = Pins(c.dp, c.tp, c.pp, size, c.schedule, parts, c.window)
    rewritten = itertools.count()

    def confirm(found: Solution) -> Sequence[int]:
        if found.objective_s >= worth_s or next(rewritten) == _MOST_REWRITTEN:
            raise _NotWorthIt
        return job.peaks(job.plan(found))

    space, count = job.pinned_space(), job.cluster.num_devices
    try:
        found = search(space, count, job.batch, cap_bytes=job.cap_bytes, pins=pins, confirm=confirm)
    except _NotWorthIt:
        return None
    return found if isinstance(found, Solution) else None
