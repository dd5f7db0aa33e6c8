"""A row of segments that a pipeline cuts into stages, and which ranges of the row are alike."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from autopar.planner.factor_graph import FactorGraph
from cost_model.schedule import in_flight as schedule_in_flight

IntArray = npt.NDArray[np.int64]


def in_flight(schedule: str, stage: int, pp: int, microbatches: int, virtual_stages: int = 1, window: int = 1) -> int:
    """Microbatches whose saved activations a stage holds at once, those of one virtual stage counting in part."""
    return -(-schedule_in_flight(schedule, stage, pp, microbatches, virtual_stages, window) // virtual_stages)


@dataclass(frozen=True, eq=False)
class Chain:
    """Segments in a row on one (dp, tp) mesh at one microbatch size.

    kinds: the distinct segments; sequence: the kind of each segment.
    cut_s(i, label): seconds per microbatch, forward and backward, of a cut before segment i (i >= 1)
    where the boundary has that label; never negative, infinite forbids the cut.
    reserve_bytes(first, last): bytes of a stage of segments [first, last) beside state and saved; equal for ranges of
    the same kinds, and never less for a longer range.
    in_flight(schedule, stage, pp, microbatches, virtual_stages, window): microbatches a stage holds at once.
    update_bytes(first, last): what the optimizer's step needs of such a stage beside state, when nothing else is there.
    Invariant: neighbours agree on the labels of their common boundary.
    """

    kinds: tuple[FactorGraph, ...]
    sequence: tuple[int, ...]
    cut_s: Callable[[int, str], float]
    reserve_bytes: Callable[[int, int], int]
    in_flight: Callable[..., int] = in_flight
    update_bytes: Callable[[int, int], float] = lambda first, last: 0.0

    def __post_init__(self) -> None:
        assert self.sequence and all(0 <= kind < len(self.kinds) for kind in self.sequence)
        for left, right in zip(self.sequence, self.sequence[1:], strict=False):
            assert self.kinds[left].exit_labels == self.kinds[right].entry_labels, (left, right)

    def __len__(self) -> int:
        return len(self.sequence)

    def boundary_labels(self, position: int) -> tuple[str, ...]:
        """Labels of the boundary before segment ``position``; ``len(chain)`` is the end."""
        if position == len(self):
            return self.kinds[self.sequence[-1]].exit_labels
        return self.kinds[self.sequence[position]].entry_labels

    def shared_domains(self) -> dict[str, tuple[str, ...]]:
        """Variable -> labels that all segments with it know, in order of first appearance."""
        known: dict[str, tuple[str, ...]] = {}
        for kind in dict.fromkeys(self.sequence):
            graph = self.kinds[kind]
            for v in graph.shared:
                labels = known.get(v, graph.domains[v])
                known[v] = tuple(label for label in labels if label in graph.domains[v])
        return known

    def fixed(self, labels: Mapping[str, str]) -> Chain:
        """The same chain where shared variables keep the given labels."""
        return replace(self, kinds=tuple(graph.fixed(labels) for graph in self.kinds))


def at_once(ways: Sequence[Chain]) -> Chain:
    """One chain that no plan of these is faster than: with the choices of the last, which has those of all, and the
    reserve of the first, which has the least. See ``Space.saving_chains``."""
    return replace(ways[-1], reserve_bytes=ways[0].reserve_bytes)


@dataclass(frozen=True)
class Floor:
    """What is known of a chain before it is made: how many segments it has, and ``time_s``, seconds per microbatch,
    forward and backward, that no assignment of them goes below. alike: of each kind of them that repeats, how many
    there are, and seconds that one of them takes at least."""

    segments: int
    time_s: float
    alike: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, eq=False)
class Folding:
    """Ranges with the same kinds in the same order are one class.

    class_of: [first, last] -> class, -1 where first >= last; singles: kinds of the first classes, which are those of
    one segment. rounds: all others, in the order in which they can be put together: (classes, class of the head, class
    of the tail), aligned, cut as ``halved`` has it. examples: [class] the first range of it.
    """

    class_of: IntArray
    singles: IntArray
    rounds: tuple[tuple[IntArray, IntArray, IntArray], ...]
    examples: tuple[tuple[int, int], ...]

    @property
    def classes(self) -> int:
        return len(self.examples)

    def parts(self, classes: IntArray) -> IntArray:
        """These and all that they are put together of, in the order of their numbers."""
        wanted = np.zeros(self.classes, dtype=bool)
        wanted[classes] = True
        for whole, heads, tails in reversed(self.rounds):
            kept = wanted[whole]
            wanted[heads[kept]] = wanted[tails[kept]] = True
        found: IntArray = np.flatnonzero(wanted)
        return found

    def rows(self, classes: IntArray) -> IntArray:
        """[class] its place among these, -1 if it is not."""
        row = np.full(self.classes, -1, dtype=np.int64)
        row[classes] = np.arange(len(classes))
        return row


def halved(length: int) -> int:
    """How many segments the head of a range has: the largest power of two that leaves a tail."""
    return 1 << (length - 1).bit_length() - 1


@functools.lru_cache(maxsize=64)
def fold(sequence: tuple[int, ...]) -> Folding:
    """Classes of all ranges of a sequence of kinds, numbered by length and first appearance.

    A run of n equal segments is put together in as many rounds as log2 n.
    """
    count = len(sequence)
    class_of = np.full((count, count + 1), -1, dtype=np.int64)
    examples = dict[int, tuple[int, int]]()
    for length in range(1, count + 1):
        known, shorter = dict[tuple[int, int], int](), len(examples)
        for first in range(count - length + 1):
            last = first + length
            key = (int(class_of[first, last - 1]), sequence[last - 1])
            class_of[first, last] = known.setdefault(key, shorter + len(known))
            examples.setdefault(int(class_of[first, last]), (first, last))
    ranges, kinds = tuple(examples.values()), tuple(dict.fromkeys(sequence))
    rounds = tuple(_rounds(class_of, ranges[len(kinds) :]))
    return Folding(class_of, np.array(kinds, dtype=np.int64), rounds, ranges)


def _rounds(class_of: IntArray, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[IntArray, IntArray, IntArray]]:
    """Those of ranges in the order of their lengths."""
    for head, rows in itertools.groupby(ranges, lambda each: halved(each[1] - each[0])):
        first, last = np.array(tuple(rows)).T
        yield class_of[first, last], class_of[first, first + head], class_of[first + head, last]
