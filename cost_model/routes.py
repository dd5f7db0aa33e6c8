"""The cheapest way from one placement to another on a mesh of several axes.

A move is one elementary step of ``redistribution`` on one axis, or on several taken together as one: sums of two axes
are reduced in one all_reduce, shards of two axes that lie one inside the other gathered in one all_gather. The places
in between are whole, sums and shards on each axis; a route is a shortest path among them. From Varying the way leads
through Partial: each rank's share of the value, and of the gradient. Whole numbers and truths have no shares.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cost_model.placement import (
    PARTIAL,
    REPLICATE,
    VARYING,
    Placement,
    Placements,
    Shard,
    as_held,
    fit,
    mesh_shape,
)
from cost_model.redistribution import conversion_steps, step_collectives
from cost_model.tensor import DTYPE_BYTES, TensorMeta

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
CLOSE = 1e-12


class MovePrices(Protocol):
    """sizes: ranks of each axis."""

    @property
    def sizes(self) -> tuple[int, ...]: ...

    def collective_s(self, kind: str, nbytes: int, axes: Sequence[int]) -> float:
        """Seconds of a collective over some axes together."""

    def copy_s(self, nbytes: int, dtype: str) -> float:
        """Seconds of a local copy of so many bytes."""


@dataclass(frozen=True)
class Move:
    """axes: that take part, as one axis of which the first is the outermost; source, target: how the tensor lies on
    that one, in terms of the piece that the other axes leave; before, after: how it lies on the mesh."""

    axes: tuple[int, ...]
    source: Placement
    target: Placement
    before: Placements
    after: Placements


def moves_s(moves: Iterable[Move], meta: TensorMeta, prices: MovePrices) -> float:
    """Seconds of some moves of a tensor, forward and backward."""
    return sum(move_s(move, meta, prices) for move in moves)


def move_s(move: Move, meta: TensorMeta, prices: MovePrices) -> float:
    """Collectives, slices, laying out shards that do not lie one behind the other in a rank's memory, and a call."""
    step = step_collectives(move.source, move.target)
    assert step is not None
    itemsize = DTYPE_BYTES[meta.dtype]
    shapes = [mesh_shape(meta.shape, places, prices.sizes) for places in (move.before, move.after)]
    small, large = sorted(itemsize * math.prod(shape) for shape in shapes)
    shards = [place for place in (move.source, move.target) if isinstance(place, Shard)]
    packed = sum(not shard.is_consecutive(shapes[0]) for shard in shards)
    total = prices.copy_s(0, meta.dtype)
    for kind in filter(None, (step.forward, step.backward)):
        if kind == "slice":
            total += prices.copy_s(2 * small, meta.dtype)
            continue
        moved = small if kind == "all_to_all" else large
        total += prices.collective_s(kind, moved, move.axes)
        total += prices.copy_s(2 * moved * packed, meta.dtype) if packed else 0.0
    return total


def moves_from(
    places: Placements, labels: Sequence[Sequence[Placement]], shape: tuple[int, ...], sizes: tuple[int, ...]
) -> Iterator[Move]:
    """All moves from a placement to others whose placement on each axis is among ``labels`` of that axis."""
    for count in range(1, len(sizes) + 1):
        for axes in itertools.permutations(range(len(sizes)), count):
            source = _as_one(places, axes, sizes)
            if source is None:
                continue
            for targets in _targets(axes, labels, sizes):
                after = tuple(targets.get(axis, place) for axis, place in enumerate(places))
                if not fit(shape, after, sizes):
                    continue
                target = _as_one(after, axes, sizes)
                if target is not None and step_collectives(source, target) is not None:
                    if _is_in_order(axes, source, target):
                        yield Move(axes, source, target, places, after)


def _is_in_order(axes: tuple[int, ...], source: Placement, target: Placement) -> bool:
    """Only shards tell one order of axes from another."""
    return isinstance(source, Shard) or isinstance(target, Shard) or axes == tuple(sorted(axes))


def _as_one(places: Placements, axes: tuple[int, ...], sizes: tuple[int, ...]) -> Placement | None:
    """How a tensor lies on some axes taken as one, the first the outermost; None where they are not alike."""
    first = places[axes[0]]
    if not isinstance(first, Shard):
        return first if all(places[axis] == first for axis in axes) else None
    return as_held(places, axes[0], sizes) if nested(first, axes, sizes) == {k: places[k] for k in axes} else None


def nested(first: Shard, axes: Sequence[int], sizes: Sequence[int]) -> dict[int, Shard]:
    """The shard of each axis where ``first`` is split over some of them as over one."""
    found, outer = {}, first.outer
    for axis in axes:
        found[axis] = Shard(first.dim, outer)
        outer *= sizes[axis]
    return found


def _targets(
    axes: tuple[int, ...], labels: Sequence[Sequence[Placement]], sizes: tuple[int, ...]
) -> Iterator[dict[int, Placement]]:
    """Placements that are one placement on some axes taken as one."""
    for label in labels[axes[0]]:
        found: dict[int, Placement] = dict.fromkeys(axes, label)
        if isinstance(label, Shard):
            found = dict(nested(label, axes, sizes))
        if all(found[axis] in labels[axis] for axis in axes):
            yield found


def plain_labels(shape: tuple[int, ...], sizes: tuple[int, ...]) -> list[list[Placement]]:
    """Of each axis: whole, a sum, and each dim in consecutive parts, inside those of any of the other axes."""
    found: list[list[Placement]] = []
    for axis, size in enumerate(sizes):
        others = [n for k, n in enumerate(sizes) if k != axis]
        products = {math.prod(some) for count in range(len(sizes)) for some in itertools.combinations(others, count)}
        shards = [Shard(d, o) for d, n in enumerate(shape) for o in sorted(products) if n > 1 and n % (o * size) == 0]
        found.append([REPLICATE, VARYING, PARTIAL, *shards])
    return found


class Routes:
    """All moves of tensors of one shape and dtype, and shortest paths through them.

    extra: placements on each axis beside the plain ones.
    """

    def __init__(self, meta: TensorMeta, prices: MovePrices, extra: Sequence[Iterable[Placement]] = ()) -> None:
        self.meta, self.prices = meta, prices
        labels = plain_labels(meta.shape, prices.sizes)
        for known, more in zip(labels, extra, strict=False):
            known += [place for place in dict.fromkeys(more) if place not in known]
        self.labels = labels
        self._last: dict[Placements, IntArray] = {}

    @cached_property
    def states(self) -> dict[Placements, int]:
        """Every placement, numbered."""
        known = (p for p in itertools.product(*self.labels) if fit(self.meta.shape, p, self.prices.sizes))
        return {places: number for number, places in enumerate(known)}

    @cached_property
    def _moves(self) -> list[Move]:
        shape, sizes = self.meta.shape, self.prices.sizes
        known = (m for places in self.states for m in moves_from(places, self.labels, shape, sizes))
        return [m for m in known if self.meta.has_gradient or m.target != PARTIAL]

    @cached_property
    def _edges(self) -> tuple[IntArray, IntArray, IntArray, FloatArray]:
        """Of each place that moves lead to, a row: (where they begin, the place, their numbers, seconds); rows are
        filled up with moves that take forever."""
        into: dict[int, list[int]] = defaultdict(list)
        for number, move in enumerate(self._moves):
            into[self.states[move.after]].append(number)
        width, known = max(map(len, into.values())), dict[tuple[object, ...], float]()
        starts, moves = np.zeros((len(into), width), dtype=np.int64), np.zeros((len(into), width), dtype=np.int64)
        seconds = np.full((len(into), width), np.inf)
        for row, numbers in enumerate(into.values()):
            moves[row, : len(numbers)] = numbers
            starts[row, : len(numbers)] = [self.states[self._moves[number].before] for number in numbers]
            seconds[row, : len(numbers)] = [self._move_s(self._moves[number], known) for number in numbers]
        return starts, np.array(list(into), dtype=np.int64), moves, seconds

    def _move_s(self, move: Move, known: dict[tuple[object, ...], float]) -> float:
        """What moves of one kind over the same axes cost depends on the sizes of the pieces alone."""
        sizes = self.prices.sizes
        shape = mesh_shape(self.meta.shape, move.before, sizes)
        key = (move.axes, move.source, move.target, shape)
        if key not in known:
            known[key] = move_s(move, self.meta, self.prices)
        return known[key]

    def seconds(self, sources: Sequence[Placements], targets: Sequence[Placements]) -> FloatArray:
        """[source, target]"""
        distances, _ = self._search([self.states[places] for places in sources])
        found: FloatArray = distances[:, [self.states[places] for places in targets]]
        return found

    def makes(self, sources: Sequence[Placements], targets: Sequence[Placements], free: Collection[str]) -> BoolArray:
        """[source, target] whether a step of the cheapest way is of none of the kinds ``free`` in forward."""
        _, last = self._search([self.states[places] for places in sources])
        makes = np.isin(self._forward, list(free), invert=True)
        found = (last >= 0) & makes[last]
        before, row = np.where(last >= 0, self._begins[last], np.arange(last.shape[1])), np.arange(len(last))[:, None]
        while True:  # of twice as many steps each time
            further = before[row, before]
            if (further == before).all():
                return found[:, [self.states[places] for places in targets]]
            found, before = found | found[row, before], further

    @cached_property
    def _forward(self) -> npt.NDArray[np.str_]:
        """Of each move."""
        steps = [step_collectives(move.source, move.target) for move in self._moves]
        return np.array([step.forward for step in steps if step is not None])

    @cached_property
    def _begins(self) -> IntArray:
        """Of each move."""
        return np.array([self.states[move.before] for move in self._moves])

    def _search(self, sources: Sequence[int]) -> tuple[FloatArray, IntArray]:
        """[source, place] seconds, and the last move that leads there (-1: none)."""
        shape = (len(sources), len(self.states))
        distances, last = np.full(shape, np.inf), np.full(shape, -1)
        distances[np.arange(len(sources)), sources] = 0.0
        starts, ends, moves, seconds = self._edges
        while True:
            reached = distances[:, starts] + seconds
            best = reached.argmin(axis=2)
            nearest = np.take_along_axis(reached, best[..., None], axis=2)[..., 0]
            better = nearest < distances[:, ends] * (1 - CLOSE)
            if not better.any():
                return distances, last
            distances[:, ends] = np.where(better, nearest, distances[:, ends])
            last[:, ends] = np.where(better, moves[np.arange(len(ends)), best], last[:, ends])

    def route(self, source: Placements, target: Placements) -> tuple[Move, ...]:
        """The moves of the cheapest way."""
        if source not in self._last:
            self._last[source] = self._search([self.states[source]])[1][0]
        path: list[Move] = []
        while target != source:
            path.insert(0, self._moves[self._last[source][self.states[target]]])
            target = path[0].before
        return tuple(path)


class RouteBook:
    """Routes on one mesh, found once for each tensor shape; on one axis those of ``redistribution``.

    On several axes whole numbers and truths, which have no gradient, are whole where others vary.
    """

    def __init__(self, prices: MovePrices) -> None:
        self.prices = prices
        self._plain: dict[TensorMeta, list[list[Placement]]] = {}
        self._routes: dict[tuple[TensorMeta, tuple[frozenset[Placement], ...]], Routes] = {}
        self._found: dict[tuple[TensorMeta, Placements, Placements], tuple[Move, ...]] = {}

    def route(self, meta: TensorMeta, source: Placements, target: Placements) -> tuple[Move, ...]:
        """The cheapest moves of a tensor. Errors: ValueError where one axis knows no way."""
        if len(source) == 1:
            steps = conversion_steps(source[0], target[0])
            return tuple(Move((0,), a, b, (a,), (b,)) for a, b in steps)
        source, target = _without_gradient(meta, (source, target))
        key = (meta, source, target)
        if key not in self._found:
            self._found[key] = self._of(meta, (source, target)).route(source, target)
        return self._found[key]

    def makes(
        self, meta: TensorMeta, sources: Sequence[Placements], targets: Sequence[Placements], free: Collection[str]
    ) -> BoolArray:
        """[source, target] whether a step of the cheapest way is of none of the kinds ``free`` in forward."""
        sources, targets = _without_gradient(meta, sources), _without_gradient(meta, targets)
        return self._of(meta, (*sources, *targets)).makes(sources, targets, free)

    def seconds(self, meta: TensorMeta, sources: Sequence[Placements], targets: Sequence[Placements]) -> FloatArray:
        """[source, target] of the cheapest moves."""
        sources, targets = _without_gradient(meta, sources), _without_gradient(meta, targets)
        return self._of(meta, (*sources, *targets)).seconds(sources, targets)

    def _of(self, meta: TensorMeta, ends: Sequence[Placements]) -> Routes:
        if meta not in self._plain:
            self._plain[meta] = plain_labels(meta.shape, self.prices.sizes)
        extra = [
            [place for place in dict.fromkeys(own) if place not in known]
            for own, known in zip(zip(*ends, strict=True), self._plain[meta], strict=True)
        ]
        key = (meta, tuple(map(frozenset, extra)))
        if key not in self._routes:
            self._routes[key] = Routes(meta, self.prices, extra)
        return self._routes[key]


def _without_gradient(meta: TensorMeta, ends: Sequence[Placements]) -> Sequence[Placements]:
    """Of what has no gradient, Varying is Replicate."""
    if meta.has_gradient:
        return ends
    return [tuple(REPLICATE if place == VARYING else place for place in places) for places in ends]


__all__ = ["Move", "MovePrices", "RouteBook", "Routes", "move_s", "moves_from", "moves_s", "nested"]
