"""The integer program of stages with meshes of their own: the columns of a stage are on several meshes and devices.

To the rows of ``autopar.planner.ilp`` comes one for each kind of device: the meshes that are chosen use them all, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pulp

from autopar.planner.columns import Column, RangeTable
from autopar.planner.ilp import StageIlp
from cost_model.mesh import Mesh


@dataclass(frozen=True, eq=False)
class Offer:
    """A column on a mesh of one kind of device.

    column: with labels numbered alike on all meshes, 0 at the chain's ends; own: the same with those of its table.
    """

    column: Column
    own: Column
    table: RangeTable
    mesh: Mesh
    kind: int

    @property
    def devices(self) -> int:
        """How many it takes."""
        return self.mesh.size


class MixedIlp(StageIlp):
    """Invariant, besides that of ``StageIlp``: labels at cuts are numbered alike on all meshes."""

    def __init__(self, offers: Sequence[Sequence[Offer]], microbatches: int, devices: Sequence[int]) -> None:
        super().__init__([[offer.column for offer in own] for own in offers], microbatches)
        self.mixed = tuple(tuple(own) for own in offers)
        for kind, count in enumerate(devices):
            self._devices_once(kind, count)

    def _devices_once(self, kind: int, count: int) -> None:
        """sum_s sum_{c of the kind} devices[c] x[s, c] = count"""
        terms = [
            (x, offer.devices)
            for picks, own in zip(self.picks, self.mixed, strict=True)
            for x, offer in zip(picks, own, strict=True)
            if offer.kind == kind
        ]
        self.problem += pulp.LpAffineExpression(terms) == count, f"devices_once_{kind}"


Place = tuple[int, int]
"""(position in the chain, label there)."""


def tilings(offers: Sequence[Sequence[Offer]], devices: Sequence[int]) -> list[list[Offer]]:
    """The offers of each stage that lie on some tiling of the chain which uses all devices once.

    A way through the stages has been to few (place, devices used of each kind), as stages and kinds are few.
    """
    none = (0,) * len(devices)
    reached: dict[Place, set[tuple[int, ...]]] = {(0, 0): {none}}
    ways: list[list[tuple[Offer, tuple[int, ...], tuple[int, ...]]]] = []
    for own in offers:
        way = []
        for offer in own:
            for used in reached.get((offer.column.first, offer.column.entry), ()):
                after = _used(used, offer)
                if after[offer.kind] <= devices[offer.kind]:
                    way.append((offer, used, after))
        ways.append(way)
        reached = {}
        for offer, _, after in way:
            reached.setdefault((offer.column.last, offer.column.exit), set()).add(after)
    alive = {(place, used) for place, known in reached.items() for used in known if used == tuple(devices)}
    found: list[list[Offer]] = []
    for way in reversed(ways):
        kept = [(o, used) for o, used, after in way if ((o.column.last, o.column.exit), after) in alive]
        alive = {((o.column.first, o.column.entry), used) for o, used in kept}
        found.append(list({id(offer): offer for offer, _ in kept}.values()))
    return found[::-1]


def _used(before: tuple[int, ...], offer: Offer) -> tuple[int, ...]:
    count = before[offer.kind] + offer.devices
    return (*before[: offer.kind], count, *before[offer.kind + 1 :])
