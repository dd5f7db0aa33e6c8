"""Chains of the model on the meshes that stages may have, each made once for all pools that are priced alike."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from autopar.planner.arrangements import Pool, Seat
from autopar.planner.bounds import TIME_ONLY, Objective
from autopar.planner.chain import Chain, at_once
from autopar.planner.factor_graph import FactorGraph, FloatArray
from autopar.planner.least import quick_bound_s
from autopar.planner.segment import Price, Segment
from cost_model.mesh import Mesh
from cost_model.placement import REPLICATE, VARYING

WHOLE = (str(REPLICATE), str(VARYING))
_FEW = 16
_ONE = Mesh(1, 1)
Key = tuple[int, int, int, int]


class MeshChains:
    """Of pools; what is known of segments is kept for all of them. Pools of one space are priced alike.

    Nothing here depends on a memory cap.
    """

    def __init__(self, pools: Sequence[Pool]) -> None:
        self.pools = tuple(pools)
        self.segments: dict[FactorGraph, Segment] = {}
        self._chains: dict[Key, Chain | None] = {}
        self._saving: dict[Key, list[Chain]] = {}
        self._fastest: dict[Key, FloatArray | None] = {}
        self._needed: dict[tuple[Key, int], FloatArray | None] = {}

    def key(self, seat: Seat, samples: int) -> Key:
        """Equal where chains are."""
        return id(self.pools[seat.pool].space), seat.mesh.dp, seat.mesh.tp, samples

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
        key = self.key(seat, samples)
        if key not in self._fastest:
            chain = self.chain(seat, samples)
            self._fastest[key] = None if chain is None else self._least(chain, Price(*TIME_ONLY))
        return self._fastest[key]

    def needed_bytes(self, seat: Seat, samples: int, held: int) -> FloatArray | None:
        """[first, last] what no plan of these segments needs less than, as a stage that holds so many microbatches,
        however memory is saved: each segment as little as it can by itself. Infinite of none; None where the mesh
        cannot be."""
        key = self.key(seat, samples), held
        if key not in self._needed:
            possible = self.chain(seat, samples) is not None
            self._needed[key] = self._least_bytes(seat, samples, held) if possible else None
        return self._needed[key]

    def chain(self, seat: Seat, samples: int) -> Chain | None:
        """Nothing done to save memory; None where the mesh cannot be."""
        key = self.key(seat, samples)
        if key not in self._chains:
            mesh, space = seat.mesh, self.pools[seat.pool].space
            known = space.chain(mesh.dp, mesh.tp, samples // mesh.dp) if samples % mesh.dp == 0 else None
            self._chains[key] = None if known is None else self._ready(known)
        return self._chains[key]

    def saving(self, seat: Seat, samples: int) -> list[Chain]:
        """Those with ways to save memory."""
        key = self.key(seat, samples)
        if key not in self._saving:
            self._saving[key] = [own for own in map(self._ready, self._ways(seat, samples)) if own is not None]
        return self._saving[key]

    def known(self, chain: Chain) -> list[Segment]:
        """Its kinds of segments."""
        return [self.segments.setdefault(graph, Segment(graph)) for graph in chain.kinds]

    def _ways(self, seat: Seat, samples: int) -> Sequence[Chain]:
        mesh = seat.mesh
        return self.pools[seat.pool].space.saving_chains(mesh.dp, mesh.tp, samples // mesh.dp)

    def _least(self, chain: Chain, price: Price) -> FloatArray:
        """[segment] what each costs least."""
        costs = np.array([float(segment.costs((price,)).min()) for segment in self.known(chain)])
        found: FloatArray = costs[list(chain.sequence)]
        return found

    def _least_bytes(self, seat: Seat, samples: int, held: int) -> FloatArray | None:
        """With the choices of all ways to save memory, and the reserve of that which has the least."""
        whole, price = at_once(self._ways(seat, samples)), Price(0.0, 0.0, 1.0, float(held))
        each = [self._least(chain, price) for chain in self._fixed(whole)]
        if not each:
            return None
        upto = np.concatenate([[0.0], np.cumsum(np.min(each, axis=0))])
        ends = range(len(upto))
        reserve = [[whole.reserve_bytes(first, last) if first < last else np.inf for last in ends] for first in ends]
        found: FloatArray = upto - upto[:, None] + np.array(reserve)
        return found

    def _ready(self, chain: Chain) -> Chain | None:
        """With shared parameters in the form that costs least."""
        fixed = self._fixed(chain)
        return min(fixed, key=lambda each: quick_bound_s(each, self.known(each), Objective(1, 1))) if fixed else None

    def _fixed(self, chain: Chain) -> list[Chain]:
        """Cuts left to the arrangement, and shared parameters whole, in each form; none where they cannot be."""
        domains = {name: [v for v in labels if v in WHOLE] for name, labels in chain.shared_domains().items()}
        if not all(domains.values()):
            return []
        chain = replace(chain, cut_s=lambda position, label: 0.0)
        choices: Iterable[tuple[str, ...]] = itertools.product(*domains.values())
        if math.prod(map(len, domains.values())) > _FEW:
            choices = itertools.islice(zip(*domains.values(), strict=False), 2)
        return [chain.fixed(dict(zip(domains, labels, strict=True))) for labels in choices]
