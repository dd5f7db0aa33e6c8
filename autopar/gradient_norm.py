"""The norm of all gradients of a program whose ranks hold copies of some: what each rank adds, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from autopar.runtime.norm import CHUNK
from cost_model.ops import OpCall, price_of
from cost_model.placement import parse_placements, split_axes
from cost_model.program import Collective, OpCost
from cost_model.tensor import TensorMeta

if TYPE_CHECKING:
    from autopar.linked import Linked, LinkedStage

FOUND = Collective("all_reduce", "world", 4)
"""Of whether a gradient is not finite, one float32, in every step that scales the loss."""
NORM = Collective("all_reduce", "world", 8)
"""Of the sum of squares, one float64, in every step that clips."""


def norm_spans(linked: Linked, stage: int, dp_index: int) -> list[tuple[str, int, int, int]]:
    """(gradient buffer, start, stop, copies) of neighbours alike; copies: how many ranks hold the same gradient.

    Replicas hold the same where ZeRO does not split it, and so do the shards of the tp axis where a parameter is whole,
    and the stages that a tied parameter is in. A rank counts its squares divided by the copies.
    """
    part = linked.stages[stage]
    copies = _copies(linked, stage)
    found: list[tuple[str, int, int, int]] = []
    for buffer, names in part.layout:
        end = 0
        for count, run in groupby(names, lambda name: copies[name][1]):
            start, end = end, end + sum(part.metas[name].numel for name in run)
            found.append((buffer, start, end, count))
    for bucket in part.buckets:
        own = dp_index * bucket.part.numel if bucket.zero == 1 else 0  # where its part begins in the buffer it holds
        pieces = bucket.pieces(dp_index) if bucket.trainable else ()
        for count, group in groupby(pieces, lambda piece: copies[piece.parameter][0]):
            neighbours = list(group)
            first, last = neighbours[0], neighbours[-1]
            found.append((bucket.name, own + first.offset, own + last.offset + last.numel, count))
    return found


def _copies(linked: Linked, stage: int) -> dict[str, tuple[int, int]]:
    """Parameter -> ranks that hold the same gradient of it: of one replica of each stage, and of all replicas."""
    meshes = linked.plan.meshes
    found = {}
    for shard in linked.stages[stage].shards:
        if shard.trainable:
            holders = linked.program.tied_stages(shard.tied) if shard.tied else (stage,)
            split = split_axes(parse_placements(shard.placement))
            shards = [meshes[s].tp // linked.plan.axes_of(s).ranks(split) for s in holders]
            whole = sum(meshes[s].dp * count for s, count in zip(holders, shards, strict=True))
            found[shard.name] = sum(shards), whole
    return found


def clip_costs(part: LinkedStage) -> Iterator[OpCost]:
    """Reading every gradient for the norm, and scaling it."""
    alone = [(dtype, sum(part.metas[name].numel for name in names)) for dtype, names in part.layout]
    for dtype, count in alone:
        yield from _norm_and_scale(TensorMeta((count,), dtype), TensorMeta((count,), dtype))
    for bucket in part.buckets:
        if bucket.gradients is not None:
            yield from _norm_and_scale(replace(bucket.part, dtype=bucket.gradients.dtype), bucket.gradients)


def norm_workspace_bytes(part: LinkedStage) -> int:
    """What the norm of gradients of half types takes for a moment, a chunk of them in float64."""
    rows = [(dtype, sum(part.metas[name].numel for name in names)) for dtype, names in part.layout]
    rows += [(b.gradients.dtype, b.part.numel) for b in part.buckets if b.gradients is not None]
    return max((8 * min(count, CHUNK) for dtype, count in rows if dtype in ("float16", "bfloat16")), default=0)


def unscale_costs(part: LinkedStage) -> Iterator[OpCost]:
    """Each gradient divided by the scale of the loss, and looked at, in one pass."""
    rows = [TensorMeta((sum(part.metas[name].numel for name in names),), dtype) for dtype, names in part.layout]
    rows += [replace(b.part, dtype=b.gradients.dtype) for b in part.buckets if b.gradients is not None]
    for row in rows:
        cost = price_of(OpCall("aten.mul_.Scalar", (row,), (row,), {}))
        assert cost is not None
        yield cost


def _norm_and_scale(read: TensorMeta, scaled: TensorMeta) -> Iterator[OpCost]:
    norm = OpCall("aten.sum.default", (read,), (TensorMeta((), read.dtype),), {})
    scale = OpCall("aten.mul_.Scalar", (scaled,), (scaled,), {})
    yield from (cost for cost in (price_of(norm), price_of(scale)) if cost is not None)
