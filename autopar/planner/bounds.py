"""Proven lower bounds of a configuration, and the memory prices that would raise them.

For any price of a byte, the least priced cost of a range less the price of its capacity bounds every
plan that fits (Lagrangian duality). Bounds of ranges add up along tilings, with whole segments and
agreeing labels; the slowest stage enters as itself (share 0), as the mean (share 1) or between.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autopar.planner.chain import IntArray
from autopar.planner.columns import SAVED, STATE, STEP, TIME, RangeTable
from autopar.planner.factor_graph import FloatArray
from autopar.planner.paths import Arcs, Ends, Sweep, bottleneck, levels_of, sweep
from autopar.planner.segment import Price
from cost_model.shared_cores import pipeline_passes

Weights = tuple[float, float]
TIME_ONLY: Weights = (1.0, 0.0)
STEP_ONLY: Weights = (0.0, 1.0)


@dataclass(frozen=True, eq=False)
class StageSpace:
    """The edges one stage may take: their numbers, and the bytes left on each for state and saved values, as many on
    all that are of one class; most_state_bytes: those left for state while it is updated."""

    stage: int
    held: int
    edges: IntArray
    capacity_bytes: FloatArray
    most_state_bytes: FloatArray

    def only(self, kept: npt.NDArray[np.bool_]) -> StageSpace:
        if kept.all():
            return self
        at = np.flatnonzero(kept)
        return StageSpace(self.stage, self.held, self.edges[at], self.capacity_bytes[at], self.most_state_bytes[at])

    def least_bytes_price(self) -> Price:
        return Price(0.0, 0.0, 1.0, float(self.held))

    def price(self, weights: Weights, byte_price: float) -> Price:
        return Price(*weights, byte_price, byte_price * self.held)


@dataclass(frozen=True)
class Objective:
    """waiting x sum of stages + slowest x slowest stage + largest step, over pp stages.

    part: of what 1f1b waits for other stages. crowding: ranks per core; those that wait leave theirs to the others.

    Stages that are equally slow compute for as long as microbatches take, and wait in part while the pipeline fills and
    drains; a stage beside which the others have nothing to do computes all microbatches as fast as its ranks have
    cores. What lies between is taken as linear: exact for all where each rank has a core.
    """

    pp: int
    microbatches: int
    part: float = 1.0
    crowding: float = 1.0

    @functools.cached_property
    def waiting(self) -> float:
        """How often each stage counts."""
        if self.pp == 1 or self.crowding == 1:
            return self.part
        filling = pipeline_passes(self.pp, self.microbatches, self.crowding) - self.microbatches
        return (self.microbatches + self.part * filling - self.lone) / (self.pp - 1)

    @functools.cached_property
    def slowest(self) -> float:
        """How often the slowest stage counts beside its place in the sum."""
        return max(0.0, self.lone - self.waiting)

    @property
    def lone(self) -> float:
        """How often a stage counts beside which the others have nothing to do: no step takes less than that."""
        return self.microbatches * max(1 / self.pp, 1 / self.crowding)

    @property
    def balanced(self) -> Weights:
        """Weights of a stage when all stages are as slow as each other; exact for pp = 1."""
        return (self.waiting + self.slowest / self.pp, 1 / self.pp)

    @property
    def along(self) -> Weights:
        """Weights of a stage that is not the slowest."""
        return (self.waiting, 1 / self.pp)

    @property
    def alone(self) -> Weights:
        """Weights of a stage that is both the slowest and the largest step."""
        return (self.lone, 1.0)

    @property
    def priced(self) -> tuple[Weights, ...]:
        """Weights that are combined with prices of memory."""
        return (self.balanced,) if self.pp == 1 else (self.balanced, TIME_ONLY)

    @property
    def free(self) -> tuple[Weights, ...]:
        """Weights used where memory costs nothing."""
        more = () if self.pp == 1 else (TIME_ONLY, STEP_ONLY, self.along, self.alone)
        return tuple(dict.fromkeys((self.balanced, *more)))

    @property
    def shares(self) -> tuple[float, ...]:
        return (1.0,) if self.pp == 1 else (0.0, 0.5, 1.0)


@dataclass(frozen=True, eq=False)
class Bound:
    """bound_s: no plan is faster. path: the edge of each stage that attains it; edge_s: [stage] the bound of
    tilings through each edge of its space. Without any tiling bound_s is the incumbent's and path empty."""

    bound_s: float
    path: tuple[int, ...]
    edge_s: tuple[FloatArray, ...]


def dual(table: RangeTable, space: StageSpace, weights: Weights) -> FloatArray:
    """[edge of the space] the largest proven lower bound of the weighted seconds; minus infinity if none is priced."""
    examples, kind = table.edges.alike(space.edges)
    at, capacity_bytes, best = space.edges[examples], space.capacity_bytes[examples], np.full(len(examples), -np.inf)
    for k, price in enumerate(table.prices):
        if (price.time_weight, price.step_weight) != weights:
            continue
        if price.state_price and price.saved_price != price.state_price * space.held:
            continue
        spare = price.state_price * capacity_bytes if price.state_price else 0.0
        best = np.maximum(best, table.edge_cost(at, k) - spare)
    found: FloatArray = best[kind]
    return found


def bound(table: RangeTable, spaces: tuple[StageSpace, ...], objective: Objective, incumbent_s: float) -> Bound:
    """The proven bound, never above the incumbent; infinite if nothing fits and there is no incumbent."""
    nodes = (len(table.chain) + 1) * table.edges.width
    starts, ends = terminals(table)
    lows = [_lows(table, space, objective) for space in spaces]
    joined = [Ends(table.edges.source[space.edges], table.edges.target[space.edges]) for space in spaces]
    floor_s, _ = bottleneck(joined, [low.time_s for low in lows], starts, ends, nodes)
    if not np.isfinite(floor_s):
        return Bound(incumbent_s, (), tuple(np.full(len(space.edges), np.inf) for space in spaces))
    ceiling_s = max(floor_s, incumbent_s * (1 + 1e-9) / objective.lone)
    arcs = [_arcs(table, *each, objective) for each in zip(spaces, joined, lows, strict=True)]
    levels = levels_of(arcs, floor_s, ceiling_s if np.isfinite(ceiling_s) else np.inf)
    return _tightest(spaces, objective, sweep(arcs, levels, starts, ends, nodes), incumbent_s)


def terminals(table: RangeTable) -> tuple[IntArray, IntArray]:
    """Nodes at which a tiling may start and end."""
    chain, width = table.chain, table.edges.width
    end = len(chain) * width
    return np.arange(len(chain.boundary_labels(0))), end + np.arange(len(chain.boundary_labels(len(chain))))


def steeper(table: RangeTable, space: StageSpace, edge: int, weights: Weights) -> Price | None:
    """The memory price at which the plans known for an edge say its bound would be best; None where memory
    is slack or the edge has left the space.

    Each known plan is a line over the price; the best price is where the lowest of them peaks (Kelley's cuts).
    """
    totals = table.edge_totals(np.array([edge]))[0]
    cost = weights[0] * totals[:, TIME] + weights[1] * totals[:, STEP]
    row = np.flatnonzero(space.edges == edge)
    if len(row) == 0:
        return None
    spare = space.capacity_bytes[row[0]]
    over = totals[:, STATE] + space.held * totals[:, SAVED] - spare
    big, small = over > 0, over <= 0
    if not big.any() or not small.any():
        return None
    gain = cost[small][None, :] - cost[big][:, None]
    byte_price = gain / (over[big][:, None] - over[small][None, :])
    level = np.where(byte_price > 0, cost[big][:, None] + byte_price * over[big][:, None], np.inf)
    if not np.isfinite(level.min()):
        return None
    # A plan that needs just the capacity ends many pairs at one level: only their largest price supports it.
    best = level <= level.min() * (1 + 1e-12)
    return space.price(weights, float(byte_price[best].max()))


@dataclass(frozen=True, eq=False)
class _Lows:
    """[edge] proven lower bounds: of time per microbatch, and of the seconds weighted in two ways."""

    time_s: FloatArray
    along_s: FloatArray
    balanced_s: FloatArray


def _lows(table: RangeTable, space: StageSpace, objective: Objective) -> _Lows:
    balanced = dual(table, space, objective.balanced)
    if objective.pp == 1:
        return _Lows(np.zeros_like(balanced), balanced, balanced)
    time, step = dual(table, space, TIME_ONLY), dual(table, space, STEP_ONLY)
    along = dual(table, space, objective.along)
    return _Lows(
        np.maximum(time, 0.0),
        np.maximum(along, _weighted(objective.along, time, step)),
        np.maximum(balanced, _weighted(objective.balanced, time, step)),
    )


def _weighted(weights: Weights, time: FloatArray, step: FloatArray) -> FloatArray:
    return weights[0] * time + weights[1] * step


def _arcs(table: RangeTable, space: StageSpace, ends: Ends, lows: _Lows, objective: Objective) -> Arcs:
    """With a sum for each share."""
    share = np.array(objective.shares)
    cost = (1 - share) * lows.along_s[:, None] + share * lows.balanced_s[:, None]
    return Arcs(ends, cost + table.edges.cut_s[space.edges, None], lows.time_s)


def _tightest(spaces: tuple[StageSpace, ...], objective: Objective, found: Sweep, incumbent_s: float) -> Bound:
    """Per level the best share counts, then the least level: the slowest stage is at some level."""
    values = found.total_s() + _apart(objective) * found.levels.lower_s
    level = int(values.max(axis=0).argmin())
    best = found.path(level, int(values[:, level].argmax()))
    path = tuple(int(space.edges[arc]) for space, arc in zip(spaces, best, strict=True))
    edge_s = tuple(_through(objective, found, stage) for stage in range(len(spaces)))
    return Bound(min(float(values[:, level].max()), incumbent_s), path, edge_s)


def _through(objective: Objective, found: Sweep, stage: int) -> FloatArray:
    slowest = np.maximum(found.levels.lower_s, found.arcs[stage].slow_s[:, None])
    values = found.through_s(stage)
    values += _apart(objective) * slowest[:, None]
    best = values[:, 0]
    for number in range(1, values.shape[1]):
        np.maximum(best, values[:, number], out=best)
    least: FloatArray = best.min(axis=1)
    return least


def _apart(objective: Objective) -> FloatArray:
    """[share, 1] how often the slowest stage counts as itself."""
    return (1 - np.array(objective.shares)[:, None]) * objective.slowest
