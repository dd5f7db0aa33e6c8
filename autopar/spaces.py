"""Spaces: what searches of one decision ask again, under other caps and pins, of clusters and parts of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from autopar.planner.arrangements import Pool
from autopar.planner.cuts import Links
from autopar.planner.mixed import MixedSolver
from autopar.planner.space import ModelSpace
from cost_model.cluster import Cluster
from cost_model.precision import Precision


@dataclass(eq=False)
class Spaces:
    """Of one model; each is made once."""

    _spaces: dict[Hashable, ModelSpace] = field(default_factory=dict)
    _solvers: dict[Hashable, MixedSolver] = field(default_factory=dict)

    def space(self, cluster: Cluster, precision: Precision, make: Callable[[], ModelSpace]) -> ModelSpace:
        """The one on a cluster, whatever its name."""
        key = cluster.devices, cluster.levels, cluster.network, cluster.backend, precision
        if key not in self._spaces:
            self._spaces[key] = make()
        return self._spaces[key]

    def solver(self, pools: Sequence[Pool], links: Links, pins: Hashable) -> MixedSolver:
        """Of pools under their caps, with what one under others has found. pins: all that links depend on."""
        key = pins, *((pool.devices, pool.space, pool.whole) for pool in pools)
        self._solvers[key] = MixedSolver(pools, links, self._solvers.get(key))
        return self._solvers[key]

    def forget(self) -> None:
        """A plan is decided on; what is asked later is made anew."""
        self._spaces.clear()
        self._solvers.clear()
