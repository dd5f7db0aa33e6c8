"""The best assignment of one segment for given prices, for all pairs of boundary labels at once.

Variable elimination: one variable after another is minimised out of the sum of the tables that
mention it, in an order found once per graph structure; numpy carries all prices together. Axes are
kept in elimination order, so that tables line up by reshaping and the variable to go is always the
first axis.

A segment whose tables would be too large is bounded (``elimination``), and the labels that the bound's
parts agree on best are an assignment: what it costs is known exactly, and how far from the best at most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autopar.planner.elimination import Elimination, Scope, Step, Sum, elimination, shape_over
from autopar.planner.factor_graph import FactorGraph, FloatArray

IntArray = npt.NDArray[np.int64]
_EQUAL = 1 - 1e-9
"""A cost times this is below one that is equal but for rounding."""


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

    cost: [entry, exit] no assignment costs less; infinite where none is allowed, or none was found. totals: [entry,
    exit, 4] of the assignment found, in the order of ``factor_graph.COMPONENTS``, which cost as much where the search
    is exact; labels: [variable, entry, exit] its label indices.
    """

    cost: FloatArray
    totals: FloatArray
    labels: npt.NDArray[np.int16]


class Segment:
    """A factor graph made ready for elimination; results are kept per price."""

    def __init__(self, graph: FactorGraph) -> None:
        self.graph = graph
        self.variables = tuple(graph.domains)
        index = {v: i for i, v in enumerate(self.variables)}
        sizes = tuple(len(graph.domains[v]) for v in self.variables)
        kept = tuple(dict.fromkeys(index[v] for v in (graph.entry, graph.exit) if v is not None))
        scopes = tuple(tuple(index[v] for v in f.variables if sizes[index[v]] > 1) for f in graph.factors)
        self._sizes, self._kept = sizes, kept
        tables = tuple(dict.fromkeys(scopes))  # factors of the same variables are one table
        self._plan = elimination(sizes, tables, kept)
        self._flat, self._forbidden = _flatten(graph, scopes, tables, self._plan)
        self._ends = tuple(None if v is None else index[v] for v in (graph.entry, graph.exit))
        pairs = (len(graph.entry_labels), len(graph.exit_labels))
        self._found = np.zeros((len(sizes), 1, *pairs), dtype=np.int64), np.full((1, *pairs, 4), np.inf)
        self._done: dict[Price, SegmentTable] = {}
        self._least: dict[Price, FloatArray] = {}

    def solve(self, prices: Sequence[Price]) -> tuple[SegmentTable, ...]:
        """One table per price, each computed once."""
        fresh = [price for price in dict.fromkeys(prices) if price not in self._done]
        if fresh:
            self._done.update(zip(fresh, self._solve(fresh), strict=True))
        return tuple(self._done[price] for price in prices)

    def costs(self, prices: Sequence[Price]) -> FloatArray:
        """[price, entry, exit] as ``SegmentTable.cost``, in about half the time where nothing else is asked for."""
        if not self.exact:
            return np.stack([table.cost for table in self.solve(prices)])
        fresh = [price for price in dict.fromkeys(prices) if price not in self._least and price not in self._done]
        if fresh:
            self._least.update(zip(fresh, self._eliminated(self._priced(fresh))[0], strict=True))
        return np.stack([self._least[p] if p in self._least else self._done[p].cost for p in prices])

    def assignment(self, price: Price, entry: int, exit: int) -> dict[str, str]:
        """Labels of a best assignment for one pair of boundary labels."""
        (table,) = self.solve((price,))
        assert np.isfinite(table.cost[entry, exit])
        picked = table.labels[:, entry, exit]
        return {v: self.graph.domains[v][int(i)] for v, i in zip(self.variables, picked, strict=True)}

    @property
    def entries(self) -> int:
        """Of all tables that ``solve`` makes for one price."""
        return sum(math.prod(self._sizes[v] for v in part.scope) for step in self._plan.steps for part in step.sums)

    @property
    def exact(self) -> bool:
        """Whether assignments are proved to be best; else ``SegmentTable.cost`` bounds them."""
        return self._plan.exact

    def _solve(self, prices: Sequence[Price]) -> Iterable[SegmentTable]:
        costs = self._priced(prices)
        cost, sums = self._eliminated(costs)
        labels = self._substitute(sums, cost.shape)
        totals = self._totals(labels, costs)
        totals[~np.isfinite(cost)] = np.inf
        if not self.exact:
            weights = _weights(prices)
            labels, totals = self._allowed(*self._improved(prices, weights, cost, labels, totals))
            cost = np.where(np.isfinite(totals[..., 0]), np.minimum(cost, _priced(weights, totals)), np.inf)
        small = labels.astype(np.int16)
        return [SegmentTable(cost[k], totals[k], small[:, k]) for k in range(len(prices))]

    def _priced(self, prices: Sequence[Price]) -> FloatArray:
        """[price, entry of a factor]"""
        costs: FloatArray = _weights(prices) @ self._flat
        costs[:, self._forbidden] = np.inf
        return costs

    def _eliminated(self, costs: FloatArray) -> tuple[FloatArray, list[list[FloatArray]]]:
        """[price, entry, exit] the least sums of entries of factors, and the sums of each step."""
        tables, sums = self._tables(costs), list[list[FloatArray]]()
        for step in self._plan.steps:
            sums.append(self._alike(step, [self._summed(tables, part, len(costs)) for part in step.sums]))
            tables += [np.minimum.reduce(total, axis=1) for total in sums[-1]]
        return self._pairs(self._summed(tables, self._plan.final, len(costs))), sums

    def _alike(self, step: Step, totals: list[FloatArray]) -> list[FloatArray]:
        """The same sum in parts that all take equally much at least for the labels of what they share, which makes
        their bound tighter (cost shifting; Ihler et al., UAI 2012)."""
        if len(totals) == 1:
            return totals
        shared, prices = step.shared, len(totals[0])
        others = [tuple(i + 1 for i, v in enumerate(part.scope) if v not in shared) for part in step.sums]
        least = [total.min(axis=axes) for total, axes in zip(totals, others, strict=True)]
        mean: FloatArray = np.sum(least, axis=0) / len(least)
        moved = []
        for part, total, own in zip(step.sums, totals, least, strict=True):
            shift = np.full_like(mean, np.inf)
            np.subtract(mean, own, out=shift, where=np.isfinite(mean))
            moved.append(total + shift.reshape(prices, *shape_over(shared, part.scope, self._sizes)))
        return moved

    def _improved(
        self, prices: Sequence[Price], weights: FloatArray, cost: FloatArray, labels: IntArray, totals: FloatArray
    ) -> tuple[IntArray, FloatArray]:
        """Better assignments among the labels that those of any pair have, and first labels: what is whole."""
        if (_priced(weights, totals) * _EQUAL <= cost).all():
            return labels, totals
        rows = labels.reshape(len(self.variables), -1)
        picked = [np.unique(np.append(row, 0)) for row in rows]
        for index in self._kept:
            picked[index] = np.arange(self._sizes[index])
        if all(len(found) == size for found, size in zip(picked, self._sizes, strict=True)):
            return labels, totals
        keeping = dict(zip(self.variables, picked, strict=True))
        tables = Segment(self.graph.narrowed(keeping)).solve(prices)
        other = np.stack([table.totals for table in tables])
        better = _priced(weights, other) < _priced(weights, totals)
        chosen = np.stack([table.labels for table in tables], axis=1)
        known = np.stack([found[row] for found, row in zip(picked, chosen, strict=True)])
        return np.where(better, known, labels), np.where(better[..., None], other, totals)

    def _allowed(self, labels: IntArray, totals: FloatArray) -> tuple[IntArray, FloatArray]:
        """With what other prices found, now or before, for pairs that these found nothing for."""
        every = np.concatenate([self._found[0], labels], axis=1)
        costs = np.concatenate([self._found[1], totals])
        first = np.isfinite(costs[..., 0]).argmax(axis=0)[None]
        found = np.take_along_axis(every, first[None], axis=1), np.take_along_axis(costs, first[..., None], axis=0)
        self._found = found
        missing = np.isinf(totals[..., 0])
        return np.where(missing, found[0], labels), np.where(missing[..., None], found[1], totals)

    def _tables(self, costs: FloatArray) -> list[FloatArray]:
        """Each factor's costs, [price, one axis per variable in elimination order]."""
        tables = []
        for scope, offset in zip(self._plan.scopes, self._plan.offsets, strict=True):
            shape = tuple(self._sizes[v] for v in scope)
            tables.append(costs[:, offset : offset + math.prod(shape)].reshape(len(costs), *shape))
        return tables

    def _summed(self, tables: Sequence[FloatArray], step: Sum, prices: int) -> FloatArray:
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

    def _substitute(self, sums: Sequence[Sequence[FloatArray]], shape: tuple[int, ...]) -> IntArray:
        """Label indices [variable, price, entry, exit], found from the last eliminated variable back."""
        where = np.indices(shape).reshape(3, -1)
        labels = np.zeros((len(self.variables), where.shape[1]), dtype=np.int64)
        for end, index in zip(self._ends, where[1:], strict=True):
            if end is not None:
                labels[end] = index
        for step, totals in zip(reversed(self._plan.steps), reversed(sums), strict=True):
            rows = [
                total[(where[0], slice(None), *(labels[v] for v in part.scope[1:]))]
                for part, total in zip(step.sums, totals, strict=True)
            ]
            labels[step.sums[0].scope[0]] = sum(rows[1:], rows[0]).argmin(axis=1)
        return labels.reshape(len(self.variables), *shape)

    def _totals(self, labels: IntArray, costs: FloatArray) -> FloatArray:
        """Exact [price, entry, exit, 4] sums of the chosen entries; infinite where one is forbidden.

        costs: [price, entry of a factor], infinite where forbidden.
        """
        picked = labels.reshape(len(self.variables), -1)
        index = (self._plan.strides @ picked + np.array(self._plan.offsets, dtype=np.float64)[:, None]).astype(np.int64)
        totals = np.stack([row[index].sum(axis=0) for row in self._flat], axis=-1)
        totals[np.isinf(costs[0])[index].any(axis=0)] = np.inf
        return totals.reshape(*labels.shape[1:], 4)


def unproved(segments: Iterable[Segment]) -> tuple[str, ...]:
    """A note where some segment is only bounded."""
    if all(segment.exact for segment in segments):
        return ()
    return (
        "a segment ties more choices together than are searched exactly: its best is bounded, and the gap counts "
        "what may be missing",
    )


def _weights(prices: Sequence[Price]) -> FloatArray:
    """[price, component]"""
    return np.array([price.vector() for price in prices])


def _priced(weights: FloatArray, totals: FloatArray) -> FloatArray:
    """[price, entry, exit] of [price, component] and [price, entry, exit, component]."""
    finite = np.isfinite(totals[..., 0])
    cost = np.einsum("pc,peoc->peo", weights, np.where(finite[..., None], totals, 0.0))
    return np.where(finite, cost, np.inf)


def _flatten(
    graph: FactorGraph, scopes: tuple[Scope, ...], tables: tuple[Scope, ...], plan: Elimination
) -> tuple[FloatArray, IntArray]:
    """The factors of each table summed, in one [4, entry] array, and where time is infinite (held there as zero).

    scopes: of each factor, one of ``tables``.
    """
    counts = [len(labels) for labels in graph.domains.values()]
    sizes = {scope: math.prod(counts[v] for v in scope) for scope in tables}
    flat = np.zeros((4, sum(sizes.values())))
    places = {}
    for scope, ordered, offset in zip(tables, plan.scopes, plan.offsets, strict=True):
        axes = None if ordered == scope else [scope.index(v) for v in ordered]
        places[scope] = slice(offset, offset + sizes[scope]), tuple(counts[v] for v in scope), axes
    for factor, scope in zip(graph.factors, scopes, strict=True):
        own, shape, axes = places[scope]
        for row, array in zip(flat, factor.components(), strict=True):
            if array is not None:
                row[own] += (array if axes is None else array.reshape(shape).transpose(axes)).reshape(-1)
    forbidden = np.flatnonzero(np.isinf(flat[0]))
    flat[0, forbidden] = 0.0
    return flat, forbidden
