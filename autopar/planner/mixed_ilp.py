"""The integer program of stages with meshes of their own: the columns of a stage are on several meshes and devices.

To the rows of ``autopar.planner.ilp`` comes one for each kind of device: the meshes that are chosen use them all, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pulp

from autopar.planner.bounds import Objective
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
        super().__init__([[offer.column for offer in own] for own in offers], Objective(len(offers), microbatches))
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
