"""Crossing: which rank sends which elements to which, where two stages with meshes of their own meet.

A tensor at a cut is one row of elements, all samples of a microbatch of all replicas, of which each rank holds a run:
a replica its samples, and where the tensor is split along tp, a shard its part of these. A rank receives each element
of its run once, from one rank that holds it, so what crosses the cut is as few bytes as its ranks hold. Where shards
of a run do not lie one behind the other (the inner dims of several samples) there is no such row, and no crossing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cost_model.errors import VerificationError
from cost_model.mesh import Mesh

Cell = tuple[int, int]
"""(dp replica, tp shard)."""


@dataclass(frozen=True)
class End:
    """One side of a cut. split: whether the tp shards hold parts of the tensor; numel: what each rank holds."""

    mesh: Mesh
    split: bool
    numel: int


@dataclass(frozen=True)
class Message:
    """``numel`` elements from ``start`` of what the source holds, to ``target_start`` of what the target holds."""

    source: Cell
    target: Cell
    start: int
    target_start: int
    numel: int


def messages(source: End, target: End) -> tuple[Message, ...]:
    """All messages of one tensor from stage to stage, in an order that both ends agree on.

    Raises VerificationError with check "crossing" where the two ends do not hold the same tensor.
    """
    if source.mesh == target.mesh:
        return tuple(Message(cell, cell, 0, 0, source.numel) for cell in source.mesh.cells())
    by_shard = source.mesh.tp == target.mesh.tp  # each shard's tensor crosses by itself, however it lies
    if _whole(source, by_shard) != _whole(target, by_shard):
        raise VerificationError("crossing", f"{source} does not hold what {target} takes")
    return tuple(message for cell in target.mesh.cells() for message in _received(source, target, cell, by_shard))


def _whole(end: End, by_shard: bool) -> int:
    """Elements of the row."""
    return end.numel * end.mesh.dp * (end.mesh.tp if end.split and not by_shard else 1)


def _first(end: End, cell: Cell, by_shard: bool) -> int:
    """Where in the row a rank's run begins."""
    dp, tp = cell
    return end.numel * (dp * end.mesh.tp + tp if end.split and not by_shard else dp)


def _received(source: End, target: End, cell: Cell, by_shard: bool) -> Iterator[Message]:
    """From each rank whose run meets that of a target; of ranks with equal runs from one, another for each shard."""
    first = _first(target, cell, by_shard)
    last = first + target.numel
    one = cell[1] if by_shard else cell[1] * source.mesh.tp // target.mesh.tp
    shards = range(source.mesh.tp) if source.split and not by_shard else (one,)
    for other in ((dp, tp) for dp in range(source.mesh.dp) for tp in shards):
        begin = _first(source, other, by_shard)
        start, stop = max(first, begin), min(last, begin + source.numel)
        if start < stop:
            yield Message(other, cell, start - begin, start - first, stop - start)
