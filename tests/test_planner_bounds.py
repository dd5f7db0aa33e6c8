"""Bounds of single edges, levels and tilings against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from effort import drawn
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.planner.bounds import TIME_ONLY, Objective, StageSpace, dual, steeper
from autopar.planner.chain import Chain
from autopar.planner.columns import RangeTable
from autopar.planner.factor_graph import Factor, FactorGraph
from autopar.planner.paths import LEVELS, Arcs, Ends, bottleneck, grouped, levels_of, sweep
from autopar.planner.segment import Price, Segment

CHOICES = 7


def single(rng: np.random.Generator) -> tuple[np.ndarray, RangeTable]:
    """[choice, 4] totals of one segment with one variable, and its table."""
    totals = rng.integers(1, 50, (CHOICES, 4)).astype(float)
    graph = FactorGraph({"x": tuple(map(str, range(CHOICES)))}, (Factor(("x",), *totals.T),))
    chain = Chain((graph,), (0,), lambda i, label: 0.0, lambda i, j: 0)
    return totals, RangeTable(chain, [Segment(graph)])


@settings(max_examples=drawn(200), deadline=None)
@given(seed=st.integers(0, 10**6), held=st.integers(1, 4), other=st.integers(1, 4))
def test_the_bound_of_an_edge_is_below_every_plan_that_fits(seed: int, held: int, other: int) -> None:
    """Prices meant for a stage that holds another number of microbatches must not count."""
    rng = np.random.default_rng(seed)
    totals, table = single(rng)
    need = totals[:, 2] + held * totals[:, 3]
    cap = float(rng.integers(need.min(), need.max() + 1))
    space = StageSpace(0, held, np.array([0]), np.array([cap]), np.array([np.inf]))
    foreign = StageSpace(1, other, np.array([0]), np.array([cap]), np.array([np.inf]))
    weights = Objective(4, 8).balanced
    prices = [Price(*weights), Price(*TIME_ONLY)]
    prices += [s.price(w, p) for s in (space, foreign) for w in (weights, TIME_ONLY) for p in (0.1, 1.0, 10.0)]
    table.add(prices)
    for w in (weights, TIME_ONLY):
        best = (w[0] * totals[:, 0] + w[1] * totals[:, 1])[need <= cap].min()
        assert dual(table, space, w)[0] <= best * (1 + 1e-12)


@settings(max_examples=drawn(100), deadline=None)
@given(seed=st.integers(0, 10**6))
def test_steeper_prices_reach_the_convex_hull(seed: int) -> None:
    """Repeated, they end at the least cost of a mixture of two plans that needs just the cap."""
    rng = np.random.default_rng(seed)
    totals, table = single(rng)
    cost, need = totals[:, 0], totals[:, 2] + totals[:, 3]
    cap = float(rng.integers(need.min(), need.max() + 1))
    space = StageSpace(0, 1, np.array([0]), np.array([cap]), np.array([np.inf]))
    table.add([Price(*TIME_ONLY), space.least_bytes_price()])
    for _ in range(CHOICES):
        price = steeper(table, space, 0, TIME_ONLY)
        if price is None or not table.add([price]):
            break
    shares = [
        (share, a, b)
        for a, b in itertools.product(range(CHOICES), repeat=2)
        for share in ((cap - need[b]) / (need[a] - need[b]) if need[a] != need[b] else 0.0,)
        if 0 <= share <= 1 and share * need[a] + (1 - share) * need[b] <= cap + 1e-9
    ]
    hull = min(min(share * cost[a] + (1 - share) * cost[b] for share, a, b in shares), cost[need <= cap].min())
    assert dual(table, space, TIME_ONLY)[0] == pytest.approx(hull)


def random_arcs(rng: np.random.Generator, stages: int, count: int, nodes: int) -> list[Arcs]:
    return [
        Arcs(
            Ends(rng.integers(0, nodes, count), rng.integers(0, nodes, count)),
            rng.uniform(1, 9, (count, 2)),
            rng.uniform(1, 9, count),
        )
        for _ in range(stages)
    ]


@settings(max_examples=drawn(200), deadline=None)
@given(ends=st.lists(st.integers(0, 9) | st.just(3), max_size=60), levels=st.sampled_from([None, 1, 5]))
def test_the_least_row_of_each_node_is_found_whatever_the_sizes_of_groups(ends: list[int], levels: int | None) -> None:
    shape = (len(ends),) if levels is None else (len(ends), levels)
    rows = np.random.default_rng(len(ends)).permutation(int(np.prod(shape))).reshape(shape).astype(float)
    groups = grouped(np.array(ends, dtype=np.int64))
    least = groups.least(rows[groups.order])
    assert sorted(groups.nodes) == sorted(set(ends)) and sorted(groups.order) == list(range(len(ends)))
    for node, found in zip(groups.nodes, least, strict=True):
        assert (found == rows[np.array(ends) == node].min(axis=0)).all()


def tilings(arcs: list[Arcs], start: int, end: int) -> list[tuple[int, ...]]:
    every = itertools.product(*(range(len(a.source)) for a in arcs))
    return [
        path
        for path in every
        if arcs[0].source[path[0]] == start
        and arcs[-1].target[path[-1]] == end
        and all(arcs[s].target[path[s]] == arcs[s + 1].source[path[s + 1]] for s in range(len(arcs) - 1))
    ]


@settings(max_examples=drawn(100), deadline=None)
@given(seed=st.integers(0, 10**6))
def test_sweeps_and_bottlenecks_equal_enumeration(seed: int) -> None:
    arcs = random_arcs(np.random.default_rng(seed), stages=3, count=7, nodes=3)
    known = tilings(arcs, 0, 2)
    starts, ends = np.array([0]), np.array([2])
    worst, path = bottleneck([a.ends for a in arcs], [a.slow_s for a in arcs], starts, ends, 3)
    assert worst == min((max(a.slow_s[i] for a, i in zip(arcs, p, strict=True)) for p in known), default=np.inf)
    assert not known or path in known
    levels = levels_of(arcs, 0.0, np.inf)
    found = sweep(arcs, levels, starts, ends, 3)
    for (level, limit), number in itertools.product(enumerate(levels.upper_s), range(2)):
        slow = {p: max(a.slow_s[i] for a, i in zip(arcs, p, strict=True)) for p in known}
        sums = {p: sum(a.cost_s[i, number] for a, i in zip(arcs, p, strict=True)) for p in known if slow[p] <= limit}
        assert found.total_s()[number, level] == pytest.approx(min(sums.values(), default=np.inf))
        if sums:
            assert found.path(level, number) == min(sums, key=sums.__getitem__)
        through = found.through_s(1)[:, number, level]
        for arc in range(7):
            least = min((v for p, v in sums.items() if p[1] == arc), default=np.inf)
            assert through[arc] == pytest.approx(least)


def test_levels_stay_exhaustive_when_there_are_too_many_times() -> None:
    times = np.sort(np.random.default_rng(0).uniform(1, 9, 1000))
    arcs = Arcs(Ends(np.zeros(1000, dtype=np.int64), np.ones(1000, dtype=np.int64)), times[:, None], times)
    levels = levels_of([arcs], 2.0, 8.0)
    kept = times[(times >= 2.0) & (times <= 8.0)]
    assert len(levels.upper_s) <= LEVELS[1] < len(kept)
    for time_s in kept:
        inside = (levels.lower_s <= time_s) & (time_s <= levels.upper_s)
        assert inside.sum() == 1
