"""Stages on unlike devices: what a search of equal ones assigned, cut anew so that no stage is long and each fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from autopar.planner.solution import Solution
from autopar.planner.virtual import shortest_ends
from cost_model.block_price import BlockPrice
from cost_model.plan import Plan
from cost_model.prices import StagePrice, price_replicas
from cost_model.replicas import slowest_first
from cost_model.simulate import step_time_s

if TYPE_CHECKING:
    from autopar.planning import Job

MAX_TIGHTENINGS, TIE = 6, 1e-6
MOST_MOVES, MOST_DEVICES = 16, 128
"""So many cuts of a plan that was chosen are tried, on clusters of up to so many devices, where that is quick."""
SLACK = 0.03
"""A cut is rewritten and timed unless a sketch of it is slower than the plan by more than this, as sketches may err."""


def fitted(job: Job, solution: Solution) -> Iterator[Solution]:
    """A placed solution as it is and, where its stages' devices differ, with more segments on faster devices, and fewer
    where the rewritten program does not fit."""
    yield solution
    plan = job.plan(solution)
    kinds = [{job.cluster.devices[device] for device in own} for own in plan.stage_devices]
    if solution.configuration.virtual_stages > 1 or all(own == kinds[0] for own in kinds):
        return
    caps = job.stage_caps(plan)
    slow = _slowness(job, plan, solution)
    seconds = [each for stage in solution.stages for each in stage.segments_s]
    most = [len(seconds)] * plan.pp
    for _ in range(MAX_TIGHTENINGS):
        ends = shortest_ends(seconds, slow, most)
        if ends is None or ends == tuple(stage.last for stage in solution.stages):
            return
        other = cut_at(solution, ends)
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
    go round, the optimizer) is no part of what made stages equally long."""
    c, tried = solution.configuration, 0
    if c.virtual_stages > 1 or job.cluster.num_devices > MOST_DEVICES:
        return solution
    best, best_s, at = solution, timed_s(solution, math.inf), 0
    sketch: CutSketch | None = None
    moves = [(stage, by) for stage in range(c.pp - 1) for by in (1, -1)]
    while tried < min(MOST_MOVES, at + len(moves)):
        stage, by = moves[tried % len(moves)]
        tried += 1
        ends = [part.last for part in best.stages]
        ends[stage] += by
        if not 0 < ends[stage] - (ends[stage - 1] if stage else 0) or ends[stage] >= ends[stage + 1]:
            continue
        other = cut_at(best, tuple(ends))
        if sketch is None:
            sketch = CutSketch(job, best)
        if not sketch.is_within(other, SLACK):
            continue
        if (other_s := timed_s(other, best_s)) < best_s * (1 - TIE):
            best, best_s, at, sketch = other, other_s, tried, None
    return best


class CutSketch:
    """What a step takes with the segments of a plan in other stages, as far as the prices of its own stages tell."""

    def __init__(self, job: Job, solution: Solution) -> None:
        self._program = job.program(job.plan(solution))
        self._replicas = slowest_first(price_replicas(self._program, job.cluster), self._program.microbatches)
        self._own_s = [sum(stage.segments_s) for stage in solution.stages]
        self._once_bytes = [max(1, sum(c.nbytes for c in stage.step.collectives)) for stage in self._program.stages]
        self._base_s = step_time_s(self._program, self._replicas)

    def is_within(self, solution: Solution, slack: float) -> bool:
        """Whether other stages take no more than so much longer than those of the plan."""
        return math.isfinite(self.seconds(solution, self._base_s * (1 + slack)))

    def seconds(self, solution: Solution, limit_s: float = math.inf) -> float:
        """Of a step, infinite over a limit. What a stage does once a step, per byte as now, is of as many more bytes as
        it has more segments, by what these have on the stage with the least: an embedding stays where it is."""
        shares = [sum(s.segments_s) / own for s, own in zip(solution.stages, self._own_s, strict=True)]
        least = min(self._once_bytes)
        once = [1.0 + (share - 1.0) * least / own for share, own in zip(shares, self._once_bytes, strict=True)]
        cut = [list(map(_cut, prices, shares, once)) for prices in self._replicas]
        found = step_time_s(self._program, cut, limit_s=limit_s)
        return found if found <= limit_s else math.inf


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
