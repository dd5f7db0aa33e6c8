"""Every range of the chain, priced: totals per pair of boundary labels, and the columns made of them.

A range is a min-plus product of segment tables; equal ranges are computed once (``chain.fold``), so a
run of n equal segments is the n-th min-plus power. A column is a range with the plan that some price
found for it, or a head with one price's plan and a tail with another's: under a memory cap equal
segments should not all change plan at the same price.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import numpy as np

from autopar.planner.chain import Chain, IntArray, fold, halved
from autopar.planner.edges import edges_of
from autopar.planner.factor_graph import FloatArray
from autopar.planner.segment import Price, Segment

TIME, STEP, STATE, SAVED = range(4)
ALL = slice(None)
AnyArray = TypeVar("AnyArray", FloatArray, IntArray)


@dataclass(frozen=True)
class Part:
    """Segments [first, last) as planned at price number ``price`` for one pair of label indices."""

    first: int
    last: int
    entry: int
    exit: int
    price: int


@dataclass(frozen=True)
class Column:
    """One way to run segments [first, last) as a stage.

    entry, exit: label indices at its two boundaries. time_s, cut_s: per microbatch, the latter of the
    cut before it; step_s: per step; saved_bytes: per microbatch in flight. parts: by which prices its segments were
    planned; assigned: the labels of each, where no prices did it.
    """

    first: int
    last: int
    entry: int
    exit: int
    time_s: float
    step_s: float
    state_bytes: float
    saved_bytes: float
    cut_s: float
    parts: tuple[Part, ...]
    assigned: tuple[Mapping[str, str], ...] = field(default=(), compare=False)


class RangeTable:
    """Costs and totals of ranges, a row per class and a layer per price; layers are added as prices come.

    cost: [row, price, entry, exit]; totals: the same with a last axis of four; middle: the best
    label between the range's head and its tail (``chain.halved``); row: [class], -1 for those that are not priced.
    Labels are padded to the widest boundary with infinity.
    longest: segments of the longest ranges that have edges, until ``extend``. pp: as in ``edges_of``.
    """

    def __init__(
        self, chain: Chain, segments: Sequence[Segment], pp: int | None = None, longest: int | None = None
    ) -> None:
        self.chain, self.segments, self.pp = chain, tuple(segments), pp
        self.folding = fold(chain.sequence)
        self.prices: list[Price] = []
        self._begin(len(chain) if longest is None else longest)

    def _begin(self, longest: int) -> None:
        self.longest, self.edges = longest, edges_of(self.chain, self.pp, longest)
        self.row = self.folding.rows(self.folding.parts(self.edges.cls))
        shape = (int(self.row.max()) + 1, 0, self.edges.width, self.edges.width)
        self._cost, self._totals = _Layers(np.zeros(shape)), _Layers(np.zeros((*shape, 4)))
        self._middle = _Layers(np.zeros(shape, dtype=np.int64))

    @property
    def cost(self) -> FloatArray:
        return self._cost.values

    @property
    def totals(self) -> FloatArray:
        return self._totals.values

    @property
    def middle(self) -> IntArray:
        return self._middle.values

    def extend(self, longest: int) -> None:
        """Price ranges of up to so many segments, at all prices known; edges get other numbers."""
        known, self.prices = self.prices, []
        self._begin(longest)
        self.add(known)

    def narrow(self, edges: IntArray) -> None:
        """From now on only what these edges need is priced."""
        classes = self.folding.parts(self.edges.cls[edges])
        rows = self.row[classes]
        assert (rows >= 0).all(), "it is part of what is priced"
        self.row = self.folding.rows(classes)
        for layers in (self._cost, self._totals, self._middle):
            layers.take(rows)

    def require(self, classes: IntArray) -> None:
        """Price these at all prices known."""
        missing = np.unique(classes[self.row[classes] < 0])
        if not len(missing):
            return
        parts = self.folding.parts(missing)
        fresh = self.row[parts] < 0
        made = self._made(self.prices, parts)
        self.row[parts[fresh]] = self.row.max() + 1 + np.arange(np.count_nonzero(fresh))
        self._cost.append(made[0][fresh])
        self._totals.append(made[1][fresh])
        self._middle.append(made[2][fresh])

    def add(self, prices: Sequence[Price], *, first: bool = False) -> int:
        """Price all at those prices that are new; returns how many were. first: before those that are known,
        since of plans that are as good as each other the first price's is chosen; only while there are no columns."""
        fresh = [price for price in dict.fromkeys(prices) if price not in self.prices]
        if not fresh:
            return 0
        made = self._made(fresh, np.argsort(self.row)[-int(self.row.max()) - 1 :])
        at = 0 if first else len(self.prices)
        self.prices[at:at] = fresh
        self._cost.add(made[0], first)
        self._totals.add(made[1], first)
        self._middle.add(made[2], first)
        return len(fresh)

    def edge_cost(self, edges: IntArray | slice = ALL, price: int | slice = ALL) -> FloatArray:
        """[edge, price], or [edge] of one price."""
        found: FloatArray = self.cost[self._at(edges, price)]
        return found

    def edge_totals(self, edges: IntArray | slice = ALL, price: int | slice = ALL) -> FloatArray:
        """[edge, price, 4], or [edge, 4] of one price."""
        found: FloatArray = self.totals[self._at(edges, price)]
        return found

    def _at(self, edges: IntArray | slice, price: int | slice) -> tuple[IntArray, int | slice, IntArray, IntArray]:
        rows, known = self.row[self.edges.cls[edges]], self.edges
        assert (rows >= 0).all(), "edges outside what was narrowed to"
        return rows, price, known.entry[edges], known.exit[edges]

    def part(self, edge: int, price: int) -> Part:
        edges = self.edges
        return Part(int(edges.first[edge]), int(edges.last[edge]), int(edges.entry[edge]), int(edges.exit[edge]), price)

    def column(self, edge: int, price: int) -> Column:
        """The plan that one price found for an edge."""
        part = self.part(edge, price)
        totals = self.totals[self.row[self.edges.cls[edge]], price, part.entry, part.exit]
        return self._column(edge, totals, (part,))

    def mixtures(self, edge: int, prices: IntArray) -> FloatArray:
        """Totals [cut, head price, tail price, label at the cut, 4] of all heads and tails of an edge."""
        whole = self.part(edge, 0)
        cuts = np.arange(whole.first + 1, whole.last)
        heads, tails = self.folding.class_of[whole.first, cuts], self.folding.class_of[cuts, whole.last]
        self.require(np.concatenate([heads, tails]))
        head = self.totals[self.row[heads]][:, prices, whole.entry, :]
        tail = self.totals[self.row[tails]][:, prices][:, :, :, whole.exit]
        both: FloatArray = head[:, :, None] + tail[:, None, :]
        return both

    def mixed_column(self, edge: int, prices: IntArray, index: tuple[int, int, int, int], totals: FloatArray) -> Column:
        """The column of one entry of ``mixtures``."""
        cut, a, b, label = index
        whole = self.part(edge, 0)
        middle = whole.first + 1 + cut
        head = Part(whole.first, middle, whole.entry, label, int(prices[a]))
        tail = Part(middle, whole.last, label, whole.exit, int(prices[b]))
        return self._column(edge, totals, (head, tail))

    def assignments(self, column: Column) -> tuple[dict[str, str], ...]:
        """The assignment of each segment of a column, in order."""
        return tuple(labels for part in column.parts for labels in self._part_assignments(part))

    def _column(self, edge: int, totals: FloatArray, parts: tuple[Part, ...]) -> Column:
        time_s, step_s, state, saved = (float(x) for x in totals)
        whole, cut_s = self.part(edge, 0), float(self.edges.cut_s[edge])
        return Column(whole.first, whole.last, whole.entry, whole.exit, time_s, step_s, state, saved, cut_s, parts)

    def _part_assignments(self, part: Part) -> list[dict[str, str]]:
        if part.last - part.first == 1:
            segment = self.segments[self.chain.sequence[part.first]]
            return [segment.assignment(self.prices[part.price], part.entry, part.exit)]
        cut = part.first + halved(part.last - part.first)
        cls = self.folding.class_of[part.first, part.last]
        label = int(self.middle[self.row[cls], part.price, part.entry, part.exit])
        head = replace(part, last=cut, exit=label)
        return self._part_assignments(head) + self._part_assignments(replace(part, first=cut, entry=label))

    def _made(self, prices: Sequence[Price], classes: IntArray) -> tuple[FloatArray, FloatArray, IntArray]:
        """cost, totals and middle of classes, all parts of which are among them, in their order."""
        one_cost, one_totals = self._padded(prices)
        shape = (len(classes), *one_cost.shape[1:])
        cost, totals = np.full(shape, np.inf), np.full((*shape, 4), np.inf)
        middle = np.zeros(shape, dtype=np.int64)
        row, kinds = self.folding.rows(classes), self.folding.singles
        single = np.flatnonzero(row[: len(kinds)] >= 0)
        cost[row[single]], totals[row[single]] = one_cost[kinds[single]], one_totals[kinds[single]]
        layer, entry, exit = np.ix_(*map(range, one_cost.shape[1:]))
        for found in self.folding.rounds:
            now, head, tail = (row[each[row[found[0]] >= 0]] for each in found)
            cost[now], best = _joined(cost[head], cost[tail])
            middle[now] = best
            head, tail = head[:, None, None, None], tail[:, None, None, None]
            totals[now] = totals[head, layer, entry, best] + totals[tail, layer, best, exit]
        return cost, totals, middle

    def _padded(self, prices: Sequence[Price]) -> tuple[FloatArray, FloatArray]:
        width = self.edges.width
        cost = np.full((len(self.segments), len(prices), width, width), np.inf)
        totals = np.full((*cost.shape, 4), np.inf)
        for kind, segment in enumerate(self.segments):
            for layer, table in enumerate(segment.solve(prices)):
                entries, exits = table.cost.shape
                cost[kind, layer, :entries, :exits] = table.cost
                totals[kind, layer, :entries, :exits] = table.totals
        return cost, totals


def _joined(head: FloatArray, tail: FloatArray) -> tuple[FloatArray, IntArray]:
    """The least of head [..., entry, label] and tail [..., label, exit] over labels, and the first label that gives it.

    Label by label, which takes a third of the time of one sum of all labels with its least.
    """
    least = head[..., :, 0, None] + tail[..., 0, None, :]
    best = np.zeros(least.shape, dtype=np.int64)
    for label in range(1, head.shape[-1]):
        other = head[..., :, label, None] + tail[..., label, None, :]
        np.copyto(best, label, where=other < least)
        np.minimum(least, other, out=least)
    return least, best


class _Layers(Generic[AnyArray]):
    """[row, layer, ...], laid out layer by layer with room for more, so that those that are known are seldom copied
    and what is not used is not touched."""

    def __init__(self, none: AnyArray) -> None:
        self._room: AnyArray = none.swapaxes(0, 1)
        self._count = 0

    @property
    def values(self) -> AnyArray:
        values: AnyArray = self._room[: self._count].swapaxes(0, 1)
        return values

    def take(self, rows: IntArray) -> None:
        """These, in this order."""
        self._room = self._room[: self._count, rows]

    def append(self, rows: AnyArray) -> None:
        """Behind the rows that are known, of as many layers."""
        self._room = np.concatenate([self._room[: self._count], rows.swapaxes(0, 1)], axis=1)

    def add(self, made: AnyArray, first: bool) -> None:
        """Layers behind those that are known, or before them."""
        known: AnyArray = self._room[: self._count]
        fresh = made.shape[1]
        self._count += fresh
        if self._count > len(self._room) or first:
            self._room = np.empty((2 * self._count, *known.shape[1:]), dtype=made.dtype)
            self._room[fresh * first : fresh * first + len(known)] = known
        at = 0 if first else self._count - fresh
        self._room[at : at + fresh] = made.swapaxes(0, 1)
