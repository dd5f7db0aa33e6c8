"""Arrangements: which devices each stage has, and as which mesh, where stages have meshes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.planner.solution import Space
from cost_model.mesh import Mesh


@dataclass(frozen=True)
class Pool:
    """Devices that a stage may have: any of those that nothing tells apart, or, whole, all of several such pools.

    devices: by their numbers in the cluster; space: the model on them; cap_bytes: of each.
    """

    devices: tuple[int, ...]
    space: Space
    cap_bytes: float
    whole: bool = False

    def free(self, left: frozenset[int]) -> tuple[int, ...]:
        """Those that are left, none where it is to be taken whole and is not."""
        found = tuple(device for device in self.devices if device in left)
        return () if self.whole and len(found) < len(self.devices) else found

    def seats(self, mesh: Mesh, free: tuple[int, ...]) -> bool:
        """Whether a stage of this mesh may have so many of its devices."""
        return mesh.size == len(free) if self.whole else mesh.size <= len(free)


@dataclass(frozen=True)
class Seat:
    """A stage on devices of a pool."""

    pool: int
    mesh: Mesh
    devices: tuple[int, ...]


Arrangement = tuple[Seat, ...]
Meshes = tuple[tuple[Mesh, ...], ...]
"""[stage] the meshes that it may have."""


class Arranger:
    """Gives all devices of pools to stages, each once; of devices of a pool the first that are left."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self.pools = tuple(pools)
        self._every = frozenset(device for pool in pools for device in pool.devices)
        self._known: dict[tuple[Meshes, frozenset[int]], list[Arrangement]] = {}
        self._counts: dict[tuple[Meshes, frozenset[int]], int] = {}

    def count(self, meshes: Meshes) -> int:
        """How many arrangements there are."""
        return self._count(meshes, self._every)

    def arrangements(self, meshes: Meshes) -> list[Arrangement]:
        """All of them, in an order that follows from that of pools and meshes."""
        return self._rest(meshes, self._every)

    def _count(self, meshes: Meshes, left: frozenset[int]) -> int:
        if not meshes:
            return not left
        key = meshes, left
        if key not in self._counts:
            seats = self._seats(meshes[0], left)
            self._counts[key] = sum(self._count(meshes[1:], left.difference(seat.devices)) for seat in seats)
        return self._counts[key]

    def _rest(self, meshes: Meshes, left: frozenset[int]) -> list[Arrangement]:
        if not meshes:
            return [] if left else [()]
        key = meshes, left
        if key not in self._known:
            self._known[key] = [
                (seat, *rest)
                for seat in self._seats(meshes[0], left)
                for rest in self._rest(meshes[1:], left.difference(seat.devices))
            ]
        return self._known[key]

    def _seats(self, meshes: tuple[Mesh, ...], left: frozenset[int]) -> list[Seat]:
        found = []
        for number, pool in enumerate(self.pools):
            free = pool.free(left)
            found += [Seat(number, mesh, free[: mesh.size]) for mesh in meshes if free and pool.seats(mesh, free)]
        return found
