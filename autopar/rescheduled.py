"""Rescheduled: what was found, under the schedule that is fastest for it; or a plan made for such a schedule.

The search is under 1f1b, which holds least, unless another schedule is pinned. Others wait less and hold more: a plan
that fills the cap does not fit under them, while one of more stages, of smaller microbatches, or that recomputes more,
may, and be faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from autopar.options import FLAT
from autopar.planner.search import Configuration, search
from autopar.planner.solution import Pins, Progress, Solution, Space, is_interrupted
from autopar.report import seconds_text
from autopar.schedules import faster_schedules, may_fit, may_hold
from autopar.tied import tied_s
from cost_model.errors import ParallelismError
from cost_model.plan import Plan

if TYPE_CHECKING:
    from autopar.planning import Job

_MOST_REWRITTEN = 2  # plans of one search that are rewritten to see whether they fit
_MOST_SOLVED = 250  # units of one search: where none of the fastest fits, hardly any other is worth its time
_WAITS_LEAST = "zero_bubble"
_SMALLER = 2  # sizes of microbatches below the one that was found


@dataclass(frozen=True)
class Scheduled:
    """A plan as it is to run, what it was made of, and what to tell of it."""

    plan: Plan
    solution: Solution
    notes: tuple[str, ...]


class _NotWorthIt(Exception):
    """No plan of a search is worth more time."""


def scheduled(job: Job, solution: Solution) -> Scheduled:
    """The fastest plan.

    Others are searched for under the schedule that waits least, on every mesh. Where none is faster, and a faster
    schedule holds too much for the plan that was found, others are searched for under the first such one, on the same
    mesh.
    """
    plan = job.plan(solution)
    best, chosen, limit_s = plan, solution, job.step_s(plan)

    def is_faster(other: Solution) -> bool:
        nonlocal best, chosen, limit_s
        made = job.plan(other)
        if job.step_s(made) >= limit_s:
            return False
        best, chosen, limit_s = made, other, job.step_s(made)
        return True

    with suppress(KeyboardInterrupt):  # the fastest so far stays
        plain = is_plain(job, solution)
        other = elsewhere(job, limit_s) if plain else None
        searched = not plain or (other is not None and is_faster(other))
        program = job.program(plan)
        for sketched_s, c in sketches(job, solution):
            same = replace(solution, configuration=c)
            if sketched_s >= limit_s:
                break
            if may_fit(same, c, program, job.static_bytes(plan), job.stage_caps(plan)) and job.fits(job.plan(same)):
                if is_faster(same):
                    break
            elif not searched:
                searched, slower = True, limit_s / sketched_s
                room = functools.partial(
                    may_hold, same, c, program, job.static_bytes(plan), job.stage_caps(plan), slower=slower
                )
                for other in _searched(job, c, limit_s, room):
                    is_faster(other)
    return Scheduled(best, chosen, () if best is plan else (_chosen_note(job, plan, best),))


def held(job: Job, solution: Solution) -> Scheduled:
    """The very choices that were found, under the fastest schedule that they fit under."""
    plan = job.plan(solution)
    program, step_s = job.program(plan), job.step_s(plan)
    for sketched_s, c in sketches(job, solution):
        same = replace(solution, configuration=c)
        if sketched_s >= step_s:
            break
        if may_fit(same, c, program, job.static_bytes(plan), job.stage_caps(plan)) and job.fits(job.plan(same)):
            if job.step_s(job.plan(same)) < step_s:
                return Scheduled(job.plan(same), same, (_chosen_note(job, plan, job.plan(same)),))
            break
    return Scheduled(plan, solution, ())


def _chosen_note(job: Job, plan: Plan, best: Plan) -> str:
    seconds = f"{seconds_text(job.step_s(best))} against {seconds_text(job.step_s(plan))}"
    note = f"{best.schedule_text()} was chosen after the search: {seconds} of {plan.schedule}"
    return f"{note}; the gap is that of the best plan under {plan.schedule}"


def sketches(job: Job, solution: Solution) -> Sequence[tuple[float, Configuration]]:
    """As ``faster_schedules``, made once."""
    plan, pins = job.plan(solution), job.options.parallelism
    if (plan, pins) not in job.sketched:
        known = job.program(plan), job.simulated(plan), job.cluster, pins
        job.sketched[plan, pins] = faster_schedules(solution, *known)
    return job.sketched[plan, pins]


def is_plain(job: Job, solution: Solution) -> bool:
    """Whether a search of one mesh of equal stages, that nobody stopped, gave it, on devices in their own order."""
    placed = (solution.meshes, solution.placement, solution.configuration.tp_axes)
    return placed == (None, None, None) and job.options.solver != FLAT and not is_interrupted(solution.notes)


def _searched(job: Job, c: Configuration, worth_s: float, has_room: Callable[..., bool]) -> Iterator[Solution]:
    """Plans of the same mesh that fit under the schedule of a configuration, of smaller microbatches or of as large.

    worth_s: of a step; as far as prices tell what one takes, it costs more than the schedule saves from there on.
    has_room(samples=): as ``schedules.may_hold``.
    """
    pinned = job.options.parallelism.microbatch_size
    smaller = [size for size in range(c.microbatch_size - 1, 0, -1) if c.microbatch_size % size == 0]
    for size in [c.microbatch_size] if pinned else [*smaller[:_SMALLER], c.microbatch_size]:
        found = _searched_on_mesh(job, c, size, worth_s) if has_room(samples=size) else None
        if found is not None:
            yield found
            return


def _searched_on_mesh(job: Job, c: Configuration, size: int, worth_s: float) -> Solution | None:
    """The best plan that fits, if one of the first does."""
    parts = c.virtual_stages if c.virtual_stages > 1 else None
    return first(job, Pins(c.dp, c.tp, c.pp, size, c.schedule, parts, c.window), worth_s)


def first(
    job: Job,
    pins: Pins,
    worth_s: float,
    *,
    fastest_only: bool = False,
    space: Space | None = None,
    plan: Callable[[Solution], Plan] | None = None,
    room_bytes: int = 0,
) -> Solution | None:
    """What a search finds of a lower price, if one of the first plans to be rewritten fits: the fastest of those that
    come then. Ctrl-C ends what it is searched for.

    space, plan: the job's own, if None. room_bytes: of the cap, that plans leave until they are rewritten.
    """
    rewritten, fitting = set[Plan](), list[Solution]()
    make = job.plan if plan is None else plan

    def report(progress: Progress) -> None:
        if progress.solved == _MOST_SOLVED and not fitting:
            raise _NotWorthIt

    def confirm(found: Solution) -> Sequence[int]:
        rewritten.add(make(found))
        if len(rewritten) > _MOST_REWRITTEN and not fitting:
            raise _NotWorthIt
        return [peak - room_bytes for peak in job.peaks(make(found))]

    def timed(found: Solution) -> float:
        fitting.append(found)
        return job.step_s(make(found))

    count, cap = job.cluster.num_devices, job.cap_bytes - room_bytes
    ask = functools.partial(search, cap_bytes=cap, pins=pins, confirm=confirm, timed=timed, cutoff_s=worth_s)
    lacks_s = functools.partial(tied_s, job)
    try:
        found = ask(
            job.pinned_space() if space is None else space,
            count,
            job.batch,
            lacks_s=lacks_s,
            progress=report,
            fastest_only=fastest_only,
        )
    except (_NotWorthIt, ParallelismError):  # no mesh is possible or left; the plan found first stays
        return None
    if isinstance(found, Solution) and is_interrupted(found.notes):
        raise KeyboardInterrupt
    return found if isinstance(found, Solution) else None


def elsewhere(job: Job, worth_s: float) -> Solution | None:
    """The plan of any mesh that takes least under the schedule that waits least, if it takes less and saves nothing;
    searched for once.

    Where little is waited for other stages, more of them hold less each, and need not trade time for memory.
    """
    p = job.options.parallelism
    if p.meshes_differ or (p.schedule, p.virtual_stages, p.window) != (None, None, None):
        return None
    key = (p, job.cap_bytes)
    if key not in job.elsewhere:
        pins = replace(job.pins(_WAITS_LEAST), pipelined=True)
        job.elsewhere[key] = first(job, pins, worth_s, fastest_only=True)
    return job.elsewhere[key]
