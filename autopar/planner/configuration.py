"""One configuration solved: memory prices are refined until bound and columns meet, then the ILP chooses.

Every plan a price finds is a column wherever it fits; the plans of two prices also mix within a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from autopar.planner.bounds import TIME_ONLY, Bound, Objective, StageSpace, Weights, bound, steeper, terminals
from autopar.planner.chain import Chain, IntArray, fold
from autopar.planner.columns import SAVED, STATE, STEP, TIME, Column, RangeTable
from autopar.planner.factor_graph import FloatArray
from autopar.planner.ilp import Choice, StageIlp, objective_s
from autopar.planner.least import least_costs, mean_bytes, quick_bound_s
from autopar.planner.paths import Arcs, bottleneck, levels_of, sweep
from autopar.planner.segment import Price, Segment
from autopar.planner.solvers import Program
from cost_model.errors import SolverError

ROUNDS = 10
TOLERANCE = 1e-4
MIXED_EDGES = 96
MIXED_PRICES = 6
TRIED_LEVELS = 4
WORTH = 1e-5
MAX_ILP_COLUMNS = 400
CLOSE = 1e-9
HINTED = 64
LONGEST = 2
"""Ranges of so many times the mean length of stages are priced at first."""


@dataclass(frozen=True)
class Configuration:
    """Mesh degrees, schedule and microbatching. microbatches: per data-parallel replica.

    virtual_stages: into so many parts the stages that are searched for are cut again. window: as in ``stage_schedule``.
    tp_axes: those that tp consists of, None where it is one. dp_inner: as in ``Plan``.
    """

    dp: int
    tp: int
    pp: int
    schedule: str
    microbatch_size: int
    microbatches: int
    virtual_stages: int = 1
    window: int = 1
    tp_axes: tuple[int, ...] | None = None
    dp_inner: int = 1

    @property
    def objective(self) -> Objective:
        """What a step takes. Of what 1f1b waits zero_bubble waits a third where forward, backward and the gradients of
        parameters take equally long, else more (Qi et al., 2023, "Zero bubble pipeline parallelism", 2.3); interleaved
        waits one virtual stage's part of it."""
        return Objective(
            self.pp, self.microbatches, 1 / 3 if self.schedule == "zero_bubble" else 1 / self.virtual_stages
        )


@dataclass(frozen=True)
class Shortage:
    """Nothing fits: the plan that needs least, its largest stage, and the cap that would do."""

    needed_bytes: int
    stage: int
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Outcome:
    """bound_s is proven for the configuration; without a choice it is over the cutoff, or nothing fits."""

    bound_s: float
    choice: Choice | None = None
    shortage: Shortage | None = None
    ilp: Program | None = None


@dataclass(frozen=True, eq=False)
class _Pool:
    """Columns of one stage as aligned arrays; ``price`` is -1 - i where the column is ``mixed[i]``."""

    edge: IntArray
    price: IntArray
    time_s: FloatArray
    step_s: FloatArray
    mixed: tuple[Column, ...] = ()

    def column(self, table: RangeTable, index: int) -> Column:
        price = int(self.price[index])
        return table.column(int(self.edge[index]), price) if price >= 0 else self.mixed[-1 - price]


@dataclass(frozen=True, eq=False)
class _Found:
    """proven: of these spaces, edge for edge; pools: the columns of each stage; best: a tiling by them."""

    spaces: tuple[StageSpace, ...]
    proven: Bound
    pools: tuple[_Pool, ...]
    best: tuple[Column, ...]


@dataclass(eq=False)
class ConfigurationSolver:
    """Solves one configuration of a chain whose shared variables are fixed.

    cap_bytes: per device, infinite if memory does not matter. extra_bytes: what the rewritten program was
    found to need beyond columns, per stage. hints_s: prices of a byte, in seconds, that proved much elsewhere.
    """

    chain: Chain
    segments: Sequence[Segment]
    configuration: Configuration
    cap_bytes: float
    extra_bytes: list[float] = field(default_factory=list)
    hints_s: Sequence[float] = ()

    def __post_init__(self) -> None:
        c = self.configuration
        self.objective = c.objective
        self.extra_bytes = self.extra_bytes or [0.0] * c.pp
        shape = (c.pp, c.microbatches, c.virtual_stages, c.window)
        self._possible: tuple[int, IntArray] | None = None
        self.held = [self.chain.in_flight(c.schedule, stage, *shape) for stage in range(c.pp)]

    @cached_property
    def table(self) -> RangeTable:
        """Ranges about as long as stages are; ``solve`` extends it where longer ones matter."""
        longest = min(len(self.chain), LONGEST * -(-len(self.chain) // self.configuration.pp))
        return RangeTable(self.chain, self.segments, longest)

    def quick_bound_s(self) -> float:
        """Balanced stages, memory without limit, the cheapest cuts; infinite if no assignment is allowed."""
        return quick_bound_s(self.chain, self.segments, self.objective) + (self.objective.pp - 1) * self._cheapest_cut_s

    def glance_s(self) -> float:
        """A bound under the cap before any range is priced: the dual of the whole chain at the latest hints.

        Stages need not be told apart: each has at most the room of a range of one segment, and holds at least the
        fewest microbatches.
        """
        chain, pp = self.chain, self.configuration.pp
        least = min(chain.reserve_bytes(*fold(chain.sequence).examples[k]) for k in range(len(set(chain.sequence))))
        room, held = pp * (self.cap_bytes - least) - sum(self.extra_bytes), min(self.held)
        weights = self.objective.balanced
        bytes_s = [hint_s * weights[0] for hint_s in self.hints_s]
        prices = [Price(*weights, byte_s, byte_s * held) for byte_s in bytes_s]
        duals = least_costs(chain.sequence, self.segments, prices) - np.array(bytes_s) * room
        return float(max(0.0, duals.max())) + (pp - 1) * self._cheapest_cut_s

    @property
    def _cheapest_cut_s(self) -> float:
        if self.objective.pp == 1:
            return 0.0
        chain = self.chain
        return min(chain.cut_s(i, label) for i in range(1, len(chain)) for label in chain.boundary_labels(i))

    def bound(self, cutoff_s: float, within_s: float) -> Outcome:
        """A bound: that of ``solve``, or less once some plan is known to take no longer than ``within_s``."""
        found = self._found(cutoff_s * (1 + CLOSE), within_s)
        return found if isinstance(found, Outcome) else Outcome(found.proven.bound_s)

    def solve(self, cutoff_s: float) -> Outcome:
        """The best choice, or only a bound once that is over the cutoff, or what memory is short."""
        found = self._found(cutoff_s * (1 + CLOSE), 0.0)
        if isinstance(found, Outcome):
            return found
        pools, best = found.pools, found.best
        if self._gap(best, found.proven) > TOLERANCE and np.isfinite(self.cap_bytes):
            pools = self._mixed(found)
            best = self._incumbent(pools, best)
        return self._chosen(pools, best, found.proven)

    def _found(self, limit_s: float, within_s: float) -> _Found | Outcome:
        """What ``_refined`` finds; the outcome where that is no choice of columns."""
        spaces, best = self._start(limit_s)
        if not all(len(space.edges) for space in spaces):
            return self._nothing(limit_s)
        found = self._refined(spaces, best, limit_s, within_s)
        if not np.isfinite(found.proven.bound_s):
            return self._nothing(limit_s)
        if not found.pools:
            return Outcome(found.proven.bound_s)
        assert found.best, "a tiling that fits has columns that fit"
        return found

    def _nothing(self, limit_s: float) -> Outcome:
        """No tiling within the limit fits: without a limit none does at all."""
        return Outcome(limit_s) if np.isfinite(limit_s) else Outcome(np.inf, shortage=self._shortage())

    def _start(self, limit_s: float) -> tuple[tuple[StageSpace, ...], tuple[Column, ...]]:
        """Edges through which a tiling within the limit may lead, and a first tiling, whose value limits them further.

        Ranges are made longer until none of the longest is fast enough and fits: nor do longer ones, then. Most
        configurations have no edges at the first prices, which are few.
        """
        self.table.add(self._first_prices())
        more = [Price(*weights) for weights in self.objective.free]
        best: tuple[Column, ...] = ()
        while True:
            spaces = tuple(self._space(stage) for stage in range(self.configuration.pp))
            near = self._within(spaces, limit_s)
            if all(len(space.edges) for space in near):
                self.table.add(more, first=True)
                self.table.add(self._hinted() if np.isfinite(self.cap_bytes) else [])
                best = self._incumbent([self._pool(space) for space in near], ())
                near = self._within(near, min(limit_s, self._value(best) * (1 + CLOSE)))
            if not self._is_cut_short(spaces, min(limit_s, self._value(best) * (1 + CLOSE))):
                return near, best
            self.table.extend(min(len(self.chain), 2 * self.table.longest))

    def _is_cut_short(self, spaces: Sequence[StageSpace], limit_s: float) -> bool:
        """Whether ranges longer than those priced may be of use."""
        table, edges = self.table, self.table.edges
        if table.longest == len(self.chain):
            return False
        slowest_s = limit_s / self.configuration.microbatches
        for space in spaces:
            longest = edges.last[space.edges] - edges.first[space.edges] == table.longest
            if (longest & (self._least_s(space) <= slowest_s)).any():
                return True
        return False

    def _least_s(self, space: StageSpace) -> FloatArray:
        """[edge of the space] the least seconds per microbatch of any assignment."""
        edges, layer, e = self.table.edges, self.table.prices.index(Price(*TIME_ONLY)), space.edges
        least: FloatArray = self.table.cost[edges.cls[e], layer, edges.entry[e], edges.exit[e]]
        return least

    def _within(self, spaces: Sequence[StageSpace], limit_s: float) -> tuple[StageSpace, ...]:
        """Without stages so slow that no tiling with them is within the limit, and what only they lead to."""
        if self.configuration.pp == 1 or not np.isfinite(limit_s):
            return tuple(spaces)
        slowest_s = limit_s / self.configuration.microbatches
        return self._connected([space.only(self._least_s(space) <= slowest_s) for space in spaces])

    def _connected(self, spaces: Sequence[StageSpace]) -> tuple[StageSpace, ...]:
        """Only edges on some way from the start to the end."""
        edges, (starts, ends, nodes) = self.table.edges, self._ends()
        found = list(spaces)
        reached = np.zeros(nodes, dtype=bool)
        reached[starts] = True
        for stage, space in enumerate(found):
            found[stage] = space.only(reached[edges.source[space.edges]])
            reached = np.zeros(nodes, dtype=bool)
            reached[edges.target[found[stage].edges]] = True
        reached &= np.isin(np.arange(nodes), ends)
        for stage in reversed(range(len(found))):
            found[stage] = found[stage].only(reached[edges.target[found[stage].edges]])
            reached = np.zeros(nodes, dtype=bool)
            reached[edges.source[found[stage].edges]] = True
        return tuple(found)

    @property
    def guess_bytes(self) -> float:
        """See ``mean_bytes``."""
        return mean_bytes(self.chain, self.segments, self.held)

    def forget(self) -> None:
        """Drop the table; what segments know of prices stays."""
        self.__dict__.pop("table", None)
        self._possible = None

    def needed_bytes(self, columns: Sequence[Column]) -> list[float]:
        """What each stage of a tiling takes."""
        reserves = [
            self.chain.reserve_bytes(c.first, c.last) + extra
            for c, extra in zip(columns, self.extra_bytes, strict=True)
        ]
        return [
            c.state_bytes + held * c.saved_bytes + reserve
            for c, held, reserve in zip(columns, self.held, reserves, strict=True)
        ]

    def _first_prices(self) -> list[Price]:
        """What tells how fast a range may be, and how little it may need."""
        fastest = Price(*(self.objective.balanced if self.configuration.pp == 1 else TIME_ONLY))
        if not np.isfinite(self.cap_bytes):
            return [fastest]
        return [fastest, *(Price(0.0, 0.0, 1.0, float(held)) for held in dict.fromkeys(self.held))]

    def _hinted(self) -> list[Price]:
        """The latest hints for each stage, as many as are cheap."""
        held, priced = tuple(dict.fromkeys(self.held)), self.objective.priced
        known = list(self.hints_s)[-max(1, HINTED // (len(held) * len(priced))) :]
        pairs = [(weights, hint_s * weights[0]) for weights in priced for hint_s in known]
        return [Price(*weights, byte, byte * count) for weights, byte in pairs for count in held]

    def learned_s(self) -> float | None:
        """The last price of a byte that was tried, in seconds of a microbatch; None where memory did not bind."""
        tried = [p.state_price / p.time_weight for p in self.table.prices if p.state_price and p.time_weight]
        return tried[-1] if tried else None

    def _stage_edges(self, stage: int) -> IntArray:
        """Edges with room for the other stages before and after, that some assignment allows."""
        pp, count, possible = self.configuration.pp, len(self.chain), self._possible_edges()
        first, last = self.table.edges.first[possible], self.table.edges.last[possible]
        begins = first == 0 if stage == 0 else first >= stage
        ends = last == count if stage == pp - 1 else last <= count - (pp - 1 - stage)
        return possible[begins & ends]

    def _possible_edges(self) -> IntArray:
        """Edges that are priced and that some assignment allows."""
        edges, table = self.table.edges, self.table
        if self._possible is None or self._possible[0] != table.longest:
            known = np.flatnonzero((edges.cls < table.priced) & np.isfinite(edges.cut_s))
            least = table.cost[edges.cls[known], 0, edges.entry[known], edges.exit[known]]
            self._possible = table.longest, known[np.isfinite(least)]
        return self._possible[1]

    def _space(self, stage: int) -> StageSpace:
        edges, table = self._stage_edges(stage), self.table
        capacity = self.cap_bytes - table.edges.reserve_bytes[edges] - self.extra_bytes[stage]
        space = StageSpace(stage, self.held[stage], edges, capacity)
        if not np.isfinite(self.cap_bytes):
            return space
        return space.only(self._least_bytes(space) <= capacity)

    def _least_bytes(self, space: StageSpace) -> FloatArray:
        """[edge of the space] the fewest bytes of state and saved values of any assignment."""
        edges, layer, e = self.table.edges, self.table.prices.index(space.least_bytes_price()), space.edges
        least: FloatArray = self.table.cost[edges.cls[e], layer, edges.entry[e], edges.exit[e]]
        return least

    def _held_bytes(self, space: StageSpace) -> FloatArray:
        """The same of the assignments that were found, which may need more where a segment is only bounded."""
        edges, layer, e = self.table.edges, self.table.prices.index(space.least_bytes_price()), space.edges
        totals = self.table.totals[edges.cls[e], layer, edges.entry[e], edges.exit[e]]
        held: FloatArray = totals[:, STATE] + space.held * totals[:, SAVED]
        return held

    def _refined(
        self, spaces: tuple[StageSpace, ...], best: tuple[Column, ...], cutoff_s: float, within_s: float
    ) -> _Found:
        """Add memory prices where the bound or the best columns hurt, until they meet or no price helps, or the columns
        take no longer than ``within_s``."""
        found = self._look(spaces, best, 0.0, cutoff_s)
        for _ in range(ROUNDS - 1):
            if not found.pools or self._value(found.best) <= within_s:
                break
            if self._gap(found.best, found.proven) <= TOLERANCE:
                break
            if not self.table.add(self._steeper(found)):
                break
            found = self._look(self._narrowed(found), found.best, found.proven.bound_s, cutoff_s)
        return found

    def _look(
        self, spaces: tuple[StageSpace, ...], best: tuple[Column, ...], known_s: float, cutoff_s: float
    ) -> _Found:
        """Bound and best columns with today's prices; no pools if nothing fits or the bound is over the cutoff."""
        proven = bound(self.table, spaces, self.objective, self._value(best))
        proven = replace(proven, bound_s=max(proven.bound_s, known_s))
        if not np.isfinite(proven.bound_s) or proven.bound_s > cutoff_s:
            return _Found(spaces, proven, (), best)
        pools = tuple(self._pool(space) for space in spaces)
        return _Found(spaces, proven, pools, self._incumbent(pools, best))

    def _narrowed(self, found: _Found) -> tuple[StageSpace, ...]:
        """Without the edges through which no tiling can beat the best columns; those columns' own stay."""
        limit = self._value(found.best) * (1 + CLOSE)
        return tuple(
            space.only(edge_s <= limit) for space, edge_s in zip(found.spaces, found.proven.edge_s, strict=True)
        )

    def _steeper(self, found: _Found) -> list[Price]:
        """New memory prices for the edges of the bound's tiling and of the best columns."""
        prices = []
        for space, edge, column in zip(found.spaces, found.proven.path, found.best, strict=True):
            for weights in self.objective.priced:
                for at in dict.fromkeys((edge, self._edge_of(column))):
                    prices.append(steeper(self.table, space, at, weights))
        return [price for price in prices if price is not None and not self._known(price)]

    def _known(self, price: Price) -> bool:
        known = np.array([row.vector() for row in self.table.prices])
        return bool((np.abs(known - price.vector()) <= 1e-9 * np.abs(known)).all(axis=1).any())

    def _edge_of(self, column: Column) -> int:
        return self.table.edges.number(column.first, column.last, column.entry, column.exit)

    def _weightings(self) -> tuple[Weights, ...]:
        return tuple(weights for weights in self.objective.free if weights[0] > 0)

    def _pool(self, space: StageSpace) -> _Pool:
        """On each edge, the fitting plans that are best for some weighting of time and step."""
        edges = self.table.edges
        examples, kind = edges.alike(space.edges)
        e = space.edges[examples]
        totals = self.table.totals[edges.cls[e], :, edges.entry[e], edges.exit[e]]
        need = totals[:, :, STATE] + space.held * totals[:, :, SAVED]
        over = np.isinf(need) | (need > space.capacity_bytes[examples, None])
        picked = []
        for weights in self._weightings():
            cost = weights[0] * totals[:, :, TIME] + weights[1] * totals[:, :, STEP]
            picked.append(np.where(over, np.inf, cost).argmin(axis=1))
        best = np.sort(np.stack(picked, axis=1), axis=1)
        offered = (np.diff(best, axis=1, prepend=-1) != 0) & ~np.take_along_axis(over, best, axis=1)
        rows, found = np.nonzero(offered[kind])
        of = kind[rows]
        prices = best[of, found]
        return _Pool(space.edges[rows], prices, totals[of, prices, TIME], totals[of, prices, STEP])

    def _arcs(self, pool: _Pool) -> Arcs:
        edges = self.table.edges
        along_s = self.objective.waiting * pool.time_s
        cost = along_s + edges.cut_s[pool.edge] + pool.step_s / self.configuration.pp
        return Arcs(edges.source[pool.edge], edges.target[pool.edge], cost, pool.time_s)

    def _value(self, columns: tuple[Column, ...]) -> float:
        return objective_s(columns, self.objective) if columns else np.inf

    def _gap(self, best: tuple[Column, ...], proven: Bound) -> float:
        value = self._value(best)
        return (value - proven.bound_s) / value if np.isfinite(value) and value > 0 else float(value > 0)

    def _incumbent(self, pools: Sequence[_Pool], best: tuple[Column, ...]) -> tuple[Column, ...]:
        """The best of some shortest tilings by these columns, if better than ``best``."""
        arcs = [self._arcs(pool) for pool in pools]
        starts, ends, nodes = self._ends()
        slow = [Arcs(a.source, a.target, a.slow_s, a.slow_s) for a in arcs]
        floor_s, _ = bottleneck(slow, starts, ends, nodes)
        if not np.isfinite(floor_s) or floor_s > self._value(best):
            return best
        microbatches = self.configuration.microbatches
        found = sweep(
            arcs, levels_of(arcs, floor_s, self._value(best) * (1 + 1e-9) / microbatches), starts, ends, nodes
        )
        values = found.total_s() + self.objective.slowest * found.levels.lower_s
        for level in np.argsort(values, kind="stable")[:TRIED_LEVELS]:
            if np.isfinite(values[level]):
                path = found.path(int(level))
                columns = tuple(pool.column(self.table, arc) for pool, arc in zip(pools, path, strict=True))
                best = columns if self._value(columns) < self._value(best) else best
        return best

    def _ends(self) -> tuple[IntArray, IntArray, int]:
        starts, ends = terminals(self.table)
        return starts, ends, (len(self.chain) + 1) * self.table.edges.width

    def _mixed(self, found: _Found) -> tuple[_Pool, ...]:
        """The pools and heads and tails at two prices, on the most promising edges of all stages."""
        every = np.sort(np.concatenate(found.proven.edge_s))
        limit = min(self._value(found.best), float(every[MIXED_EDGES]) if len(every) > MIXED_EDGES else np.inf)
        return tuple(
            self._extended(space, pool, np.flatnonzero(edge_s < limit))
            for space, pool, edge_s in zip(found.spaces, found.pools, found.proven.edge_s, strict=True)
        )

    def _extended(self, space: StageSpace, pool: _Pool, rows: IntArray) -> _Pool:
        """The pool and the best mixed columns of some edges of the space."""
        columns: list[Column] = []
        edges: list[int] = []
        for row in rows.tolist():
            found = self._mixed_columns(space, row)
            columns += found
            edges += [int(space.edges[row])] * len(found)
        return _Pool(
            np.concatenate([pool.edge, np.array(edges, dtype=np.int64)]),
            np.concatenate([pool.price, -1 - np.arange(len(columns))]),
            np.concatenate([pool.time_s, [c.time_s for c in columns]]),
            np.concatenate([pool.step_s, [c.step_s for c in columns]]),
            tuple(columns),
        )

    def _mixed_columns(self, space: StageSpace, row: int) -> list[Column]:
        edge, room = int(space.edges[row]), float(space.capacity_bytes[row])
        if self.table.edges.last[edge] - self.table.edges.first[edge] < 2:
            return []
        prices = self._near_prices(space, edge, room)
        totals = self.table.mixtures(edge, prices)
        fits = np.isfinite(totals[..., TIME]) & (totals[..., STATE] + space.held * totals[..., SAVED] <= room)
        time, step = (np.where(fits, totals[..., part], 0.0) for part in (TIME, STEP))
        found: dict[tuple[int, ...], Column] = {}
        for weights in self.objective.priced:
            cost = np.where(fits, weights[0] * time + weights[1] * step, np.inf)
            cut, head, tail, label = (int(i) for i in np.unravel_index(cost.argmin(), cost.shape))
            if np.isfinite(cost[cut, head, tail, label]):
                at = (cut, head, tail, label)
                found[at] = self.table.mixed_column(edge, prices, at, totals[at])
        return list(found.values())

    def _near_prices(self, space: StageSpace, edge: int, room: float) -> IntArray:
        """Prices whose plans for the edge lie nearest the price of memory that bounds it best."""
        edges, weights = self.table.edges, self.objective.balanced
        totals = self.table.totals[edges.cls[edge], :, edges.entry[edge], edges.exit[edge]]
        need = totals[:, STATE] + space.held * totals[:, SAVED]
        cost = weights[0] * totals[:, TIME] + weights[1] * totals[:, STEP]
        offered = np.array([price.state_price for price in self.table.prices if price.time_weight == weights[0]])
        duals = (cost[None, :] + offered[:, None] * (need - room)[None, :]).min(axis=1)
        order = np.argsort(cost + offered[duals.argmax()] * need, kind="stable")
        _, first = np.unique(need[order], return_index=True)
        near: IntArray = order[np.sort(first)[:MIXED_PRICES]]
        return near

    def _chosen(self, pools: Sequence[_Pool], best: tuple[Column, ...], proven: Bound) -> Outcome:
        """Let the ILP choose among the columns that could beat the incumbent, and the incumbent's own."""
        offers = [
            list(dict.fromkeys((column, *others)))
            for column, others in zip(best, self._hopeful(pools, self._value(best)), strict=True)
        ]
        ilp = StageIlp(offers, self.objective)
        value = self._value(best)
        try:
            choice = ilp.solve()
        except SolverError as error:
            tried = "; ".join(f"{name}: {why}" for name, why in error.tried)
            note = f"no ILP solver worked ({tried}): the best stages found without one were taken"
            choice = Choice(best, value, proven.bound_s, False, "", (note,))
        if choice.objective_s >= value * (1 - 1e-12):
            choice = replace(choice, columns=best, objective_s=value, bound_s=min(choice.bound_s, value))
        return Outcome(min(proven.bound_s, choice.objective_s), choice, None, ilp)

    def _hopeful(self, pools: Sequence[_Pool], value: float) -> list[list[Column]]:
        """Columns through which a tiling might be better by more than WORTH, the best MAX_ILP_COLUMNS in all.

        What is left out cannot hide in the gap: that is taken from the proven bound.
        """
        arcs = [self._arcs(pool) for pool in pools]
        starts, ends, nodes = self._ends()
        microbatches = self.configuration.microbatches
        found = sweep(arcs, levels_of(arcs, 0.0, value / microbatches), starts, ends, nodes)
        kept = []
        for stage, (pool, a) in enumerate(zip(pools, arcs, strict=True)):
            slowest = np.maximum(found.levels.lower_s, a.slow_s[:, None])
            through = (found.through_s(stage) + self.objective.slowest * slowest).min(axis=1)
            order = np.argsort(through, kind="stable")[: MAX_ILP_COLUMNS // len(pools)]
            kept.append([pool.column(self.table, int(i)) for i in order if through[i] < value * (1 - WORTH)])
        return kept

    def _shortage(self) -> Shortage | None:
        """The tiling whose largest stage is smallest; None if no tiling is possible at any cap."""
        if not np.isfinite(self.cap_bytes):
            return None
        table, arcs, spaces = self.table, [], []
        if table.longest < len(self.chain):
            table.extend(len(self.chain))
        for stage in range(self.configuration.pp):
            edges = self._stage_edges(stage)
            space = StageSpace(stage, self.held[stage], edges, np.full(len(edges), np.inf))
            need = self._held_bytes(space) + table.edges.reserve_bytes[edges] + self.extra_bytes[stage]
            arcs.append(Arcs(table.edges.source[edges], table.edges.target[edges], need, need))
            spaces.append(space)
        needed, path = bottleneck(arcs, *self._ends())
        if not path:
            return None
        binding = int(np.argmax([a.cost_s[arc] for a, arc in zip(arcs, path, strict=True)]))
        layers = [table.prices.index(space.least_bytes_price()) for space in spaces]
        columns = tuple(
            table.column(int(space.edges[arc]), layer) for space, arc, layer in zip(spaces, path, layers, strict=True)
        )
        return Shortage(int(np.ceil(needed)), binding, columns)
