"""Solvers of integer programs: HiGHS or, failing that, CBC, both through PuLP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pulp

from cost_model.errors import SolverError

TIME_LIMIT_S = 60.0
INTEGRALITY = 1e-4
"""How far an integer variable may be from a whole number; the solvers' own tolerance is 1e-6."""


class Program(Protocol):
    """An integer program that a person may want to read."""

    def write_lp(self, path: str | Path) -> None:
        """Write it in LP format, rows and variables by their names."""


def named(name: str, unit_s: float) -> str:
    """The name of a program, as its file's first line has it, with the seconds that its objective counts in."""
    return f"{name}_in_units_of_{unit_s!r}_s"


@dataclass(frozen=True)
class Answer:
    """How a program was solved; the values are in its variables.

    feasible: whether there is a solution; optimal: whether it is proven best; bound: of the objective, proven, None
    where the solver leaves none. solver: the one that answered; notes: solvers that did not work, for the user.
    """

    feasible: bool
    optimal: bool
    bound: float | None
    solver: str
    notes: tuple[str, ...]


def solved(problem: pulp.LpProblem, time_limit_s: float) -> Answer:
    """Solve with the first solver that works. Errors: SolverError, naming what was tried, if none does."""
    failures: list[tuple[str, str]] = []
    for name, make in SOLVERS:
        reason = _attempt(problem, make(time_limit_s))
        if reason is None:
            notes = tuple(f"ILP solver {other} did not work ({why}); {name} was used" for other, why in failures)
            feasible = problem.status != pulp.LpStatusInfeasible
            optimal = problem.sol_status == pulp.LpSolutionOptimal
            return Answer(feasible, optimal, _bound(problem) if name == "HiGHS" else None, name, notes)
        failures.append((name, reason))
    raise SolverError(tuple(failures))


def _attempt(problem: pulp.LpProblem, solver: pulp.LpSolver) -> str | None:
    """None if the solver left an integer solution or proved that there is none, else why not."""
    if not solver.available():
        return "not installed"
    try:
        problem.solve(solver)
    except (pulp.PulpError, OSError, RuntimeError) as error:
        return str(error)
    if problem.status == pulp.LpStatusInfeasible:
        return None
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return f"no solution ({pulp.LpSolution[problem.sol_status]})"
    if any(abs(x.value() - round(x.value())) > INTEGRALITY for x in problem.variables() if x.cat == pulp.LpInteger):
        return "its answer has fractions where whole numbers are asked"
    return None


def _bound(problem: pulp.LpProblem) -> float:
    return float(problem.solverModel.getInfo().mip_dual_bound)


def _highs(time_limit_s: float) -> pulp.LpSolver:
    """Without presolve, with which HiGHS 1.15 calls a small program optimal that is not, another one solved with
    fractions in binary variables, a third infeasible of which a plan needs the cap to the byte. Without its
    jump to a first solution: 9 ms of a program of five variables that takes 0.4 else (a HiGHS without it has no such
    option, and ignores it)."""
    options = {"presolve": "off", "mip_heuristic_run_feasibility_jump": False}
    return pulp.HiGHS(msg=False, gapRel=0.0, gapAbs=0.0, threads=1, timeLimit=time_limit_s, **options)


def _cbc(time_limit_s: float) -> pulp.LpSolver:
    return pulp.PULP_CBC_CMD(msg=False, gapRel=0.0, threads=1, timeLimit=time_limit_s)


SOLVERS: tuple[tuple[str, Callable[[float], pulp.LpSolver]], ...] = (("HiGHS", _highs), ("CBC", _cbc))
