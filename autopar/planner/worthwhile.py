"""Worthwhile: which of the columns offered to stages may be part of the best choice, one column a stage.

A tiling takes its way, the time of its slowest stage as often as a step waits for it, and the largest step of a stage.
Between stages there are few places, so the shortest way of stages up to some time and step is soon found. Boxes of
(time, step) are bounded by the shortest way up to their upper ends and what their lower ends cost, and halved while
that is less than the best tiling takes: columns that no box which is left has a use for are no part of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from autopar.planner.chain import IntArray
from autopar.planner.factor_graph import BoolArray, FloatArray

TIE = 1e-9
AT_ONCE, MOST_BOXES = 64, 2048
"""Boxes that are bounded at once, and that there may be: where more are left, many columns are as good as the best."""


@dataclass(frozen=True, eq=False)
class Ways:
    """What one stage may be, as aligned arrays: before, after: the places it leads from and to; time_s: what each
    microbatch waits for it, cost_s: its part of the way, step_s: once a step. Tilings begin and end at place 0."""

    before: IntArray
    after: IntArray
    time_s: FloatArray
    cost_s: FloatArray
    step_s: FloatArray

    def part(self, kept: BoolArray | IntArray) -> Ways:
        """Some of them."""
        return Ways(*(values[kept] for values in vars(self).values()))


@dataclass(frozen=True, eq=False)
class Worthwhile:
    """kept: [stage] numbers of the ways that may be part of the best tiling, one each where a tiling is known to be the
    best, none where there is no tiling; bound_s: no tiling takes less."""

    kept: tuple[IntArray, ...]
    bound_s: float


def worthwhile(ways: Sequence[Ways], microbatches: float, enough_s: float = math.inf) -> Worthwhile:
    """Of each stage, the ways that lie on some tiling which may be the best; no more is looked at once it takes longer
    than ``enough_s``."""
    stages, kept = list(ways), [np.arange(len(own.before)) for own in ways]
    if not all(map(len, kept)):
        return Worthwhile(tuple(own[:0] for own in kept), math.inf)
    times, largest = _distinct([s.time_s for s in stages]), _distinct([s.step_s for s in stages])
    boxes, best_s, best = np.array([[0, len(times) - 1, 0, len(largest) - 1]]), math.inf, list[IntArray]()
    while True:
        parts = [boxes[first : first + AT_ONCE] for first in range(0, len(boxes), AT_ONCE)]
        found = [_Shortest(stages, _Limits(times, largest, part, microbatches - 1)) for part in parts]
        for found_s, path in (each.best() for each in found):
            if found_s < best_s:
                best_s, best = found_s, [own[way] for own, way in zip(kept, path, strict=True)]
        if math.isinf(best_s):
            return Worthwhile(tuple(own[:0] for own in kept), math.inf)
        limit_s = best_s * (1 + TIE)
        worth = [np.any(own, axis=0) for own in zip(*(each.worth(limit_s) for each in found), strict=True)]
        stages = [s.part(own) for s, own in zip(stages, worth, strict=True)]
        kept = [numbers[own] for numbers, own in zip(kept, worth, strict=True)]
        least_s = np.concatenate([each.least_s for each in found])
        boxes, least_s = boxes[least_s <= limit_s], least_s[least_s <= limit_s]
        bound_s = min(best_s, float(least_s.min(initial=math.inf)))
        if bound_s >= best_s * (1 - TIE):
            return Worthwhile(tuple(best), bound_s)
        if bound_s > enough_s or len(boxes) > MOST_BOXES or (boxes[:, ::2] == boxes[:, 1::2]).all():
            return Worthwhile(tuple(kept), bound_s)
        boxes = np.concatenate(list(_halves(boxes, times * (microbatches - 1), largest)))


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


class _Limits:
    """[box] the least and largest time of the slowest stage, and step of a stage."""

    def __init__(self, times: FloatArray, largest: FloatArray, boxes: IntArray, waits: float) -> None:
        self.least_time_s, self.most_time_s = times[boxes[:, 0]], times[boxes[:, 1]]
        self.least_step_s, self.most_step_s = largest[boxes[:, 2]], largest[boxes[:, 3]]
        self.waits = waits

    def allow(self, stage: Ways) -> BoolArray:
        """[way, box]"""
        allowed: BoolArray = (stage.time_s[:, None] <= self.most_time_s) & (stage.step_s[:, None] <= self.most_step_s)
        return allowed


class _Shortest:
    """The shortest ways to and from each place under the upper ends of boxes: reach, rest [stage][place, box]."""

    def __init__(self, stages: Sequence[Ways], limits: _Limits) -> None:
        self.stages, self.limits = stages, limits
        self.allowed = [limits.allow(stage) for stage in stages]
        count = len(limits.most_time_s)
        costs = [np.where(a, s.cost_s[:, None], np.inf) for a, s in zip(self.allowed, stages, strict=True)]
        places = 1 + max(int(max(s.before.max(initial=0), s.after.max(initial=0))) for s in stages)
        ends = np.full((places, count), np.inf)
        ends[0] = 0.0
        self.reach, rest = [ends], [ends]
        for stage, cost_s in zip(stages, costs, strict=True):
            self.reach.append(_least(self.reach[-1][stage.before] + cost_s, stage.after, places))
        for stage, cost_s in zip(reversed(stages), reversed(costs), strict=True):
            rest.append(_least(rest[-1][stage.after] + cost_s, stage.before, places))
        self.rest = rest[::-1]

    @property
    def least_s(self) -> FloatArray:
        """[box] what no tiling in it takes less than."""
        limits = self.limits
        found: FloatArray = self.rest[0][0] + limits.waits * limits.least_time_s + limits.least_step_s
        return found

    def best(self) -> tuple[float, list[IntArray]]:
        """What the fastest of the shortest tilings takes, and the way of each stage, [1]."""
        along, path = self.rest[0][0], list[IntArray]()
        state, slowest, largest = np.zeros(len(along), dtype=np.int64), np.zeros(len(along)), np.zeros(len(along))
        for stage, allowed, rest in zip(self.stages, self.allowed, self.rest[1:], strict=True):
            onward_s = rest[stage.after] + stage.cost_s[:, None]
            way = np.where(allowed & (stage.before[:, None] == state), onward_s, np.inf).argmin(axis=0)
            path.append(way)
            state = stage.after[way]
            slowest, largest = np.maximum(slowest, stage.time_s[way]), np.maximum(largest, stage.step_s[way])
        step_s = along + self.limits.waits * slowest + largest
        box = int(step_s.argmin())
        return float(step_s[box]), [way[box : box + 1] for way in path]

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
