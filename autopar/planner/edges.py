"""Edges: the ranges that stages may be, each with the labels of its two boundaries, as aligned arrays."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from autopar.planner.chain import Chain, IntArray, fold
from autopar.planner.factor_graph import FloatArray

MANY = 3
"""So many stages have others on both sides."""


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
    update_bytes: FloatArray
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


def edges_of(chain: Chain, pp: int | None = None, longest: int | None = None) -> Edges:
    """The edges of a chain, sorted by first, last, entry, exit. pp: ranges that none of so many stages can be are left
    out; longest: and those of more segments."""
    labels = tuple(chain.boundary_labels(position) for position in range(len(chain) + 1))
    index = _index(tuple(map(len, labels)), chain.sequence, min(pp or MANY, MANY), longest or len(chain))
    first, last, entry, exit, cls, source, target = index
    cuts = np.full((len(chain), max(map(len, labels))), np.inf)
    for position in np.flatnonzero(np.bincount(first)).tolist():
        costs = [chain.cut_s(position, label) if position else 0.0 for label in labels[position]]
        cuts[position, : len(costs)] = costs
    assert (cuts >= 0).all()
    beside = np.zeros((2, int(cls.max()) + 1))
    for number in np.flatnonzero(np.bincount(cls)).tolist():
        example = fold(chain.sequence).examples[number]
        beside[:, number] = chain.reserve_bytes(*example), chain.update_bytes(*example)
    reserve, update = beside[:, cls]
    return Edges(first, last, entry, exit, cls, source, target, cuts[first, entry], reserve, update, cuts.shape[1])


@functools.lru_cache(maxsize=64)
def _index(sizes: tuple[int, ...], sequence: tuple[int, ...], pp: int, longest: int) -> tuple[IntArray, ...]:
    """The first fields of ``Edges``, of a chain with so many labels at its boundaries."""
    width, count = max(sizes), len(sequence)
    known = np.arange(width) < np.array(sizes)[:, None]
    begin, end = np.ogrid[: count + 1, : count + 1]
    ranges = (begin < end) & (end - begin <= longest)
    if pp < MANY:  # the first stage begins the chain, the last one ends it
        ranges &= ((begin == 0) & (end == count)) if pp == 1 else ((begin == 0) ^ (end == count))
    first, last, entry, exit = np.nonzero(ranges[:, :, None, None] & known[:, None, :, None] & known[None, :, None, :])
    cls = fold(sequence).class_of[first, last]
    return first, last, entry, exit, cls, first * width + entry, last * width + exit
