"""The exact choice: one column per stage, as an integer program (``autopar.planner.solvers`` solves it).

Variables: x[s, c] = 1 if stage s is column c; slowest = time of the slowest stage; step = the largest
per-step cost. Times are divided by a unit near the slowest stage, since solvers' tolerances are absolute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pulp

from autopar.planner.bounds import Objective
from autopar.planner.columns import Column
from autopar.planner.solvers import TIME_LIMIT_S, Answer, named, solved
from cost_model.errors import SolverError

Offers = Sequence[Sequence[Column]]


@dataclass(frozen=True)
class Choice:
    """columns: one per stage; bound_s: proven over the same columns; optimal: whether they meet.

    solver: the one that answered; notes: fallbacks and timeouts, to be said to the user.
    """

    columns: tuple[Column, ...]
    objective_s: float
    bound_s: float
    optimal: bool
    solver: str
    notes: tuple[str, ...]


def objective_s(columns: Sequence[Column], objective: Objective) -> float:
    """waiting x sum of stages + cuts + slowest x slowest stage + largest per-step cost."""
    along = sum(objective.waiting * c.time_s + c.cut_s for c in columns)
    return along + objective.slowest * max(c.time_s for c in columns) + max(c.step_s for c in columns)


class StageIlp:
    """The integer program over columns offered to each stage.

    Invariant: only columns that begin the chain are offered to the first stage, only columns that end
    it to the last, and none is over its stage's memory cap.
    """

    def __init__(self, offers: Offers, objective: Objective) -> None:
        assert offers and all(offers), "a stage without columns"
        self.offers = tuple(tuple(columns) for columns in offers)
        self.objective = objective
        self.unit_s = _unit_s(self.offers)
        self.problem = pulp.LpProblem(named("autopar_stages", self.unit_s), pulp.LpMinimize)
        self.picks = [
            [pulp.LpVariable(f"x_{s}_{c}", cat=pulp.LpBinary) for c in range(len(columns))]
            for s, columns in enumerate(self.offers)
        ]
        self.slowest = pulp.LpVariable("slowest", lowBound=0)
        self.step = pulp.LpVariable("step", lowBound=0)
        self.problem += self._objective(), "step_time"
        for s in range(len(self.offers)):
            self._one_column(s)
            self._slowest_stage(s)
            self._largest_step(s)
        for s in range(len(self.offers) - 1):
            self._meet_at_cut(s)

    def write_lp(self, path: str | Path) -> None:
        """Write the program in LP format."""
        self.problem.writeLP(str(path))

    def solve(self, time_limit_s: float = TIME_LIMIT_S) -> Choice:
        """Solve with the first solver that works.

        Raises SolverError, naming what was tried, if none gives a solution.
        """
        answer = solved(self.problem, time_limit_s)
        if not answer.feasible:
            raise SolverError(((answer.solver, "the columns do not tile the chain"),))
        return self._choice(answer)

    def _objective(self) -> pulp.LpAffineExpression:
        """sum_s sum_c (waiting time[c] + cut[c]) x[s, c] + slowest_weight slowest + step"""
        terms = [
            (pick, (self.objective.waiting * c.time_s + c.cut_s) / self.unit_s)
            for picks, columns in zip(self.picks, self.offers, strict=True)
            for pick, c in zip(picks, columns, strict=True)
        ]
        return pulp.LpAffineExpression([*terms, (self.slowest, self.objective.slowest), (self.step, 1)])

    def _one_column(self, s: int) -> None:
        """sum_c x[s, c] = 1"""
        self.problem += pulp.lpSum(self.picks[s]) == 1, f"one_column_{s}"

    def _slowest_stage(self, s: int) -> None:
        """sum_c time[c] x[s, c] <= slowest"""
        terms = [(x, c.time_s / self.unit_s) for x, c in zip(self.picks[s], self.offers[s], strict=True)]
        self.problem += pulp.LpAffineExpression([*terms, (self.slowest, -1)]) <= 0, f"slowest_stage_{s}"

    def _largest_step(self, s: int) -> None:
        """sum_c step[c] x[s, c] <= step"""
        terms = [(x, c.step_s / self.unit_s) for x, c in zip(self.picks[s], self.offers[s], strict=True)]
        self.problem += pulp.LpAffineExpression([*terms, (self.step, -1)]) <= 0, f"largest_step_{s}"

    def _meet_at_cut(self, s: int) -> None:
        """for each (position, label): sum of x[s, c] that end there = sum of x[s + 1, c] that begin there"""
        meeting: dict[tuple[int, int], list[tuple[pulp.LpVariable, int]]] = {}
        for x, c in zip(self.picks[s], self.offers[s], strict=True):
            meeting.setdefault((c.last, c.exit), []).append((x, 1))
        for x, c in zip(self.picks[s + 1], self.offers[s + 1], strict=True):
            meeting.setdefault((c.first, c.entry), []).append((x, -1))
        for (position, label), terms in sorted(meeting.items(), key=lambda item: item[0]):
            self.problem += pulp.LpAffineExpression(terms) == 0, f"meet_{s}_{position}_{label}"

    def _choice(self, answer: Answer) -> Choice:
        columns = tuple(
            next(c for x, c in zip(picks, offered, strict=True) if round(x.value() or 0.0) == 1)
            for picks, offered in zip(self.picks, self.offers, strict=True)
        )
        found_s = objective_s(columns, self.objective)
        bound_s = found_s if answer.optimal else min(found_s, relaxed_s(self.offers, self.objective))
        notes = answer.notes
        if not answer.optimal:
            above = _percent(found_s, bound_s)
            notes = (*notes, f"{answer.solver} stopped at its time limit, {above} above the bound it left")
        return Choice(columns, found_s, bound_s, answer.optimal, answer.solver, notes)


def relaxed_s(offers: Offers, objective: Objective) -> float:
    """A lower bound that needs no solver: each stage takes its best column, whatever its neighbours do."""
    along = sum(min(objective.waiting * c.time_s + c.cut_s for c in columns) for columns in offers)
    slowest = max(min(c.time_s for c in columns) for columns in offers)
    return along + objective.slowest * slowest + max(min(c.step_s for c in columns) for columns in offers)


def _unit_s(offers: Offers) -> float:
    slowest = max(min(c.time_s for c in columns) for columns in offers)
    return slowest if slowest > 0 else 1.0


def _percent(found_s: float, bound_s: float) -> str:
    return f"{(found_s / bound_s - 1) * 100:.2f} %" if bound_s > 0 else "unboundedly"
