"""One configuration solved: memory prices are refined until bound and columns meet, then the ILP chooses.

Every plan a price finds is a column wherever it fits; the plans of two prices also mix within a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from autopar.planner.bounds import TIME_ONLY, Bound, StageSpace, bound, steeper
from autopar.planner.chain import Chain, IntArray, fold
from autopar.planner.columns import SAVED, STATE, Column, RangeTable
from autopar.planner.configuration import Configuration
from autopar.planner.factor_graph import FloatArray
from autopar.planner.ilp import Choice, StageIlp
from autopar.planner.least import beside_slowest_s, least_costs, mean_bytes, quick_bound_s, slowest_stage_s
from autopar.planner.paths import Ends, bottleneck
from autopar.planner.pools import Pool, Pools
from autopar.planner.segment import Price, Segment
from autopar.planner.solvers import Program
from cost_model.errors import SolverError

ROUNDS = 10
TOLERANCE = 1e-4
_STATE_ONLY = Price(0.0, 0.0, 1.0, 0.0)
CLOSE = 1e-9
HINTED = 64
LONGEST = 2
"""Ranges of so many times the mean length of stages are priced at first."""


@dataclass(frozen=True)
class Shortage:
    """Nothing fits: the plan that needs least, its largest stage, and the cap that would do."""

    needed_bytes: int
    stage: int
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Outcome:
    """bound_s is proven for the configuration; without a choice it is over the cutoff, or nothing fits. best: the best
    tiling that was met where only a bound was asked for."""

    bound_s: float
    choice: Choice | None = None
    shortage: Shortage | None = None
    ilp: Program | None = None
    best: tuple[Column, ...] = ()


@dataclass(frozen=True, eq=False)
class _Found:
    """proven: of these spaces, edge for edge; pools: the columns of each stage; best: a tiling by them."""

    spaces: tuple[StageSpace, ...]
    proven: Bound
    pools: tuple[Pool, ...]
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
        return RangeTable(self.chain, self.segments, self.configuration.pp, longest)

    @cached_property
    def pools(self) -> Pools:
        """Of the table."""
        return Pools(self.table, self.objective)

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
        both = [self.objective.balanced] if pp == 1 else [self.objective.balanced, self.objective.along]
        weighted = [(weights, hint_s * self.objective.balanced[0]) for weights in both for hint_s in self.hints_s]
        prices = [Price(*weights, byte_s, byte_s * held) for weights, byte_s in weighted]
        duals = least_costs(chain.sequence, self.segments, prices) - np.array([byte_s for _, byte_s in weighted]) * room
        if pp > 1:
            slowest_s = slowest_stage_s(chain, self.segments, pp)
            duals[len(self.hints_s) :] += beside_slowest_s(0.0, self.objective, slowest_s)
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
        return found if isinstance(found, Outcome) else Outcome(found.proven.bound_s, best=found.best)

    def solve(self, cutoff_s: float) -> Outcome:
        """The best choice, or only a bound once that is over the cutoff, or what memory is short."""
        found = self._found(cutoff_s * (1 + CLOSE), 0.0)
        if isinstance(found, Outcome):
            return found
        pools, best = found.pools, found.best
        if self._gap(best, found.proven) > TOLERANCE and np.isfinite(self.cap_bytes):
            pools = self.pools.mixed(found.spaces, found.pools, found.proven.edge_s, self.pools.value(best))
            best = self.pools.incumbent(pools, best)
        return self._chosen(pools, best, found.proven)

    def _found(self, limit_s: float, within_s: float) -> _Found | Outcome:
        """What ``_refined`` finds; the outcome where that is no choice of columns.

        Where all that leaves room for the update of its state saves too much, and the other way about, what lies
        between is not looked for: then nothing is said to fit.
        """
        spaces, best = self._start(limit_s)
        if not all(len(space.edges) for space in spaces):
            return self._nothing(limit_s)
        found = self._refined(spaces, best, limit_s, within_s)
        if not np.isfinite(found.proven.bound_s):
            return self._nothing(limit_s)
        if not found.pools:
            return Outcome(found.proven.bound_s)
        return found if found.best else self._nothing(limit_s)

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
            near, longest_s = self._within(spaces, limit_s), self._longest_s(spaces)
            if all(len(space.edges) for space in near):
                self.table.narrow(np.concatenate([space.edges for space in near]))
                self.table.add(more, first=True)
                self.table.add(self._hinted() if np.isfinite(self.cap_bytes) else [])
                best = self.pools.incumbent([self.pools.pool(space) for space in near], ())
                near = self._within(near, min(limit_s, self.pools.value(best) * (1 + CLOSE)))
            slowest_s = min(limit_s, self.pools.value(best) * (1 + CLOSE)) / self.objective.lone
            if np.isinf(longest_s) or longest_s > slowest_s:  # nor are longer ones of use
                return near, best
            self.table.extend(min(len(self.chain), 2 * self.table.longest))

    def _longest_s(self, spaces: Sequence[StageSpace]) -> float:
        """The least seconds per microbatch of the longest ranges that are priced; infinite where none fits, or there
        are no longer ones."""
        table, edges = self.table, self.table.edges
        if table.longest == len(self.chain):
            return np.inf
        longest = [s.only(edges.last[s.edges] - edges.first[s.edges] == table.longest) for s in spaces]
        return min(float(self._least_s(space).min(initial=np.inf)) for space in longest)

    def _least_s(self, space: StageSpace) -> FloatArray:
        """[edge of the space] the least seconds per microbatch of any assignment."""
        return self.table.edge_cost(space.edges, self.table.prices.index(Price(*TIME_ONLY)))

    def _within(self, spaces: Sequence[StageSpace], limit_s: float) -> tuple[StageSpace, ...]:
        """Without stages so slow that no tiling with them is within the limit, and what only they lead to."""
        if self.configuration.pp == 1 or not np.isfinite(limit_s):
            return tuple(spaces)
        slowest_s = limit_s / self.objective.lone
        return self._connected([space.only(self._least_s(space) <= slowest_s) for space in spaces])

    def _connected(self, spaces: Sequence[StageSpace]) -> tuple[StageSpace, ...]:
        """Only edges on some way from the start to the end."""
        edges, (starts, ends, nodes) = self.table.edges, self.pools.ends()
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
        self.__dict__.pop("pools", None)
        self._possible = None

    def needed_bytes(self, columns: Sequence[Column]) -> list[float]:
        """What each stage of a tiling takes."""
        chain, needed = self.chain, []
        for c, held, extra in zip(columns, self.held, self.extra_bytes, strict=True):
            running = held * c.saved_bytes + chain.reserve_bytes(c.first, c.last)
            needed.append(c.state_bytes + max(running, chain.update_bytes(c.first, c.last)) + extra)
        return needed

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
            known = np.flatnonzero(np.isfinite(edges.cut_s))
            self._possible = table.longest, known[np.isfinite(table.edge_cost(known, 0))]
        return self._possible[1]

    def _space(self, stage: int) -> StageSpace:
        edges, table = self._stage_edges(stage), self.table
        room = self.cap_bytes - self.extra_bytes[stage]
        capacity, most = (room - known[edges] for known in (table.edges.reserve_bytes, table.edges.update_bytes))
        space = StageSpace(stage, self.held[stage], edges, capacity, most)
        if not np.isfinite(self.cap_bytes):
            return space
        return self._updatable(space.only(self._least_bytes(space) <= capacity))

    def _updatable(self, space: StageSpace) -> StageSpace:
        """Edges some assignment of which leaves room for the update of its state."""
        table, least = self.table, space.least_bytes_price()
        states = table.edge_totals(space.edges, table.prices.index(least))[:, STATE]
        if (states <= space.most_state_bytes).all():
            return space
        table.add([_STATE_ONLY])
        return space.only(table.edge_cost(space.edges, table.prices.index(_STATE_ONLY)) <= space.most_state_bytes)

    def _least_bytes(self, space: StageSpace) -> FloatArray:
        """[edge of the space] the fewest bytes of state and saved values of any assignment."""
        return self.table.edge_cost(space.edges, self.table.prices.index(space.least_bytes_price()))

    def _needed_bytes(self, space: StageSpace) -> FloatArray:
        """What those assignments need in all that were found, more where a segment is only bounded."""
        known, at = self.table.edges, space.edges
        totals = self.table.edge_totals(at, self.table.prices.index(space.least_bytes_price()))
        running = space.held * totals[:, SAVED] + known.reserve_bytes[at]
        beside: FloatArray = np.maximum(running, known.update_bytes[at]) + self.extra_bytes[space.stage]
        return totals[:, STATE] + beside

    def _refined(
        self, spaces: tuple[StageSpace, ...], best: tuple[Column, ...], cutoff_s: float, within_s: float
    ) -> _Found:
        """Add memory prices where the bound or the best columns hurt, until they meet or no price helps, or the columns
        take no longer than ``within_s``."""
        found = self._look(spaces, best, 0.0, cutoff_s)
        for _ in range(ROUNDS - 1):
            if not (found.pools and found.best) or self.pools.value(found.best) <= within_s:
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
        proven = bound(self.table, spaces, self.objective, self.pools.value(best))
        proven = replace(proven, bound_s=max(proven.bound_s, known_s))
        if not np.isfinite(proven.bound_s) or proven.bound_s > cutoff_s:
            return _Found(spaces, proven, (), best)
        pools = tuple(self.pools.pool(space) for space in spaces)
        return _Found(spaces, proven, pools, self.pools.incumbent(pools, best))

    def _narrowed(self, found: _Found) -> tuple[StageSpace, ...]:
        """Without the edges through which no tiling can beat the best columns; those columns' own stay."""
        limit = self.pools.value(found.best) * (1 + CLOSE)
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

    def _gap(self, best: tuple[Column, ...], proven: Bound) -> float:
        value = self.pools.value(best)
        return (value - proven.bound_s) / value if np.isfinite(value) and value > 0 else float(value > 0)

    def _chosen(self, pools: Sequence[Pool], best: tuple[Column, ...], proven: Bound) -> Outcome:
        """Let the ILP choose among the columns that could beat the incumbent, and the incumbent's own."""
        ilp = StageIlp(self.pools.offers(pools, best), self.objective)
        value = self.pools.value(best)
        try:
            choice = ilp.solve()
        except SolverError as error:
            tried = "; ".join(f"{name}: {why}" for name, why in error.tried)
            note = f"no ILP solver worked ({tried}): the best stages found without one were taken"
            choice = Choice(best, value, proven.bound_s, False, "", (note,))
        if choice.objective_s >= value * (1 - 1e-12):
            choice = replace(choice, columns=best, objective_s=value, bound_s=min(choice.bound_s, value))
        return Outcome(min(proven.bound_s, choice.objective_s), choice, None, ilp)

    def _shortage(self) -> Shortage | None:
        """The tiling whose largest stage is smallest; None if no tiling is possible at any cap."""
        if not np.isfinite(self.cap_bytes):
            return None
        table, joined, needs, spaces = self.table, list[Ends](), list[FloatArray](), list[StageSpace]()
        if table.longest < len(self.chain):
            table.extend(len(self.chain))
        table.require(table.edges.cls)
        for stage in range(self.configuration.pp):
            edges = self._stage_edges(stage)
            room = np.full(len(edges), np.inf)
            space = StageSpace(stage, self.held[stage], edges, room, room)
            joined.append(Ends(table.edges.source[edges], table.edges.target[edges]))
            needs.append(self._needed_bytes(space))
            spaces.append(space)
        needed, path = bottleneck(joined, needs, *self.pools.ends())
        if not path:
            return None
        binding = int(np.argmax([need[arc] for need, arc in zip(needs, path, strict=True)]))
        layers = [table.prices.index(space.least_bytes_price()) for space in spaces]
        columns = tuple(
            table.column(int(space.edges[arc]), layer) for space, arc, layer in zip(spaces, path, layers, strict=True)
        )
        return Shortage(int(np.ceil(needed)), binding, columns)
