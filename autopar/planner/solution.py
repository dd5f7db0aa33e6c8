"""What a search is given and what it answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from autopar.planner.chain import Chain, Floor
from autopar.planner.columns import Column, RangeTable
from autopar.planner.configuration import Configuration
from autopar.planner.configuration_solver import ConfigurationSolver
from autopar.planner.solvers import Program
from cost_model.mesh import Mesh

FEWEST_PARTS = 2
INTERRUPTED = "interrupted after"


class Space(Protocol):
    """What the caller knows: the chain on a mesh at a microbatch size, or None where that is impossible."""

    @property
    def crowding(self) -> float:
        """Of the cluster: ranks per core where they share cores, else 1."""

    def floor(self, dp: int, tp: int, microbatch_size: int, above_s: float = -1.0) -> Floor | None:
        """What costs less to know than the chain. One above so many seconds may take longer to find; where the answer
        is not above them, none is known."""

    def least_saved_bytes(self, dp: int, tp: int, microbatch_size: int) -> float:
        """By a microbatch, of all stages together: no plan of the chain saves less. Costs less to know than it."""

    def chain(self, dp: int, tp: int, microbatch_size: int) -> Chain | None: ...

    def saving_chains(self, dp: int, tp: int, microbatch_size: int) -> Sequence[Chain]:
        """Chains with choices that trade time for memory as well, each with the reserve that its choices need; no plan
        of theirs is faster than the fastest of ``chain``. The first reserves least, the last has the choices of all.
        None where there are no such choices."""


@dataclass(frozen=True)
class Pins:
    """Choices already made; None leaves one to the search.

    1f1b never holds more than another schedule, so it alone is searched unless another is pinned; with pp = 1 a plan is
    called 1f1b by convention. pipelined: whether there is to be more than one stage.
    """

    dp: int | None = None
    tp: int | None = None
    pp: int | None = None
    microbatch_size: int | None = None
    schedule: str | None = None
    virtual_stages: int | None = None
    window: int | None = None
    pipelined: bool | None = None

    @property
    def parts(self) -> int:
        """Virtual stages of each stage."""
        return (self.virtual_stages or FEWEST_PARTS) if self.schedule == "interleaved" else 1


@dataclass(frozen=True)
class StageSolution:
    """Segments [first, last) with the labels at both ends, and the assignment and the seconds of each segment."""

    first: int
    last: int
    entry: str
    exit: str
    assignments: tuple[Mapping[str, str], ...] = field(hash=False)
    time_s: float
    cut_s: float
    step_s: float
    state_bytes: float
    saved_bytes: float
    segments_s: tuple[float, ...]


@dataclass(frozen=True)
class Solution:
    """objective_s: seconds of a step; bound_s: no plan of any configuration is faster, those that were simulated apart,
    and with what plans of a configuration are thought to wait (``Timings``), which notes say.

    gap: (objective_s - bound_s) / bound_s, 0 where proven optimal. notes: fallbacks, timeouts, interruption.
    placement: the device of each (stage, replica, shard), in that order; None: counting up. ilp: that chose it.
    meshes: of each stage, None where all have that of the configuration, which is the first stage's otherwise.
    """

    configuration: Configuration
    stages: tuple[StageSolution, ...]
    objective_s: float
    bound_s: float
    gap: float
    notes: tuple[str, ...]
    placement: tuple[int, ...] | None = None
    ilp: Program | None = field(default=None, repr=False, compare=False)
    meshes: tuple[Mesh, ...] | None = None


@dataclass(frozen=True)
class Infeasible:
    """No plan fits. needed_bytes: the smallest cap that would do; stage: that binds in the plan that needs least.

    placement, meshes: as in ``Solution``.
    """

    needed_bytes: int
    stage: int
    configuration: Configuration
    stages: tuple[StageSolution, ...]
    placement: tuple[int, ...] | None = None
    meshes: tuple[Mesh, ...] | None = None


@dataclass(frozen=True)
class Progress:
    """units: how many there are, solved of them so far; best_s: best objective, None before any.

    bound_s: the least that what still waits may give; configuration: the one just solved.
    """

    units: int
    solved: int
    best_s: float | None
    bound_s: float
    configuration: Configuration


def is_interrupted(notes: Iterable[str]) -> bool:
    """Whether they say that the search was interrupted."""
    return any(note.startswith(INTERRUPTED) for note in notes)


def stage_solutions(solver: ConfigurationSolver, columns: Sequence[Column]) -> tuple[StageSolution, ...]:
    return tuple(_stage(solver, column) for column in columns)


def _assignments(solver: ConfigurationSolver, c: Column) -> tuple[Mapping[str, str], ...]:
    return c.assigned or solver.table.assignments(c)


def _stage(solver: ConfigurationSolver, c: Column) -> StageSolution:
    return stage_solution(solver.table, c)


def stage_solution(table: RangeTable, c: Column) -> StageSolution:
    """What a column of a table stands for."""
    chain, assignments = table.chain, c.assigned or table.assignments(c)
    kinds = (chain.kinds[kind] for kind in chain.sequence[c.first : c.last])
    return StageSolution(
        c.first,
        c.last,
        chain.boundary_labels(c.first)[c.entry],
        chain.boundary_labels(c.last)[c.exit],
        assignments,
        c.time_s,
        c.cut_s,
        c.step_s,
        c.state_bytes,
        c.saved_bytes,
        tuple(kind.time_s(assignment) for kind, assignment in zip(kinds, assignments, strict=True)),
    )
