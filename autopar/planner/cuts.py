"""Cuts between stages with meshes of their own: which labels meet there, and what messages take on their links."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from autopar.planner.arrangements import Arrangement, Seat
from autopar.planner.chain import Chain, IntArray
from autopar.planner.factor_graph import FloatArray
from autopar.planner.mesh_chains import WHOLE
from autopar.planner.stage_columns import StageColumns
from autopar.planner.worthwhile import Ways
from cost_model.mesh import Mesh


class Links(Protocol):
    """What crosses, and how long it takes."""

    def cut_bytes(self, mesh: Mesh, samples: int, position: int, label: str) -> float:
        """That a rank of a mesh gets of a microbatch of so many samples on all replicas; infinite where none can be."""

    def hop_s(self, source: Seat, target: Seat, nbytes: float, split: bool) -> tuple[float, float]:
        """Of a microbatch there and back, and how long that keeps the busier way. split: of as many parts as shards."""

    def once_s(self, seats: Arrangement) -> float:
        """What stages exchange once a step, whatever their segments."""


@dataclass(frozen=True, eq=False)
class _Boundary:
    """[position, label] of a chain: numbers that are the same for all chains, bytes, and whether these are parts."""

    number: IntArray
    nbytes: FloatArray
    split: IntArray


@dataclass(frozen=True, eq=False)
class Offered:
    """The ways of a stage, each of a column; hop_s: of the cut before it."""

    ways: Ways
    column: IntArray
    hop_s: FloatArray


class Cuts:
    """Of one model."""

    def __init__(self, links: Links) -> None:
        self.links = links
        self._numbers: dict[str, int] = {}
        self._boundaries: dict[tuple[int, Mesh, int], tuple[Chain, _Boundary]] = {}

    def least_s(self, source: Seat, target: Seat, samples: int, chain: Chain) -> tuple[float, float]:
        """No cut between these takes less, nor keeps its link less."""
        known = self._boundary(chain, target.mesh, samples)
        flat = [(float(n), bool(s)) for n, s in zip(known.nbytes.ravel(), known.split.ravel(), strict=True)]
        hops = [self.links.hop_s(source, target, *each) for each in set(flat) if math.isfinite(each[0])]
        return (min(way for way, _ in hops), min(busy for _, busy in hops)) if hops else (math.inf, math.inf)

    def quick_s(self, source: Seat, target: Seat, samples: int, alone: Chain) -> tuple[float, float]:
        """The same of any labels, whole or in parts, by the chain on one device."""
        parts, own = source.mesh.tp * target.mesh.tp, samples // target.mesh.dp
        least = float(self._boundary(alone, Mesh(1, 1), own).nbytes.min())
        if math.isinf(least):
            return math.inf, math.inf
        whole = self.links.hop_s(source, target, least, split=False)
        split = self.links.hop_s(source, target, float(int(least) // parts * source.mesh.tp), split=True)
        return min(whole[0], split[0]), min(whole[1], split[1])

    def offered(self, seats: Arrangement, samples: int, columns: Sequence[StageColumns]) -> list[Offered]:
        """The ways of each stage, from the place where it begins to that where it ends: a cut with its label. On one
        shard a value lies as whoever meets it wants it."""
        known = [
            [self._boundary(t.chain, s.mesh, samples) for t in c.tables] for s, c in zip(seats, columns, strict=True)
        ]
        found = []
        for stage, (seat, own) in enumerate(zip(seats, columns, strict=True)):
            last, rows = len(seats) - 1, np.arange(len(own))
            before, after = seats[stage - 1] if stage else None, seats[stage + 1] if stage < last else None
            rows, entry = self._places(own, rows, known[stage], seat, before, known[stage - 1], begins=True)
            kept, exit = self._places(
                own, rows, known[stage], seat, after, known[(stage + 1) % len(seats)], begins=False
            )
            entry, numbers = entry[kept], rows[kept]
            way_s, busy_s = self._hops_s(own, numbers, known[stage], before, seat)
            time_s = own.time_s[numbers]
            ways = Ways(entry, exit, np.maximum(time_s, busy_s), time_s + way_s, own.step_s[numbers])
            found.append(Offered(ways, numbers, way_s))
        return found

    def _boundary(self, chain: Chain, mesh: Mesh, samples: int) -> _Boundary:
        key = id(chain), mesh, samples
        if key not in self._boundaries:
            self._boundaries[key] = chain, self._made(chain, mesh, samples)  # the chain lives as long as its number
        return self._boundaries[key][1]

    def _made(self, chain: Chain, mesh: Mesh, samples: int) -> _Boundary:
        labels = [chain.boundary_labels(position) for position in range(len(chain) + 1)]
        shape = len(labels), max(map(len, labels))
        number, nbytes, split = np.zeros(shape, dtype=np.int64), np.full(shape, np.inf), np.zeros(shape, dtype=np.int64)
        for position in range(1, len(chain)):
            for index, label in enumerate(labels[position]):
                number[position, index] = self._numbers.setdefault(label, len(self._numbers))
                nbytes[position, index] = self.links.cut_bytes(mesh, samples, position, label)
                split[position, index] = label not in WHOLE
        return _Boundary(number, nbytes, split)

    def _places(
        self,
        own: StageColumns,
        rows: IntArray,
        known: Sequence[_Boundary],
        seat: Seat,
        other: Seat | None,
        others: Sequence[_Boundary],
        *,
        begins: bool,
    ) -> tuple[IntArray, IntArray]:
        """Which of some rows meet the other stage, once for each label that they may have there, and the place; without
        another stage it is place 0."""
        every = np.arange(len(rows))
        if other is None:
            return every if not begins else rows, np.zeros(len(rows), dtype=np.int64)
        position, label = (own.first, own.entry) if begins else (own.last, own.exit)
        position, label = position[rows], label[rows]
        if seat.mesh.tp > 1:
            number, nbytes = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows))
            for index, each in enumerate(known):
                of = own.table[rows] == index
                number[of], nbytes[of] = each.number[position[of], label[of]], each.nbytes[position[of], label[of]]
            kept = np.flatnonzero(np.isfinite(nbytes))
            number = number[kept]
        else:
            known_there = [np.unique(each.number[np.isfinite(each.nbytes)]) for each in others]
            choices = np.unique(np.concatenate(known_there)) if other.mesh.tp > 1 else np.zeros(1, dtype=np.int64)
            kept, number = np.repeat(every, len(choices)), np.tile(choices, len(rows))
        place = position[kept] * max(1, len(self._numbers)) + number
        return rows[kept] if begins else kept, place

    def _hops_s(
        self, own: StageColumns, rows: IntArray, known: Sequence[_Boundary], before: Seat | None, seat: Seat
    ) -> tuple[FloatArray, FloatArray]:
        """[row] there and back, and the busier way."""
        if before is None:
            return np.zeros(len(rows)), np.zeros(len(rows))
        found = np.full((2, len(rows)), np.inf)
        for index, each in enumerate(known):
            of = np.flatnonzero(own.table[rows] == index)
            at = own.first[rows[of]], own.entry[rows[of]]
            kinds, kind = np.unique(np.stack([each.nbytes[at], each.split[at]]), axis=1, return_inverse=True)
            hops = [self._hop_s(before, seat, nbytes, bool(split)) for nbytes, split in kinds.T.tolist()]
            found[:, of] = np.array(hops).reshape(-1, 2).T[:, kind.ravel()]
        return found[0], found[1]

    def _hop_s(self, source: Seat, target: Seat, nbytes: float, split: bool) -> tuple[float, float]:
        return self.links.hop_s(source, target, nbytes, split) if math.isfinite(nbytes) else (math.inf, math.inf)
