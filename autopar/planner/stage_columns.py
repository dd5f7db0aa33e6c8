"""Columns of one stage on one mesh: of every range of the chain the plans that are best for some weighing of a
microbatch against the step, from several tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.planner.bounds import Weights
from autopar.planner.chain import IntArray
from autopar.planner.columns import SAVED, STATE, STEP, TIME, Column, RangeTable
from autopar.planner.factor_graph import FloatArray


@dataclass(frozen=True)
class Role:
    """What a stage is in a pipeline of so many; held: microbatches that it holds at once."""

    stage: int
    pp: int
    held: int


@dataclass(frozen=True, eq=False)
class StageColumns:
    """Aligned arrays: numbers of a table, an edge of it and a price; what they come to; needed_bytes: of a device."""

    tables: tuple[RangeTable, ...]
    table: IntArray
    edge: IntArray
    price: IntArray
    first: IntArray
    last: IntArray
    entry: IntArray
    exit: IntArray
    time_s: FloatArray
    step_s: FloatArray
    needed_bytes: FloatArray

    def __len__(self) -> int:
        return len(self.edge)

    def column(self, number: int) -> tuple[RangeTable, Column]:
        """One of them, with its table."""
        table = self.tables[int(self.table[number])]
        return table, table.column(int(self.edge[number]), int(self.price[number]))


def stage_columns(
    tables: Sequence[RangeTable], role: Role, weighings: Sequence[Weights], cap_bytes: float
) -> StageColumns:
    """Those that fit, and of each range that which needs least."""
    parts = [_of_table(table, number, role, weighings, cap_bytes) for number, table in enumerate(tables)]
    return StageColumns(tuple(tables), *(np.concatenate(rows) for rows in zip(*parts, strict=True)))


def _of_table(
    table: RangeTable, number: int, role: Role, weighings: Sequence[Weights], cap_bytes: float
) -> tuple[FloatArray | IntArray, ...]:
    edges, rows = table.edges, _rows(table, role)
    totals = table.edge_totals(rows)
    needed = totals[:, :, STATE] + role.held * totals[:, :, SAVED] + edges.reserve_bytes[rows, None]
    needed = np.maximum(needed, totals[:, :, STATE] + edges.update_bytes[rows, None])
    over = ~np.isfinite(totals[:, :, TIME]) | ~(needed <= cap_bytes)
    time_s, step_s = (np.where(over, 0.0, totals[:, :, part]) for part in (TIME, STEP))
    costs = [needed, *(a * time_s + b * step_s for a, b in weighings)]
    best = np.sort(np.stack([np.where(over, np.inf, cost).argmin(axis=1) for cost in costs], axis=1), axis=1)
    offered = (np.diff(best, axis=1, prepend=-1) != 0) & ~np.take_along_axis(over, best, axis=1)
    at, which = np.nonzero(offered)
    price, edge = best[at, which], rows[at]
    ends = edges.first[edge], edges.last[edge], edges.entry[edge], edges.exit[edge]
    found = totals[at, price]
    return np.full(len(edge), number), edge, price, *ends, found[:, TIME], found[:, STEP], needed[at, price]


def _rows(table: RangeTable, role: Role) -> IntArray:
    """Edges that leave each other stage a segment at least."""
    edges, count, last = table.edges, len(table.chain), role.pp - 1
    begins = edges.first == 0 if role.stage == 0 else edges.first >= role.stage
    ends = edges.last == count if role.stage == last else edges.last <= count - (last - role.stage)
    return np.flatnonzero(begins & ends)
