"""Shortest tilings of a chain by stages, for many limits on the slowest stage at once.

An arc is a stage over a range with its two boundary labels; a node is (position, label). For a fixed
limit on the slowest stage the objective is a sum over stages, hence a shortest path.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autopar.planner.chain import IntArray
from autopar.planner.factor_graph import FloatArray

LEVELS = (8, 64)
LEVEL_ARCS = 500_000
_WIDE = 4
"""So many rows are worth a step of their own."""


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows that end at the same node, in an order in which the least of each node's are found by few steps.

    order: the rows; nodes: those that any ends at, the ones of most rows first. The n-th part of the order has the n-th
    rows of the first ``counts[n]`` nodes; after these parts come all further rows of the first nodes, whose begin there
    are ``rest``.
    """

    order: IntArray
    nodes: IntArray
    counts: tuple[int, ...]
    rest: IntArray

    def least(self, rows: FloatArray) -> FloatArray:
        """[node of ``nodes``, ...] of rows in ``order``, which are overwritten."""
        best, at = rows[: len(self.nodes)], len(self.nodes)
        for count in self.counts[1:]:
            np.minimum(best[:count], rows[at : at + count], out=best[:count])
            at += count
        if count := len(self.rest):
            least = np.minimum.reduceat(rows[at:], self.rest, axis=0)
            np.minimum(best[:count], least, out=best[:count])
        return best


def grouped(ends: IntArray) -> Groups:
    """ends: the node of each row. Grouped once: most stages of a search have rows between the same nodes."""
    return _grouped(ends.tobytes())


@functools.lru_cache(maxsize=256)
def _grouped(raw: bytes) -> Groups:
    ends = np.frombuffer(raw, dtype=np.int64)
    together = np.argsort(ends, kind="stable")
    ordered = ends[together]
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    sizes = np.diff(first, append=len(ends))
    largest = np.argsort(-sizes, kind="stable")
    nodes, sorted_sizes = ordered[first[largest]], sizes[largest]
    parts = int(sorted_sizes[_WIDE - 1]) if len(sizes) >= _WIDE else 1
    number = np.arange(len(ends)) - np.repeat(first, sizes)
    counts = np.bincount(np.minimum(number, parts), minlength=parts + 1)[:parts]
    rest = np.maximum(sorted_sizes - parts, 0)
    begin = np.cumsum(rest) - rest
    rank = np.empty_like(largest)
    rank[largest] = np.arange(len(largest))
    row = np.repeat(rank, sizes)
    after = np.concatenate([np.cumsum(counts) - counts, [counts.sum()]])
    place = after[np.minimum(number, parts)] + np.where(number < parts, row, begin[row] + number - parts)
    order = np.empty_like(together)
    order[place] = together
    return Groups(order, nodes, tuple(counts.tolist()), begin[rest > 0])


@dataclass(frozen=True, eq=False)
class Ends:
    """The two nodes of each arc."""

    source: IntArray
    target: IntArray

    @cached_property
    def by_source(self) -> Groups:
        return grouped(self.source)

    @cached_property
    def by_target(self) -> Groups:
        return grouped(self.target)


@dataclass(frozen=True, eq=False)
class Arcs:
    """What one stage may be, as aligned arrays.

    ends: nodes; cost_s: [arc, sum] its part of each of some sums; slow_s: a lower bound of its time. Arcs with infinite
    cost do not exist.
    """

    ends: Ends
    cost_s: FloatArray
    slow_s: FloatArray

    @property
    def source(self) -> IntArray:
        return self.ends.source

    @property
    def target(self) -> IntArray:
        return self.ends.target


@dataclass(frozen=True, eq=False)
class Levels:
    """Intervals of slowest-stage time: stages up to ``upper_s``, the slowest of them at least ``lower_s``."""

    lower_s: FloatArray
    upper_s: FloatArray


@dataclass(frozen=True, eq=False)
class Sweep:
    """Shortest sums from the start to each node (``reach``) and from each node to the end (``rest``).

    Both are [stage][node, sum, level], whose rows are added and compared as a whole: ``reach[s]`` before stage s,
    ``rest[s]`` too.
    """

    arcs: tuple[Arcs, ...]
    levels: Levels
    reach: tuple[FloatArray, ...]
    rest: tuple[FloatArray, ...]

    def total_s(self) -> FloatArray:
        """[sum, level] the shortest sum over a whole tiling."""
        total: FloatArray = (self.reach[0] + self.rest[0]).min(axis=0)
        return total

    def through_s(self, stage: int) -> FloatArray:
        """[arc, sum, level] the shortest sum over tilings with this arc at this stage; infinite above the level."""
        arcs = self.arcs[stage]
        around: FloatArray = self.reach[stage][arcs.source]
        around += self.rest[stage + 1][arcs.target]
        return _along(around, arcs.cost_s, arcs.slow_s, self.levels)

    def path(self, level: int, number: int = 0) -> tuple[int, ...]:
        """The arc of each stage on a tiling whose sum of this number is the shortest at a level; the first of equal
        ones."""
        start = self.reach[0][:, number, level] + self.rest[0][:, number, level]
        node, chosen = int(start.argmin()), []
        for stage, arcs in enumerate(self.arcs):
            cost = np.where(arcs.slow_s <= self.levels.upper_s[level], arcs.cost_s[:, number], np.inf)
            onward = np.where(arcs.source == node, cost + self.rest[stage + 1][arcs.target, number, level], np.inf)
            chosen.append(int(onward.argmin()))
            node = int(arcs.target[chosen[-1]])
        return tuple(chosen)


def levels_of(arcs: Sequence[Arcs], floor_s: float, ceiling_s: float) -> Levels:
    """Levels at the distinct stage times within [floor_s, ceiling_s]; quantiles of them if they are many.

    Long chains get fewer levels, so that a sweep's arrays keep their size; the levels stay exhaustive.
    """
    slow = np.unique(np.concatenate([a.slow_s[np.isfinite(a.cost_s).all(axis=1)] for a in arcs]))
    slow = slow[(slow >= floor_s) & (slow <= ceiling_s)]
    if len(slow) == 0:
        return Levels(np.array([floor_s]), np.array([ceiling_s]))
    wanted = min(len(slow), int(np.clip(LEVEL_ARCS // max(len(a.source) for a in arcs), *LEVELS)))
    picked = np.unique(np.linspace(0, len(slow) - 1, wanted).round().astype(np.int64))
    below = np.concatenate([[0], picked[:-1] + 1])
    return Levels(slow[below], slow[picked])


def sweep(arcs: Sequence[Arcs], levels: Levels, starts: IntArray, ends: IntArray, nodes: int) -> Sweep:
    """Forward and backward shortest sums at every level."""
    shape = (nodes, arcs[0].cost_s.shape[1], len(levels.upper_s))
    reach = [np.full(shape, np.inf)]
    reach[0][starts] = 0.0
    for a in arcs:
        reach.append(_onward(reach[-1], a, a.source, a.ends.by_target, levels))
    rest = [np.full(shape, np.inf)]
    rest[0][ends] = 0.0
    for a in reversed(arcs):
        rest.append(_onward(rest[-1], a, a.target, a.ends.by_source, levels))
    return Sweep(tuple(arcs), levels, tuple(reach), tuple(rest[::-1]))


def bottleneck(
    joined: Sequence[Ends], costs_s: Sequence[FloatArray], starts: IntArray, ends: IntArray, nodes: int
) -> tuple[float, tuple[int, ...]]:
    """The tiling whose largest cost is least: that cost, and the arc of each stage; no arcs if none exists.

    costs_s: [stage][arc]
    """
    reach = [np.full(nodes, np.inf)]
    reach[0][starts] = 0.0
    for own, cost_s in zip(joined, costs_s, strict=True):
        groups = own.by_target
        reach.append(np.full(nodes, np.inf))
        reach[-1][groups.nodes] = groups.least(np.maximum(reach[-2][own.source], cost_s)[groups.order])
    node = int(ends[reach[-1][ends].argmin()])
    worst, chosen = float(reach[-1][node]), []
    if not np.isfinite(worst):
        return worst, ()
    for before, own, cost_s in zip(reversed(reach[:-1]), reversed(joined), reversed(costs_s), strict=True):
        arrive = np.where(own.target == node, np.maximum(before[own.source], cost_s), np.inf)
        chosen.append(int(arrive.argmin()))
        node = int(own.source[chosen[-1]])
    return worst, tuple(chosen[::-1])


def _along(sums: FloatArray, cost_s: FloatArray, slow_s: FloatArray, levels: Levels) -> FloatArray:
    """[arc, sum, level] sums with the arcs' costs, in place; infinite where an arc is slower than the level."""
    sums += cost_s[:, :, None]
    np.copyto(sums, np.inf, where=(slow_s[:, None] > levels.upper_s)[:, None])
    return sums


def _onward(before: FloatArray, arcs: Arcs, source: IntArray, groups: Groups, levels: Levels) -> FloatArray:
    """[node, sum, level] least sums at the ends of arcs by which they are grouped, of those at their other ends."""
    best, order = np.full(before.shape, np.inf), groups.order
    sums = _along(before[source[order]], arcs.cost_s[order], arcs.slow_s[order], levels)
    best[groups.nodes] = groups.least(sums)
    return best
