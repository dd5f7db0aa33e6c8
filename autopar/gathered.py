"""Gathered: plans whose microbatches gather split parameters and scatter gradients while they compute.

The search prices what level 3 of ZeRO moves as if it stood alone, for it moves nothing behind compute. So plans at that
level are searched for apart, where moving takes no time, and simulated with their collectives behind compute: none on a
mesh where these take longer than a step may. That is done once it is known what they have to beat, before the plan of
the search is rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from autopar.hiding import hidden_of
from autopar.narrower import WORTH
from autopar.options import FLAT
from autopar.planner.bounds import Objective
from autopar.planner.chain import Chain, Floor
from autopar.planner.configuration import Configuration
from autopar.planner.solution import Infeasible, Solution, is_interrupted
from autopar.planner.space import PinnedSpace
from autopar.report import seconds_text
from autopar.rescheduled import first
from cost_model.parallelism import Parallelism
from cost_model.plan import Plan

if TYPE_CHECKING:
    from autopar.planning import Job

_LEVEL = 3
_ROOM = 0.02
"""Of the cap, left for what prices do not know: the allocator's rounding."""


class _BeatenError(Exception):
    """The plan that is to be rewritten takes longer than one that was gathered."""

    def __init__(self, solution: Solution) -> None:
        super().__init__(solution)
        self.solution = solution


@dataclass(frozen=True)
class Gathered:
    """A plan, and what to tell of it. step_s: seconds that a step of it takes."""

    plan: Plan
    notes: tuple[str, ...]
    step_s: float

    def told(self, other_s: float) -> tuple[Plan, tuple[str, ...]]:
        """The plan, beside the seconds of a step of what it beats."""
        seconds = f"{seconds_text(self.step_s)} against {seconds_text(other_s)}"
        chosen = (
            f"parameters are split over replicas, collectives move behind compute, chosen after the search: {seconds}"
        )
        return self.plan, (*self.notes, chosen, "the gap is that of the best plan whose collectives do not move")


Ask = Callable[[Callable[[Solution], Sequence[int]]], Solution | Infeasible]
"""Searches with a ``confirm``."""


def unless_beaten(job: Job, ask: Ask) -> Solution | Infeasible:
    """What the search finds; its first plan as it is where a gathered one takes less than that may, and so than all
    others: it has not been rewritten then."""
    known = False

    def confirm(found: Solution) -> Sequence[int]:
        nonlocal known
        if not known and beats(job, found) is not None:
            raise _BeatenError(found)
        peaks = job.peaks(job.plan(found))
        known = known or max(peaks) <= job.cap_bytes
        return peaks

    try:
        return ask(confirm)
    except _BeatenError as beaten:
        return beaten.solution


def beats(job: Job, solution: Solution) -> Gathered | None:
    """The fastest plan that is gathered, if it takes less than what was found may: its price, less what it may hide.
    Not known where ranks share cores, which may take less than prices say."""
    if job.cluster.crowding > 1:
        return None
    return gathered(job, solution, solution.objective_s - hidden_of(job, solution))


def gathered(job: Job, solution: Solution, than_s: float) -> Gathered | None:
    """The fastest such plan; None where none is known to take less. solution: one that it is to be like but for choices
    and degrees. It is searched for once, unless much slower ones would do now."""
    if not _may_be(job, solution):
        return None
    pins = _pins(job, solution.configuration)
    key = (pins, job.cap_bytes)
    known_s, found = job.gathered.get(key, (0.0, None))
    if found is None and (1 - WORTH) * than_s > known_s:
        found = _searched(job, replace(pins, zero=_LEVEL, overlap=True), than_s)
        job.gathered[key] = than_s, found
    return found if found is not None and found.step_s < than_s else None


def _pins(job: Job, c: Configuration) -> Parallelism:
    """The job's, and what was found where tp is several axes, which are not searched for."""
    pins = job.options.parallelism
    return pins if c.tp_axes is None else replace(pins, dp=c.dp, tp=c.tp, pp=c.pp, tp_axes=c.tp_axes)


def _searched(job: Job, pins: Parallelism, limit_s: float) -> Gathered | None:
    room = int(_ROOM * job.cap_bytes)
    split = job.under(pins, job.options.memory_cap_bytes)

    def plan(found: Solution) -> Plan:
        return replace(split.plan(found), overlap=True)

    space = _Meshes(replace(split.pinned_space(), space=job.space.moving()), job, limit_s)
    found = first(split, split.pins(pins.schedule), limit_s, space=space, plan=plan, room_bytes=room)
    if found is None:
        return None
    return Gathered(plan(found), found.notes, job.step_s(plan(found)))


def _may_be(job: Job, solution: Solution) -> bool:
    """Whether pins, optimizer and devices allow it."""
    p, c = job.options.parallelism, solution.configuration
    is_free = p.zero in (None, _LEVEL) and p.overlap is not False and (p.dp_inner or c.dp_inner or 1) == 1
    is_plain = (solution.meshes, solution.placement, p.placement) == (None, None, None)
    is_searched = job.options.solver != FLAT and not is_interrupted(solution.notes)
    is_alike = len(set(job.cluster.devices)) == 1
    return is_free and is_plain and is_searched and is_alike and job.space.divisible


@dataclass(frozen=True)
class _Meshes:
    """``space`` without meshes on which what microbatches move takes longer than a step may."""

    space: PinnedSpace
    job: Job
    limit_s: float

    @property
    def crowding(self) -> float:
        return self.space.crowding

    def floor(self, dp: int, tp: int, microbatch_size: int, above_s: float = -1.0) -> Floor | None:
        count, stages = self.job.batch // dp // microbatch_size, self.job.cluster.num_devices // (dp * tp)
        if dp == 1 or self._moved_s(dp, tp) * Objective(stages, count, 1.0, self.crowding).lone >= self.limit_s:
            return None
        return self.space.floor(dp, tp, microbatch_size, above_s)

    def least_saved_bytes(self, dp: int, tp: int, microbatch_size: int) -> float:
        return self.space.least_saved_bytes(dp, tp, microbatch_size)

    def chain(self, dp: int, tp: int, microbatch_size: int) -> Chain | None:
        return self.space.chain(dp, tp, microbatch_size)

    def saving_chains(self, dp: int, tp: int, microbatch_size: int) -> Sequence[Chain]:
        return self.space.saving_chains(dp, tp, microbatch_size)

    def _moved_s(self, dp: int, tp: int) -> float:
        """By a microbatch, of a stage of mean size."""
        job, replicas = self.job, tuple(range(0, dp * tp, tp))
        share = dp / job.cluster.num_devices
        moved = (("all_gather", 2 * job.parameter_bytes), ("reduce_scatter", job.reduced_bytes))
        return sum(job.cluster.collective_time_s(kind, nbytes * share, replicas) for kind, nbytes in moved)
