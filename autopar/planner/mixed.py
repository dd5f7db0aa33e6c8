"""Stages with meshes of their own: which mesh of which devices, which segments and which choices, for each stage.

Every mesh that a stage may have gives columns of its own: its ranges of the chain, priced on its devices, as far as
they fit there. An ILP takes one column a stage so that ranges tile the chain, labels agree at cuts and devices are
used once. The bound is the same ILP without a cap. Cuts between meshes are whole or in consecutive shards; parameters
of several segments are whole on every rank.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopar.planner.bounds import Objective
from autopar.planner.chain import Chain, IntArray
from autopar.planner.columns import SAVED, STATE, STEP, TIME, Column, RangeTable
from autopar.planner.configuration import Configuration
from autopar.planner.factor_graph import FactorGraph, FloatArray
from autopar.planner.ilp import Choice
from autopar.planner.least import quick_bound_s
from autopar.planner.mixed_ilp import MixedIlp, Offer
from autopar.planner.segment import Price, Segment, unproved
from autopar.planner.solution import Infeasible, Solution, Space, stage_solution
from autopar.planner.worthwhile import worthwhile
from cost_model.mesh import Mesh
from cost_model.placement import REPLICATE, VARYING

BYTE_PRICES = (0.03, 0.3, 3.0)
"""What all bytes of a stage are worth, in its own time, at the prices that are tried where memory binds."""
WORTH_SAVING = 1.001
"""Ways to save memory are looked at where the cap makes a step so much longer."""
_MANY, _FEW, _GIB = 10**6, 16, 2**30
WHOLE = (str(REPLICATE), str(VARYING))
Cut = Callable[[Mesh, int, int, str], float]
"""(mesh, samples, position, label) -> seconds of a cut there, both ways; infinite where none can be."""


@dataclass(frozen=True)
class Pool:
    """Devices of one kind, by their numbers in the cluster; space: the model on them; cap_bytes: of each."""

    devices: tuple[int, ...]
    space: Space
    cap_bytes: float


@dataclass(frozen=True)
class Shape:
    """What is asked for: meshes[s]: those that stage s may have; samples of a microbatch on all replicas together."""

    meshes: tuple[tuple[Mesh, ...], ...]
    samples: int
    microbatches: int
    schedule: str
    window: int = 1

    @property
    def pp(self) -> int:
        return len(self.meshes)

    def held(self, chain: Chain, stage: int) -> int:
        """Microbatches that a stage holds at once."""
        return chain.in_flight(self.schedule, stage, self.pp, self.microbatches, 1, self.window)


@dataclass(frozen=True, eq=False)
class _Table:
    """The ranges of the chain on a mesh of a kind of device."""

    mesh: Mesh
    kind: int
    ranges: RangeTable


class MixedSolver:
    """Solves shapes on pools of devices; what is known of segments is kept between them."""

    def __init__(self, pools: Sequence[Pool], cut: Cut) -> None:
        self.pools, self.cut = tuple(pools), cut
        self.segments: dict[FactorGraph, Segment] = {}

    def bound_s(self, shape: Shape) -> float:
        """Seconds of a step that no choice for a shape is faster than; infinite where there is none.

        Every segment on the mesh where it is fastest, and the slowest stage no faster than all devices are, each
        segment on the mesh where it takes least of them.
        """
        price, fastest, least = (Price(1.0, 0.0),), dict[int, float](), dict[int, float]()
        for mesh, kind in self._choices(shape):
            chain = self._chain(shape, mesh, kind)
            if chain is not None:
                costs = [float(segment.solve(price)[0].cost.min()) for segment in self._known(chain)]
                for position, seconds in enumerate(costs[number] for number in chain.sequence):
                    fastest[position] = min(seconds, fastest.get(position, math.inf))
                    least[position] = min(seconds * mesh.size, least.get(position, math.inf))
        devices = sum(len(pool.devices) for pool in self.pools)
        slowest_s = sum(least.values()) / devices
        return sum(fastest.values()) + (shape.microbatches - 1) * slowest_s if fastest else math.inf

    def solve(self, shape: Shape, extra_bytes: Sequence[float] = ()) -> Solution | Infeasible | None:
        """The best choice, what memory is short of, or None where no meshes use all devices.

        extra_bytes: what the rewritten program was found to need beyond columns, per stage.
        """
        extra = tuple(extra_bytes) or (0.0,) * shape.pp
        tables = self._tables(shape)
        free = self._choice(shape, self._offers(shape, tables, None))
        if free is None:
            return None
        found, bound_s = self._choice(shape, self._offers(shape, tables, extra)), free[0].objective_s
        if found is None or found[0].objective_s > bound_s * WORTH_SAVING:
            tables += self._saving_tables(shape, bound_s)
            found = self._choice(shape, self._offers(shape, tables, extra))
        return self._shortage(shape, tables, extra) if found is None else self._solution(shape, *found, bound_s)

    def _choices(self, shape: Shape) -> Iterator[tuple[Mesh, int]]:
        """Every mesh that some stage may have, on every kind of which there are enough devices."""
        for mesh in dict.fromkeys(itertools.chain.from_iterable(shape.meshes)):
            for kind, pool in enumerate(self.pools):
                if mesh.size <= len(pool.devices):
                    yield mesh, kind

    def _known(self, chain: Chain) -> list[Segment]:
        return [self.segments.setdefault(graph, Segment(graph)) for graph in chain.kinds]

    def _chain(self, shape: Shape, mesh: Mesh, kind: int) -> Chain | None:
        samples = shape.samples // mesh.dp
        chain = self.pools[kind].space.chain(mesh.dp, mesh.tp, samples) if shape.samples % mesh.dp == 0 else None
        return None if chain is None else self._ready(chain, mesh, samples)

    def _ready(self, chain: Chain, mesh: Mesh, samples: int) -> Chain | None:
        """With the cuts of stages of different meshes, and shared parameters whole, in the form that costs least."""
        domains = {name: [v for v in labels if v in WHOLE] for name, labels in chain.shared_domains().items()}
        if not all(domains.values()):
            return None
        chain = replace(chain, cut_s=functools.cache(functools.partial(self.cut, mesh, samples)))
        choices: Iterable[tuple[str, ...]] = itertools.product(*domains.values())
        if math.prod(map(len, domains.values())) > _FEW:
            choices = itertools.islice(zip(*domains.values(), strict=False), 2)
        fixed = [chain.fixed(dict(zip(domains, labels, strict=True))) for labels in choices]
        return min(fixed, key=lambda each: quick_bound_s(each, self._known(each), Objective(1, 1)))

    def _tables(self, shape: Shape) -> list[_Table]:
        """Of every mesh on every kind of device, nothing done to save memory."""
        free = [Price(*weights) for weights in Objective(shape.pp, shape.microbatches).free]
        found = []
        for mesh, kind in self._choices(shape):
            chain = self._chain(shape, mesh, kind)
            if chain is not None:
                found.append(self._table(shape, mesh, kind, chain, free))
        return found

    def _saving_tables(self, shape: Shape, step_s: float) -> list[_Table]:
        """The same with all ways to save memory, at several prices of it."""
        weights, found = Objective(shape.pp, shape.microbatches).balanced, []
        for mesh, kind in self._choices(shape):
            pool, samples = self.pools[kind], shape.samples // mesh.dp
            worth_s = step_s / shape.pp / pool.cap_bytes
            for chain in pool.space.saving_chains(mesh.dp, mesh.tp, samples) if shape.samples % mesh.dp == 0 else ():
                ready = self._ready(chain, mesh, samples)
                if ready is not None:
                    prices = [
                        Price(*weights, share * worth_s, share * worth_s * held)
                        for share in BYTE_PRICES
                        for held in self._held(shape, ready)
                    ]
                    found.append(self._table(shape, mesh, kind, ready, prices))
        return found

    def _table(self, shape: Shape, mesh: Mesh, kind: int, chain: Chain, prices: Sequence[Price]) -> _Table:
        table = RangeTable(chain, self._known(chain))
        table.add([*prices, *(Price(0.0, 0.0, 1.0, float(held)) for held in self._held(shape, chain))])
        return _Table(mesh, kind, table)

    def _held(self, shape: Shape, chain: Chain) -> list[int]:
        """Microbatches that stages hold at once, each number once."""
        return list(dict.fromkeys(shape.held(chain, stage) for stage in range(shape.pp)))

    def _offers(self, shape: Shape, tables: Sequence[_Table], extra: Sequence[float] | None) -> list[list[Offer]]:
        """Of each stage what fits; without ``extra`` memory has no end."""
        labels = _labels(tables)
        return [
            [
                offer
                for table in tables
                if table.mesh in shape.meshes[stage]
                for offer in self._of_stage(shape, stage, table, None if extra is None else extra[stage], labels)
            ]
            for stage in range(shape.pp)
        ]

    def _of_stage(
        self, shape: Shape, stage: int, table: _Table, extra: float | None, labels: dict[str, int]
    ) -> Iterator[Offer]:
        """The fastest columns of every range that fit, by each weighing of a microbatch against the step, and the
        smallest."""
        edges, count, pp = table.ranges.edges, len(table.ranges.chain), shape.pp
        begins = edges.first == 0 if stage == 0 else edges.first >= stage
        ends = edges.last == count if stage == pp - 1 else edges.last <= count - (pp - 1 - stage)
        rows = np.flatnonzero(begins & ends & np.isfinite(edges.cut_s))
        totals = table.ranges.edge_totals(rows)
        needed, fits = self._needed_bytes(shape, stage, table, rows), np.isfinite(totals[..., TIME])
        if extra is not None:
            fits &= needed + extra <= self.pools[table.kind].cap_bytes
        own, weighings = totals[fits], Objective(pp, shape.microbatches).free
        values = [needed[fits], *(a * own[:, TIME] + b * own[:, STEP] for a, b in weighings)]
        picked: dict[tuple[int, int], None] = {}
        for of_fitting in values:
            value = np.full(fits.shape, np.inf)
            value[fits] = of_fitting
            best = value.argmin(axis=1)
            there = np.isfinite(value[np.arange(len(rows)), best])
            picked |= dict.fromkeys(zip(rows[there].tolist(), best[there].tolist(), strict=True))
        for edge, price in sorted(picked):
            yield from self._as_offers(table, table.ranges.column(edge, price), labels)

    def _needed_bytes(self, shape: Shape, stage: int, table: _Table, rows: IntArray) -> FloatArray:
        """[edge, price] of a stage on a device."""
        totals, ranges = table.ranges.edge_totals(rows), table.ranges
        held = shape.held(ranges.chain, stage)
        needed: FloatArray = totals[..., STATE] + held * totals[..., SAVED] + ranges.edges.reserve_bytes[rows, None]
        return needed

    def _as_offers(self, table: _Table, column: Column, labels: dict[str, int]) -> Iterator[Offer]:
        """On one shard a value lies as whoever meets it wants it."""
        chain = table.ranges.chain
        ends = []
        for position, label in ((column.first, column.entry), (column.last, column.exit)):
            if position in (0, len(chain)):
                ends.append([0])
            elif table.mesh.tp == 1:
                ends.append(list(labels.values()))
            else:
                text = chain.boundary_labels(position)[label]
                there = math.isfinite(chain.cut_s(position, text))
                ends.append([labels[text]] if there else [])
        for entry, exit in itertools.product(*ends):
            yield Offer(replace(column, entry=entry, exit=exit), column, table.ranges, table.mesh, table.kind)

    def _choice(self, shape: Shape, offers: list[list[Offer]]) -> tuple[Choice, list[Offer], MixedIlp] | None:
        devices = [len(pool.devices) for pool in self.pools]
        possible = worthwhile(offers, devices, shape.microbatches)
        if not all(possible):
            return None
        ilp = MixedIlp(possible, shape.microbatches, devices)
        choice = ilp.solve()
        of_column = {id(offer.column): offer for own in possible for offer in own}
        return choice, [of_column[id(column)] for column in choice.columns], ilp

    def _solution(self, shape: Shape, choice: Choice, offers: list[Offer], ilp: MixedIlp, bound_s: float) -> Solution:
        stages = tuple(stage_solution(offer.table, offer.own) for offer in offers)
        bound_s = min(bound_s, choice.objective_s)
        gap = choice.objective_s / bound_s - 1 if bound_s else math.inf
        meshes = tuple(offer.mesh for offer in offers)
        placement = self._placement(offers)
        c = self._configuration(shape, meshes)
        notes = (*choice.notes, *unproved(self.segments.values()))
        return Solution(c, stages, choice.objective_s, bound_s, gap, notes, placement, ilp=ilp, meshes=meshes)

    def _configuration(self, shape: Shape, meshes: Sequence[Mesh]) -> Configuration:
        first = meshes[0]
        samples = shape.samples // first.dp
        microbatches, window = shape.microbatches, shape.window
        return Configuration(first.dp, first.tp, shape.pp, shape.schedule, samples, microbatches, window=window)

    def _placement(self, offers: Sequence[Offer]) -> tuple[int, ...]:
        """Devices of each kind in their own order, stage after stage."""
        left = [iter(pool.devices) for pool in self.pools]
        return tuple(next(left[offer.kind]) for offer in offers for _ in range(offer.devices))

    def _shortage(self, shape: Shape, tables: Sequence[_Table], extra: Sequence[float]) -> Infeasible | None:
        """The choice whose fullest stage is over its cap by least: an ILP in which bytes are time."""
        offers = [[self._by_bytes(shape, stage, offer, extra[stage]) for offer in own]
                  for stage, own in enumerate(self._offers(shape, tables, None))]  # fmt: skip
        found = self._choice(replace(shape, microbatches=_MANY), offers)
        if found is None:
            return None
        chosen = found[1]
        needed = [self._bytes(shape, stage, offer) + extra[stage] for stage, offer in enumerate(chosen)]
        over = [n - self.pools[offer.kind].cap_bytes for n, offer in zip(needed, chosen, strict=True)]
        stages, meshes = tuple(stage_solution(o.table, o.own) for o in chosen), tuple(o.mesh for o in chosen)
        configuration, placement = self._configuration(shape, meshes), self._placement(chosen)
        stage = over.index(max(over))
        return Infeasible(int(max(needed)), stage, configuration, stages, placement, meshes)

    def _bytes(self, shape: Shape, stage: int, offer: Offer) -> float:
        c, chain = offer.own, offer.table.chain
        held = shape.held(chain, stage)
        return c.state_bytes + held * c.saved_bytes + chain.reserve_bytes(c.first, c.last)

    def _by_bytes(self, shape: Shape, stage: int, offer: Offer, extra: float) -> Offer:
        most = max(pool.cap_bytes for pool in self.pools)
        over = self._bytes(shape, stage, offer) + extra - self.pools[offer.kind].cap_bytes + most
        return replace(offer, column=replace(offer.column, time_s=max(0.0, over / _GIB), step_s=0.0, cut_s=0.0))


def _labels(tables: Sequence[_Table]) -> dict[str, int]:
    """Numbers of the labels at cuts, alike for all meshes."""
    chains = [table.ranges.chain for table in tables if table.mesh.tp > 1]
    texts = {text for chain in chains for i in range(1, len(chain)) for text in chain.boundary_labels(i)}
    return {text: number for number, text in enumerate(sorted(texts | {str(REPLICATE)}))}
