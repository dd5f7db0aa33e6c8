"""The least that a chain costs at a price: one min-plus product along its segments, equal parts multiplied once."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from autopar.planner.bounds import TIME_ONLY, Objective
from autopar.planner.chain import Chain
from autopar.planner.factor_graph import FactorGraph, FloatArray
from autopar.planner.segment import Price, Segment

_CLOSE = 1e-6
"""Of the slowest stage's seconds: how close below them a bound may stop."""


def quick_bound_s(chain: Chain, segments: Sequence[Segment], objective: Objective) -> float:
    """Seconds of stages as fast as each other, or along a slowest one, where neither memory nor cuts cost anything;
    infinite if nothing is allowed."""
    balanced, along = Price(*objective.balanced), Price(*objective.along)
    if objective.pp == 1:
        return float(least_costs(chain.sequence, segments, (balanced,))[0])
    slowest_s = slowest_stage_s(chain, segments, objective.pp, (balanced, along))
    balanced_s, along_s = least_costs(chain.sequence, segments, (balanced, along))
    return float(max(balanced_s, beside_slowest_s(along_s, objective, slowest_s)))


def beside_slowest_s(along_s: float, objective: Objective, slowest_s: float) -> float:
    """Seconds of a step of which the slowest stage takes so many per microbatch: infinite where that is, though with
    one microbatch no stage counts once more."""
    return along_s + objective.slowest * slowest_s if math.isfinite(slowest_s) else math.inf


def slowest_stage_s(chain: Chain, segments: Sequence[Segment], pp: int, wanted: Sequence[Price] = ()) -> float:
    """Seconds per microbatch that the slowest of so many stages takes at least, whole segments each; infinite if
    nothing is allowed. wanted: prices that are asked for next: all together take hardly longer."""
    kinds = {
        kind: segments[kind].costs((*wanted, Price(*TIME_ONLY)))[-1].min() for kind in dict.fromkeys(chain.sequence)
    }
    until = [0.0, *itertools.accumulate(float(kinds[kind]) for kind in chain.sequence)]
    low, high = max(until[-1] / pp, float(max(kinds.values()))), until[-1]
    while math.isfinite(high) and high - low > _CLOSE * high:
        middle = (low + high) / 2
        low, high = (low, middle) if _is_enough(until, pp, middle) else (middle, high)
    return low


def _is_enough(until: Sequence[float], pp: int, longest_s: float) -> bool:
    """Whether so many stages that take no longer are enough. until: seconds of all segments before each."""
    at = 0
    for _ in range(pp):
        at = bisect.bisect_right(until, until[at] + longest_s) - 1
        if at == len(until) - 1:
            return True
    return False


def most_whole_s(alike: Iterable[tuple[int, float]], pp: int) -> float:
    """Seconds that the slowest of so many stages takes at least: segments stay whole, so one has no fewer of a kind
    than the mean, rounded up. alike: of each kind, how many there are, and seconds that one takes at least."""
    return max((-(-count // pp) * each_s for count, each_s in alike), default=0.0)


def least_costs(sequence: tuple[int, ...], segments: Sequence[Segment], prices: Sequence[Price]) -> FloatArray:
    """[price] of a row of segments of these kinds."""
    costs = {kind: segments[kind].costs(prices) for kind in dict.fromkeys(sequence)}
    joins, whole = _joins(sequence)
    for number, (left, right) in joins:
        costs[number] = (costs[left][:, :, :, None] + costs[right][:, None]).min(axis=2)
    least: FloatArray = costs[whole].min(axis=(1, 2))
    return least


def floors_s(row: Sequence[str], graphs: Mapping[str, FactorGraph]) -> FloatArray:
    """Seconds per microbatch of a row of segments, by kind, of which only those in ``graphs`` cost anything; and of one
    of each of these."""
    kinds, price = tuple(graphs), Price(*TIME_ONLY)
    segments = [Segment(graph) for graph in graphs.values()]
    runs = (tuple(map(kinds.index, run)) for known, run in itertools.groupby(row, graphs.__contains__) if known)
    whole_s = sum(float(least_costs(run, segments, (price,))[0]) for run in runs)
    return np.array([whole_s, *(float(segment.costs((price,)).min()) for segment in segments)])


def least_saved_bytes(row: Sequence[str], graphs: Mapping[str, FactorGraph]) -> float:
    """By a microbatch, of a row of segments, by kind, of which only those in ``graphs`` count."""
    counts, price = Counter(row), Price(0.0, 0.0, 0.0, 1.0)
    return sum(counts[kind] * float(Segment(graph).costs((price,)).min()) for kind, graph in graphs.items())


def mean_bytes(chain: Chain, segments: Sequence[Segment], held: Sequence[int]) -> float:
    """Of a stage, on average, where all hold the mean number of microbatches and each segment needs as little as it
    may: a guess at whether anything fits, which costs next to nothing."""
    price = Price(0.0, 0.0, 1.0, sum(held) / len(held))
    counts = Counter(chain.sequence).items()
    return sum(count * float(segments[kind].costs((price,)).min()) for kind, count in counts) / len(held)


@functools.lru_cache(maxsize=64)
def _joins(sequence: tuple[int, ...]) -> tuple[tuple[tuple[int, tuple[int, int]], ...], int]:
    """Products (number, its two factors) that lead to that of a row of factors, each once, and the last one's number.

    Neighbours are joined pair by pair, so a row that repeats itself n times takes as many products as log n.
    """
    row, first, known = list(sequence), max(sequence) + 1, dict[tuple[int, int], int]()
    while len(row) > 1:
        pairs = zip(row[::2], row[1::2], strict=False)
        row = [known.setdefault(pair, first + len(known)) for pair in pairs] + row[len(row) - len(row) % 2 :]
    return tuple((number, pair) for pair, number in known.items()), row[0]
