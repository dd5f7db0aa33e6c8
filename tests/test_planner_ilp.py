"""The ILP against enumeration of the same columns, and its behaviour when solvers are missing."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pulp
import pytest
from effort import drawn
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.planner import ilp
from autopar.planner.bounds import Objective
from autopar.planner.columns import Column
from autopar.planner.ilp import StageIlp, objective_s
from cost_model.errors import SolverError


def random_offers(seed: int, stages: int, segments: int = 4) -> list[list[Column]]:
    """Random columns of each stage; the first few tile the chain, so that a solution exists."""
    rng = np.random.default_rng(seed)
    cuts = [0, *sorted(rng.choice(np.arange(1, segments), stages - 1, replace=False).tolist()), segments]
    offers = []
    for s in range(stages):
        columns = [random_column(rng, cuts[s], cuts[s + 1], s, stages)]
        for _ in range(int(rng.integers(0, 7))):
            first = 0 if s == 0 else int(rng.integers(s, segments - stages + s + 1))
            last = segments if s == stages - 1 else int(rng.integers(first + 1, segments - stages + s + 2))
            columns.append(random_column(rng, first, max(last, first + 1), s, stages))
        offers.append(columns)
    return offers


def random_column(rng: np.random.Generator, first: int, last: int, stage: int, stages: int) -> Column:
    entry, exit = (0 if at_end else int(rng.integers(0, 2)) for at_end in (stage == 0, stage == stages - 1))
    time_s, step_s, cut_s = (float(x) for x in rng.uniform(0, 1e-3, 3))
    return Column(first, last, entry, exit, time_s * (last - first), step_s, 0.0, 0.0, cut_s if stage else 0.0, ())


def meets(columns: tuple[Column, ...]) -> bool:
    return all((a.last, a.exit) == (b.first, b.entry) for a, b in itertools.pairwise(columns))


def ilp_of(offers: list[list[Column]], microbatches: int) -> StageIlp:
    return StageIlp(offers, Objective(len(offers), microbatches))


def brute_force(offers: list[list[Column]], objective: Objective) -> float:
    """Least objective over all choices that tile the chain with agreeing labels; infinite if none does."""
    tilings = (choice for choice in itertools.product(*offers) if meets(choice))
    return min((objective_s(choice, objective) for choice in tilings), default=np.inf)


@settings(max_examples=drawn(60), deadline=None)
@given(
    seed=st.integers(0, 10**6),
    stages=st.integers(1, 3),
    microbatches=st.sampled_from([1, 2, 16]),
    waiting=st.sampled_from([1.0, 0.25]),
)
def test_the_choice_equals_brute_force(seed: int, stages: int, microbatches: int, waiting: float) -> None:
    offers, objective = random_offers(seed, stages), Objective(stages, microbatches, waiting)
    best = brute_force(offers, objective)
    if not np.isfinite(best):
        return
    choice = StageIlp(offers, objective).solve()
    assert meets(choice.columns)
    assert all(column in columns for column, columns in zip(choice.columns, offers, strict=True))
    assert choice.objective_s == pytest.approx(best, rel=1e-6)
    assert choice.optimal and choice.solver == "HiGHS" and choice.notes == ()


def test_the_objective_is_the_formula() -> None:
    columns = [Column(0, 1, 0, 0, 2.0, 1.0, 0, 0, 0.0, ()), Column(1, 2, 0, 0, 3.0, 5.0, 0, 0, 0.5, ())]
    assert objective_s(columns, Objective(2, 8)) == 2.0 + 3.5 + 7 * 3.0 + 5.0
    assert objective_s(columns, Objective(2, 8, 0.25)) == 0.25 * 5.0 + 0.5 + 7.75 * 3.0 + 5.0


def test_cbc_answers_when_highs_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    offers = random_offers(3, 2)
    expected = ilp_of(offers, 4).solve()
    monkeypatch.setattr(pulp.HiGHS, "available", lambda self: False)
    choice = ilp_of(offers, 4).solve()
    assert choice.columns == expected.columns
    assert choice.solver == "CBC"
    assert choice.notes == ("ILP solver HiGHS did not work (not installed); CBC was used",)


def test_without_solvers_the_error_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, problem: object) -> None:
        raise pulp.PulpSolverError("broken")

    monkeypatch.setattr(pulp.HiGHS, "available", lambda self: False)
    monkeypatch.setattr(pulp.PULP_CBC_CMD, "actualSolve", broken)
    with pytest.raises(SolverError, match="highspy") as caught:
        ilp_of(random_offers(3, 2), 4).solve()
    assert caught.value.tried == (("HiGHS", "not installed"), ("CBC", "broken"))


@pytest.mark.parametrize("presolved_only", [True, False])
def test_an_answer_with_fractions_is_not_taken(presolved_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    solve = pulp.HiGHS.actualSolve

    def fractional(self: pulp.HiGHS, problem: pulp.LpProblem) -> int:
        status = solve(self, problem)
        if not (presolved_only and self.optionsDict.get("presolve") == "off"):
            next(x for x in problem.variables() if x.cat == pulp.LpInteger).varValue = 0.4
        return int(status)

    offers = random_offers(3, 2)
    expected = ilp_of(offers, 4).solve()
    monkeypatch.setattr(pulp.HiGHS, "actualSolve", fractional)
    choice = ilp_of(offers, 4).solve()
    assert choice.columns == expected.columns
    assert choice.solver == ("HiGHS" if presolved_only else "CBC")
    assert [("fractions" in note, "CBC was used" in note) for note in choice.notes] == [(True, True)] * (
        not presolved_only
    )


def test_a_timeout_is_not_called_optimal(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = pulp.HiGHS.actualSolve

    def stopped(self: pulp.HiGHS, problem: pulp.LpProblem) -> int:
        status = solve(self, problem)
        problem.assignStatus(status, pulp.LpSolutionIntegerFeasible)
        return int(status)

    offers = random_offers(11, 3)
    monkeypatch.setattr(pulp.HiGHS, "actualSolve", stopped)
    choice = ilp_of(offers, 4).solve()
    assert not choice.optimal
    assert choice.bound_s <= brute_force(offers, Objective(len(offers), 4)) * (1 + 1e-9)
    assert "time limit" in choice.notes[0]


def test_an_impossible_tiling_is_a_solver_error() -> None:
    offers = [[Column(0, 1, 0, 0, 1.0, 0, 0, 0, 0, ())], [Column(2, 3, 0, 0, 1.0, 0, 0, 0, 0, ())]]
    with pytest.raises(SolverError):
        ilp_of(offers, 1).solve()


def test_rows_keep_their_names(tmp_path: Path) -> None:
    program = ilp_of(random_offers(5, 2), 4)
    program.write_lp(tmp_path / "stages.lp")
    text = (tmp_path / "stages.lp").read_text()
    for row in ("one_column_0", "one_column_1", "slowest_stage_1", "largest_step_0", "meet_0_"):
        assert row in text, row


def test_tiny_times_are_not_lost_in_tolerances() -> None:
    """HiGHS accepts rows within 1e-7, which is a tenth of these times."""
    offers = [[Column(0, 1, 0, 0, t, 0.0, 0, 0, 0, ()) for t in (1.01e-6, 1.00e-6, 1.02e-6)]]
    choice = ilp_of(offers, 1024).solve()
    assert choice.columns[0].time_s == 1.00e-6
    assert ilp.relaxed_s(offers, Objective(len(offers), 1024)) == pytest.approx(choice.objective_s)
