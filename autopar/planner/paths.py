"""Shortest tilings of a chain by stages, for many limits on the slowest stage at once.

An arc is a stage over a range with its two boundary labels; a node is (position, label). For a fixed
limit on the slowest stage the objective is a sum over stages, hence a shortest path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.planner.chain import IntArray
from autopar.planner.factor_graph import FloatArray

LEVELS = (8, 64)
LEVEL_ARCS = 500_000


@dataclass(frozen=True, eq=False)
class Arcs:
    """What one stage may be, as aligned arrays.

    source, target: nodes; cost_s: its part of the sum; slow_s: a lower bound of its time.
    Arcs with infinite cost do not exist.
    """

    source: IntArray
    target: IntArray
    cost_s: FloatArray
    slow_s: FloatArray


@dataclass(frozen=True, eq=False)
class Levels:
    """Intervals of slowest-stage time: stages up to ``upper_s``, the slowest of them at least ``lower_s``."""

    lower_s: FloatArray
    upper_s: FloatArray


@dataclass(frozen=True, eq=False)
class Sweep:
    """Shortest sums from the start to each node (``reach``) and from each node to the end (``rest``).

    Both are [stage][node, level], whose rows of levels are added and compared as a whole: ``reach[s]`` before stage s,
    ``rest[s]`` too.
    """

    arcs: tuple[Arcs, ...]
    levels: Levels
    reach: tuple[FloatArray, ...]
    rest: tuple[FloatArray, ...]

    def total_s(self) -> FloatArray:
        """[level] the shortest sum over a whole tiling."""
        total: FloatArray = (self.reach[0] + self.rest[0]).min(axis=0)
        return total

    def through_s(self, stage: int) -> FloatArray:
        """[arc, level] the shortest sum over tilings with this arc at this stage; infinite above the level."""
        arcs = self.arcs[stage]
        around: FloatArray = self.reach[stage][arcs.source]
        around += self.rest[stage + 1][arcs.target]
        return _along(around, arcs.cost_s, arcs.slow_s, self.levels)

    def path(self, level: int) -> tuple[int, ...]:
        """The arc of each stage on a shortest tiling at a level; the first of equal ones."""
        start = self.reach[0][:, level] + self.rest[0][:, level]
        node, chosen = int(start.argmin()), []
        for stage, arcs in enumerate(self.arcs):
            cost = np.where(arcs.slow_s <= self.levels.upper_s[level], arcs.cost_s, np.inf)
            onward = np.where(arcs.source == node, cost + self.rest[stage + 1][arcs.target, level], np.inf)
            chosen.append(int(onward.argmin()))
            node = int(arcs.target[chosen[-1]])
        return tuple(chosen)


def levels_of(arcs: Sequence[Arcs], floor_s: float, ceiling_s: float) -> Levels:
    """Levels at the distinct stage times within [floor_s, ceiling_s]; quantiles of them if they are many.

    Long chains get fewer levels, so that a sweep's arrays keep their size; the levels stay exhaustive.
    """
    slow = np.unique(np.concatenate([a.slow_s[np.isfinite(a.cost_s)] for a in arcs]))
    slow = slow[(slow >= floor_s) & (slow <= ceiling_s)]
    if len(slow) == 0:
        return Levels(np.array([floor_s]), np.array([ceiling_s]))
    wanted = min(len(slow), int(np.clip(LEVEL_ARCS // max(len(a.source) for a in arcs), *LEVELS)))
    picked = np.unique(np.linspace(0, len(slow) - 1, wanted).round().astype(np.int64))
    below = np.concatenate([[0], picked[:-1] + 1])
    return Levels(slow[below], slow[picked])


def sweep(arcs: Sequence[Arcs], levels: Levels, starts: IntArray, ends: IntArray, nodes: int) -> Sweep:
    """Forward and backward shortest sums at every level."""
    count = len(levels.upper_s)
    reach = [np.full((nodes, count), np.inf)]
    reach[0][starts] = 0.0
    for a in arcs:
        reach.append(_onward(reach[-1], a, a.source, a.target, levels))
    rest = [np.full((nodes, count), np.inf)]
    rest[0][ends] = 0.0
    for a in reversed(arcs):
        rest.append(_onward(rest[-1], a, a.target, a.source, levels))
    return Sweep(tuple(arcs), levels, tuple(reach), tuple(rest[::-1]))


def bottleneck(arcs: Sequence[Arcs], starts: IntArray, ends: IntArray, nodes: int) -> tuple[float, tuple[int, ...]]:
    """The tiling whose largest ``cost_s`` is least: that cost, and the arc of each stage; no arcs if none exists."""
    reach = [np.full(nodes, np.inf)]
    reach[0][starts] = 0.0
    for a in arcs:
        order, first, reached = _grouped(a.target)
        reach.append(np.full(nodes, np.inf))
        reach[-1][reached] = np.minimum.reduceat(np.maximum(reach[-2][a.source], a.cost_s)[order], first)
    node = int(ends[reach[-1][ends].argmin()])
    worst, chosen = float(reach[-1][node]), []
    if not np.isfinite(worst):
        return worst, ()
    for before, a in zip(reversed(reach[:-1]), reversed(arcs), strict=True):
        arrive = np.where(a.target == node, np.maximum(before[a.source], a.cost_s), np.inf)
        chosen.append(int(arrive.argmin()))
        node = int(a.source[chosen[-1]])
    return worst, tuple(chosen[::-1])


def _along(sums: FloatArray, cost_s: FloatArray, slow_s: FloatArray, levels: Levels) -> FloatArray:
    """[arc, level] sums with the arcs' costs, in place; infinite where an arc is slower than the level."""
    sums += cost_s[:, None]
    sums[slow_s[:, None] > levels.upper_s] = np.inf
    return sums


def _onward(before: FloatArray, arcs: Arcs, source: IntArray, target: IntArray, levels: Levels) -> FloatArray:
    """[node, level] least sums at the targets of arcs, of those at their sources."""
    best = np.full(before.shape, np.inf)
    order, first, reached = _grouped(target)
    sums = _along(before[source[order]], arcs.cost_s[order], arcs.slow_s[order], levels)
    best[reached] = np.minimum.reduceat(sums, first, axis=0)
    return best


def _grouped(nodes: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """An order in which equal nodes stand together, where each group begins in it, and its node."""
    order = np.argsort(nodes, kind="stable")
    ordered = nodes[order]
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    return order, first, ordered[first]
