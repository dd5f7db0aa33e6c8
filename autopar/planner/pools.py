"""Pools: the columns that prices have found for each stage, tilings of the chain by them, and columns of two prices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.planner.bounds import Objective, StageSpace, terminals
from autopar.planner.chain import IntArray
from autopar.planner.columns import SAVED, STATE, STEP, TIME, Column, RangeTable
from autopar.planner.factor_graph import FloatArray
from autopar.planner.ilp import objective_s
from autopar.planner.paths import Arcs, Ends, bottleneck, levels_of, sweep
from autopar.planner.worthwhile import Ways, worthwhile

MIXED_EDGES = 96
MIXED_PRICES = 6
TRIED_LEVELS = 4
WORTH = 1e-5
MAX_ILP_COLUMNS = 400


@dataclass(frozen=True, eq=False)
class Pool:
    """Columns of one stage as aligned arrays; ``price`` is -1 - i where the column is ``mixed[i]``."""

    edge: IntArray
    price: IntArray
    time_s: FloatArray
    step_s: FloatArray
    mixed: tuple[Column, ...] = ()

    def column(self, table: RangeTable, index: int) -> Column:
        price = int(self.price[index])
        return table.column(int(self.edge[index]), price) if price >= 0 else self.mixed[-1 - price]


class Pools:
    """Makes pools of a table and tilings of pools. What it is asked for reads the table as it is then."""

    def __init__(self, table: RangeTable, objective: Objective) -> None:
        self.table, self.objective = table, objective
        self._weightings = tuple(weights for weights in objective.free if weights[0] > 0)

    def pool(self, space: StageSpace) -> Pool:
        """On each edge, the fitting plans that are best for some weighting of time and step."""
        edges = self.table.edges
        examples, kind = edges.alike(space.edges)
        totals = self.table.edge_totals(space.edges[examples])
        need = totals[:, :, STATE] + space.held * totals[:, :, SAVED]
        over = np.isinf(need) | (need > space.capacity_bytes[examples, None])
        over |= totals[:, :, STATE] > space.most_state_bytes[examples, None]
        picked = []
        for weights in self._weightings:
            cost = weights[0] * totals[:, :, TIME] + weights[1] * totals[:, :, STEP]
            picked.append(np.where(over, np.inf, cost).argmin(axis=1))
        best = np.sort(np.stack(picked, axis=1), axis=1)
        offered = (np.diff(best, axis=1, prepend=-1) != 0) & ~np.take_along_axis(over, best, axis=1)
        rows, found = np.nonzero(offered[kind])
        of = kind[rows]
        prices = best[of, found]
        return Pool(space.edges[rows], prices, totals[of, prices, TIME], totals[of, prices, STEP])

    def arcs(self, pool: Pool) -> Arcs:
        """The columns as arcs of a graph whose paths are tilings."""
        edges = self.table.edges
        along_s = self.objective.waiting * pool.time_s
        cost = along_s + edges.cut_s[pool.edge] + pool.step_s / self.objective.pp
        return Arcs(Ends(edges.source[pool.edge], edges.target[pool.edge]), cost[:, None], pool.time_s)

    def value(self, columns: tuple[Column, ...]) -> float:
        """Seconds of a step; infinite without columns."""
        return objective_s(columns, self.objective) if columns else np.inf

    def incumbent(self, pools: Sequence[Pool], best: tuple[Column, ...]) -> tuple[Column, ...]:
        """The best of some shortest tilings by these columns, if better than ``best``."""
        arcs = [self.arcs(pool) for pool in pools]
        starts, ends, nodes = self.ends()
        floor_s, _ = bottleneck([a.ends for a in arcs], [a.slow_s for a in arcs], starts, ends, nodes)
        if not np.isfinite(floor_s) or floor_s > self.value(best):
            return best
        found = sweep(
            arcs,
            levels_of(arcs, floor_s, self.value(best) * (1 + 1e-9) / self.objective.lone),
            starts,
            ends,
            nodes,
        )
        values = found.total_s()[0] + self.objective.slowest * found.levels.lower_s
        for level in np.argsort(values, kind="stable")[:TRIED_LEVELS]:
            if np.isfinite(values[level]):
                path = found.path(int(level))
                columns = tuple(pool.column(self.table, arc) for pool, arc in zip(pools, path, strict=True))
                best = columns if self.value(columns) < self.value(best) else best
        return best

    def ends(self) -> tuple[IntArray, IntArray, int]:
        """Nodes where tilings begin and where they end, and how many nodes there are."""
        starts, ends = terminals(self.table)
        return starts, ends, (len(self.table.chain) + 1) * self.table.edges.width

    def mixed(
        self, spaces: Sequence[StageSpace], pools: Sequence[Pool], edge_s: Sequence[FloatArray], best_s: float
    ) -> tuple[Pool, ...]:
        """The pools and heads and tails at two prices, on the most promising edges of all stages.

        edge_s: [stage] a bound through each edge of the space; best_s: what is to be improved on.
        """
        every = np.sort(np.concatenate(edge_s))
        limit = min(best_s, float(every[MIXED_EDGES]) if len(every) > MIXED_EDGES else np.inf)
        return tuple(
            self._extended(space, pool, np.flatnonzero(known_s < limit))
            for space, pool, known_s in zip(spaces, pools, edge_s, strict=True)
        )

    def _extended(self, space: StageSpace, pool: Pool, rows: IntArray) -> Pool:
        """The pool and the best mixed columns of some edges of the space."""
        columns: list[Column] = []
        edges: list[int] = []
        for row in rows.tolist():
            found = self._mixed_columns(space, row)
            columns += found
            edges += [int(space.edges[row])] * len(found)
        return Pool(
            np.concatenate([pool.edge, np.array(edges, dtype=np.int64)]),
            np.concatenate([pool.price, -1 - np.arange(len(columns))]),
            np.concatenate([pool.time_s, [c.time_s for c in columns]]),
            np.concatenate([pool.step_s, [c.step_s for c in columns]]),
            tuple(columns),
        )

    def _mixed_columns(self, space: StageSpace, row: int) -> list[Column]:
        edge, room = int(space.edges[row]), float(space.capacity_bytes[row])
        if self.table.edges.last[edge] - self.table.edges.first[edge] < 2:
            return []
        prices = self._near_prices(space, edge, room)
        totals = self.table.mixtures(edge, prices)
        fits = np.isfinite(totals[..., TIME]) & (totals[..., STATE] + space.held * totals[..., SAVED] <= room)
        fits &= totals[..., STATE] <= space.most_state_bytes[row]
        time, step = (np.where(fits, totals[..., part], 0.0) for part in (TIME, STEP))
        found: dict[tuple[int, ...], Column] = {}
        for weights in self.objective.priced:
            cost = np.where(fits, weights[0] * time + weights[1] * step, np.inf)
            cut, head, tail, label = (int(i) for i in np.unravel_index(cost.argmin(), cost.shape))
            if np.isfinite(cost[cut, head, tail, label]):
                at = (cut, head, tail, label)
                found[at] = self.table.mixed_column(edge, prices, at, totals[at])
        return list(found.values())

    def _near_prices(self, space: StageSpace, edge: int, room: float) -> IntArray:
        """Prices whose plans for the edge lie nearest the price of memory that bounds it best."""
        weights = self.objective.balanced
        totals = self.table.edge_totals(np.array([edge]))[0]
        need = totals[:, STATE] + space.held * totals[:, SAVED]
        cost = weights[0] * totals[:, TIME] + weights[1] * totals[:, STEP]
        offered = np.array([price.state_price for price in self.table.prices if price.time_weight == weights[0]])
        duals = (cost[None, :] + offered[:, None] * (need - room)[None, :]).min(axis=1)
        order = np.argsort(cost + offered[duals.argmax()] * need, kind="stable")
        _, first = np.unique(need[order], return_index=True)
        near: IntArray = order[np.sort(first)[:MIXED_PRICES]]
        return near

    def offers(self, pools: Sequence[Pool], best: tuple[Column, ...]) -> list[list[Column]]:
        """Of each stage, the columns of which the best choice is one: those that could beat a tiling, and its own."""
        every = [
            list(dict.fromkeys((column, *others)))
            for column, others in zip(best, self._hopeful(pools, self.value(best)), strict=True)
        ]
        kept = worthwhile(list(map(self._ways, every)), self.objective.slowest + 1).kept
        return [[columns[number] for number in own] for columns, own in zip(every, kept, strict=True)]

    def _ways(self, columns: Sequence[Column]) -> Ways:
        """The columns as ways between places (position, label)."""
        start, count, width = 0, len(self.table.chain), self.table.edges.width
        before = [column.first * width + column.entry if column.first else start for column in columns]
        after = [column.last * width + column.exit if column.last < count else start for column in columns]
        times_s, cuts_s, steps_s = (
            np.array(each) for each in zip(*((c.time_s, c.cut_s, c.step_s) for c in columns), strict=True)
        )
        return Ways(np.array(before), np.array(after), times_s, self.objective.waiting * times_s + cuts_s, steps_s)

    def _hopeful(self, pools: Sequence[Pool], value: float) -> list[list[Column]]:
        """Columns through which a tiling might be better by more than WORTH, the best MAX_ILP_COLUMNS in all.

        What is left out cannot hide in the gap: that is taken from the proven bound.
        """
        arcs = [self.arcs(pool) for pool in pools]
        starts, ends, nodes = self.ends()
        found = sweep(arcs, levels_of(arcs, 0.0, value / self.objective.lone), starts, ends, nodes)
        kept = []
        for stage, (pool, a) in enumerate(zip(pools, arcs, strict=True)):
            slowest = np.maximum(found.levels.lower_s, a.slow_s[:, None])
            through = (found.through_s(stage)[:, 0] + self.objective.slowest * slowest).min(axis=1)
            order = np.argsort(through, kind="stable")[: MAX_ILP_COLUMNS // len(pools)]
            kept.append([pool.column(self.table, int(i)) for i in order if through[i] < value * (1 - WORTH)])
        return kept
