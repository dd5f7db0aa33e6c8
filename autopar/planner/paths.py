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

    Both are [stage][level, node]: ``reach[s]`` before stage s, ``rest[s]`` too.
    """

    arcs: tuple[Arcs, ...]
    levels: Levels
    reach: tuple[FloatArray, ...]
    rest: tuple[FloatArray, ...]

    def total_s(self) -> FloatArray:
        """[level] the shortest sum over a whole tiling."""
        total: FloatArray = (self.reach[0] + self.rest[0]).min(axis=1)
        return total

    def through_s(self, stage: int) -> FloatArray:
        """[level, arc] the shortest sum over tilings with this arc at this stage; infinite above the level."""
        arcs = self.arcs[stage]
        around = self.reach[stage][:, arcs.source] + self.rest[stage + 1][:, arcs.target]
        return around + _allowed_cost(arcs, self.levels)

    def path(self, level: int) -> tuple[int, ...]:
        """The arc of each stage on a shortest tiling at a level; the first of equal ones."""
        start = self.reach[0][level] + self.rest[0][level]
        node, chosen = int(start.argmin()), []
        for stage, arcs in enumerate(self.arcs):
            cost = np.where(arcs.slow_s <= self.levels.upper_s[level], arcs.cost_s, np.inf)
            onward = np.where(arcs.source == node, cost + self.rest[stage + 1][level][arcs.target], np.inf)
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
    reach = [np.full((count, nodes), np.inf)]
    reach[0][:, starts] = 0.0
    for a in arcs:
        reach.append(_relaxed(reach[-1][:, a.source] + _allowed_cost(a, levels), a.target, nodes))
    rest = [np.full((count, nodes), np.inf)]
    rest[0][:, ends] = 0.0
    for a in reversed(arcs):
        rest.append(_relaxed(rest[-1][:, a.target] + _allowed_cost(a, levels), a.source, nodes))
    return Sweep(tuple(arcs), levels, tuple(reach), tuple(rest[::-1]))


def bottleneck(arcs: Sequence[Arcs], starts: IntArray, ends: IntArray, nodes: int) -> tuple[float, tuple[int, ...]]:
    """The tiling whose largest ``cost_s`` is least: that cost, and the arc of each stage; no arcs if none exists."""
    reach = [np.full(nodes, np.inf)]
    reach[0][starts] = 0.0
    for a in arcs:
        reach.append(_relaxed(np.maximum(reach[-1][a.source], a.cost_s)[None], a.target, nodes)[0])
    node = int(ends[reach[-1][ends].argmin()])
    worst, chosen = float(reach[-1][node]), []
    if not np.isfinite(worst):
        return worst, ()
    for before, a in zip(reversed(reach[:-1]), reversed(arcs), strict=True):
        arrive = np.where(a.target == node, np.maximum(before[a.source], a.cost_s), np.inf)
        chosen.append(int(arrive.argmin()))
        node = int(a.source[chosen[-1]])
    return worst, tuple(chosen[::-1])


def _allowed_cost(arcs: Arcs, levels: Levels) -> FloatArray:
    """[level, arc] cost, infinite where the arc is slower than the level."""
    return np.where(arcs.slow_s[None, :] <= levels.upper_s[:, None], arcs.cost_s[None, :], np.inf)


def _relaxed(values: FloatArray, nodes_of: IntArray, nodes: int) -> FloatArray:
    """[level, node] least of the values [level, arc] that fall on each node."""
    best = np.full((len(values), nodes), np.inf)
    if values.shape[1] == 0:
        return best
    if (nodes_of[1:] < nodes_of[:-1]).any():
        order = np.argsort(nodes_of, kind="stable")
        values, nodes_of = values[:, order], nodes_of[order]
    starts = np.flatnonzero(np.concatenate([[True], nodes_of[1:] != nodes_of[:-1]]))
    best[:, nodes_of[starts]] = np.minimum.reduceat(values, starts, axis=1)
    return best
