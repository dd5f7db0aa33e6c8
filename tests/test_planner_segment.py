"""Variable elimination against enumeration of all assignments."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from effort import drawn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autopar.planner import elimination as elimination_module
from autopar.planner.factor_graph import Factor, FactorGraph
from autopar.planner.segment import Price, Segment, SegmentTable

PRICES = (Price(1, 0), Price(3, 1), Price(0, 0, 1, 2), Price(2, 0.5, 0.25, 0.5))


def random_graph(rng: np.random.Generator, ends: str) -> FactorGraph:
    """Up to five variables of up to three labels, random scopes, some combinations forbidden."""
    variables = [f"v{i}" for i in range(int(rng.integers(2, 6)))]
    domains = {v: tuple(f"{v}.{i}" for i in range(int(rng.integers(1, 4)))) for v in variables}
    factors = []
    for _ in range(int(rng.integers(1, 8))):
        scope = tuple(rng.permutation(variables)[: int(rng.integers(0, 4))])
        shape = tuple(len(domains[v]) for v in scope)
        time_s = rng.integers(0, 20, shape).astype(float)
        time_s = np.where(rng.random(shape) < 0.1, np.inf, time_s)
        rest = [rng.integers(0, 20, shape).astype(float) if rng.random() < 0.7 else None for _ in range(3)]
        factors.append(Factor(scope, time_s, *rest))
    entry = {"none": None, "both": "v0", "same": "v0", "exit": None}[ends]
    exit = {"none": None, "both": "v1", "same": "v0", "exit": "v1"}[ends]
    return FactorGraph(domains, tuple(factors), entry, exit)


def totals_of(graph: FactorGraph, labels: dict[str, str]) -> np.ndarray:
    """The four totals of one assignment, added factor by factor."""
    total = np.zeros(4)
    for factor in graph.factors:
        at = tuple(graph.domains[v].index(labels[v]) for v in factor.variables)
        total += [0.0 if array is None else array[at] for array in factor.components()]
    return total


def brute_force(graph: FactorGraph, price: Price) -> np.ndarray:
    """[entry, exit] least priced cost over all assignments."""
    best = np.full((len(graph.entry_labels), len(graph.exit_labels)), np.inf)
    for chosen in itertools.product(*graph.domains.values()):
        labels = dict(zip(graph.domains, chosen, strict=True))
        totals = totals_of(graph, labels)
        if not np.isfinite(totals[0]):
            continue
        entry = graph.entry_labels.index(labels[graph.entry] if graph.entry else "")
        exit = graph.exit_labels.index(labels[graph.exit] if graph.exit else "")
        best[entry, exit] = min(best[entry, exit], np.dot(price.vector(), totals))
    return best


@settings(max_examples=drawn(150), deadline=None)
@given(seed=st.integers(0, 10**6), ends=st.sampled_from(["none", "both", "same", "exit"]))
def test_every_pair_equals_brute_force(seed: int, ends: str) -> None:
    graph = random_graph(np.random.default_rng(seed), ends)
    segment = Segment(graph)
    for price, table in zip(PRICES, segment.solve(PRICES), strict=True):
        np.testing.assert_allclose(table.cost, brute_force(graph, price), rtol=1e-12)
        for entry, exit in zip(*np.nonzero(np.isfinite(table.cost)), strict=True):
            labels = segment.assignment(price, int(entry), int(exit))
            totals = totals_of(graph, labels)
            np.testing.assert_allclose(table.totals[entry, exit], totals, rtol=1e-12)
            assert np.dot(price.vector(), totals) == pytest.approx(table.cost[entry, exit], rel=1e-12)
            assert graph.entry is None or labels[graph.entry] == graph.entry_labels[entry]
            assert graph.exit is None or labels[graph.exit] == graph.exit_labels[exit]


@settings(max_examples=drawn(50), deadline=None)
@given(seed=st.integers(0, 10**6))
def test_one_price_at_a_time_equals_all_at_once(seed: int) -> None:
    graph = random_graph(np.random.default_rng(seed), "both")
    together = Segment(graph).solve(PRICES)
    apart = [Segment(graph).solve((price,))[0] for price in PRICES]
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)


@settings(max_examples=drawn(50), deadline=None)
@given(seed=st.integers(0, 10**6), solved=st.integers(0, len(PRICES)))
def test_costs_alone_are_those_of_tables_whatever_was_solved_before(seed: int, solved: int) -> None:
    graph = random_graph(np.random.default_rng(seed), "both")
    segment = Segment(graph)
    segment.costs(PRICES[:2])
    segment.solve(PRICES[solved:])
    for price, cost in zip(PRICES, segment.costs(PRICES), strict=True):
        np.testing.assert_allclose(cost, brute_force(graph, price), rtol=1e-12)


def test_fixing_a_shared_variable_keeps_only_its_label() -> None:
    time_s = np.array([[5.0, 1.0], [2.0, 7.0]])
    graph = FactorGraph({"w": ("r", "s"), "x": ("a", "b")}, (Factor(("w", "x"), time_s),), shared=("w",))
    found = {label: Segment(graph.fixed({"w": label})) for label in ("r", "s")}
    assert {label: float(s.solve((Price(1, 0),))[0].cost[0, 0]) for label, s in found.items()} == {"r": 1.0, "s": 2.0}
    assert found["s"].assignment(Price(1, 0), 0, 0) == {"w": "s", "x": "a"}
    assert graph.fixed({"other": "r"}) is graph


def test_ties_go_to_the_first_label() -> None:
    graph = FactorGraph({"x": ("a", "b"), "y": ("c", "d")}, (Factor(("x", "y"), np.ones((2, 2))),))
    assert Segment(graph).assignment(Price(1, 1), 0, 0) == {"x": "a", "y": "c"}


def test_a_variable_without_factors_takes_its_first_label() -> None:
    graph = FactorGraph({"x": ("a", "b"), "idle": ("c", "d")}, (Factor(("x",), np.array([2.0, 1.0])),))
    assert Segment(graph).assignment(Price(1, 0), 0, 0) == {"x": "b", "idle": "c"}


@pytest.fixture
def small_tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Exact up to 12 entries, in parts of 9 beyond."""
    monkeypatch.setattr(elimination_module, "MAX_TABLE_ENTRIES", 12)
    monkeypatch.setattr(elimination_module, "PART_ENTRIES", 9)
    elimination_module.elimination.cache_clear()
    yield
    elimination_module.elimination.cache_clear()


def held_by(price: Price, table: SegmentTable) -> np.ndarray:
    """[entry, exit] priced cost of the assignments found; infinite where there is none."""
    finite = np.isfinite(table.totals[..., 0])
    return np.where(finite, np.where(finite[..., None], table.totals, 0.0) @ price.vector(), np.inf)


@pytest.mark.usefixtures("small_tables")
@settings(max_examples=drawn(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), ends=st.sampled_from(["none", "both", "same", "exit"]))
def test_tables_too_large_are_bounded_and_an_assignment_is_priced(seed: int, ends: str) -> None:
    graph = random_graph(np.random.default_rng(seed), ends)
    segment = Segment(graph)
    for price, table in zip(PRICES, segment.solve(PRICES), strict=True):
        least, found = brute_force(graph, price), held_by(price, table)
        finite = np.isfinite(found)
        assert (np.isfinite(table.cost) == finite).all() and (table.cost[finite] <= least[finite] * (1 + 1e-12)).all()
        assert (found >= least * (1 - 1e-12)).all()
        for entry, exit in zip(*np.nonzero(finite), strict=True):
            labels = segment.assignment(price, int(entry), int(exit))
            np.testing.assert_allclose(table.totals[entry, exit], totals_of(graph, labels), rtol=1e-12)
        np.testing.assert_allclose(segment.costs([price])[0], table.cost, rtol=1e-12)
        if segment.exact:
            np.testing.assert_allclose(table.cost, least, rtol=1e-12)


def tied(count: int, labels: int, seed: int = 0) -> FactorGraph:
    """Each variable tied to each: what agrees costs nothing, the rest differs; label 0 goes with any."""
    rng = np.random.default_rng(seed)
    domains = {f"v{i}": tuple(map(str, range(labels))) for i in range(count)}
    factors = [Factor((v,), rng.integers(0, 60, labels).astype(float)) for v in domains]
    for pair in itertools.combinations(domains, 2):
        time_s = rng.integers(1, 10, (labels, labels)) * (1.0 - np.eye(labels))
        time_s[rng.random((labels, labels)) < 0.1] = np.inf
        time_s[0], time_s[:, 0] = 5.0, 5.0
        factors.append(Factor(pair, time_s))
    return FactorGraph(domains, tuple(factors), "v0", "v1")


@pytest.mark.usefixtures("small_tables")
def test_variables_that_are_all_tied_have_an_assignment_near_the_best() -> None:
    graph = tied(8, 3)
    segment = Segment(graph)
    (table,) = segment.solve((Price(1, 0),))
    least = brute_force(graph, Price(1, 0))
    assert not segment.exact and np.isfinite(table.totals[0, 0]).all()
    assert table.cost.min() <= least.min() <= table.totals[..., 0].min() <= 1.1 * least.min()


def test_more_choices_than_any_table_holds_are_searched() -> None:
    """Tables over 20 variables of 5 labels have 10^14 entries."""
    segment = Segment(tied(20, 5))
    (table,) = segment.solve((Price(1, 0),))
    assert not segment.exact and np.isfinite(table.totals[0, 0]).all() and (table.cost <= table.totals[..., 0]).all()
    assert len(segment.assignment(Price(1, 0), 0, 0)) == 20


@pytest.mark.parametrize("bad", [np.zeros(3), np.array([np.nan, 0.0]), np.array([-np.inf, 0.0])])
def test_factors_are_checked(bad: np.ndarray) -> None:
    with pytest.raises(AssertionError):
        FactorGraph({"x": ("a", "b")}, (Factor(("x",), bad),))
