"""The flat integer program of one configuration: every label of every variable of every segment, without any price.

It decides what the dynamic program and its columns decide together, in one program, and so is their oracle and the way
to the exact optimum under a tight cap, on small graphs. Stage s, segment i, variable v with label l, factor f with
entry e (one label of each of its variables), range r = (first, last):

range[s, r] = 1 if stage s runs segments [first, last); here[s, i] = 1 if it runs segment i; pick[s, i, v, l] = 1 if it
does and v has label l there; entry[s, i, f, e] likewise for all variables of f; cut[s, i, l] = 1 if stage s begins at
segment i with label l on the boundary; shared[v, l]: the label that a shared variable has everywhere; slowest, step,
cap: seconds of the slowest stage, the largest cost per step, bytes of the largest stage. Times and bytes are divided by
units, since solvers' tolerances are absolute.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pulp

from autopar.planner.bounds import Objective
from autopar.planner.chain import Chain
from autopar.planner.columns import SAVED, STATE, STEP, TIME
from autopar.planner.factor_graph import FactorGraph, FloatArray
from autopar.planner.solvers import TIME_LIMIT_S, Answer, named, solved

Term = tuple[pulp.LpVariable, float]


@dataclass(frozen=True)
class Problem:
    """One configuration. held: microbatches in flight of each stage; extra_bytes: of each stage, beyond its choices.

    cap_bytes: of a device; infinite where memory does not matter.
    """

    chain: Chain
    objective: Objective
    held: tuple[int, ...]
    cap_bytes: float
    extra_bytes: tuple[float, ...]

    def ranges(self, stage: int) -> list[tuple[int, int]]:
        """Segments that a stage may run, with one at least for each other stage."""
        count, after = len(self.chain), self.objective.pp - 1 - stage
        firsts = range(stage, count - after) if stage else (0,)
        lasts = range(stage + 1, count - after + 1) if after else (count,)
        return [(first, last) for first in firsts for last in lasts if first < last]


@dataclass(frozen=True)
class FlatStage:
    """Segments [first, last) with the labels of each of their variables."""

    first: int
    last: int
    assignments: tuple[Mapping[str, str], ...]


@dataclass(frozen=True, eq=False)
class _Table:
    """The sum of all factors of one scope. costs: [component, one axis per variable]; only variables with a choice."""

    variables: tuple[str, ...]
    costs: FloatArray

    def entries(self) -> Iterator[tuple[int, ...]]:
        """Label indices of what is not forbidden."""
        return (tuple(int(i) for i in at) for at in np.argwhere(np.isfinite(self.costs[TIME])))


@functools.lru_cache(maxsize=256)
def _tables(graph: FactorGraph) -> tuple[_Table, ...]:
    """Factors without variables of one label, those of one scope added up; the empty scope holds what has no choice."""
    found: dict[tuple[str, ...], FloatArray] = {(): np.zeros(4)}
    for factor in graph.factors:
        shape = tuple(len(graph.domains[v]) for v in factor.variables)
        costs = np.stack([np.zeros(shape) if a is None else a for a in factor.components()])
        free = [(v, axis) for axis, v in enumerate(factor.variables) if shape[axis] > 1]
        order = sorted(free)
        costs = costs.reshape(4, *(shape[axis] for _, axis in free))
        costs = costs.transpose(0, *(1 + free.index(each) for each in order))
        scope = tuple(v for v, _ in order)
        found[scope] = found[scope] + costs if scope in found else costs
    return tuple(_Table(scope, costs) for scope, costs in found.items())


def _labels(graph: FactorGraph) -> dict[str, int]:
    """Variables with a choice, and those that neighbours or other segments must agree on: how many labels they have."""
    tied = {graph.entry, graph.exit, *graph.shared}
    return {v: len(known) for v, known in graph.domains.items() if len(known) > 1 or v in tied}


def count_variables(problem: Problem) -> int:
    """How large the program would be, without building it."""
    of_kind = []
    for graph in problem.chain.kinds:
        tables = (t for t in _tables(graph) if len(t.variables) > 1)
        of_kind.append(sum(_labels(graph).values()) + sum(int(np.isfinite(t.costs[TIME]).sum()) for t in tables))
    total = 0
    for stage in range(problem.objective.pp):
        ranges = problem.ranges(stage)
        segments = {i for first, last in ranges for i in range(first, last)}
        total += len(ranges) + sum(of_kind[problem.chain.sequence[i]] for i in segments)
    return total


class FlatIlp:
    """The program of a problem; least: it looks for the smallest cap that some plan meets, not for the fastest plan."""

    def __init__(self, problem: Problem, *, least: bool = False) -> None:
        self.given, self.chain, self.stages = problem, problem.chain, range(problem.objective.pp)
        self.unit_s, self.unit_bytes = self._units()
        self.problem = pulp.LpProblem(named("autopar_flat", self.unit_s), pulp.LpMinimize)
        self.graphs = [self.chain.kinds[kind] for kind in self.chain.sequence]
        self.ranges = [self._ranges(s) for s in self.stages]
        self.here: dict[tuple[int, int], pulp.LpVariable] = {}
        self.picks: dict[tuple[int, int, str], list[pulp.LpVariable]] = {}
        self.shared = {v: self._shared(v, known) for v, known in self.chain.shared_domains().items()}
        self.costs: list[list[list[Term]]] = [[[], [], [], []] for _ in self.stages]
        self.cut_terms: list[Term] = []
        self.slowest, self.step = (pulp.LpVariable(name, lowBound=0) for name in ("slowest", "step"))
        bounded = math.isfinite(problem.cap_bytes) and not least
        self.cap = pulp.LpVariable("cap", 0, problem.cap_bytes / self.unit_bytes if bounded else None)
        self._build(with_memory=bounded or least)
        self.problem.setObjective(pulp.LpAffineExpression([(self.cap, 1)]) if least else self._objective())

    def _build(self, *, with_memory: bool) -> None:
        for s in self.stages:
            self._one_range(s)
            for i in sorted({i for first, last in self.ranges[s] for i in range(first, last)}):
                self._segment(s, i)
        for s in self.stages[:-1]:
            self._tile(s)
        for s in self.stages[1:]:
            self._cuts(s)
        for i in range(len(self.chain) - 1):
            self._meet(i)
        for v in self.shared:
            self._agree(v)
        for s in self.stages:
            self._slowest_stage(s)
            self._largest_step(s)
            if with_memory:
                self._memory(s)
                if any(self.chain.update_bytes(*r) for r in self.ranges[s]):
                    self._update(s)

    def write_lp(self, path: str | Path) -> None:
        """Write the program in LP format."""
        self.problem.writeLP(str(path))

    def solve(self, time_limit_s: float = TIME_LIMIT_S) -> tuple[Answer, tuple[FlatStage, ...]]:
        """The answer, and its stages if it is feasible. Errors: SolverError."""
        answer = solved(self.problem, time_limit_s)
        return answer, tuple(self._stage(s) for s in self.stages) if answer.feasible else ()

    # --- Variables

    def _units(self) -> tuple[float, float]:
        """Seconds and bytes of all segments where each costs what its most expensive entries do, at most."""
        seconds, nbytes = 0.0, 0.0
        for kind in self.chain.sequence:
            for table in _tables(self.chain.kinds[kind]):
                finite = np.isfinite(table.costs[TIME])
                seconds += float(table.costs[TIME][finite].mean()) if finite.any() else 0.0
                nbytes += float((table.costs[STATE] + table.costs[SAVED]).max())
        cap_bytes = self.given.cap_bytes
        return seconds or 1.0, cap_bytes if math.isfinite(cap_bytes) and cap_bytes > 0 else nbytes or 1.0

    def _ranges(self, s: int) -> dict[tuple[int, int], pulp.LpVariable]:
        return {r: pulp.LpVariable(f"range_{s}_{r[0]}_{r[1]}", cat=pulp.LpBinary) for r in self.given.ranges(s)}

    def _shared(self, v: str, labels: Sequence[str]) -> dict[str, pulp.LpVariable]:
        return {label: pulp.LpVariable(f"shared_{_word(v)}_{n}", 0, 1) for n, label in enumerate(labels)}

    def _segment(self, s: int, i: int) -> None:
        """The variables of a segment in a stage, with the rows that tie them to each other, and what they cost."""
        self._inside(s, i)
        for v, count in _labels(self.graphs[i]).items():
            names = (f"pick_{s}_{i}_{_word(v)}_{label}" for label in range(count))
            self.picks[s, i, v] = [pulp.LpVariable(name, cat=pulp.LpBinary) for name in names]
            self._one_label(s, i, v)
        for number, table in enumerate(_tables(self.graphs[i])):
            for at, variable in self._entries(s, i, number, table):
                for component, terms in enumerate(self.costs[s]):
                    cost = float(table.costs[(component, *at)])
                    if cost:
                        terms.append((variable, cost))

    def _entries(self, s: int, i: int, number: int, table: _Table) -> list[tuple[tuple[int, ...], pulp.LpVariable]]:
        """Every entry of a table that is allowed, with the variable that says whether it is taken."""
        if not table.variables:
            if not np.isfinite(table.costs[TIME]):
                self.here[s, i].upBound = 0
                return []
            return [((), self.here[s, i])]
        allowed = list(table.entries())
        if len(table.variables) == 1:
            picks = self.picks[s, i, table.variables[0]]
            for label in set(range(len(picks))) - {at[0] for at in allowed}:
                picks[label].upBound = 0
            return [(at, picks[at[0]]) for at in allowed]
        made = [(at, pulp.LpVariable(f"entry_{s}_{i}_{number}_{'_'.join(map(str, at))}", 0, 1)) for at in allowed]
        for axis, v in enumerate(table.variables):
            self._marginal(s, i, number, v, [(at[axis], variable) for at, variable in made])
        return made

    # --- Rows

    def _objective(self) -> pulp.LpAffineExpression:
        """sum_s (waiting time[s] + cuts[s]) + slowest_weight slowest + step"""
        given = self.given.objective
        along = [(x, given.waiting * c) for s in self.stages for x, c in self.costs[s][TIME]] + self.cut_terms
        terms = [(x, c / self.unit_s) for x, c in along]
        return pulp.LpAffineExpression([*terms, (self.slowest, given.slowest), (self.step, 1)])

    def _one_range(self, s: int) -> None:
        """one_range_s: sum_r range[s, r] = 1"""
        self.problem += pulp.lpSum(self.ranges[s].values()) == 1, f"one_range_{s}"

    def _tile(self, s: int) -> None:
        """tile_s_i: sum of range[s, r] that end before segment i = sum of range[s + 1, r] that begin with it"""
        ending = _grouped((last, (x, 1.0)) for (_, last), x in self.ranges[s].items())
        begins = _grouped((first, (x, -1.0)) for (first, _), x in self.ranges[s + 1].items())
        for i in sorted({*ending, *begins}):
            self._row([*ending.get(i, []), *begins.get(i, [])], f"tile_{s}_{i}")

    def _inside(self, s: int, i: int) -> None:
        """here_s_i: here[s, i] = sum of range[s, r] with first <= i < last"""
        here = self.here[s, i] = pulp.LpVariable(f"here_{s}_{i}", 0, 1)
        around = [(x, 1.0) for (first, last), x in self.ranges[s].items() if first <= i < last]
        self._row([*around, (here, -1.0)], f"inside_{s}_{i}")

    def _one_label(self, s: int, i: int, v: str) -> None:
        """label_s_i_v: sum_l pick[s, i, v, l] = here[s, i]"""
        self._row([*((x, 1.0) for x in self.picks[s, i, v]), (self.here[s, i], -1.0)], f"label_{s}_{i}_{_word(v)}")

    def _marginal(self, s: int, i: int, number: int, v: str, made: Sequence[tuple[int, pulp.LpVariable]]) -> None:
        """marginal_s_i_f_v_l: sum of entry[s, i, f, e] in which v has label l = pick[s, i, v, l]"""
        of_label = _grouped((label, (x, 1.0)) for label, x in made)
        for label, pick in enumerate(self.picks[s, i, v]):
            self._row([*of_label.get(label, []), (pick, -1.0)], f"marginal_{s}_{i}_{number}_{_word(v)}_{label}")

    def _meet(self, i: int) -> None:
        """meet_i_l: sum_s pick[s, i, exit, l] = sum_s pick[s, i + 1, entry, l]"""
        exit, entry = self.graphs[i].exit, self.graphs[i + 1].entry
        if exit is None or entry is None:
            return
        for label in range(len(self.graphs[i].exit_labels)):
            left = [(self.picks[s, i, exit][label], 1.0) for s in self.stages if (s, i, exit) in self.picks]
            right = [(self.picks[s, i + 1, entry][label], -1.0) for s in self.stages if (s, i + 1, entry) in self.picks]
            self._row([*left, *right], f"meet_{i}_{label}")

    def _agree(self, v: str) -> None:
        """agree_i_v_l: sum_s pick[s, i, v, l] = shared[v, l], which is 0 where some segment does not know the label"""
        for i, graph in enumerate(self.graphs):
            for number, label in enumerate(graph.domains[v] if v in graph.shared else ()):
                picks = [(self.picks[s, i, v][number], 1.0) for s in self.stages if (s, i, v) in self.picks]
                common = [(self.shared[v][label], -1.0)] if label in self.shared[v] else []
                self._row([*picks, *common], f"agree_{i}_{_word(v)}_{number}")

    def _cuts(self, s: int) -> None:
        """begin_s_i: sum_l cut[s, i, l] = sum of range[s, r] that begin with i; cut_s_i_l: cut[s, i, l] <= pick[s, i,
        entry, l]"""
        for i, begin in _grouped((first, (x, -1.0)) for (first, _), x in self.ranges[s].items()).items():
            labels, entry = self.chain.boundary_labels(i), self.graphs[i].entry
            cuts = []
            for number, label in enumerate(labels):
                seconds = self.chain.cut_s(i, label)
                cut = pulp.LpVariable(f"cut_{s}_{i}_{number}", 0, 1 if math.isfinite(seconds) else 0)
                cuts.append((cut, 1.0))
                self.cut_terms += [(cut, seconds)] if 0 < seconds < math.inf else []
                if entry is not None:
                    self._row([(cut, 1.0), (self.picks[s, i, entry][number], -1.0)], f"cut_{s}_{i}_{number}", most=True)
            self._row([*cuts, *begin], f"begin_{s}_{i}")

    def _slowest_stage(self, s: int) -> None:
        """slowest_stage_s: time[s] <= slowest"""
        self._row([*self._scaled(s, TIME, self.unit_s), (self.slowest, -1.0)], f"slowest_stage_{s}", most=True)

    def _largest_step(self, s: int) -> None:
        """largest_step_s: seconds per step of stage s <= step"""
        self._row([*self._scaled(s, STEP, self.unit_s), (self.step, -1.0)], f"largest_step_{s}", most=True)

    def _memory(self, s: int) -> None:
        """memory_s: state[s] + held[s] saved[s] + sum_r (reserve[r] + extra[s]) range[s, r] <= cap"""
        state = self._scaled(s, STATE, self.unit_bytes)
        saved = self._scaled(s, SAVED, self.unit_bytes / self.given.held[s])
        extra = self.given.extra_bytes[s]
        reserve = [(x, (self.chain.reserve_bytes(*r) + extra) / self.unit_bytes) for r, x in self.ranges[s].items()]
        self._row([*_added([*state, *saved, *reserve]), (self.cap, -1.0)], f"memory_{s}", most=True)

    def _update(self, s: int) -> None:
        """update_s: state[s] + sum_r (update[r] + extra[s]) range[s, r] <= cap"""
        extra, unit = self.given.extra_bytes[s], self.unit_bytes
        beside = [(x, (self.chain.update_bytes(*r) + extra) / unit) for r, x in self.ranges[s].items()]
        self._row([*_added([*self._scaled(s, STATE, unit), *beside]), (self.cap, -1.0)], f"update_{s}", most=True)

    def _scaled(self, s: int, component: int, unit: float) -> list[Term]:
        return _added([(x, c / unit) for x, c in self.costs[s][component]])

    def _row(self, terms: Sequence[Term], name: str, *, most: bool = False) -> None:
        """terms = 0, or terms <= 0"""
        expression = pulp.LpAffineExpression(_added(terms))
        self.problem += (expression <= 0 if most else expression == 0), name

    # --- What it found

    def _stage(self, s: int) -> FlatStage:
        first, last = next(r for r, x in self.ranges[s].items() if round(x.value() or 0.0) == 1)
        return FlatStage(first, last, tuple(self._assignment(s, i) for i in range(first, last)))

    def _assignment(self, s: int, i: int) -> dict[str, str]:
        found = {}
        for v, known in self.graphs[i].domains.items():
            values = [x.value() or 0.0 for x in self.picks.get((s, i, v), [])]
            found[v] = known[values.index(max(values)) if values else 0]
        return found


def _word(variable: str) -> str:
    """A name as the LP format allows it."""
    return variable.replace(":", ".")


def _added(terms: Sequence[Term]) -> list[Term]:
    """One term for each variable."""
    sums: dict[pulp.LpVariable, float] = {}
    for variable, coefficient in terms:
        sums[variable] = sums.get(variable, 0.0) + coefficient
    return list(sums.items())


def _grouped(pairs: Iterator[tuple[int, Term]]) -> dict[int, list[Term]]:
    found: dict[int, list[Term]] = {}
    for key, term in pairs:
        found.setdefault(key, []).append(term)
    return found
