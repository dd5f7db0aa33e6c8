"""The automatic plan against every grid: all dp x tp x pp, microbatch sizes, ZeRO 0, 1, 3, recompute none to full.

    python benchmarks/baselines.py [CASE ...] [--depths] [--schedule 1f1b]

Each grid is the best plan that its pins leave (shardings, stage boundaries and, unless pinned, the schedule), under the
same cap and by the same simulator. Ruled out are those whose stages take longer on average than the automatic plan's
step, and those of which no plan within the cap is fast enough for any schedule, by the search's proven bound, of all
grids of a degree and microbatch size at once and of each: no schedule waits less than a third of what 1f1b waits, or a
virtual stage's part of it (``Configuration.objective``). Both bounds count collectives where they are due, none behind
compute. Prints what is left, and how many there are of each kind. The exit code is 1 where a plan is faster than the
automatic one, or exceeds the cap.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from planner_cases import CASES, DEPTHS, PUBLISHED, Case

from autopar.options import DEFAULT_OPTIMIZER, Options
from autopar.planner.chain import Chain, at_once
from autopar.planner.configuration_solver import ConfigurationSolver
from autopar.planner.layouts import configurations
from autopar.planner.least import least_costs
from autopar.planner.search import Configuration, search
from autopar.planner.segment import Price, Segment
from autopar.planner.solution import Pins, Solution
from autopar.planner.space import PinnedSpace
from autopar.planning import Job, Planned
from cost_model.parallelism import RECOMPUTES, Parallelism

ZEROS = (0, 1, 3)


@dataclass(frozen=True, eq=False)
class Grid:
    """A way to train that the model can be cut and split for; bound_s: no plan of it takes less, whatever it holds."""

    pins: Parallelism
    configuration: Configuration
    chain: Chain
    bound_s: float

    def __str__(self) -> str:
        p = self.pins
        return f"dp={p.dp} tp={p.tp} pp={p.pp} microbatch_size={p.microbatch_size} zero={p.zero} {p.recompute}"


class TooSlow(Exception):
    """No plan that is left is fast enough."""


class Grids:
    """All grids of a job; segments are made ready once. known: how many there are, once they were gone through."""

    def __init__(self, job: Job, schedule: str | None) -> None:
        self.job, self.schedule = job, schedule
        self.segments: dict[object, Segment] = {}
        self.hints_s: tuple[float, ...] = ()
        self.known = 0
        self._hopeless: dict[Configuration, bool] = {}

    def quicker(self, step_s: float) -> Iterator[Grid]:
        """Those whose stages may take less on average. One replica has nothing to split over replicas."""
        for c in configurations(self.job.cluster.num_devices, self.job.batch, Pins()):
            ways = list(itertools.product(ZEROS if c.dp > 1 else (0,), RECOMPUTES))
            least_s = self._least_s(c, step_s)
            self.known += 0 if least_s is None else len(ways)
            if least_s is not None and least_s < step_s:
                found = (self._grid(c, zero, recompute) for zero, recompute in ways)
                yield from (grid for grid in found if grid.bound_s < step_s)

    def _least_s(self, c: Configuration, step_s: float) -> float | None:
        """What no grid of a configuration takes less than, by its ops alone where they take longer than a step; None
        where the model cannot be cut or split so."""
        space, each = self._under(Parallelism()), c.microbatches / c.pp
        floor = space.floor(c.dp, c.tp, c.microbatch_size, step_s / each)
        if floor is None or c.pp > floor.segments:
            return None
        return each * floor.time_s if each * floor.time_s >= step_s else self._bound_s(c, space)

    def _grid(self, c: Configuration, zero: int, recompute: str) -> Grid:
        pins = Parallelism(c.dp, c.tp, c.pp, zero, recompute, self.schedule, c.microbatch_size)
        space = self._under(pins)
        return Grid(pins, c, self._chain(c, space), self._bound_s(c, space))

    def _under(self, pins: Parallelism) -> PinnedSpace:
        return self.job.under(pins, self.job.options.memory_cap_bytes).pinned_space()

    def _chain(self, c: Configuration, space: PinnedSpace) -> Chain:
        chain = space.chain(c.dp, c.tp, c.microbatch_size)
        assert chain is not None, c
        return chain

    def _bound_s(self, c: Configuration, space: PinnedSpace) -> float:
        chain = self._chain(c, space)
        price = Price(c.microbatches / c.pp, 1 / c.pp)
        return float(least_costs(chain.sequence, self._ready(chain), (price,))[0])

    def _ready(self, chain: Chain) -> list[Segment]:
        return [self.segments.setdefault(graph, Segment(graph)) for graph in chain.kinds]

    def is_offered(self, grid: Grid, step_s: float) -> bool:
        """Whether columns of the grid that fit may take less, under any schedule."""
        c, within_s = grid.configuration, _within_s(grid, step_s)
        if c not in self._hopeless:
            self._hopeless[c] = not self._any_is_offered(c, within_s)
        return not self._hopeless[c] and self._is_offered(grid, within_s)

    def _any_is_offered(self, c: Configuration, within_s: float) -> bool:
        """Whether columns of any grid of a configuration that fit may be fast enough: each segment has all ways to save
        memory, for what the least of them reserves."""
        ways = self._under(Parallelism()).saving_chains(c.dp, c.tp, c.microbatch_size)
        return self._is_within(at_once(ways), c, within_s)

    def _is_offered(self, grid: Grid, within_s: float) -> bool:
        """Whether columns that fit are fast enough."""
        c, shared = grid.configuration, grid.chain.shared_domains()
        if shared and not self._is_within(grid.chain, c, within_s):
            return False
        labels = (dict(zip(shared, each, strict=True)) for each in itertools.product(*shared.values()))
        return any(self._is_within(grid.chain.fixed(each), c, within_s) for each in labels)

    def _is_within(self, chain: Chain, c: Configuration, within_s: float) -> bool:
        """Whether the bound of a chain under the cap is."""
        solver = ConfigurationSolver(chain, self._ready(chain), c, self.job.cap_bytes)
        solver.hints_s = self.hints_s
        if self.hints_s and solver.glance_s() >= within_s:
            return False
        bound_s = solver.bound(within_s, within_s).bound_s
        learned_s = solver.learned_s()
        self.hints_s = self.hints_s if learned_s is None else (learned_s,)
        return bound_s < within_s

    def fits(self, grid: Grid, step_s: float) -> bool:
        """Whether a plan of the grid that fits once it is rewritten may take less, by the bound of what was found."""
        within_s = _within_s(grid, step_s)
        p, job = grid.pins, self.job.under(grid.pins, self.job.options.memory_cap_bytes)

        def confirm(found: Solution) -> Sequence[int]:
            if found.bound_s >= within_s:
                raise TooSlow
            return job.peaks(job.plan(found))

        pins = Pins(grid.configuration.dp, grid.configuration.tp, p.pp, p.microbatch_size, p.schedule)
        space, count = job.pinned_space(), job.cluster.num_devices
        try:
            found = search(space, count, job.batch, cap_bytes=job.cap_bytes, pins=pins, confirm=confirm)
        except TooSlow:
            return False
        return isinstance(found, Solution)


def _within_s(grid: Grid, step_s: float) -> float:
    """What 1f1b may take at most where some schedule takes less than a step.

    Stages that sum to S, the slowest of which takes m, take w S + (microbatches - w) m, of which w is 1 for 1f1b: what
    another w takes is least, beside that, where all stages are as slow as each other.
    """
    c = grid.configuration
    waits = min(1 / 3, 1 / (len(grid.chain) // c.pp))
    return step_s * (c.microbatches + c.pp - 1) / (c.microbatches + waits * (c.pp - 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {case.name: case for case in (*CASES, *DEPTHS)}
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(known)}; default: the first five")
    parser.add_argument("--depths", action="store_true")
    parser.add_argument("--schedule", help="of all grids; default: the best for each")
    given = parser.parse_args()
    names = given.cases or [case.name for case in (DEPTHS if given.depths else CASES)]
    if set(names) - set(known):
        parser.error(f"no case is called {', '.join(sorted(set(names) - set(known)))}")
    failed = [name for name in names if not holds(known[name], given.schedule)]
    return int(bool(failed))


def holds(case: Case, schedule: str | None) -> bool:
    """Whether no grid of a case is faster than its automatic plan, and no plan exceeds the cap; prints all it finds."""
    (model, inputs), cluster = case.model(), case.load_cluster()
    start, own = time.perf_counter(), time.process_time()
    job = Job.of(model, cluster, inputs, Options.of(None, DEFAULT_OPTIMIZER, None, case.memory_cap, None, None))
    best = job.planned(job.decide(start))
    best_s = best.estimate.step_time_s
    print(f"{case.name} on {case.devices}, cap {job.cap_bytes / 2**30:.2f} GiB: {_text(best, best_s)}", flush=True)
    grids = Grids(job, schedule)
    quick = sorted(grids.quicker(best_s), key=lambda grid: grid.bound_s)
    out = f"{grids.known - len(quick)} of {grids.known} grids ruled out by what stages take on average"
    print(f"{case.name}: {out}; processor {time.process_time() - own:.0f} s", flush=True)
    offered = [grid for grid in quick if grids.is_offered(grid, best_s)]
    out = f"{len(quick) - len(offered)} by what columns take and hold"
    print(f"{case.name}: {out}; processor {time.process_time() - own:.0f} s", flush=True)
    left = [grid for grid in offered if grids.fits(grid, best_s)]
    out = f"{len(offered) - len(left)} by what programs hold, {len(left)} searched and simulated"
    print(f"{case.name}: {out}; processor {time.process_time() - own:.0f} s", flush=True)
    ways = [(str(grid), grid.pins) for grid in left] + list(PUBLISHED.get(case.name, ()))
    failures = [name for name, pins in ways if not _is_beaten(job, name, pins, best_s)]
    print(f"{case.name}: {len(failures)} faster, or over the cap; processor {time.process_time() - own:.0f} s")
    return not failures and best.estimate.peak_bytes <= job.cap_bytes


def _is_beaten(job: Job, name: str, pins: Parallelism, best_s: float) -> bool:
    """Whether the best plan under some pins is no faster than the automatic one, and fits."""
    found = job.under(pins, job.options.memory_cap_bytes).attempt()
    if isinstance(found, int):
        print(f"  {name}: needs {found / 2**30:.2f} GiB", flush=True)
        return True
    print(f"  {name}: {_text(found, best_s)}", flush=True)
    return found.estimate.step_time_s >= best_s and found.estimate.peak_bytes <= job.cap_bytes


def _text(planned: Planned, best_s: float) -> str:
    plan, found = planned.plan, planned.estimate
    how = f"{plan.mesh_text()}, {plan.microbatches} x {plan.microbatch_size}, {plan.schedule_text()}"
    times = f"{found.step_time_s:.3f} s ({found.step_time_s / best_s - 1:+.1%})"
    return f"{how}{plan.saving_text()}: {times}, {found.peak_bytes / 2**30:.2f} GiB"


if __name__ == "__main__":
    sys.exit(main())
