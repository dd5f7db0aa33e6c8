"""Tables of the chain on the meshes that stages may have, each made once for all pools that are priced alike."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from autopar.planner.arrangements import Pool, Seat
from autopar.planner.bounds import TIME_ONLY, Objective
from autopar.planner.chain import Chain
from autopar.planner.columns import RangeTable
from autopar.planner.factor_graph import FactorGraph, FloatArray
from autopar.planner.least import quick_bound_s
from autopar.planner.segment import Price, Segment
from cost_model.mesh import Mesh
from cost_model.placement import REPLICATE, VARYING

WHOLE = (str(REPLICATE), str(VARYING))
_FEW = 16
_ONE = Mesh(1, 1)
_Key = tuple[int, int, int, int]


class MeshTables:
    """Of pools; what is known of segments is kept for all of them. Pools of one space are priced alike."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self.pools = tuple(pools)
        self.segments: dict[FactorGraph, Segment] = {}
        self._chains: dict[_Key, Chain | None] = {}
        self._fastest: dict[_Key, FloatArray | None] = {}
        self._tables: dict[_Key, RangeTable] = {}
        self._saving: dict[_Key, list[RangeTable]] = {}

    def alone(self, seat: Seat, samples: int) -> tuple[FloatArray, Chain] | None:
        """[segment] seconds that no mesh of so many shards goes below if they are as fast as can be, by one device as
        fast as the fastest of the pool; and the chain on it. None where it cannot be."""
        found = [
            (seconds, chain)
            for pool in self._like(seat.pool)
            if (seconds := self.fastest_s(Seat(pool, _ONE, ()), samples // seat.mesh.dp)) is not None
            and (chain := self.chain(Seat(pool, _ONE, ()), samples // seat.mesh.dp)) is not None
        ]
        return (np.min([seconds for seconds, _ in found], axis=0) / seat.mesh.tp, found[0][1]) if found else None

    def _like(self, number: int) -> list[int]:
        """A pool of each kind of devices that are in a pool, alone: its own number where nothing tells them apart."""
        own = self.pools[number]
        if not own.whole:
            return [number]
        parts = [n for n, pool in enumerate(self.pools) if not pool.whole and set(pool.devices) & set(own.devices)]
        return list({id(self.pools[n].space): n for n in parts}.values())

    def fastest_s(self, seat: Seat, samples: int) -> FloatArray | None:
        """[segment] seconds of a microbatch that none of its plans goes below; None where the mesh cannot be."""
        key = self._key(seat, samples)
        if key not in self._fastest:
            chain = self.chain(seat, samples)
            self._fastest[key] = None if chain is None else self._least_s(chain)
        return self._fastest[key]

    def chain(self, seat: Seat, samples: int) -> Chain | None:
        """Nothing done to save memory; None where the mesh cannot be."""
        key = self._key(seat, samples)
        if key not in self._chains:
            mesh, space = seat.mesh, self.pools[seat.pool].space
            known = space.chain(mesh.dp, mesh.tp, samples // mesh.dp) if samples % mesh.dp == 0 else None
            self._chains[key] = None if known is None else self._ready(known)
        return self._chains[key]

    def table(self, seat: Seat, samples: int, prices: Sequence[Price]) -> RangeTable:
        """Of that chain, with plans at these prices."""
        key = self._key(seat, samples)
        if key not in self._tables:
            chain = self.chain(seat, samples)
            assert chain is not None
            self._tables[key] = RangeTable(chain, self._known(chain))
        self._tables[key].add(prices)
        return self._tables[key]

    def saving(self, seat: Seat, samples: int, prices: Sequence[Price]) -> list[RangeTable]:
        """Of the chains with ways to save memory."""
        key, mesh = self._key(seat, samples), seat.mesh
        if key not in self._saving:
            chains = self.pools[seat.pool].space.saving_chains(mesh.dp, mesh.tp, samples // mesh.dp)
            ready = [chain for chain in map(self._ready, chains) if chain is not None]
            self._saving[key] = [RangeTable(chain, self._known(chain)) for chain in ready]
        for table in self._saving[key]:
            table.add(prices)
        return self._saving[key]

    def _key(self, seat: Seat, samples: int) -> _Key:
        return id(self.pools[seat.pool].space), seat.mesh.dp, seat.mesh.tp, samples

    def _known(self, chain: Chain) -> list[Segment]:
        return [self.segments.setdefault(graph, Segment(graph)) for graph in chain.kinds]

    def _least_s(self, chain: Chain) -> FloatArray:
        price = (Price(*TIME_ONLY),)
        costs = np.array([float(segment.solve(price)[0].cost.min()) for segment in self._known(chain)])
        found: FloatArray = costs[list(chain.sequence)]
        return found

    def _ready(self, chain: Chain) -> Chain | None:
        """Cuts left to the arrangement, and shared parameters whole, in the form that costs least."""
        domains = {name: [v for v in labels if v in WHOLE] for name, labels in chain.shared_domains().items()}
        if not all(domains.values()):
            return None
        chain = replace(chain, cut_s=lambda position, label: 0.0)
        choices: Iterable[tuple[str, ...]] = itertools.product(*domains.values())
        if math.prod(map(len, domains.values())) > _FEW:
            choices = itertools.islice(zip(*domains.values(), strict=False), 2)
        fixed = [chain.fixed(dict(zip(domains, labels, strict=True))) for labels in choices]
        return min(fixed, key=lambda each: quick_bound_s(each, self._known(each), Objective(1, 1)))
