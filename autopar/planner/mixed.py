"""Stages with meshes of their own: which mesh of which devices, which segments and which choices, for each stage.

Every arrangement of meshes on devices is bounded, by what segments take where they are fastest and by what its links
take; then priced without a cap; then solved under it: best first, so that most of them are no more than bounded. An
arrangement is priced by columns, ranges of the chain on the mesh of a stage, which tile it so that labels agree at
cuts. Each further microbatch takes as long as the slowest stage or link; what stages sum once a step comes on top.
Cuts between meshes are whole or in consecutive shards; parameters of several segments are whole on every rank.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np

from autopar.planner.arrangements import Arrangement, Arranger, Meshes, Pool, Seat
from autopar.planner.bounds import Objective
from autopar.planner.columns import Column, RangeTable
from autopar.planner.configuration import Configuration
from autopar.planner.cuts import Cuts, Links, Offered
from autopar.planner.factor_graph import FloatArray
from autopar.planner.ilp import StageIlp
from autopar.planner.mesh_chains import MeshChains
from autopar.planner.mesh_tables import MeshTables
from autopar.planner.paths import Ends, bottleneck
from autopar.planner.segment import Price, unproved
from autopar.planner.solution import Infeasible, Solution, stage_solution
from autopar.planner.stage_columns import Role, StageColumns, stage_columns
from autopar.planner.worthwhile import Worthwhile, worthwhile
from cost_model.mesh import Mesh
from cost_model.schedule import in_flight

BYTE_PRICES = (0.03, 0.3, 3.0)
"""What all bytes of a stage are worth, in its own time, at the prices that are tried where memory binds."""
WORTH_SAVING = 1.001
"""Ways to save memory are looked at where the cap makes a step so much longer."""


@dataclass(frozen=True)
class Shape:
    """What is asked for: meshes[s]: those that stage s may have; samples of a microbatch on all replicas together."""

    meshes: Meshes
    samples: int
    microbatches: int
    schedule: str
    window: int = 1

    @property
    def pp(self) -> int:
        return len(self.meshes)

    @property
    def objective(self) -> Objective:
        return Objective(self.pp, self.microbatches)

    def role(self, stage: int) -> Role:
        held = in_flight(self.schedule, stage, self.pp, self.microbatches, 1, self.window)
        return Role(stage, self.pp, held)


@dataclass(frozen=True, eq=False)
class Arranged:
    """An arrangement of a shape: bound_s: no plan of it is faster, whatever the cap; solution: once it was solved."""

    shape: Shape
    seats: Arrangement
    bound_s: float
    solution: Solution | None = None


class Known(IntEnum):
    """How an arrangement is bounded: by one device of each stage, by its meshes, by columns as far as was enough, by
    all of them."""

    QUICK = 0
    ARRANGED = 1
    GLIMPSED = 2
    FREE = 3


class MixedSolver:
    """Solves shapes on pools of devices; what is known of segments and meshes is kept between them.

    other: one of the same pools and links under other caps, whose bounds hold here.
    """

    def __init__(self, pools: Sequence[Pool], links: Links, other: MixedSolver | None = None) -> None:
        self.pools = tuple(pools)
        self.arranger: Arranger = other.arranger if other else Arranger(pools)
        self.chains: MeshChains = other.chains if other else MeshChains(pools)
        self.cuts: Cuts = other.cuts if other else Cuts(links)
        self._bounds: dict[tuple[Shape, Arrangement], tuple[float, Known]] = other._bounds if other else {}
        self._solved: dict[tuple[Shape, Arrangement], Solution | None] = {}
        self.tables = MeshTables(self.chains)
        self._columns: dict[tuple[object, ...], StageColumns] = {}
        self._is_tight = False

    def fastest(self, shapes: Iterable[Shape], limit_s: float = math.inf) -> Iterator[Arranged]:
        """What fits, by price: bounded arrangements wait until none before them can be faster. None at a limit or over.

        bound_s of what comes is that of all arrangements that have not come.
        """
        queue = self._waiting(shapes, limit_s)
        lowest_s, enough_s = math.inf, math.inf
        while queue and queue[0][0] < limit_s:
            _, number, known, arranged = heapq.heappop(queue)
            if self._is_tight and arranged.solution is None and self._over_bytes(arranged) > 0:
                continue
            if arranged.solution is not None:
                lowest_s = min(lowest_s, arranged.bound_s)
                yield replace(arranged, bound_s=min([lowest_s, *(each.bound_s for _, _, _, each in queue)]))
            elif known == Known.FREE:
                if (solution := self._solution_of(arranged)) is not None:
                    heapq.heappush(queue, (solution.objective_s, number, known, replace(arranged, solution=solution)))
            else:
                bound_s, known = self._bounded(arranged, known, enough_s)
                self._bounds[arranged.shape, arranged.seats] = bound_s, known
                enough_s = min(enough_s, bound_s) if known == Known.FREE else enough_s
                if math.isfinite(bound_s):
                    heapq.heappush(queue, (bound_s, number, known, replace(arranged, bound_s=bound_s)))

    def _waiting(self, shapes: Iterable[Shape], limit_s: float) -> list[tuple[float, int, Known, Arranged]]:
        """A heap of all arrangements that may be under a limit, as far as is known at first."""
        queue: list[tuple[float, int, Known, Arranged]] = []
        for shape in shapes:
            for seats in self.arranger.arrangements(shape.meshes):
                if (shape, seats) not in self._bounds:
                    self._bounds[shape, seats] = self._quick_bound_s(shape, seats), Known.QUICK
                bound_s, known = self._bounds[shape, seats]
                if bound_s < limit_s:
                    queue.append((bound_s, len(queue), known, Arranged(shape, seats, bound_s)))
        heapq.heapify(queue)
        return queue

    def _bounded(self, arranged: Arranged, known: Known, enough_s: float) -> tuple[float, Known]:
        """A higher bound, and how it is known. enough_s: what some plan takes; no more is looked at beyond it until the
        arrangement comes again."""
        if known == Known.QUICK:
            return max(arranged.bound_s, self._bound_s(arranged.shape, arranged.seats)), Known.ARRANGED
        wanted_s = enough_s if known == Known.ARRANGED else math.inf
        free_s = self._free_s(arranged, wanted_s)
        return max(arranged.bound_s, free_s), Known.FREE if free_s <= wanted_s else Known.GLIMPSED

    def _solution_of(self, arranged: Arranged) -> Solution | None:
        """``solve``, once."""
        key = arranged.shape, arranged.seats
        if key not in self._solved:
            self._solved[key] = self.solve(arranged)
        return self._solved[key]

    def solve(self, arranged: Arranged, extra_bytes: Sequence[float] = ()) -> Solution | None:
        """The best choice, or None where nothing fits.

        extra_bytes: what the rewritten program was found to need beyond columns, per stage.
        """
        caps = self._caps(arranged, extra_bytes)
        columns = [self._fitting(arranged, stage, cap, saving=False) for stage, cap in enumerate(caps)]
        offered, kept = self._kept(arranged, columns)
        if kept.bound_s + self.cuts.links.once_s(arranged.seats) > arranged.bound_s * WORTH_SAVING:
            if self._over_bytes(arranged) > 0:
                self._is_tight = True
                return None
            columns = [self._fitting(arranged, stage, cap, saving=True) for stage, cap in enumerate(caps)]
            offered, kept = self._kept(arranged, columns)
        return None if math.isinf(kept.bound_s) else self._solution(arranged, columns, offered, kept)

    def shortage(self, shapes: Iterable[Shape]) -> Infeasible | None:
        """The choice whose fullest stage is over its cap by least, of the smallest microbatches; None without any."""
        least: dict[Meshes, Shape] = {}
        for shape in shapes:
            known = least.get(shape.meshes)
            least[shape.meshes] = shape if known is None or shape.samples < known.samples else known
        every = (Arranged(s, seats, 0.0) for s in least.values() for seats in self.arranger.arrangements(s.meshes))
        bounded = sorted(((self._over_bytes(each), number, each) for number, each in enumerate(every)))
        best: tuple[float, Infeasible | None] = math.inf, None
        for over_bytes, _, arranged in bounded:
            if over_bytes >= best[0]:
                break
            best = min(best, self._short(arranged), key=lambda each: each[0])
        return best[1]

    def _over_bytes(self, arranged: Arranged) -> float:
        """By how much some stage is over its cap at least, whatever its plan; infinite where there is none."""
        shape, reached = arranged.shape, np.array([-np.inf])
        for stage, (seat, cap) in enumerate(zip(arranged.seats, self._caps(arranged, ()), strict=True)):
            needed = self.chains.needed_bytes(seat, shape.samples, shape.role(stage).held)
            if needed is None:
                return math.inf
            over = needed - cap
            reached = np.maximum(reached[:, None], over if stage else over[:1]).min(axis=0)
        return float(reached[-1])

    def _quick_bound_s(self, shape: Shape, seats: Arrangement) -> float:
        """As if shards were as fast as can be: what meshes are not asked for costs nothing."""
        known = [self.chains.alone(seat, shape.samples) for seat in seats if shape.samples % seat.mesh.dp == 0]
        alone = [own for own in known if own is not None]
        if len(alone) < len(seats) or len(alone[0][0]) < len(seats):
            return math.inf
        pairs = zip(seats, seats[1:], (chain for _, chain in alone[1:]), strict=False)
        hops = [self.cuts.quick_s(source, target, shape.samples, chain) for source, target, chain in pairs]
        return self._least_s(shape, seats, np.stack([seconds for seconds, _ in alone]), hops)

    def _bound_s(self, shape: Shape, seats: Arrangement) -> float:
        """By the meshes themselves."""
        known = [(self.chains.fastest_s(seat, shape.samples), self.chains.chain(seat, shape.samples)) for seat in seats]
        costs = [seconds for seconds, _ in known if seconds is not None]
        chains = [chain for _, chain in known if chain is not None]
        if len(costs) < len(seats):
            return math.inf
        pairs = zip(seats, seats[1:], chains[1:], strict=False)
        hops = [self.cuts.least_s(source, target, shape.samples, chain) for source, target, chain in pairs]
        return self._least_s(shape, seats, np.stack(costs), hops)

    def _least_s(
        self, shape: Shape, seats: Arrangement, cost_s: FloatArray, hops: Sequence[tuple[float, float]]
    ) -> float:
        """Of cost_s[stage, segment] and hops (way, busy): the shortest way through stages that are ranges of the chain,
        and the shortest slowest stage or hop of any such ranges, as often as a step waits for it."""
        upto_s = np.concatenate([np.zeros((len(seats), 1)), np.cumsum(cost_s, axis=1)], axis=1)
        empty = np.tri(upto_s.shape[1], dtype=bool)
        along_s = slowest_s = np.where(empty[0], np.inf, upto_s[0])
        for own_s, (way_s, busy_s) in zip(upto_s[1:], hops, strict=True):
            ranges_s = np.where(empty, np.inf, own_s - own_s[:, None])
            along_s = (along_s[:, None] + ranges_s).min(axis=0) + way_s
            slowest_s = np.maximum(slowest_s[:, None], np.maximum(ranges_s, busy_s)).min(axis=0)
        return float(along_s[-1] + (shape.microbatches - 1) * slowest_s[-1]) + self.cuts.links.once_s(seats)

    def _free_s(self, arranged: Arranged, enough_s: float) -> float:
        """What no plan takes less than, whatever the cap, unless that is more than ``enough_s``: then less may do."""
        columns = [self._fitting(arranged, stage, math.inf, saving=False) for stage in range(arranged.shape.pp)]
        once_s = self.cuts.links.once_s(arranged.seats)
        return self._kept(arranged, columns, enough_s - once_s)[1].bound_s + once_s

    def _kept(
        self, arranged: Arranged, columns: Sequence[StageColumns], enough_s: float = math.inf
    ) -> tuple[list[Offered], Worthwhile]:
        offered = self.cuts.offered(arranged.seats, arranged.shape.samples, columns)
        return offered, worthwhile([own.ways for own in offered], arranged.shape.microbatches, enough_s)

    def _caps(self, arranged: Arranged, extra_bytes: Sequence[float]) -> list[float]:
        extra = extra_bytes or (0.0,) * len(arranged.seats)
        return [self.pools[s.pool].cap_bytes - more for s, more in zip(arranged.seats, extra, strict=True)]

    def _fitting(self, arranged: Arranged, stage: int, cap_bytes: float, *, saving: bool) -> StageColumns:
        """Those of a stage under a cap. saving: with all ways to save memory, at several prices of it."""
        shape, seat, role = arranged.shape, arranged.seats[stage], arranged.shape.role(stage)
        weighings, pool = shape.objective.free, self.pools[seat.pool]
        worth_s = _rounded(arranged.bound_s / shape.pp / pool.cap_bytes) if saving else 0.0
        key = (id(pool.space), seat.mesh, shape.samples, role, weighings, cap_bytes, worth_s)
        if key not in self._columns:
            smallest = Price(0.0, 0.0, 1.0, float(role.held))
            free = [*(Price(*weights) for weights in weighings), smallest]
            tables = [self.tables.table(seat, shape.samples, free)]
            if saving:
                prices = [share * worth_s for share in BYTE_PRICES]
                dear = [Price(*shape.objective.balanced, each, each * role.held) for each in prices]
                tables += self.tables.saving(seat, shape.samples, [*dear, smallest])
            self._columns[key] = stage_columns(tables, role, weighings, cap_bytes)
        return self._columns[key]

    def _solution(
        self, arranged: Arranged, columns: Sequence[StageColumns], offered: Sequence[Offered], kept: Worthwhile
    ) -> Solution:
        """One column a stage, by an integer program of those that are kept."""
        ways = [_Way.of(own, each, numbers) for own, each, numbers in zip(columns, offered, kept.kept, strict=True)]
        ilp = StageIlp([[way.offer for way in own] for own in ways], arranged.shape.objective)
        choice = ilp.solve()
        by_offer = {id(way.offer): way for own in ways for way in own}
        chosen = [by_offer[id(offer)] for offer in choice.columns]
        stages = tuple(stage_solution(way.table, way.column) for way in chosen)
        objective_s = choice.objective_s + self.cuts.links.once_s(arranged.seats)
        bound_s = min(arranged.bound_s, objective_s)
        gap = objective_s / bound_s - 1 if bound_s else math.inf
        notes = (*choice.notes, *unproved(self.chains.segments.values()))
        placement, meshes = _laid_out(arranged.seats)
        c = _configuration(arranged)
        return Solution(c, stages, objective_s, bound_s, gap, notes, placement, ilp=ilp, meshes=meshes)

    def _short(self, arranged: Arranged) -> tuple[float, Infeasible | None]:
        """Bytes over the cap, and the choice that is over it by least; infinite where there is none."""
        columns = []
        for stage, seat in enumerate(arranged.seats):
            role = arranged.shape.role(stage)
            smallest = [Price(0.0, 0.0, 1.0, float(role.held))]
            samples = arranged.shape.samples
            tables = [self.tables.table(seat, samples, smallest), *self.tables.saving(seat, samples, smallest)]
            columns.append(stage_columns(tables, role, (), math.inf))
        caps, offered = self._caps(arranged, ()), self.cuts.offered(arranged.seats, arranged.shape.samples, columns)
        over = [own.needed_bytes[o.column] - cap for own, o, cap in zip(columns, offered, caps, strict=True)]
        least = min(0.0, *(float(each.min(initial=0.0)) for each in over))
        joined = [Ends(o.ways.before, o.ways.after) for o in offered]
        places = 1 + max(int(ends.max(initial=0)) for o in offered for ends in (o.ways.before, o.ways.after))
        first = np.zeros(1, dtype=np.int64)
        worst, path = bottleneck(joined, [each - least for each in over], first, first, places)
        if not path:
            return math.inf, None
        ways = [_Way.of(own, o, [at])[0] for own, o, at in zip(columns, offered, path, strict=True)]
        needed = [float(own.needed_bytes[o.column[at]]) for own, o, at in zip(columns, offered, path, strict=True)]
        stage = int(np.argmax([n - cap for n, cap in zip(needed, caps, strict=True)]))
        placement, meshes = _laid_out(arranged.seats)
        stages = tuple(stage_solution(way.table, way.column) for way in ways)
        found = Infeasible(int(max(needed)), stage, _configuration(arranged), stages, placement, meshes)
        return worst + least, found


@dataclass(frozen=True, eq=False)
class _Way:
    """offer: of the integer program, whose times and labels are those of the way; column: what it stands for."""

    offer: Column
    column: Column
    table: RangeTable

    @staticmethod
    def of(columns: StageColumns, offered: Offered, numbers: Iterable[int]) -> list[_Way]:
        found, ways = [], offered.ways
        for number in map(int, numbers):
            table, column = columns.column(int(offered.column[number]))
            column, time_s = replace(column, cut_s=float(offered.hop_s[number])), float(ways.time_s[number])
            cut_s, entry, exit = float(ways.cost_s[number]) - time_s, int(ways.before[number]), int(ways.after[number])
            offer = replace(column, time_s=time_s, cut_s=cut_s, entry=entry, exit=exit)
            found.append(_Way(offer, column, table))
        return found


def _laid_out(seats: Sequence[Seat]) -> tuple[tuple[int, ...], tuple[Mesh, ...]]:
    """Devices stage after stage, and the meshes of stages."""
    return tuple(device for seat in seats for device in seat.devices), tuple(seat.mesh for seat in seats)


def _configuration(arranged: Arranged) -> Configuration:
    shape, first = arranged.shape, arranged.seats[0].mesh
    samples = shape.samples // first.dp
    return Configuration(first.dp, first.tp, shape.pp, shape.schedule, samples, shape.microbatches, window=shape.window)


def _rounded(value: float) -> float:
    """The next power of two, so that tables of one price serve many arrangements."""
    return 2.0 ** round(math.log2(value)) if 0 < value < math.inf else 0.0
