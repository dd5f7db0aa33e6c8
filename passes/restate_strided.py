"""Restate ``as_strided``, which reads memory as it lay in the trace: overlapping windows of a dim are ``unfold``.

A program may lay a value otherwise than the trace did, so what is no such windows is refused where layouts matter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from cost_model.errors import UnsupportedError
from cost_model.tensor import TensorMeta
from passes.graph import source_of
from passes.restate import rewrites

if TYPE_CHECKING:
    from passes.clean import Cleaner

aten = torch.ops.aten
Dim = tuple[int, int]
"""Extent and stride."""


@dataclass(frozen=True)
class _Windows:
    """Of a source without dims of extent 1: others, the dims taken as they are, in the order of the result; merged,
    those that are one dim of windows, outermost first; places, inside: of the result, where windows stand and what is
    in them; step: from window to window."""

    others: tuple[int, ...]
    merged: tuple[int, ...]
    places: int
    inside: int
    step: int


@rewrites(aten.as_strided.default)
def _as_strided(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    source = [dim for dim in zip(value.shape, value.stride(), strict=True) if dim[0] > 1]
    out = [dim for dim in zip(a["size"], a["stride"], strict=True) if dim[0] > 1]
    found = None if a["storage_offset"] not in (None, value.storage_offset()) else _windows(source, out)
    if found is None:
        return _from_its_start(run, node, a)
    return _unfolded(run, node, a["self"], [extent for extent, _ in source], found, a["size"])


def _from_its_start(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> fx.Node:
    """Elements picked by their places, counted from where the value begins: a program may hold it in other memory."""
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    ahead = 0 if a["storage_offset"] is None else a["storage_offset"] - value.storage_offset()
    last = ahead + sum((extent - 1) * stride for extent, stride in zip(a["size"], a["stride"], strict=True))
    if not value.is_contiguous() or ahead < 0 or last >= value.numel() or 0 in a["size"]:
        raise UnsupportedError(
            f"as_strided reads memory by strides that a program need not keep ({source_of(node)}): write it with "
            "unfold, permute and reshape, or take .contiguous() before"
        )
    places, dtype = _picked(run, node, a["size"], a["stride"], ahead), run.tensor(a["self"]).dtype
    count = math.prod(a["size"])
    flat = run.call(aten.reshape.default, (a["self"], [-1]), TensorMeta((value.numel(),), dtype), like=node)
    rows = run.call(aten.index_select.default, (flat, 0, places), TensorMeta((count,), dtype), like=node)
    made: fx.Node = run.call(
        aten.reshape.default, (rows, list(a["size"])), TensorMeta(tuple(a["size"]), dtype), like=node
    )
    return made


def _picked(run: Cleaner, node: fx.Node, size: Sequence[int], stride: Sequence[int], ahead: int) -> fx.Node:
    """[elements] the places of a strided view, ``ahead`` from the first: those of dim after dim beside each other."""

    def ordered(extent: int) -> fx.Node:
        numbers = TensorMeta((extent,), "int64")
        made: fx.Node = run.call(aten.arange.default, (extent,), numbers, like=node, dtype=torch.int64)
        return made

    places = run.call(aten.add.Tensor, (ordered(1), ahead), TensorMeta((1,), "int64"), like=node)
    count = 1
    for extent, step in zip(size, stride, strict=True):
        far = run.call(aten.mul.Tensor, (ordered(extent), step), TensorMeta((extent,), "int64"), like=node)
        rows = run.call(aten.reshape.default, (places, [count, 1]), TensorMeta((count, 1), "int64"), like=node)
        both = run.call(aten.add.Tensor, (rows, far), TensorMeta((count, extent), "int64"), like=node)
        count *= extent
        places = run.call(aten.reshape.default, (both, [count]), TensorMeta((count,), "int64"), like=node)
    picked: fx.Node = places
    return picked


def _windows(source: Sequence[Dim], out: Sequence[Dim]) -> _Windows | None:
    """Two dims of the result as windows of one dim of the source, all others as they are; None where they are not."""
    for places, inside in itertools.permutations(range(len(out)), 2):
        kept = [dim for index, dim in enumerate(out) if index not in (places, inside)]
        if len(set(source)) < len(source) or any(dim not in source for dim in kept):
            continue
        merged = sorted((d for d in range(len(source)) if source[d] not in kept), key=lambda d: -source[d][1])
        (count, far), (width, near) = out[places], out[inside]
        is_one = all(source[a][1] == math.prod(source[b]) for a, b in itertools.pairwise(merged))
        if not merged or not is_one or source[merged[-1]][1] != near or far % near or far == 0:
            continue
        step, extent = far // near, math.prod(source[d][0] for d in merged)
        if (extent - width) // step + 1 == count:
            return _Windows(tuple(source.index(dim) for dim in kept), tuple(merged), places, inside, step)
    return None


def _unfolded(
    run: Cleaner, node: fx.Node, x: fx.Node, extents: Sequence[int], windows: _Windows, size: Sequence[int]
) -> fx.Node:
    dtype, last = run.tensor(x).dtype, len(windows.others)
    shown = [extent for extent in size if extent > 1]
    order = [*windows.others, *windows.merged]
    lead = [extents[d] for d in windows.others]
    whole = math.prod(extents[d] for d in windows.merged)
    count, width = shown[windows.places], shown[windows.inside]
    places = _places(len(shown), windows)
    steps: tuple[tuple[Any, tuple[Any, ...], Sequence[int]], ...] = (
        (aten.reshape.default, (list(extents),), extents),
        (aten.permute.default, (order,), [extents[d] for d in order]),
        (aten.reshape.default, ([*lead, whole],), [*lead, whole]),
        (aten.unfold.default, (last, width, windows.step), [*lead, count, width]),
        (aten.permute.default, (list(places),), shown),
        (aten.reshape.default, (list(size),), size),
    )
    for target, args, shape in steps:
        x = run.call(target, (x, *args), TensorMeta(tuple(shape), dtype), like=node)
    return x


def _places(rank: int, windows: _Windows) -> Iterator[int]:
    """Of each dim of the result, where it stands behind ``unfold``: others, places, inside."""
    others = iter(range(rank - 2))
    for dim in range(rank):
        yield rank - 2 if dim == windows.places else rank - 1 if dim == windows.inside else next(others)
