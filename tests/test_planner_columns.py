"""Ranges, folding and mixed columns against plain enumeration of chains of segments."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from effort import drawn
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.planner.chain import Chain, fold, in_flight
from autopar.planner.columns import Column, RangeTable
from autopar.planner.factor_graph import COMPONENTS, Factor, FactorGraph
from autopar.planner.segment import Price, Segment

PRICES = (Price(1, 0), Price(2, 1, 0.5, 1.0), Price(0, 0, 1, 2))


def random_kind(rng: np.random.Generator, entry: tuple[str, ...] | None, exit: tuple[str, ...] | None) -> FactorGraph:
    """Entry, one inner variable and exit, all tied by random factors."""
    domains = {"inner": ("a", "b"), **({"in": entry} if entry else {}), **({"out": exit} if exit else {})}
    factors = []
    for scope in itertools.combinations(domains, min(2, len(domains))):
        shape = tuple(len(domains[v]) for v in scope)
        factors.append(Factor(scope, *(rng.integers(0, 9, shape).astype(float) for _ in COMPONENTS)))
    return FactorGraph(domains, tuple(factors), "in" if entry else None, "out" if exit else None)


def random_chain(seed: int, repeats: int = 3) -> Chain:
    """head, a block repeated, a wider last block, tail: two kinds of boundaries."""
    rng = np.random.default_rng(seed)
    narrow, wide = ("r", "s"), ("r", "s", "p")
    kinds = (
        random_kind(rng, None, narrow),
        random_kind(rng, narrow, narrow),
        random_kind(rng, narrow, wide),
        random_kind(rng, wide, None),
    )
    return Chain(kinds, (0, *(1,) * repeats, 2, 3), lambda i, label: 1.0, lambda i, j: 0)


def table_of(chain: Chain) -> RangeTable:
    table = RangeTable(chain, [Segment(graph) for graph in chain.kinds])
    table.add(PRICES)
    return table


def paths(chain: Chain, first: int, last: int) -> Iterator[tuple[str, ...]]:
    yield from itertools.product(*(chain.boundary_labels(i) for i in range(first, last + 1)))


def best_range(chain: Chain, price: Price, first: int, last: int) -> dict[tuple[str, str], float]:
    """Least priced cost of a range per pair of end labels, over all labels between."""
    one = [Segment(chain.kinds[k]).solve((price,))[0].cost for k in chain.sequence]
    best: dict[tuple[str, str], float] = {}
    for path in paths(chain, first, last):
        index = [chain.boundary_labels(first + i).index(label) for i, label in enumerate(path)]
        cost = sum(one[first + i][index[i], index[i + 1]] for i in range(last - first))
        pair = (path[0], path[-1])
        best[pair] = min(best.get(pair, np.inf), cost)
    return best


@settings(max_examples=drawn(25), deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_range_equals_enumeration(seed: int) -> None:
    chain = random_chain(seed)
    table, edges = table_of(chain), table_of(chain).edges
    cost = table.edge_cost()
    for k, price in enumerate(PRICES):
        expected = {r: best_range(chain, price, *r) for r in set(zip(edges.first, edges.last, strict=True))}
        for e in range(len(edges.first)):
            labels = [chain.boundary_labels(edges.first[e])[edges.entry[e]]]
            labels.append(chain.boundary_labels(edges.last[e])[edges.exit[e]])
            assert cost[e, k] == pytest.approx(expected[edges.first[e], edges.last[e]][tuple(labels)])


@settings(max_examples=drawn(25), deadline=None)
@given(seed=st.integers(0, 10**6), edge_seed=st.integers(0, 10**6))
def test_a_column_is_the_sum_of_its_assignments(seed: int, edge_seed: int) -> None:
    chain = random_chain(seed)
    table = table_of(chain)
    rng = np.random.default_rng(edge_seed)
    edge = int(rng.choice(np.flatnonzero(table.edges.last - table.edges.first > 1)))
    prices = np.arange(len(PRICES))
    totals = table.mixtures(edge, prices)
    at = tuple(int(rng.integers(0, size)) for size in totals.shape[:3])
    first = int(table.edges.first[edge])
    at = (*at, int(rng.integers(0, len(chain.boundary_labels(first + 1 + at[0])))))
    for column in (table.column(edge, 1), table.mixed_column(edge, prices, at, totals[at])):
        assert_adds_up(chain, table, column)


def assert_adds_up(chain: Chain, table: RangeTable, column: Column) -> None:
    assignments, total, before = table.assignments(column), np.zeros(4), None
    assert len(assignments) == column.last - column.first
    for offset, labels in enumerate(assignments):
        graph = chain.kinds[chain.sequence[column.first + offset]]
        assert before is None or labels["in"] == before
        before = labels.get("out")
        for factor in graph.factors:
            index = tuple(graph.domains[v].index(labels[v]) for v in factor.variables)
            total += [array[index] for array in factor.components()]
    found = (column.time_s, column.step_s, column.state_bytes, column.saved_bytes)
    np.testing.assert_allclose(found, total)
    assert assignments[-1].get("out", "") == chain.boundary_labels(column.last)[column.exit]


def test_folding_does_not_change_a_range() -> None:
    folded = random_chain(7, repeats=4)
    kinds = tuple(folded.kinds[k] for k in folded.sequence)
    unfolded = Chain(kinds, tuple(range(len(kinds))), folded.cut_s, folded.reserve_bytes)
    one, other = table_of(folded), table_of(unfolded)
    assert one.folding.classes < other.folding.classes == len(kinds) * (len(kinds) + 1) // 2
    np.testing.assert_array_equal(one.edge_totals(), other.edge_totals())
    for edge in range(len(one.edges.first)):
        assert one.assignments(one.column(edge, 1)) == other.assignments(other.column(edge, 1))


@settings(max_examples=drawn(25), deadline=None)
@given(seed=st.integers(0, 10**6), edge_seed=st.integers(0, 10**6))
def test_what_was_left_out_is_priced_like_the_rest_once_it_is_required(seed: int, edge_seed: int) -> None:
    """Prices that came meanwhile included, before and behind those that were known."""
    chain = random_chain(seed)
    whole, narrow = table_of(chain), table_of(chain)
    rng = np.random.default_rng(edge_seed)
    kept = rng.choice(len(whole.edges.first), 2, replace=False)
    narrow.narrow(kept)
    for table in (whole, narrow):
        table.add([Price(5, 5)], first=True)
        table.add([Price(2, 1, 0.5, 0.25)])
    np.testing.assert_array_equal(narrow.edge_totals(kept), whole.edge_totals(kept))
    with pytest.raises(AssertionError, match="narrowed"):
        narrow.edge_cost()
    narrow.require(narrow.edges.cls)
    np.testing.assert_array_equal(narrow.edge_totals(), whole.edge_totals())
    np.testing.assert_array_equal(narrow.edge_cost(), whole.edge_cost())
    edge = int(rng.integers(len(whole.edges.first)))
    assert narrow.assignments(narrow.column(edge, 0)) == whole.assignments(whole.column(edge, 0))


@pytest.mark.parametrize("pp", [1, 2, 3])
def test_edges_are_of_ranges_that_some_stage_may_be(pp: int) -> None:
    chain = random_chain(5)
    count = len(chain)
    cuts = itertools.combinations(range(1, count), pp - 1)
    ranges = {pair for cut in cuts for pair in itertools.pairwise((0, *cut, count))}
    edges = RangeTable(chain, [Segment(graph) for graph in chain.kinds], pp).edges
    found = set(zip(edges.first.tolist(), edges.last.tolist(), strict=True))
    assert found == ranges if pp < 3 else found >= ranges
    short = RangeTable(chain, [Segment(graph) for graph in chain.kinds], None, 2).edges
    assert set((short.last - short.first).tolist()) == {1, 2}


def test_a_chain_of_equal_blocks_has_one_class_per_length() -> None:
    assert fold((0,) * 50).classes == 50
    assert fold((0, 1, 1, 1, 2)).classes == 3 + 3 + 3 + 2 + 1


def test_prices_are_added_once() -> None:
    table = table_of(random_chain(1))
    assert table.add([PRICES[0], Price(5, 5)]) == 1
    assert table.add([Price(5, 5)]) == 0
    assert table.cost.shape[1] == len(PRICES) + 1


def test_neighbours_must_agree_on_their_boundary() -> None:
    rng = np.random.default_rng(0)
    kinds = (random_kind(rng, None, ("r", "s")), random_kind(rng, ("r", "p"), None))
    with pytest.raises(AssertionError):
        Chain(kinds, (0, 1), lambda i, label: 0.0, lambda i, j: 0)


@pytest.mark.parametrize("schedule, held", [("gpipe", [8, 8, 8, 8]), ("1f1b", [4, 3, 2, 1])])
def test_microbatches_in_flight(schedule: str, held: list[int]) -> None:
    assert [in_flight(schedule, stage, 4, 8) for stage in range(4)] == held
    assert in_flight(schedule, 0, 4, 2) == 2
