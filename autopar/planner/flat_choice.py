"""What the flat program of a problem chooses, as columns: the same nouns as those of the other way to solve it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from autopar.planner.chain import Chain
from autopar.planner.columns import Column
from autopar.planner.flat import FlatIlp, FlatStage, Problem
from autopar.planner.ilp import Choice, objective_s
from autopar.planner.solvers import TIME_LIMIT_S, Answer


def flat_choice(problem: Problem, time_limit_s: float = TIME_LIMIT_S) -> tuple[Choice | None, FlatIlp]:
    """The best choice, None where nothing fits, and the program that made it. Errors: SolverError."""
    ilp = FlatIlp(problem)
    answer, stages = ilp.solve(time_limit_s)
    return (_choice(problem, answer, stages, ilp.unit_s) if stages else None), ilp


def least_columns(problem: Problem) -> tuple[Column, ...]:
    """The plan whose largest stage is smallest; empty where no plan is possible at any cap."""
    _, stages = FlatIlp(replace(problem, cap_bytes=math.inf), least=True).solve()
    return tuple(_column(problem.chain, stage) for stage in stages)


def _choice(problem: Problem, answer: Answer, stages: tuple[FlatStage, ...], unit_s: float) -> Choice:
    columns = tuple(_column(problem.chain, stage) for stage in stages)
    found_s = objective_s(columns, problem.objective)
    if answer.optimal:
        return Choice(columns, found_s, found_s, True, answer.solver, answer.notes)
    bound_s = 0.0 if answer.bound is None else answer.bound * unit_s
    note = f"{answer.solver} stopped at its time limit before the flat program was solved"
    return Choice(columns, found_s, min(found_s, bound_s), False, answer.solver, (*answer.notes, note))


def _column(chain: Chain, stage: FlatStage) -> Column:
    """What the assignments of a stage add up to, by the same tables as any column."""
    totals = np.zeros(4)
    for position, labels in enumerate(stage.assignments, stage.first):
        totals += chain.kinds[chain.sequence[position]].totals(labels)
    entry, exit = _ends(chain, stage)
    cut_s = chain.cut_s(stage.first, chain.boundary_labels(stage.first)[entry]) if stage.first else 0.0
    time_s, step_s, state, saved = (float(x) for x in totals)
    ends = (stage.first, stage.last, entry, exit)
    return Column(*ends, time_s, step_s, state, saved, cut_s, (), stage.assignments)


def _ends(chain: Chain, stage: FlatStage) -> tuple[int, int]:
    """Label indices at the two boundaries of a stage."""
    first, last = (chain.kinds[chain.sequence[i]] for i in (stage.first, stage.last - 1))
    entry = "" if first.entry is None else stage.assignments[0][first.entry]
    exit = "" if last.exit is None else stage.assignments[-1][last.exit]
    return first.entry_labels.index(entry), last.exit_labels.index(exit)
