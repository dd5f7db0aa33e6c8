"""Parts: pieces of a value as long as other values say, ``x.split(counts.tolist())``, as masks of its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from passes.calls import schema_arguments

aten = torch.ops.aten
SPLITS = (aten.split_with_sizes.default, aten.split.sizes)


def sizes_of(node: fx.Node) -> tuple[fx.Node, ...] | None:
    """The values that say how long each part of a split is; None where others do, or dims other than the first."""
    given = schema_arguments(node)
    sizes = given["split_sizes"] if "split_sizes" in given else given["split_size"]
    if given["dim"] != 0 or not all(_is_read(size) for size in sizes):
        return None
    return tuple(size.args[0] for size in sizes)


def part_masks(call: Callable[..., fx.Node], sizes: Sequence[fx.Node], count: int) -> list[fx.Node]:
    """For each part, which of ``count`` rows are in it [count]; call: appends a call."""
    ends = call(aten.cumsum.default, call(aten.stack.default, list(sizes)), 0)
    part = call(aten.searchsorted.Tensor, ends, call(aten.arange.default, count), right=True)
    return [call(aten.eq.Scalar, part, number) for number in range(len(sizes))]


def _is_read(size: Any) -> bool:
    return isinstance(size, fx.Node) and size.target in (aten.item.default, aten._local_scalar_dense.default)
