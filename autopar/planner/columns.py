"""Every range of the chain, priced: totals per pair of boundary labels, and the columns made of them.

A range is a min-plus product of segment tables; equal ranges are computed once (``chain.fold``), so a
run of n equal segments is the n-th min-plus power. A column is a range with the plan that some price
found for it, or a head with one price's plan and a tail with another's: under a memory cap equal
segments should not all change plan at the same price.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import numpy as np

from autopar.planner.chain import Chain, IntArray, fold, halved
from autopar.planner.factor_graph import FloatArray
from autopar.planner.segment import Price, Segment

TIME, STEP, STATE, SAVED = range(4)
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


@dataclass(frozen=True, eq=False)
class Edges:
    """All (range, entry label, exit label), as aligned arrays; cls is the range's class; source, target: numbers of its
    two boundaries with their labels. What is priced is the same of edges of one class with the same labels."""

    first: IntArray
    last: IntArray
    entry: IntArray
    exit: IntArray
    cls: IntArray
    source: IntArray
    target: IntArray
    cut_s: FloatArray
    reserve_bytes: FloatArray
    width: int

    def number(self, first: int, last: int, entry: int, exit: int) -> int:
        """Of the edge that has these fields: it must be there."""
        low, high = np.searchsorted(self.first, [first, first + 1])
        low, high = low + np.searchsorted(self.last[low:high], [last, last + 1])
        same = (self.entry[low:high] == entry) & (self.exit[low:high] == exit)
        return int(low + np.flatnonzero(same)[0])

    def alike(self, edges: IntArray) -> tuple[IntArray, IntArray]:
        """Of each kind of priced range among some edges, the place of one in them; of each of them, its kind."""
        kinds = (self.cls[edges] * self.width + self.entry[edges]) * self.width + self.exit[edges]
        example = np.zeros(int(kinds.max(initial=-1)) + 1, dtype=np.int64)
        example[kinds] = np.arange(1, len(edges) + 1)
        known = np.flatnonzero(example)
        number = np.zeros_like(example)
        number[known] = np.arange(len(known))
        return example[known] - 1, number[kinds]


def edges_of(chain: Chain) -> Edges:
    """The edges of a chain, sorted by first, last, entry, exit."""
    count = len(chain)
    sizes = [len(chain.boundary_labels(position)) for position in range(count + 1)]
    width = max(sizes)
    cuts = np.full((count, width), np.inf)
    for position in range(count):
        for label, text in enumerate(chain.boundary_labels(position)):
            cuts[position, label] = chain.cut_s(position, text) if position else 0.0
    assert (cuts >= 0).all()
    reserve = np.array([chain.reserve_bytes(*r) for r in fold(chain.sequence).examples], dtype=np.float64)
    first, last, entry, exit, cls, source, target = _index(tuple(sizes), chain.sequence)
    return Edges(first, last, entry, exit, cls, source, target, cuts[first, entry], reserve[cls], width)


@functools.lru_cache(maxsize=64)
def _index(sizes: tuple[int, ...], sequence: tuple[int, ...]) -> tuple[IntArray, ...]:
    """The first fields of ``Edges``, of a chain with so many labels at its boundaries."""
    width = max(sizes)
    known = np.arange(width) < np.array(sizes)[:, None]
    later = np.arange(len(sizes))[:, None] < np.arange(len(sizes))
    first, last, entry, exit = np.nonzero(later[:, :, None, None] & known[:, None, :, None] & known[None, :, None, :])
    cls = fold(sequence).class_of[first, last]
    return first, last, entry, exit, cls, first * width + entry, last * width + exit


class RangeTable:
    """Costs and totals of every class of ranges, one layer per price; layers are added as prices come.

    cost: [class, price, entry, exit]; totals: the same with a last axis of four; middle: the best
    label between the range's head and its tail (``chain.halved``). Labels are padded to the widest boundary with infinity.
    longest: segments of the longest ranges that are priced; classes of longer ones, numbered last, have no place until
    ``extend``.
    """

    def __init__(self, chain: Chain, segments: Sequence[Segment], longest: int | None = None) -> None:
        self.chain, self.segments = chain, tuple(segments)
        self.longest = len(chain) if longest is None else longest
        self.edges = edges_of(chain)
        self.folding = fold(chain.sequence)
        self.prices: list[Price] = []
        self._clear()

    def _clear(self) -> None:
        shape = (self.priced, 0, self.edges.width, self.edges.width)
        self._cost, self._totals = _Layers(np.zeros(shape)), _Layers(np.zeros((*shape, 4)))
        self._middle = _Layers(np.zeros(shape, dtype=np.int64))

    @property
    def priced(self) -> int:
        """How many classes are priced."""
        return self.folding.numbered[self.longest]

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
        """Price ranges of up to so many segments, at all prices known."""
        known, self.prices, self.longest = self.prices, [], longest
        self._clear()
        self.add(known)

    def add(self, prices: Sequence[Price], *, first: bool = False) -> int:
        """Price every range at those prices that are new; returns how many were. first: before those that are known,
        since of plans that are as good as each other the first price's is chosen; only while there are no columns."""
        fresh = [price for price in dict.fromkeys(prices) if price not in self.prices]
        if not fresh:
            return 0
        cost, totals, middle = self._layers(fresh)
        at = 0 if first else len(self.prices)
        self.prices[at:at] = fresh
        self._cost.add(cost, first)
        self._totals.add(totals, first)
        self._middle.add(middle, first)
        return len(fresh)

    def edge_cost(self) -> FloatArray:
        """[edge, price]"""
        edges = self.edges
        return self.cost[edges.cls, :, edges.entry, edges.exit]

    def edge_totals(self) -> FloatArray:
        """[edge, price, 4]"""
        edges = self.edges
        return self.totals[edges.cls, :, edges.entry, edges.exit]

    def part(self, edge: int, price: int) -> Part:
        edges = self.edges
        return Part(int(edges.first[edge]), int(edges.last[edge]), int(edges.entry[edge]), int(edges.exit[edge]), price)

    def column(self, edge: int, price: int) -> Column:
        """The plan that one price found for an edge."""
        part = self.part(edge, price)
        totals = self.totals[self.edges.cls[edge], price, part.entry, part.exit]
        return self._column(edge, totals, (part,))

    def mixtures(self, edge: int, prices: IntArray) -> FloatArray:
        """Totals [cut, head price, tail price, label at the cut, 4] of all heads and tails of an edge."""
        whole = self.part(edge, 0)
        cuts = np.arange(whole.first + 1, whole.last)
        head = self.totals[self.folding.class_of[whole.first, cuts]][:, prices, whole.entry, :]
        tail = self.totals[self.folding.class_of[cuts, whole.last]][:, prices][:, :, :, whole.exit]
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
        label = int(self.middle[cls, part.price, part.entry, part.exit])
        head = replace(part, last=cut, exit=label)
        return self._part_assignments(head) + self._part_assignments(replace(part, first=cut, entry=label))

    def _layers(self, prices: Sequence[Price]) -> tuple[FloatArray, FloatArray, IntArray]:
        """cost, totals and middle of the classes that are priced, for some prices, shorter ranges first."""
        one_cost, one_totals = self._padded(prices)
        shape = (self.priced, *one_cost.shape[1:])
        cost, totals = np.full(shape, np.inf), np.full((*shape, 4), np.inf)
        middle = np.zeros(shape, dtype=np.int64)
        singles = self.folding.singles
        cost[: len(singles)], totals[: len(singles)] = one_cost[singles], one_totals[singles]
        layer, entry, exit = np.ix_(*map(range, one_cost.shape[1:]))
        for classes, heads, tails in self.folding.rounds:
            known = classes < self.priced
            now, head, tail = classes[known], heads[known, None, None, None], tails[known, None, None, None]
            cost[now], best = _joined(cost[heads[known]], cost[tails[known]])
            middle[now] = best
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
    """[class, layer, ...], laid out layer by layer with room for more, so that those that are known are seldom copied
    and what is not used is not touched."""

    def __init__(self, none: AnyArray) -> None:
        self._room: AnyArray = none.swapaxes(0, 1)
        self._count = 0

    @property
    def values(self) -> AnyArray:
        values: AnyArray = self._room[: self._count].swapaxes(0, 1)
        return values

    def add(self, made: AnyArray, first: bool) -> None:
        """Behind the layers that are known, or before them."""
        known: AnyArray = self._room[: self._count]
        fresh = made.shape[1]
        self._count += fresh
        if self._count > len(self._room) or first:
            self._room = np.empty((2 * self._count, *known.shape[1:]), dtype=made.dtype)
            self._room[fresh * first : fresh * first + len(known)] = known
        at = 0 if first else self._count - fresh
        self._room[at : at + fresh] = made.swapaxes(0, 1)
