"""The least that a chain costs at a price: one min-plus product along its segments, equal parts multiplied once."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

from autopar.planner.bounds import TIME_ONLY, Objective
from autopar.planner.chain import Chain
from autopar.planner.factor_graph import FactorGraph, FloatArray
from autopar.planner.segment import Price, Segment


def quick_bound_s(chain: Chain, segments: Sequence[Segment], objective: Objective) -> float:
    """Seconds of balanced stages where neither memory nor cuts cost anything; infinite if nothing is allowed."""
    return float(least_costs(chain.sequence, segments, (Price(*objective.balanced),))[0])


def least_costs(sequence: tuple[int, ...], segments: Sequence[Segment], prices: Sequence[Price]) -> FloatArray:
    """[price] of a row of segments of these kinds."""
    costs = {kind: segments[kind].costs(prices) for kind in dict.fromkeys(sequence)}
    joins, whole = _joins(sequence)
    for number, (left, right) in joins:
        costs[number] = (costs[left][:, :, :, None] + costs[right][:, None]).min(axis=2)
    least: FloatArray = costs[whole].min(axis=(1, 2))
    return least


def floor_s(row: Sequence[str], graphs: Mapping[str, FactorGraph]) -> float:
    """Seconds per microbatch of a row of segments, by kind, of which only those in ``graphs`` cost anything."""
    kinds = tuple(graphs)
    segments = [Segment(graph) for graph in graphs.values()]
    runs = (tuple(map(kinds.index, run)) for known, run in itertools.groupby(row, graphs.__contains__) if known)
    return sum(float(least_costs(run, segments, (Price(*TIME_ONLY),))[0]) for run in runs)


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
