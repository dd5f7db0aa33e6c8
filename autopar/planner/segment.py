"""The best assignment of one segment for given prices, for all pairs of boundary labels at once.

Variable elimination: one variable after another is minimised out of the sum of the tables that
mention it, in an order found once per graph structure; numpy carries all prices together. Axes are
kept in elimination order, so that tables line up by reshaping and the variable to go is always the
first axis.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autopar.planner.factor_graph import FactorGraph, FloatArray
from cost_model.errors import UnsupportedError

IntArray = npt.NDArray[np.int64]
MAX_TABLE_ENTRIES = 20_000_000


@dataclass(frozen=True, order=True)
class Price:
    """What the dynamic program minimises: weighted seconds plus priced bytes.

    state_price, saved_price: weighted seconds per byte of state and per byte saved by one microbatch.
    """

    time_weight: float
    step_weight: float
    state_price: float = 0.0
    saved_price: float = 0.0

    def vector(self) -> tuple[float, float, float, float]:
        return (self.time_weight, self.step_weight, self.state_price, self.saved_price)


@dataclass(frozen=True, eq=False)
class SegmentTable:
    """Results for one price.

    cost: [entry, exit], infinite where nothing is allowed; totals: [entry, exit, 4] in the order of
    ``factor_graph.COMPONENTS``; labels: [variable, entry, exit] label indices of a best assignment.
    """

    cost: FloatArray
    totals: FloatArray
    labels: npt.NDArray[np.int16]


@dataclass(frozen=True)
class _Step:
    """A sum of tables over ``scope``, whose first variable goes; inputs: (table, its shape over the whole scope)."""

    scope: tuple[int, ...]
    inputs: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True, eq=False)
class _Elimination:
    """scopes: each factor's variables in elimination order; strides: [factor, variable] steps into the flat costs."""

    scopes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    strides: FloatArray
    steps: tuple[_Step, ...]
    final: _Step


class Segment:
    """A factor graph made ready for elimination; results are kept per price."""

    def __init__(self, graph: FactorGraph) -> None:
        self.graph = graph
        self.variables = tuple(graph.domains)
        index = {v: i for i, v in enumerate(self.variables)}
        sizes = tuple(len(graph.domains[v]) for v in self.variables)
        scopes = tuple(tuple(index[v] for v in factor.variables) for factor in graph.factors)
        kept = tuple(dict.fromkeys(index[v] for v in (graph.entry, graph.exit) if v is not None))
        self._sizes = sizes
        self._plan = _elimination(sizes, scopes, kept)
        self._flat, self._forbidden = _flatten(graph, scopes, self._plan)
        self._ends = tuple(None if v is None else index[v] for v in (graph.entry, graph.exit))
        self._done: dict[Price, SegmentTable] = {}

    def solve(self, prices: Sequence[Price]) -> tuple[SegmentTable, ...]:
        """One table per price, each computed once."""
        fresh = [price for price in dict.fromkeys(prices) if price not in self._done]
        if fresh:
            self._done.update(zip(fresh, self._solve(fresh), strict=True))
        return tuple(self._done[price] for price in prices)

    def assignment(self, price: Price, entry: int, exit: int) -> dict[str, str]:
        """Labels of a best assignment for one pair of boundary labels."""
        (table,) = self.solve((price,))
        assert np.isfinite(table.cost[entry, exit])
        picked = table.labels[:, entry, exit]
        return {v: self.graph.domains[v][int(i)] for v, i in zip(self.variables, picked, strict=True)}

    def _solve(self, prices: Sequence[Price]) -> Iterable[SegmentTable]:
        weights = np.array([price.vector() for price in prices])
        costs = weights @ self._flat
        costs[:, self._forbidden] = np.inf
        tables, sums = self._tables(costs), []
        for step in self._plan.steps:
            sums.append(self._summed(tables, step, len(prices)))
            tables.append(sums[-1].min(axis=1))
        cost = self._pairs(self._summed(tables, self._plan.final, len(prices)))
        labels = self._substitute(sums, cost.shape)
        totals = self._totals(labels, cost)
        small = labels.astype(np.int16)
        return [SegmentTable(cost[k], totals[k], small[:, k]) for k in range(len(prices))]

    def _tables(self, costs: FloatArray) -> list[FloatArray]:
        """Each factor's costs, [price, one axis per variable in elimination order]."""
        tables = []
        for scope, offset in zip(self._plan.scopes, self._plan.offsets, strict=True):
            shape = tuple(self._sizes[v] for v in scope)
            tables.append(costs[:, offset : offset + math.prod(shape)].reshape(len(costs), *shape))
        return tables

    def _summed(self, tables: Sequence[FloatArray], step: _Step, prices: int) -> FloatArray:
        """[price, one axis per variable of the step's scope]."""
        total: FloatArray | None = None
        for table, shape in step.inputs:
            piece = tables[table].reshape(prices, *shape)
            total = piece if total is None else total + piece
        whole = (prices, *(self._sizes[v] for v in step.scope))
        if total is None:
            return np.zeros(whole)
        return total if total.shape == whole else np.broadcast_to(total, whole)

    def _pairs(self, cost: FloatArray) -> FloatArray:
        """[price, entry, exit] from [price, one axis per kept variable]; an absent end has one label."""
        entry, exit = self._ends
        if entry is not None and entry == exit:
            size = self._sizes[entry]
            spread = np.full((len(cost), size, size), np.inf)
            spread[:, np.arange(size), np.arange(size)] = cost
            return spread
        shape = tuple(1 if v is None else self._sizes[v] for v in (entry, exit))
        return cost.reshape(len(cost), *shape)

    def _substitute(self, sums: Sequence[FloatArray], shape: tuple[int, ...]) -> IntArray:
        """Label indices [variable, price, entry, exit], found from the last eliminated variable back."""
        where = np.indices(shape).reshape(3, -1)
        labels = np.zeros((len(self.variables), where.shape[1]), dtype=np.int64)
        for end, index in zip(self._ends, where[1:], strict=True):
            if end is not None:
                labels[end] = index
        for step, total in zip(reversed(self._plan.steps), reversed(sums), strict=True):
            rest = tuple(labels[v] for v in step.scope[1:])
            labels[step.scope[0]] = total[(where[0], slice(None), *rest)].argmin(axis=1)
        return labels.reshape(len(self.variables), *shape)

    def _totals(self, labels: IntArray, cost: FloatArray) -> FloatArray:
        """Exact [price, entry, exit, 4] sums of the chosen entries; infinite where the pair is impossible."""
        picked = labels.reshape(len(self.variables), -1)
        index = (self._plan.strides @ picked + np.array(self._plan.offsets, dtype=np.float64)[:, None]).astype(np.int64)
        totals = np.stack([row[index].sum(axis=0) for row in self._flat], axis=-1).reshape(*cost.shape, 4)
        totals[~np.isfinite(cost)] = np.inf
        return totals


def _flatten(
    graph: FactorGraph, scopes: tuple[tuple[int, ...], ...], plan: _Elimination
) -> tuple[FloatArray, IntArray]:
    """All factor entries in one [4, entry] array, and where time is infinite (held there as zero)."""
    sizes = [math.prod(len(graph.domains[v]) for v in factor.variables) for factor in graph.factors]
    flat = np.zeros((4, sum(sizes)))
    for factor, scope, ordered, offset, size in zip(
        graph.factors, scopes, plan.scopes, plan.offsets, sizes, strict=True
    ):
        axes = [scope.index(v) for v in ordered]
        for row, array in zip(flat, factor.components(), strict=True):
            if array is not None:
                row[offset : offset + size] = array.transpose(axes).ravel()
    forbidden = np.flatnonzero(np.isinf(flat[0]))
    flat[0, forbidden] = 0.0
    return flat, forbidden


@functools.lru_cache(maxsize=1024)
def _elimination(sizes: tuple[int, ...], scopes: tuple[tuple[int, ...], ...], kept: tuple[int, ...]) -> _Elimination:
    order = _order(sizes, scopes, kept)
    rank = {v: i for i, v in enumerate((*order, *kept))}
    ordered = tuple(tuple(sorted(scope, key=rank.__getitem__)) for scope in scopes)
    lengths = [math.prod(sizes[v] for v in scope) for scope in scopes]
    offsets = tuple(sum(lengths[:i]) for i in range(len(lengths)))
    strides = np.zeros((len(scopes), len(sizes)))
    for row, scope in zip(strides, ordered, strict=True):
        for axis, v in enumerate(scope):
            row[v] = math.prod(sizes[u] for u in scope[axis + 1 :])
    steps, final = _steps(sizes, ordered, order, kept, rank)
    return _Elimination(ordered, offsets, strides, steps, final)


def _steps(
    sizes: tuple[int, ...],
    scopes: tuple[tuple[int, ...], ...],
    order: tuple[int, ...],
    kept: tuple[int, ...],
    rank: dict[int, int],
) -> tuple[tuple[_Step, ...], _Step]:
    """The tables that meet at each variable, and those left for the kept ones."""
    alive = dict(enumerate(scopes))
    steps = []
    for v in order:
        meeting = [table for table, scope in alive.items() if v in scope]
        union = tuple(sorted({v}.union(*(alive[t] for t in meeting)), key=rank.__getitem__))
        if math.prod(sizes[u] for u in union) > MAX_TABLE_ENTRIES:
            raise UnsupportedError(
                f"a segment ties {len(union)} choices together, too many to search exactly; "
                "next: pin tp or split the module so that fewer values are live at once"
            )
        steps.append(_Step(union, tuple((t, _shape(alive[t], union, sizes)) for t in meeting)))
        for table in meeting:
            del alive[table]
        alive[len(scopes) + len(steps) - 1] = union[1:]
    return tuple(steps), _Step(kept, tuple((t, _shape(scope, kept, sizes)) for t, scope in alive.items()))


def _shape(scope: tuple[int, ...], union: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sizes[v] if v in scope else 1 for v in union)


def _order(sizes: tuple[int, ...], scopes: tuple[tuple[int, ...], ...], kept: tuple[int, ...]) -> tuple[int, ...]:
    """Greedy elimination order: smallest new table first, then least fill-in, then first named."""
    near: dict[int, set[int]] = {v: set() for v in range(len(sizes))}
    for scope in scopes:
        for v in scope:
            near[v].update(u for u in scope if u != v)
    scores = {v: _score(v, near, sizes) for v in near if v not in kept}
    order = []
    while scores:
        v = min(scores, key=scores.__getitem__)
        order.append(v)
        del scores[v]
        touched = set(near[v])
        for u in near.pop(v):
            near[u] |= touched
            near[u] -= {u, v}
        for u in touched.union(*(near[t] for t in touched)):
            if u in scores:
                scores[u] = _score(u, near, sizes)
    return tuple(order)


def _score(v: int, near: dict[int, set[int]], sizes: tuple[int, ...]) -> tuple[int, int, int]:
    around = near[v]
    entries = math.prod(sizes[u] for u in around) * sizes[v]
    missing = sum(len(around - near[u]) - 1 for u in around)
    return (entries, missing, v)
