"""Worthwhile: which of the columns offered to stages with meshes of their own may be part of the best choice.

A tiling takes its way, the time of its slowest stage as often as a step waits for it, and the largest step of a stage.
Between stages there are few states, so the shortest way of stages up to some time and step is soon found. Boxes of
(time, step) are bounded by the shortest way up to their upper ends and what their lower ends cost, and halved while
that is less than the best tiling takes: columns that no box which is left has a use for are no part of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopar.planner.chain import IntArray
from autopar.planner.factor_graph import BoolArray, FloatArray
from autopar.planner.mixed_ilp import Offer

State = tuple[tuple[int, int], tuple[int, ...]]
"""((position in the chain, label there), devices used of each kind) before or after a stage."""
Way = tuple[Offer, State, State]
TIE = 1e-9
AT_ONCE, MOST_BOXES = 64, 2048
"""Boxes that are bounded at once, and that there may be: where more are left, many columns are as good as the best."""
FEW = 100
"""Ways of which an integer program chooses in no time."""


def worthwhile(offers: Sequence[Sequence[Offer]], devices: Sequence[int], microbatches: int) -> list[list[Offer]]:
    """The offers of each stage that lie on some tiling which uses all devices once and may be the best."""
    steps = _possible(offers, devices)
    if not all(steps):
        return [[] for _ in offers]
    stages = _stages(steps)
    times, largest = _distinct([s.time_s for s in stages]), _distinct([s.step_s for s in stages])
    boxes, best_s = np.array([[0, len(times) - 1, 0, len(largest) - 1]]), math.inf
    while 0 < len(boxes) <= MOST_BOXES:
        parts = [boxes[first : first + AT_ONCE] for first in range(0, len(boxes), AT_ONCE)]
        found = [_Shortest(stages, _Limits(times, largest, part, microbatches - 1)) for part in parts]
        best_s = min(best_s, *(each.best_s() for each in found))
        limit_s = best_s * (1 + TIE)
        worth = [each.worth(limit_s) for each in found]
        stages = [s.part(np.any(own, axis=0)) for s, own in zip(stages, zip(*worth, strict=True), strict=True)]
        boxes = boxes[np.concatenate([each.least_s for each in found]) <= limit_s]
        if sum(len(s.ways) for s in stages) <= FEW or (boxes[:, ::2] == boxes[:, 1::2]).all():
            break
        boxes = np.concatenate(list(_halves(boxes, times * (microbatches - 1), largest)))
    return [list({id(way[0]): way[0] for way in s.ways}.values()) for s in stages]


def _distinct(values: Sequence[FloatArray]) -> FloatArray:
    found: FloatArray = np.unique(np.concatenate(values))
    return found


def _halves(boxes: IntArray, times: FloatArray, largest: FloatArray) -> Iterator[IntArray]:
    """Of each box two, divided where its ends are farther apart in seconds of a step; points stay as they are."""
    along = times[boxes[:, 1]] - times[boxes[:, 0]] >= largest[boxes[:, 3]] - largest[boxes[:, 2]]
    points = (boxes[:, ::2] == boxes[:, 1::2]).all(axis=1)
    yield boxes[points]
    for own, (low, high) in ((along & ~points, (0, 1)), (~along & ~points, (2, 3))):
        middle = (boxes[own, low] + boxes[own, high]) // 2
        lower, upper = boxes[own].copy(), boxes[own].copy()
        lower[:, high], upper[:, low] = middle, middle + 1
        yield from (lower, upper)


@dataclass(frozen=True, eq=False)
class _Stage:
    """[way] the numbers of its states, of which there are so many before and after the stage, and its seconds."""

    ways: list[Way]
    before: IntArray
    after: IntArray
    counts: tuple[int, int]
    time_s: FloatArray
    cost_s: FloatArray
    step_s: FloatArray

    def part(self, kept: BoolArray) -> _Stage:
        """Some of the ways."""
        ways = [self.ways[number] for number in np.flatnonzero(kept).tolist()]
        arrays = {name: getattr(self, name)[kept] for name in ("before", "after", "time_s", "cost_s", "step_s")}
        return replace(self, ways=ways, **arrays)


def _stages(steps: Sequence[list[Way]]) -> list[_Stage]:
    before, found = {steps[0][0][1]: 0}, []
    for step in steps:
        after = {state: number for number, state in enumerate(dict.fromkeys(way[2] for way in step))}
        columns = [way[0].column for way in step]
        made = _Stage(
            ways=step,
            before=np.array([before[way[1]] for way in step]),
            after=np.array([after[way[2]] for way in step]),
            counts=(len(before), len(after)),
            time_s=np.array([c.time_s for c in columns]),
            cost_s=np.array([c.time_s + c.cut_s for c in columns]),
            step_s=np.array([c.step_s for c in columns]),
        )
        found.append(made)
        before = after
    return found


class _Limits:
    """[box] the least and largest time of the slowest stage, and step of a stage."""

    def __init__(self, times: FloatArray, largest: FloatArray, boxes: IntArray, waits: int) -> None:
        self.least_time_s, self.most_time_s = times[boxes[:, 0]], times[boxes[:, 1]]
        self.least_step_s, self.most_step_s = largest[boxes[:, 2]], largest[boxes[:, 3]]
        self.waits = waits

    def allow(self, stage: _Stage) -> BoolArray:
        """[way, box]"""
        allowed: BoolArray = (stage.time_s[:, None] <= self.most_time_s) & (stage.step_s[:, None] <= self.most_step_s)
        return allowed


class _Shortest:
    """The shortest ways to and from each state under the upper ends of boxes: reach, rest [stage][state, box]."""

    def __init__(self, stages: Sequence[_Stage], limits: _Limits) -> None:
        self.stages, self.limits = stages, limits
        self.allowed = [limits.allow(stage) for stage in stages]
        count = len(limits.most_time_s)
        costs = [np.where(a, s.cost_s[:, None], np.inf) for a, s in zip(self.allowed, stages, strict=True)]
        self.reach, rest = [np.zeros((1, count))], [np.zeros((1, count))]
        for stage, cost_s in zip(stages, costs, strict=True):
            self.reach.append(_least(self.reach[-1][stage.before] + cost_s, stage.after, stage.counts[1]))
        for stage, cost_s in zip(reversed(stages), reversed(costs), strict=True):
            rest.append(_least(rest[-1][stage.after] + cost_s, stage.before, stage.counts[0]))
        self.rest = rest[::-1]

    @property
    def least_s(self) -> FloatArray:
        """[box] what no tiling in it takes less than."""
        limits = self.limits
        found: FloatArray = self.rest[0][0] + limits.waits * limits.least_time_s + limits.least_step_s
        return found

    def best_s(self) -> float:
        """What the fastest of the shortest tilings takes."""
        along = self.rest[0][0]
        state, slowest, largest = np.zeros(len(along), dtype=np.int64), np.zeros(len(along)), np.zeros(len(along))
        for stage, allowed, rest in zip(self.stages, self.allowed, self.rest[1:], strict=True):
            onward_s = rest[stage.after] + stage.cost_s[:, None]
            way = np.where(allowed & (stage.before[:, None] == state), onward_s, np.inf).argmin(axis=0)
            state = stage.after[way]
            slowest, largest = np.maximum(slowest, stage.time_s[way]), np.maximum(largest, stage.step_s[way])
        return float((along + self.limits.waits * slowest + largest).min())

    def worth(self, limit_s: float) -> list[BoolArray]:
        """[stage][way] whether it is on a tiling that may take no longer."""
        limits, found = self.limits, list[BoolArray]()
        for stage, allowed, reach, rest in zip(self.stages, self.allowed, self.reach[:-1], self.rest[1:], strict=True):
            least_s = reach[stage.before] + stage.cost_s[:, None] + rest[stage.after]
            least_s += limits.waits * np.maximum(limits.least_time_s, stage.time_s[:, None])
            least_s += np.maximum(limits.least_step_s, stage.step_s[:, None])
            found.append(np.any(allowed & (least_s <= limit_s), axis=1))
        return found


def _least(values: FloatArray, states: IntArray, count: int) -> FloatArray:
    """[state, box] the least of each state's ways, of [way, box]; infinite where there is none."""
    order = np.argsort(states, kind="stable")
    first = np.flatnonzero(np.diff(states[order], prepend=-1))
    found = np.full((count, values.shape[1]), np.inf)
    found[states[order[first]]] = np.minimum.reduceat(values[order], first, axis=0)
    return found


def _possible(offers: Sequence[Sequence[Offer]], devices: Sequence[int]) -> list[list[Way]]:
    """Every way of each stage that lies on a tiling which uses all devices once; an empty stage where there is none."""
    reached: dict[tuple[int, int], set[tuple[int, ...]]] = {(0, 0): {(0,) * len(devices)}}
    steps: list[list[Way]] = []
    for own in offers:
        step: list[Way] = []
        for offer in own:
            c, size, most = offer.column, offer.devices, devices[offer.kind]
            for used in reached.get((c.first, c.entry), ()):
                if used[offer.kind] + size <= most:
                    after = _used(used, offer.kind, size)
                    step.append((offer, ((c.first, c.entry), used), ((c.last, c.exit), after)))
        steps.append(step)
        reached = {}
        for _, _, (place, used) in step:
            reached.setdefault(place, set()).add(used)
    alive = {(place, used) for place, known in reached.items() for used in known if used == tuple(devices)}
    for stage in reversed(range(len(steps))):
        steps[stage] = [way for way in steps[stage] if way[2] in alive]
        alive = {way[1] for way in steps[stage]}
    return steps


def _used(before: tuple[int, ...], kind: int, size: int) -> tuple[int, ...]:
    return (*before[:kind], before[kind] + size, *before[kind + 1 :])
