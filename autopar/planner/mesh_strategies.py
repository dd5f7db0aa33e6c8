"""Which strategies each op of a segment has on a mesh: those of its axes, put together where they go together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from autopar.planner.strategies import OpSpace, PlannedOp
from cost_model.factors import Strategy
from cost_model.ops import OpCall
from cost_model.placement import Placement, Placements, Shard, fit
from cost_model.strategies import MeshStrategy, goes_together


@dataclass(frozen=True)
class MeshOp:
    """As ``PlannedOp``, with a choice on each axis."""

    node: str
    operands: tuple[str, ...]
    call: OpCall
    strategies: tuple[MeshStrategy, ...] = field(hash=False)


@dataclass(frozen=True)
class MeshSpace:
    """ops, values: as of ``OpSpace``; axes: the space of each axis by itself; sizes: ranks of each."""

    ops: tuple[MeshOp, ...]
    values: Mapping[str, tuple[str, int]] = field(hash=False)
    axes: tuple[OpSpace, ...]
    sizes: tuple[int, ...]

    def places(
        self, tensor: str, shape: tuple[int, ...], fixed: Iterable[Placement], *, sharded: bool = True
    ) -> list[Placements]:
        """On each axis one of ``fixed`` or, if ``sharded``, a shard that some strategy gives or wants."""
        shards = (space.shards.get(tensor, ()) if sharded else () for space in self.axes)
        return combined([(*fixed, *own) for own in shards], shape, self.sizes)


def mesh_space(axes: Sequence[OpSpace], sizes: tuple[int, ...]) -> MeshSpace:
    """axes: equal but for the strategies of their ops. Calls that are alike are looked at once."""
    known: dict[tuple[object, ...], tuple[MeshStrategy, ...]] = {}

    def joined(alone: Sequence[PlannedOp]) -> MeshOp:
        first, choices = alone[0], tuple(op.strategies for op in alone)
        if len(alone) == 1:
            return MeshOp(first.node, first.operands, first.call, tuple(MeshStrategy((s,)) for s in first.strategies))
        parts = tuple(strategy.parts for strategy in first.strategies)
        key = (choices, parts, first.call.inputs, first.call.outputs)
        if key not in known:
            known[key] = tuple(_joint(choices, first.call, sizes))
        return MeshOp(first.node, first.operands, first.call, known[key])

    return MeshSpace(
        tuple(map(joined, zip(*(space.ops for space in axes), strict=True))), axes[0].values, tuple(axes), sizes
    )


def _joint(alone: Sequence[tuple[Strategy, ...]], call: OpCall, sizes: tuple[int, ...]) -> Iterator[MeshStrategy]:
    """Of all combinations those that go together: what splits one factor alike does so one inside the other."""
    known = set[tuple[object, ...]]()
    for chosen in itertools.product(*alone):
        parts = [_inside(own, _ranks_before(chosen, axis, sizes), sizes[axis]) for axis, own in enumerate(chosen)]
        if any(part is None for part in parts):
            continue
        strategy = MeshStrategy(tuple(part for part in parts if part is not None))
        key = (strategy.inputs, strategy.outputs, tuple(part.inside for part in strategy.axes))
        if key not in known and goes_together(strategy, call.inputs, call.outputs, sizes):
            known.add(key)
            yield strategy


def _ranks_before(chosen: Sequence[Strategy], axis: int, sizes: Sequence[int]) -> int:
    """Of the axes before this one that split the same factor in the same place, together."""
    own, ranks = chosen[axis], 1
    for before, size in zip(chosen[:axis], sizes, strict=False):
        if own.factor and (before.factor, before.inputs, before.outputs) == (own.factor, own.inputs, own.outputs):
            ranks *= size
    return ranks


def _inside(own: Strategy, ranks: int, size: int) -> Strategy | None:
    """The strategy where what it splits has been split among so many ranks; None where it has too few parts."""
    if ranks == 1:
        return own
    if not own.can_be_split(ranks * size):
        return None

    def moved(places: tuple[Placement, ...]) -> tuple[Placement, ...]:
        return tuple(replace(p, outer=p.outer * ranks) if isinstance(p, Shard) else p for p in places)

    return replace(own, inputs=moved(own.inputs), outputs=moved(own.outputs))


def combined(
    options: Sequence[Sequence[Placement]], shape: tuple[int, ...], sizes: tuple[int, ...]
) -> list[Placements]:
    """Placements of one option on each axis; equal shards of several axes lie one inside the other."""
    found: dict[Placements, None] = {}
    for chosen in itertools.product(*options):
        places = list(chosen)
        for axis, place in enumerate(chosen):
            if isinstance(place, Shard):
                ranks = [size for before, size in zip(chosen[:axis], sizes, strict=False) if before == place]
                for size in ranks:
                    place = replace(place, outer=place.outer * size)
                places[axis] = place
        if fit(shape, tuple(places), sizes):
            found[tuple(places)] = None
    return list(found)
