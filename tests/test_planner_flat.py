"""The flat program, brute force, and the dynamic program with its columns: three ways to one answer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from effort import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from lp_reader import solved_elsewhere
from random_spaces import BATCH, DEVICES, RandomSpace, SavingSpace, UpdatedSpace, Whole, assert_consistent, every_plan
from test_planner_search import LargeSpace

from autopar.planner import flat_solver
from autopar.planner.search import search
from autopar.planner.solution import Infeasible, Pins, Solution
from cost_model.errors import ProblemSizeError, UnsupportedError

FEW, MANY = (settings(max_examples=drawn(count), deadline=None) for count in (30, 400))
SCHEDULE = st.sampled_from([None, "gpipe", "zero_bubble"])
SEED = st.integers(0, 10**6)


def agree_without_a_cap(seed: int, tied: bool, schedule: str | None) -> None:
    """With costs per step the columns may be off by the gap they report, and by no more."""
    space, pins = RandomSpace(seed, tied), Pins(schedule=schedule)
    best = min(every_plan(space, pins))[0]
    flat, columns = (search(space, DEVICES, BATCH, pins=pins, flat=way) for way in (True, False))
    assert isinstance(flat, Solution) and isinstance(columns, Solution)
    assert flat.objective_s == pytest.approx(best, rel=1e-6) and flat.gap == pytest.approx(0.0, abs=1e-6)
    assert_consistent(space, flat, math.inf)
    assert best * (1 - 1e-9) <= columns.objective_s <= best * (1 + columns.gap) * (1 + 1e-9)


def agree_under_a_cap(seed: int, tied: bool, tightness: float, updated: bool) -> None:
    """The flat program is exact, the columns within the gap that they report."""
    space = UpdatedSpace(seed, tied) if updated else RandomSpace(seed, tied)
    plans = every_plan(space, Pins())
    least, most = min(need for _, need in plans), min(plans)[1]
    cap = int(least - 2 + tightness * (most - least + 4))
    flat, columns = (search(space, DEVICES, BATCH, cap_bytes=cap, flat=way) for way in (True, False))
    fitting = [time_s for time_s, need in plans if need <= cap]
    if not fitting:
        assert isinstance(flat, Infeasible) and isinstance(columns, Infeasible)
        assert flat.needed_bytes == columns.needed_bytes == least
        return
    assert isinstance(flat, Solution) and isinstance(columns, Solution)
    assert flat.objective_s == pytest.approx(min(fitting), rel=1e-6)
    assert_consistent(space, flat, cap)
    assert flat.objective_s * (1 - 1e-6) <= columns.objective_s <= flat.objective_s * (1 + columns.gap) * (1 + 1e-6)


def test_without_a_cap_all_three_agree() -> None:
    FEW(given(seed=SEED, tied=st.booleans(), schedule=SCHEDULE)(agree_without_a_cap))()


def test_under_a_cap_all_three_agree() -> None:
    FEW(given(seed=SEED, tied=st.booleans(), tightness=st.floats(0, 1.2), updated=st.booleans())(agree_under_a_cap))()


@pytest.mark.slow
def test_many_graphs_without_a_cap() -> None:
    MANY(given(seed=SEED, tied=st.booleans(), schedule=SCHEDULE)(agree_without_a_cap))()


@pytest.mark.slow
def test_many_graphs_under_a_cap() -> None:
    MANY(given(seed=SEED, tied=st.booleans(), tightness=st.floats(0, 1.2), updated=st.booleans())(agree_under_a_cap))()


@pytest.mark.parametrize(("seed", "tied", "tightness"), [(751, True, 0.5), (874, True, 0.375), (5354, False, 0.203125)])
def test_programs_that_presolve_gives_a_wrong_answer(seed: int, tied: bool, tightness: float) -> None:
    """HiGHS 1.15 calls the first solved with fractions in binary variables, the second infeasible, the third optimal
    where it is not."""
    agree_under_a_cap(seed, tied=tied, tightness=tightness, updated=False)


@settings(max_examples=drawn(15), deadline=None)
@given(seed=st.integers(0, 10**6), tightness=st.floats(0, 1.0))
def test_ways_to_save_memory_are_variables_of_the_flat_program_too(seed: int, tightness: float) -> None:
    space = SavingSpace(seed)
    plans = every_plan(Whole(space), Pins())
    least, most = min(need for _, need in plans), min(plans)[1]
    cap = int(least + tightness * (most - least))
    found = search(space, DEVICES, BATCH, cap_bytes=cap, flat=True)
    assert isinstance(found, Solution)
    assert found.objective_s == pytest.approx(min(t for t, need in plans if need <= cap), rel=1e-6)
    assert_consistent(Whole(space), found, cap)


def test_the_flat_program_is_written_with_named_rows_and_read_back(tmp_path: Path) -> None:
    """Another reader of the LP format finds the same optimum."""
    found = search(RandomSpace(8, tied=True), DEVICES, BATCH, cap_bytes=150, pins=Pins(pp=2), flat=True)
    assert isinstance(found, Solution) and found.ilp is not None
    path = tmp_path / "flat.lp"
    found.ilp.write_lp(path)
    text = path.read_text()
    rows = ("one_range_1", "tile_0_1", "inside_0_0", "label_1_2_tied", "meet_0_1", "agree_2_tied_0", "begin_1_1")
    for row in (*rows, "cut_1_1_0", "marginal_0_0_", "slowest_stage_1", "largest_step_0", "memory_1"):
        assert f"\n{row}" in text, row
    assert solved_elsewhere(path) == pytest.approx(found.objective_s, rel=1e-6)


def test_a_graph_that_is_too_large_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat_solver, "MOST_VARIABLES", 1000)
    with pytest.raises(ProblemSizeError, match=r"would have [\d,]+ variables, more than the 1,000") as caught:
        search(LargeSpace(), 8, 32, flat=True)
    assert caught.value.variables > caught.value.most_variables == 1000
    assert isinstance(caught.value, UnsupportedError)
