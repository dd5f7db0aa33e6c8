"""Stages on unlike devices: what a search of equal ones assigned, cut anew so that no stage is long and each fits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from autopar.planner.candidates import MOST_MOVED
from autopar.planner.places import FloatArray, IntArray
from autopar.planner.shares import soonest
from autopar.planner.solution import Solution
from autopar.planner.virtual import shortest_ends
from cost_model.block_price import BlockPrice
from cost_model.plan import Plan
from cost_model.prices import StagePrice, price_replicas
from cost_model.replicas import LIKELY, ReplicaSums, slowest_first
from cost_model.simulate import step_time_s

if TYPE_CHECKING:
    from autopar.planning import Job

MAX_TIGHTENINGS, TIE = 6, 1e-6
SLACK = 0.1
"""Sums err by less."""
MOST_SKETCHED, MOST_TIMED, MOST_REWRITTEN = 24, 2, 4
"""So many cuts next to a plan are sketched, so many of the fastest are rewritten, so many times."""


def fitted(job: Job, solution: Solution, limit_s: Callable[[], float]) -> Iterator[Solution]:
    """A placed solution as it is and, where its stages' devices differ, with more segments on faster devices, and fewer
    where the rewritten program does not fit; none that takes longer than a limit under any schedule, as far as sums
    tell. The limit is asked for once the first is known."""
    yield solution
    plan = job.plan(solution)
    kinds = [{job.cluster.devices[device] for device in own} for own in plan.stage_devices]
    if solution.configuration.virtual_stages > 1 or all(own == kinds[0] for own in kinds):
        return
    caps, sketch = job.stage_caps(plan), CutSketch(job, solution)
    most_s = limit_s() * (1 + SLACK)
    slow = _slowness(job, plan, solution)
    seconds = [each for stage in solution.stages for each in stage.segments_s]
    most = [len(seconds)] * plan.pp
    for _ in range(MAX_TIGHTENINGS):
        ends = shortest_ends(seconds, slow, most)
        if ends is None or ends == tuple(stage.last for stage in solution.stages):
            return
        other = cut_at(solution, ends)
        if sketch.least_s(ends) > most_s:
            return
        peaks = job.peaks(job.plan(other))
        if all(peak <= cap for peak, cap in zip(peaks, caps, strict=True)):
            yield other
            return
        most = [
            min(limit, stage.last - stage.first - 1, int((stage.last - stage.first) * cap / peak))
            if peak > cap
            else limit
            for limit, stage, peak, cap in zip(most, other.stages, peaks, caps, strict=True)
        ]


def moved(job: Job, solution: Solution, timed_s: Callable[[Solution, float], float]) -> Solution:
    """The solution with ends of stages moved by a segment while that is faster: what a step costs once (gradients that
    go round, the optimizer) is no part of what made stages equally long.

    Cuts are sketched from the prices of the plan's own, and only those that sketches find fastest are rewritten and
    timed, again from there while they are faster.
    """
    if not _may_move(job, solution):
        return solution
    best, best_s = solution, timed_s(solution, math.inf)
    for _ in range(MOST_REWRITTEN):
        for other in CutSketch(job, best).better(best):
            if (other_s := timed_s(other, best_s)) < best_s * (1 - TIE):
                best, best_s = other, other_s
                break
        else:
            return best
    return best


def faster_cut(job: Job, solution: Solution, limit_s: float) -> Solution | None:
    """The cut that sketches find fastest, where it is faster than the solution's own and than a limit."""
    found = CutSketch(job, solution).better(solution, limit_s) if _may_move(job, solution) else []
    return found[0] if found else None


def _may_move(job: Job, solution: Solution) -> bool:
    c = solution.configuration
    return c.pp > 1 and c.virtual_stages == 1 and job.cluster.num_devices <= MOST_MOVED


class CutSketch:
    """What a step takes with the segments of a plan in other stages, as far as the prices of its own stages tell."""

    def __init__(self, job: Job, solution: Solution) -> None:
        self._program = job.program(job.plan(solution))
        self._replicas = price_replicas(self._program, job.cluster)
        self._own_s = np.array([sum(stage.segments_s) for stage in solution.stages])
        self._upto_s = np.cumsum([0.0, *(seconds for stage in solution.stages for seconds in stage.segments_s)])
        self._once_bytes = np.array([max(1, sum(c.nbytes for c in s.step.collectives)) for s in self._program.stages])
        self._sums = ReplicaSums(self._replicas, self._program.microbatches)

    def better(self, solution: Solution, limit_s: float = math.inf) -> list[Solution]:
        """The fastest of the cuts on the way from one to where no segment is better in another stage, by sums, or of
        those next to it where there is no way; as far as simulated sketches are faster too, and than a limit, the
        fastest first."""
        own = np.array([stage.last for stage in solution.stages])
        cuts = np.array(list(self._ways(own)) or list(self._nearest(own)), dtype=np.int64).reshape(-1, len(own))
        cuts = cuts[self._summed_s(cuts) < limit_s]
        if not len(cuts):
            return []
        own_s, found = min(self.seconds(solution, limit_s), limit_s), list[tuple[float, int, Solution]]()
        for number, ends in enumerate(cuts):
            other = cut_at(solution, tuple(ends.tolist()))
            found.append((self.seconds(other, own_s), number, other))
        worth = sorted(each for each in found if each[0] < own_s * (1 - TIE))
        return [other for _, _, other in worth[:MOST_TIMED]]

    def seconds(self, solution: Solution, limit_s: float = math.inf) -> float:
        """Of a step, by the replicas that are likely to take longest; infinite over a limit."""
        shares, once = self._shares(np.array([[stage.last for stage in solution.stages]]))
        cut = [list(map(_cut, own, shares[0].tolist(), once[0].tolist())) for own in self._replicas]
        count = self._program.microbatches
        found = step_time_s(self._program, slowest_first(cut, count)[:LIKELY], limit_s=limit_s)
        return found if found <= limit_s else math.inf

    def least_s(self, ends: tuple[int, ...]) -> float:
        """Of a step in a window that is wide enough, as far as sums tell."""
        return float(self._summed_s(np.array([ends]))[0])

    def _ways(self, own: IntArray) -> Iterator[IntArray]:
        """From one and from the shares that cost least, which may be far: where several stages take as long, moving a
        segment of one of them helps nothing."""
        yield from self._way(own)
        least = self._cheapest()
        if self._summed_s(least[None])[0] < self._summed_s(own[None])[0] * (1 - TIE):
            yield least
            yield from self._way(least)

    def _cheapest(self) -> IntArray:
        """[stage] Ends of stages of about the shares of the model that cost least by sums."""
        parts = np.maximum(self._own_s, TIE * self._own_s.max())
        parts /= parts.mean()
        work_s, once_s = self._sums.stages_s
        once_s = once_s / self._once_bytes * (self._once_bytes / parts).min()
        count, stages = len(self._upto_s) - 1, len(parts)
        shares = soonest((work_s / parts)[None], once_s[None], stages / count)[0]
        ends = np.abs(self._upto_s[:, None] - shares.cumsum() * self._upto_s[-1] / stages).argmin(axis=0)
        ends[-1] = count
        numbers = np.arange(stages)
        ends = np.maximum.accumulate(ends - numbers) + numbers  # each a segment further than the one before, at least
        found: IntArray = np.clip(ends, numbers + 1, count - stages + 1 + numbers)
        return found

    def _way(self, best: IntArray) -> Iterator[IntArray]:
        """Ends of stages, one segment from one stage to another each time, where that helps most."""
        best_s = float(self._summed_s(best[None])[0])
        while len(tried := _next_to(best)):
            tried_s = self._summed_s(tried)
            if not tried_s.min() < best_s * (1 - TIE):
                return
            best, best_s = tried[tried_s.argmin()], float(tried_s.min())
            yield best

    def _nearest(self, ends: IntArray) -> Iterator[IntArray]:
        """With one segment in another stage, those that take least by sums."""
        near = _next_to(ends)
        yield from near[np.argsort(self._summed_s(near), kind="stable")[:MOST_SKETCHED]]

    def _summed_s(self, ends: IntArray) -> FloatArray:
        """[cut] from [cut, stage]"""
        return self._sums.steps_s(*self._shares(ends))

    def _shares(self, ends: IntArray) -> tuple[FloatArray, FloatArray]:
        """[cut, stage] how many times its own segments a stage has, in seconds, and how many times what it does once a
        step: of as many more bytes as it has more segments, per byte as now, by what these have on the stage with the
        least: an embedding stays where it is."""
        shares: FloatArray = np.diff(self._upto_s[ends], axis=1, prepend=0.0) / self._own_s
        once: FloatArray = 1.0 + (shares - 1.0) * self._once_bytes.min() / self._once_bytes
        return shares, once


def _next_to(ends: IntArray) -> IntArray:
    """[cut, stage] Ends of stages with one segment in another stage."""
    stages = range(len(ends))
    moves = [[(b <= s < a) - (a <= s < b) for s in stages] for a, b in itertools.permutations(stages, 2)]
    found: IntArray = ends + np.array(moves)
    return found[(np.diff(found, axis=1, prepend=0) > 0).all(axis=1)]


def _cut(price: StagePrice, share: float, once: float) -> StagePrice:
    """A stage with so many times the segments, and so many times what is done once a step."""
    chunks = tuple(
        replace(
            chunk,
            forward=_longer(chunk.forward, share),
            backward=_longer(chunk.backward, share),
            weight=None if chunk.weight is None else _longer(chunk.weight, share),
        )
        for chunk in price.chunks
    )
    return replace(
        price,
        chunks=chunks,
        step_collectives_s=tuple(once * seconds for seconds in price.step_collectives_s),
        step_gathers_s=tuple(once * seconds for seconds in price.step_gathers_s),
        optimizer_s=once * price.optimizer_s,
    )


def _longer(block: BlockPrice, share: float) -> BlockPrice:
    return replace(
        block,
        compute_s=share * block.compute_s,
        communication_s=share * block.communication_s,
        completed_s={group: share * seconds for group, seconds in block.completed_s.items()},
    )


def _slowness(job: Job, plan: Plan, solution: Solution) -> list[float]:
    """Of each stage, how much longer its blocks take on its slowest replica than the search took them to."""
    replicas = price_replicas(job.program(plan), job.cluster)
    stages = zip(*replicas, strict=True)
    own_s = [max(sum(chunk.blocks_s for chunk in price.chunks) for price in prices) for prices in stages]
    return [seconds / sum(stage.segments_s) for seconds, stage in zip(own_s, solution.stages, strict=True)]


def cut_at(solution: Solution, ends: tuple[int, ...]) -> Solution:
    """The same choices of the same segments in other stages."""
    assignments = [each for stage in solution.stages for each in stage.assignments]
    seconds = [each for stage in solution.stages for each in stage.segments_s]
    parts = tuple(
        replace(
            stage,
            first=first,
            last=last,
            assignments=tuple(assignments[first:last]),
            time_s=sum(seconds[first:last]),
            segments_s=tuple(seconds[first:last]),
        )
        for stage, first, last in zip(solution.stages, (0, *ends), ends, strict=False)
    )
    return replace(solution, stages=parts)
