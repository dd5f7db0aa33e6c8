"""The outer search: meshes, microbatch sizes and labels of shared variables, best bound first.

Configurations wait in a queue under a proven bound. One that comes out is made into units, one for each choice of
labels of shared variables, which wait under theirs; a solved unit waits under its objective. A unit that may fit is
solved without a cap first: where it does, no way to save memory is worth its time; where it does not, the unit waits
again, for a solution under the cap with all of them. A solved unit that comes out waits once more under what its step
takes, once the caller has confirmed that its rewritten program fits and has simulated it: prices know nothing of what
stages wait for each other's messages. The first such unit to come out is the answer: nothing left in the queue can
beat it.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from autopar.planner.awaited import awaited_s
from autopar.planner.chain import Chain, Floor, at_once, in_flight
from autopar.planner.columns import Column
from autopar.planner.configuration import Configuration
from autopar.planner.configuration_solver import ConfigurationSolver, Outcome
from autopar.planner.factor_graph import Factor, FactorGraph
from autopar.planner.flat_solver import FlatSolver
from autopar.planner.layouts import configurations, refused_because
from autopar.planner.least import beside_slowest_s, most_whole_s, quick_bound_s
from autopar.planner.nodes import Relaxed, Unit, Waiting
from autopar.planner.segment import Segment, unproved
from autopar.planner.solution import (
    INTERRUPTED,
    Infeasible,
    Pins,
    Progress,
    Solution,
    Space,
    StageSolution,
    is_interrupted,
    stage_solutions,
)
from autopar.planner.timings import Hidden, Timed, Timings
from cost_model.errors import ParallelismError

__all__ = [
    "Chain", "Configuration", "Factor", "FactorGraph", "Floor", "Infeasible", "Pins", "Progress", "Solution",
    "Space", "StageSolution", "in_flight", "is_interrupted", "search",
]  # fmt: skip
MAX_CONFIRMATIONS = 8
MOST_SHARED_LABELS = 256
"""Combinations of labels of shared variables that are tried one by one: those of four parameters of four labels."""
MOST_SHARED_ENTRIES = 10**9
"""Of all tables that a search of each of these combinations goes through: some ten seconds."""
WORTH_TIGHTENING = 0.01
NEAR = 1.05
GLANCES, FIRST_GLANCES = 2, 4
"""So often the bound of a configuration is raised by ``NEAR`` at most; the latter while no plan is known."""
HINTS = 4
ALIKE = 0.2


Confirm = Callable[[Solution], Sequence[int]]


def search(
    space: Space,
    num_devices: int,
    batch: int,
    *,
    cap_bytes: int | None = None,
    pins: Pins | None = None,
    confirm: Confirm | None = None,
    timed: Timed | None = None,
    hidden_s: Hidden | None = None,
    lacks_s: Timed | None = None,
    progress: Callable[[Progress], None] | None = None,
    flat: bool = False,
    fastest_only: bool = False,
    cutoff_s: float = math.inf,
) -> Solution | Infeasible:
    """The fastest plan for a global batch on all devices, under a memory cap per device (None: no cap).

    confirm(solution) gives the exact peak bytes of each stage after rewriting; a stage over the cap is
    tightened by the difference and solved again. timed(solution) gives the seconds of a step, waiting and all: where
    these are above the price, plans of other prices below them are timed, too, the fastest is the answer, and the gap
    is that of its price, or of its step if that is less, to prices of plans that were not timed, with what these wait
    for messages (``awaited``).
    hidden_s(c, along_s): what plans of a configuration may take less than their price, where a microbatch takes no less
    than along_s through all stages; lacks_s(solution): what one takes more than it, waiting apart. flat: each
    configuration is one integer program (``flat_solver``). fastest_only: configurations whose fastest plan, memory
    aside, is too large are left out.
    cutoff_s: plans of as high a price or a higher are not wanted.
    Ctrl-C returns the best plan so far with its gap, if there is one. Equal input gives an equal answer;
    ties go to fewer stages, then less tensor parallelism, then larger microbatches, then first labels.
    Raises ParallelismError where pins, devices and batch do not go together, SolverError without a solver,
    ProblemSizeError where ``flat`` is asked for and the program would be too large.
    """
    timings = Timings(timed, None if flat else hidden_s, lacks_s)
    run = _Search(
        space, num_devices, batch, cap_bytes, pins or Pins(), confirm, timings, progress, flat, fastest_only, cutoff_s
    )
    try:
        return run.answer()
    except KeyboardInterrupt:
        return run.interrupted()


class _Search:
    def __init__(
        self,
        space: Space,
        num_devices: int,
        batch: int,
        cap_bytes: int | None,
        pins: Pins,
        confirm: Confirm | None,
        timings: Timings,
        progress: Callable[[Progress], None] | None,
        flat: bool,
        fastest_only: bool,
        cutoff_s: float,
    ) -> None:
        self.fastest_only, self.cutoff_s = fastest_only, cutoff_s
        self.flat, self.solver = flat, FlatSolver if flat else ConfigurationSolver
        self.space, self.num_devices, self.batch, self.pins = space, num_devices, batch, pins
        self.cap_bytes = math.inf if cap_bytes is None else float(cap_bytes)
        self.confirm, self.timings, self.progress = confirm, timings, progress
        self.segments: dict[FactorGraph, Segment] = {}
        self.units: list[Unit] = []
        self.queue: list[tuple[float, tuple[int, ...], Unit | Waiting | Relaxed]] = []
        self.hopeless: list[tuple[int, tuple[int, ...], Relaxed]] = []
        self.solved, self.floor_s, self.left_out_s = 0, 0.0, math.inf
        self.hints_s: list[float] = []
        self.shortages: list[tuple[int, tuple[int, ...], Infeasible]] = []

    def answer(self) -> Solution | Infeasible:
        self._gather()
        while self.queue and self.queue[0][0] < self.cutoff_s and not self.timings.are_enough(self.solved):
            self.floor_s, _, unit = heapq.heappop(self.queue)
            if self._key(unit) > self.floor_s:  # its configuration has been timed since
                self._push(unit)
            elif isinstance(unit, Waiting):
                self._open(unit)
            elif isinstance(unit, Relaxed):
                self._prove(unit)
            elif unit.solution is None:
                self._solve(unit)
            elif unit.step_s is not None or (self._fits(unit) and not self._waits_timed(unit)):
                break
        known = [unit for unit in self.units if unit.step_s is not None]
        return self._final(min(known, key=lambda unit: (unit.step_s, unit.order)), ()) if known else self._infeasible()

    def _waits_timed(self, unit: Unit) -> bool:
        """Whether a unit whose plan fits is back in the queue, under what its step takes."""
        assert unit.solution is not None
        with self._in_order(unit.solver.configuration):
            unit.step_s = self.timings.time(unit.solution, self.solved)
        if self.timings.step_s is not None:
            self._push(unit)
        return self.timings.step_s is not None

    @contextmanager
    def _in_order(self, c: Configuration) -> Iterator[None]:
        """Around what is learned of a configuration: where its plans take less than was thought, the queue is sorted
        anew, for they would come after others that take more. Where they take more, they are pushed back as they come.
        """
        before_s = self.timings.beside_s(c)
        yield
        if self.timings.beside_s(c) < before_s:
            self.queue = [(self._key(unit), order, unit) for _, order, unit in self.queue]
            heapq.heapify(self.queue)

    def interrupted(self) -> Solution:
        """The best confirmed plan, else the best plan, else the interruption itself."""
        found = [unit for unit in self.units if unit.solution is not None]
        if not found:
            raise KeyboardInterrupt
        best = min(found, key=lambda unit: (not unit.confirmed, self._key(unit), unit.order))
        note = f"{INTERRUPTED} {self.solved} of {self._known()} configurations; the best plan so far is given"
        unsure = self.confirm is not None and not best.confirmed
        answer = self._final(best, (note, "its exact peak memory was not confirmed") if unsure else (note,))
        bound_s = min(answer.bound_s, self.floor_s)
        return replace(answer, bound_s=bound_s, gap=_gap(answer.objective_s, bound_s))

    def _known(self) -> int:
        """Units, and configurations whose units are not made yet."""
        return len(self.units) + sum(not isinstance(entry[2], Unit) for entry in self.queue)

    def _gather(self) -> None:
        """Put every possible configuration in the queue under its floor: stages as fast as each other."""
        floors: dict[tuple[int, int, int], Floor | None] = {}
        reasons: list[tuple[int, str]] = []
        for c in configurations(self.num_devices, self.batch, self.pins, self.space.crowding):
            mesh = (c.dp, c.tp, c.microbatch_size)
            if mesh not in floors:
                floors[mesh] = self.space.floor(*mesh)
            floor = floors[mesh]
            refused = refused_because(c, floor)
            if refused is not None:
                reasons.append(refused)
            elif floor is not None:
                self.timings.note_hidden(c, floor.time_s, _floor_s(c, floor))
                self._push(Waiting((c.pp, c.tp, -c.microbatch_size), _floor_s(c, floor), c, floor.time_s))
        if not self.queue:
            raise ParallelismError(self._why(max(reasons, key=lambda each: each[0])[1] if reasons else None))

    def _why(self, reason: str | None) -> str:
        pinned = ", ".join(f"{k}={v}" for k, v in vars(self.pins).items() if v is not None) or "nothing pinned"
        detail = reason or "the degrees do not divide the devices and the batch"
        return (
            f"no configuration is possible on {self.num_devices} device(s) with a batch of {self.batch} and "
            f"{pinned}: {detail}. Next: pin fewer degrees, or change the batch"
        )

    def _open(self, waiting: Waiting) -> None:
        """Put a configuration back under a higher floor, or the quick bound of its chain, or make its units."""
        c = waiting.configuration
        if waiting.chain is not None:
            self._add_units(c, waiting.chain, waiting)
            return
        if self.fastest_only and self._saves_much(c):
            self.left_out_s = min(self.left_out_s, waiting.bound_s)
            return
        floor = self.space.floor(c.dp, c.tp, c.microbatch_size, waiting.floor_s)
        if floor is not None and floor.time_s > waiting.floor_s:
            self._push(replace(waiting, bound_s=_floor_s(c, floor), floor_s=floor.time_s))
            return
        chain = self.space.chain(c.dp, c.tp, c.microbatch_size)
        assert chain is not None, c
        if self.fastest_only and self._is_large(c, chain):
            self.left_out_s = min(self.left_out_s, waiting.bound_s)
            return
        bound_s = quick_bound_s(chain, self._segments(chain), c.objective)
        if math.isfinite(bound_s):
            self._push(replace(waiting, bound_s=max(waiting.bound_s, bound_s), chain=chain))

    def _saves_much(self, c: Configuration) -> bool:
        """Whether no plan of the fastest chain fits, for what they save: known before it is made. Each stage holds no
        fewer microbatches than the one that holds fewest."""
        shape = (c.pp, c.microbatches, c.virtual_stages, c.window)
        held = min(in_flight(c.schedule, stage, *shape) for stage in range(c.pp))
        return self.space.least_saved_bytes(c.dp, c.tp, c.microbatch_size) * held > self.cap_bytes * c.pp

    def _is_large(self, c: Configuration, chain: Chain) -> bool:
        """Whether the guess is that no plan fits; with labels of shared variables fixed it is no less."""
        return self.solver(chain, self._segments(chain), c, math.inf).guess_bytes > self.cap_bytes

    def _segments(self, chain: Chain) -> list[Segment]:
        return [self.segments.setdefault(graph, Segment(graph)) for graph in chain.kinds]

    def _add_units(self, c: Configuration, chain: Chain, waiting: Waiting) -> None:
        """A unit for each choice of labels of shared variables; under a cap, all of them at once first."""
        units = functools.partial(self._units, c, chain, waiting.order)
        ways: Sequence[Chain] = ()
        if math.isfinite(self.cap_bytes) and not self.flat and not self.fastest_only:
            ways = self.space.saving_chains(c.dp, c.tp, c.microbatch_size)
        if not ways or (len(ways) == 1 and not chain.shared_domains()):
            self._put(units(), waiting.bound_s)
            return
        relaxed = at_once(ways)
        solver = self.solver(relaxed, self._segments(relaxed), c, self.cap_bytes)
        self._push(Relaxed(waiting.order, solver, waiting.bound_s, units))

    def _put(self, units: Iterable[Unit], bound_s: float) -> None:
        """In the queue, no plan of which is faster than the bound."""
        for unit in units:
            unit.bound_s = max(unit.bound_s, bound_s, unit.solver.quick_bound_s())
            if math.isfinite(unit.bound_s):
                self.units.append(unit)
                self._push(unit)

    def _units(self, c: Configuration, chain: Chain, order: tuple[int, ...]) -> list[Unit]:
        choices, notes = self._shared_labels(c, chain)
        found = []
        for number, labels in enumerate(choices):
            fixed = chain.fixed(labels)
            unit = Unit((*order, number), self.solver(fixed, self._segments(fixed), c, math.inf), 0.0, notes=notes)
            if math.isfinite(self.cap_bytes):
                unit.capped = functools.partial(self._capped, c, fixed, labels)
            found.append(unit)
        return found

    def _prove(self, node: Relaxed) -> None:
        """Put a node back under a higher bound, or its units in its place.

        At first, and until some plan is known, its bound is raised by NEAR at most: that is quickly done where it is
        far too low, and a plan that is known by then spares many nodes more.
        """
        if node.proven:
            self._put(node.units(), node.bound_s)
            return
        node.solver.hints_s = tuple(self.hints_s)
        if self._is_put_off(node):
            return
        cutoff_s, near_s = self._wanted_s(node.solver.configuration), node.bound_s * NEAR
        if near_s < cutoff_s and not node.near and node.glances < (FIRST_GLANCES if math.isinf(cutoff_s) else GLANCES):
            outcome = node.solver.bound(near_s, near_s)
            node.glances, node.near = node.glances + 1, outcome.bound_s < near_s
        else:
            outcome = node.solver.bound(cutoff_s, 0.0)
            node.proven = True
        self._learn(node.solver)
        node.bound_s = max(node.bound_s, outcome.bound_s)
        if outcome.best and (node.near or node.proven):
            self._note_awaited(node.solver, outcome.best)
        if outcome.shortage is not None:
            self.hopeless.append((outcome.shortage.needed_bytes, node.order, node))
        if math.isfinite(node.bound_s):
            self._push(node)
        node.solver.forget()
        self._report(node.solver.configuration, solved=0)

    def _shared_labels(self, c: Configuration, chain: Chain) -> tuple[Iterable[dict[str, str]], tuple[str, ...]]:
        """Choices of labels of shared variables, and a note where they are too many to try.

        Then it is the choice of the best plan in which each use may lie otherwise, as its first use has it, and the
        first labels of all (whole on every rank). A flat program chooses them itself.
        """
        domains = {} if self.flat else chain.shared_domains()
        count = math.prod(map(len, domains.values()))
        segments = self._segments(chain) if count > 1 else []
        if count <= min(MOST_SHARED_LABELS, MOST_SHARED_ENTRIES / max(sum(s.entries for s in segments), 1)):
            return (dict(zip(domains, labels, strict=True)) for labels in itertools.product(*domains.values())), ()
        solver = ConfigurationSolver(chain, segments, c, math.inf)
        choice = solver.solve(math.inf).choice
        chosen: dict[str, str] = {}
        for stage in stage_solutions(solver, choice.columns) if choice is not None else ():
            for variable, label in (item for assignment in stage.assignments for item in assignment.items()):
                if label in domains.get(variable, ()):
                    chosen.setdefault(variable, label)
        first = {variable: labels[0] for variable, labels in domains.items()}
        note = (
            f"{len(domains)} parameters are used in several blocks: {count} combinations of their placements are too "
            "many, so the one that the blocks choose apart was taken; the gap is to plans with that"
        )
        return (first | chosen, first), (note,)

    def _capped(self, c: Configuration, chain: Chain, labels: Mapping[str, str]) -> list[ConfigurationSolver]:
        if self.fastest_only:
            return []
        saving = self.space.saving_chains(c.dp, c.tp, c.microbatch_size)
        fixed = [other.fixed(labels) for other in saving] or [chain]
        return [self.solver(each, self._segments(each), c, self.cap_bytes) for each in fixed]

    def _under_cap(self, unit: Unit) -> None:
        """From now on the unit is solved under the cap, with further units for further ways to save memory."""
        if unit.capped is None:
            return
        solvers, unit.capped = unit.capped(), None
        if not solvers:
            unit.left_out = True
            return
        unit.solver, *others = solvers
        for number, solver in enumerate(others, start=1):
            other = Unit((*unit.order, number), solver, unit.bound_s)
            self.units.append(other)
            self._push(other)

    def _key(self, unit: Unit | Waiting | Relaxed) -> float:
        """Twelve digits: sums that differ in the last bits are ties."""
        return float(f"{self._price_s(unit):.12g}")

    def _price_s(self, unit: Unit | Waiting | Relaxed) -> float:
        known_s = unit.bound_s
        if isinstance(unit, Unit) and unit.solution is not None:
            known_s = unit.solution.objective_s
        return self.timings.price_s(_configuration(unit), known_s)

    def _wanted_s(self, c: Configuration) -> float:
        """No plan of a configuration is wanted that has a higher price."""
        return (min(self._best_s(), self.cutoff_s) - self.timings.beside_s(c)) * (1 + 1e-12)

    def _push(self, unit: Unit | Waiting | Relaxed) -> None:
        heapq.heappush(self.queue, (self._key(unit), unit.order, unit))

    def _best_s(self) -> float:
        return min((self._price_s(unit) for unit in self.units if unit.solution is not None), default=math.inf)

    def _solve(self, unit: Unit) -> None:
        if unit.capped is not None and unit.solver.guess_bytes > self.cap_bytes:
            self._under_cap(unit)
        if unit.left_out:
            self._report(unit.solver.configuration)
            return
        unit.solver.hints_s = tuple(self.hints_s)
        if self._is_put_off(unit):
            return
        outcome = unit.solver.solve(self._wanted_s(unit.solver.configuration))
        unit.outcome = outcome
        self._learn(unit.solver)
        if outcome.shortage is not None and self._loosened(unit):
            return
        unit.bound_s = max(unit.bound_s, outcome.bound_s)
        if outcome.choice is not None and unit.capped is not None and not self._is_small(unit, outcome.choice.columns):
            self._under_cap(unit)
        elif outcome.choice is not None:
            unit.solution = self._solution(unit, outcome)
            self._note_awaited(unit.solver, outcome.choice.columns)
        elif outcome.shortage is not None:
            short = outcome.shortage
            self._short(unit, short.needed_bytes, short.stage, stage_solutions(unit.solver, short.columns))
        if math.isfinite(unit.bound_s) and not unit.left_out:
            self._push(unit)
        unit.solver.forget()
        self._report(unit.solver.configuration)

    def _note_awaited(self, solver: ConfigurationSolver, columns: Sequence[Column]) -> None:
        """Where plans are simulated, what they wait for is looked at before: of a plan, or of the best that a node was
        bounded by, which may be none, but waits about as long as its plans."""
        if self.timings.step_s is None:
            return
        value_s = solver.pools.value(tuple(columns))
        found = Solution(solver.configuration, stage_solutions(solver, columns), value_s, 0.0, math.inf, ())
        spare = [self.cap_bytes - needed for needed in solver.needed_bytes(columns)]
        held = zip(solver.held, spare, columns, strict=True)
        rooms = [count + left / max(column.saved_bytes, 1.0) for count, left, column in held]
        with self._in_order(found.configuration):
            self.timings.note_awaited(found, awaited_s(found.stages, found.configuration, self.pins, rooms))

    def _is_put_off(self, unit: Unit | Relaxed) -> bool:
        """Whether a glance at what memory costs the unit says that another one comes before it."""
        if math.isinf(unit.solver.cap_bytes) or not self.hints_s:
            return False
        bound_s = unit.solver.glance_s()
        if not self.queue or not unit.bound_s * (1 + 1e-9) < bound_s < math.inf:
            return False
        unit.bound_s = bound_s
        if self._key(unit) <= self.queue[0][0]:
            return False
        self._push(unit)
        return True

    def _learn(self, solver: ConfigurationSolver) -> None:
        """What a byte is worth differs little between configurations: the latest prices, each once, the newest last."""
        learned_s = solver.learned_s()
        if learned_s is not None:
            self.hints_s = [h for h in self.hints_s if abs(h - learned_s) > ALIKE * learned_s][1 - HINTS :] + [
                learned_s
            ]

    def _is_small(self, unit: Unit, columns: Sequence[Column]) -> bool:
        return max(unit.solver.needed_bytes(columns)) <= self.cap_bytes

    def _report(self, c: Configuration, solved: int = 1) -> None:
        self.solved += solved
        if self.progress is None:
            return
        best_s = self._best_s()
        bound_s = min((key for key, _, _ in self.queue), default=best_s)
        known = best_s if math.isfinite(best_s) else None
        self.progress(Progress(self._known(), self.solved, known, bound_s, c))

    def _solution(self, unit: Unit, outcome: Outcome) -> Solution:
        assert outcome.choice is not None
        choice = outcome.choice
        stages = stage_solutions(unit.solver, choice.columns)
        gap = _gap(choice.objective_s, unit.bound_s)
        notes = (*choice.notes, *unit.notes, *unproved(unit.solver.segments))
        c = unit.solver.configuration
        return Solution(c, stages, choice.objective_s, unit.bound_s, gap, notes, ilp=outcome.ilp)

    def _fits(self, unit: Unit) -> bool:
        """Ask for exact peaks; over the cap, tighten those stages by what they need beyond their columns, and put the
        unit back."""
        assert unit.solution is not None and unit.outcome is not None and unit.outcome.choice is not None
        columns = unit.outcome.choice.columns
        unit.confirmed = True
        if self.confirm is None or not math.isfinite(self.cap_bytes):
            return True
        peaks = list(self.confirm(unit.solution))
        if max(peaks) <= self.cap_bytes:
            return True
        stages, unit.solution, unit.confirmed = unit.solution.stages, None, False
        found = Infeasible(int(max(peaks)), peaks.index(max(peaks)), unit.solver.configuration, stages)
        unit.nearest = min(unit.nearest or found, found, key=lambda each: each.needed_bytes)
        unit.confirmations += 1
        self._under_cap(unit)
        if unit.left_out:
            return False
        unit.loose = list(unit.solver.extra_bytes)
        needed = unit.solver.needed_bytes(columns)
        beyond = [p - n + extra for p, n, extra in zip(peaks, needed, unit.loose, strict=True)]
        wanted = [b if p > self.cap_bytes else x for b, p, x in zip(beyond, peaks, unit.loose, strict=True)]
        if unit.confirmations < MAX_CONFIRMATIONS:
            self._tighten(unit, wanted)
        else:
            self._short(unit, found.needed_bytes, found.stage, stages)
        return False

    def _tighten(self, unit: Unit, wanted: list[float]) -> None:
        """Solve again with so many extra bytes on each stage, less where that is known to leave nothing."""
        assert unit.loose is not None
        if unit.tight is not None:
            half = [(a + b) / 2 for a, b in zip(unit.loose, unit.tight, strict=True)]
            wanted = half if any(a >= b for a, b in zip(wanted, unit.tight, strict=True)) else wanted
        unit.solver.extra_bytes[:] = wanted
        times = "once" if unit.confirmations == 1 else f"{unit.confirmations} times"
        unit.notes = (f"the rewritten program needed more than the cap; its stages were tightened {times}",)
        self._push(unit)

    def _loosened(self, unit: Unit) -> bool:
        """Whether a unit that was tightened until nothing fits is worth another look: plans differ in what they need
        beyond their columns, so that one that needs more there may need less in all."""
        if unit.loose is None or unit.confirmations >= MAX_CONFIRMATIONS:
            return False
        unit.tight = list(unit.solver.extra_bytes)
        if max(b - a for a, b in zip(unit.loose, unit.tight, strict=True)) < WORTH_TIGHTENING * self.cap_bytes:
            return False
        unit.confirmations += 1
        self._tighten(unit, unit.tight)
        return True

    def _short(self, unit: Unit, needed_bytes: int, stage: int, stages: tuple[StageSolution, ...]) -> None:
        """Nothing fits; the plan that needs least, exactly where one was rewritten."""
        found = unit.nearest or Infeasible(needed_bytes, stage, unit.solver.configuration, stages)
        self.shortages.append((found.needed_bytes, unit.order, found))

    def _final(self, unit: Unit, notes: tuple[str, ...]) -> Solution:
        assert unit.solution is not None
        found = unit.solution
        slower = {id(other) for other in self.units if other is not unit and other.step_s is not None}
        nodes = [other for other in (*self.units, *(row[2] for row in self.queue)) if id(other) not in slower]
        waiting = (other.bound_s + self.timings.awaited_s(_configuration(other)) for other in nodes)
        bound_s = min(found.objective_s, self.left_out_s, *waiting)
        proven_s = min([bound_s, *(other.bound_s for other in nodes)])
        step_s = min(found.objective_s, unit.step_s or math.inf)
        if slower:
            said = f"plans of other meshes or microbatches were simulated, too, and are slower: {len(slower)}"
            notes = (*notes, said)
        if proven_s < bound_s * (1 - 1e-9):
            gap = f"{_gap(step_s, proven_s):.2%}"
            said = f"without what plans of other meshes are thought to wait for, the gap would be {gap}"
            notes = (*notes, said)
        return replace(found, bound_s=bound_s, gap=_gap(step_s, bound_s), notes=(*found.notes, *notes))

    def _infeasible(self) -> Infeasible:
        self._look_at_hopeless()
        if not self.shortages:
            raise ParallelismError(self._why("every way to cut the model is forbidden"))
        return min(self.shortages, key=lambda row: row[:2])[2]

    def _look_at_hopeless(self) -> None:
        """What plans need of those nodes that may need less than what is known to do."""
        for needed_bytes, _, node in sorted(self.hopeless, key=lambda row: row[:2]):
            if any(known_bytes <= needed_bytes for known_bytes, _, _ in self.shortages):
                return
            for unit in node.units():
                assert unit.capped is not None
                for number, solver in enumerate(unit.capped()):
                    short = solver.solve(math.inf).shortage
                    if short is not None:
                        way = Unit((*unit.order, number), solver, math.inf)
                        self._short(way, short.needed_bytes, short.stage, stage_solutions(solver, short.columns))


def _configuration(unit: Unit | Waiting | Relaxed) -> Configuration:
    return unit.configuration if isinstance(unit, Waiting) else unit.solver.configuration


def _floor_s(c: Configuration, floor: Floor) -> float:
    """Seconds of a step of stages that are as fast as each other, or as one that has whole segments."""
    slowest_s = max(floor.time_s / c.pp, most_whole_s(floor.alike, c.pp))
    return beside_slowest_s(c.objective.waiting * floor.time_s, c.objective, slowest_s)


def _gap(objective_s: float, bound_s: float) -> float:
    if objective_s <= bound_s:
        return 0.0
    return (objective_s - bound_s) / bound_s if bound_s > 0 else math.inf
