"""Redistributions on meshes of several axes: every pair of placements, executed on the shards of all ranks."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from autopar.runtime.comm import _join, _parts, shard_of
from cost_model.axes import Axes
from cost_model.collectives import Link
from cost_model.placement import (
    PARTIAL,
    REPLICATE,
    VARYING,
    Partial,
    Placement,
    Placements,
    Shard,
    Varying,
    as_held,
    fit,
    mesh_shape,
    parse_placements,
    placements_text,
)
from cost_model.redistribution import can_convert, conversion_steps, step_collectives
from cost_model.routes import Move, RouteBook, Routes, moves_s, plain_labels
from cost_model.tensor import TensorMeta

Ranks = dict[tuple[int, ...], Tensor]
FAST, SLOW = Link(1e-6, 50e9), Link(1e-5, 5e9)


def mesh_of(*sizes: int, outer: Link = SLOW) -> Axes:
    """What goes over the first axis moves at another pace."""
    return Axes.of(sizes, lambda axes: outer if 0 in axes else FAST, Link(1e-7, 200e9))


MESHES = {"2x2": (mesh_of(2, 2), (8, 4)), "2x4": (mesh_of(2, 4), (8, 8)), "2x2x2": (mesh_of(2, 2, 2), (8, 4))}


def held(whole: Tensor, places: Placements, sizes: Sequence[int], summed: type[Placement]) -> Ranks:
    """What each rank holds of a value, or of a gradient: ``summed`` is the placement in which it is a sum."""
    axes = [axis for axis, place in enumerate(places) if isinstance(place, summed)]
    cells = list(itertools.product(*(range(n) for n in sizes)))
    generator = torch.Generator().manual_seed(0)
    terms: dict[tuple[int, ...], Tensor] = {}
    for cell in cells:
        key = tuple(cell[axis] for axis in axes)
        if key not in terms:
            terms[key] = torch.randn(whole.shape, generator=generator, dtype=whole.dtype)
    last = tuple(sizes[axis] - 1 for axis in axes)
    terms[last] = whole - sum(term for key, term in terms.items() if key != last)
    found = {}
    for cell in cells:
        piece = terms[tuple(cell[axis] for axis in axes)]
        for axis, place in enumerate(places):
            if isinstance(place, Shard):  # the shards that are left out so far lie inside or beside
                alone = tuple(p if k >= axis else REPLICATE for k, p in enumerate(places))
                piece = _shard_among(piece, alone, places, axis, cell, sizes)
        found[cell] = piece.clone()
    return found


def _shard_among(
    piece: Tensor, _: Placements, places: Placements, axis: int, cell: tuple[int, ...], sizes: Sequence[int]
) -> Tensor:
    """A rank's part along one axis of a piece that the axes before it have split already."""
    before = tuple(p if k <= axis else REPLICATE for k, p in enumerate(places))
    own = as_held(before, axis, sizes)
    assert isinstance(own, Shard)
    return shard_of(piece, cell[axis], sizes[axis], own.dim, own.outer)


def groups(axes: Sequence[int], sizes: Sequence[int]) -> list[list[tuple[int, ...]]]:
    """Ranks that take part together, in the order of the axes taken as one."""
    found: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for cell in itertools.product(*(range(n) for n in sizes)):
        found.setdefault(tuple(c for k, c in enumerate(cell) if k not in axes), []).append(cell)
    return [sorted(group, key=lambda cell: tuple(cell[axis] for axis in axes)) for group in found.values()]


def collective(kind: str, parts: list[Tensor], source: Placement, target: Placement) -> list[Tensor]:
    """A group's tensors after a collective, or a slice, that turns one placement into the other."""
    size = len(parts)
    if kind == "":
        return parts
    if kind == "slice":
        if isinstance(target, Shard):
            return [shard_of(part, index, size, target.dim, target.outer) for index, part in enumerate(parts)]
        return [part / size for part in parts]
    if kind == "all_reduce":
        return [torch.stack(parts).sum(0)] * size
    if kind == "all_gather":
        assert isinstance(source, Shard)
        return [_join(torch.stack(parts), source.dim, source.outer, copy=False)] * size
    if kind == "reduce_scatter":
        assert isinstance(target, Shard)
        total = torch.stack(parts).sum(0)
        return [shard_of(total, index, size, target.dim, target.outer) for index in range(size)]
    assert kind == "all_to_all" and isinstance(source, Shard) and isinstance(target, Shard)
    sent = [_parts(part, size, target.dim, 1) for part in parts]
    return [_join(torch.stack([s[index] for s in sent]), source.dim, 1, copy=False) for index in range(size)]


def moved(ranks: Ranks, move: Move, sizes: Sequence[int], *, backward: bool) -> Ranks:
    step = step_collectives(move.source, move.target)
    assert step is not None
    kind = step.backward if backward else step.forward
    ends = (move.target, move.source) if backward else (move.source, move.target)
    if isinstance(move.target, Varying | Partial) and kind == "slice" and backward:
        ends = (move.target, PARTIAL)  # V -> P: each rank's share of its gradient
    after: Ranks = {}
    for group in groups(move.axes, sizes):
        after.update(zip(group, collective(kind, [ranks[cell] for cell in group], *ends), strict=True))
    return after


def placements(shape: tuple[int, ...], sizes: tuple[int, ...]) -> list[Placements]:
    return [p for p in itertools.product(*plain_labels(shape, sizes)) if fit(shape, p, sizes)]


@functools.cache
def book(mesh: str) -> RouteBook:
    return RouteBook(MESHES[mesh][0])


def pairs_of(mesh: str, most: int) -> list[tuple[Placements, Placements]]:
    """All pairs of placements, or so many of them by lot."""
    sizes, shape = MESHES[mesh][0].sizes, MESHES[mesh][1]
    known = placements(shape, sizes)
    pairs = list(itertools.product(known, known))
    return random.Random(1).sample(pairs, min(most, len(pairs)))


def check_pair(mesh: str, source: Placements, target: Placements) -> None:
    """The value arrives, and the gradient of what arrives goes back as the gradient of what was there."""
    sizes, shape = MESHES[mesh][0].sizes, MESHES[mesh][1]
    meta = TensorMeta(shape, "float64")
    route = book(mesh).route(meta, source, target)
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ranks = held(whole, source, sizes, Partial)
    for move in route:
        ranks = moved(ranks, move, sizes, backward=False)
    assert_holds(ranks, whole, target, sizes, Partial)
    ranks = held(whole, target, sizes, Varying)
    for move in reversed(route):
        ranks = moved(ranks, move, sizes, backward=True)
    assert_holds(ranks, whole, source, sizes, Varying)


def assert_holds(
    ranks: Ranks, whole: Tensor, places: Placements, sizes: Sequence[int], summed: type[Placement]
) -> None:
    axes = [axis for axis, place in enumerate(places) if isinstance(place, summed)]
    alone = tuple(REPLICATE if axis in axes else place for axis, place in enumerate(places))
    expected = held(whole, alone, sizes, summed)
    for group in groups(axes, sizes) if axes else [[cell] for cell in ranks]:
        total = torch.stack([ranks[cell] for cell in group]).sum(0)
        torch.testing.assert_close(total, expected[group[0]], rtol=1e-12, atol=1e-12)
        assert all(ranks[cell].shape == mesh_shape(tuple(whole.shape), places, sizes) for cell in group)


@pytest.mark.parametrize("mesh", MESHES)
def test_redistributions_are_right_forward_and_backward(mesh: str) -> None:
    for source, target in pairs_of(mesh, 500):
        check_pair(mesh, source, target)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_many_redistributions_are_right_forward_and_backward(mesh: str) -> None:
    """All of two axes; of three axes one in eight, since all 161,604 take a quarter of an hour."""
    for source, target in pairs_of(mesh, 20_000):
        check_pair(mesh, source, target)


def naive_moves(
    source: Placements, target: Placements, shape: tuple[int, ...], sizes: tuple[int, ...]
) -> list[Move] | None:
    """Axis by axis, first to last; None where one axis knows no way, or two axes meet in one place."""
    found, places = [], source
    for axis in range(len(sizes)):
        if not can_convert(source[axis], target[axis]):
            return None
        for _, b in conversion_steps(source[axis], target[axis]):
            after = (*places[:axis], b, *places[axis + 1 :])
            if not fit(shape, after, sizes):
                return None
            ends = as_held(places, axis, sizes), as_held(after, axis, sizes)
            if step_collectives(*ends) is None:
                return None
            found.append(Move((axis,), *ends, places, after))
            places = after
    return found


@pytest.mark.parametrize("mesh", MESHES)
def test_no_route_is_dearer_than_axis_by_axis(mesh: str) -> None:
    prices, shape = MESHES[mesh]
    meta, cheaper, compared = TensorMeta(shape, "float32"), 0, 0
    for source, target in pairs_of(mesh, 1000):
        naive = naive_moves(source, target, shape, prices.sizes)
        if naive is not None:
            route_s = moves_s(book(mesh).route(meta, source, target), meta, prices)
            naive_s = moves_s(naive, meta, prices)
            assert route_s <= naive_s * (1 + 1e-9), (source, target)
            cheaper, compared = cheaper + (route_s < naive_s * (1 - 1e-9)), compared + 1
    assert compared > 200 and cheaper > compared / 10


def test_routes_are_as_long_as_their_prices_say() -> None:
    """What the search prices is what is rewritten."""
    prices, shape = MESHES["2x4"]
    meta, known = TensorMeta(shape, "float32"), placements(shape, prices.sizes)
    seconds = Routes(meta, prices).seconds(known, known)
    for i, j in itertools.product(range(0, len(known), 3), range(0, len(known), 2)):
        route_s = moves_s(book("2x4").route(meta, known[i], known[j]), meta, prices)
        assert route_s == pytest.approx(seconds[i, j], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("free", [("",), ("", "slice")])
@pytest.mark.parametrize("mesh", ["2x4", "2x2x2"])
def test_what_routes_make_is_what_their_moves_make(mesh: str, free: tuple[str, ...]) -> None:
    prices, shape = MESHES[mesh]
    meta, known = TensorMeta(shape, "float32"), placements(shape, prices.sizes)[::3]
    makes = book(mesh).makes(meta, known, known, free)
    for i, j in itertools.product(range(0, len(known), 2), range(len(known))):
        steps = [step_collectives(move.source, move.target) for move in book(mesh).route(meta, known[i], known[j])]
        assert makes[i, j] == any(step is not None and step.forward not in free for step in steps)
    assert makes.any() and not makes.all()


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("P | P", "R | R", "tp P -> R"),  # one all_reduce over both
        ("S(0) | S(0,2)", "R | R", "tp S(0) -> R"),
        ("S(0,2) | S(0)", "R | R", "tp1_tp0 S(0) -> R"),  # the other nesting is another order of ranks
        ("S(0) | S(1)", "R | S(1)", "tp0 S(0) -> R"),
        ("S(0) | S(0,2)", "R | S(0,2)", "tp0 S(0) -> R"),  # the outer one alone: what is left is strided
        ("P | S(0)", "S(1) | S(0)", "tp0 P -> S(1)"),
        ("R | R", "V | V", "tp R -> V"),
        ("S(0) | R", "R | S(1)", "tp1 R -> S(1), tp0 S(0) -> R"),  # slice first, gather less
    ],
)
def test_sequences(source: str, target: str, expected: str) -> None:
    mesh = mesh_of(2, 2, outer=FAST)
    route = RouteBook(mesh).route(TensorMeta((8, 4), "float32"), parse_placements(source), parse_placements(target))
    text = ", ".join(f"{mesh.name(move.axes)} {move.source} -> {move.target}" for move in route)
    assert text == expected


@pytest.mark.parametrize("mesh", MESHES)
def test_whole_numbers_are_divided_by_nobody(mesh: str) -> None:
    """The way of a value that varies to its shards led through equal parts of it, which whole numbers do not have."""
    known, meta = book(mesh), TensorMeta((8, 24), "int64")
    for axis in range(len(known.prices.sizes)):
        places = tuple(VARYING if k == axis else REPLICATE for k in range(len(known.prices.sizes)))
        for target in (
            places,
            (REPLICATE,) * len(places),
            tuple(Shard(0) if k == axis else v for k, v in enumerate(places)),
        ):
            route = known.route(meta, places, target)
            assert all(move.target != PARTIAL for move in route) and known.seconds(meta, [places], [target])[0, 0] < 1


def test_a_slow_outer_axis_is_spared() -> None:
    """Sums over both axes of a large tensor: scattered on the fast axis, reduced on the slow one, gathered."""
    mesh = mesh_of(2, 4)
    route = RouteBook(mesh).route(TensorMeta((4096, 4096), "float32"), (PARTIAL, PARTIAL), (REPLICATE, REPLICATE))
    texts = [f"{mesh.name(move.axes)} {move.source} -> {move.target}" for move in route]
    assert texts == ["tp1 P -> S(0)", "tp0 P -> R", "tp1 S(0) -> R"]


def test_texts() -> None:
    for places in placements((8, 4), (2, 2)):
        assert parse_placements(placements_text(places)) == places
    assert np.unique([placements_text(p) for p in placements((8, 4), (2, 2))]).size == len(placements((8, 4), (2, 2)))
