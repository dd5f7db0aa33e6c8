"""Places: where a mask is true, as lists of coordinates, which are what ``torch.where`` and ``nonzero`` give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.calls import schema_arguments
from passes.graph import is_getitem
from passes.restate_masks import refused

aten = torch.ops.aten
OF_MASK = (aten.nonzero.default, aten.nonzero_numpy.default, aten.where.default)
_SAME = (aten.squeeze.default, aten.squeeze.dim, aten.flatten.using_ints, aten.view.default, aten.reshape.default)
"""What is left of places [n, 1], their only column, is the places."""
_EXPANDED = (aten.expand.default, aten.expand_as.default)
_NEGATED = (aten.bitwise_not.default, aten.logical_not.default)
_SORTED = (aten.topk.default, aten.sort.default, aten.sort.stable)
_ARGSORTED = (aten.argsort.default, aten.argsort.stable)
"""Calls whose indices along a dim are all different ones."""
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_SAME_NUMBERS = {aten.to.dtype, aten._to_copy.default, *VIEWS}


@dataclass(frozen=True)
class Places:
    """Every place at which a mask is true: coordinates along ``dims``, in columns, apart or, of one dim, a list."""

    mask: fx.Node
    dims: tuple[int, ...]

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(dim for dim in range(self.mask.meta["val"].dim()) if dim not in self.dims)


def of_mask(mask: fx.Node) -> Places:
    return Places(mask, tuple(range(mask.meta["val"].dim())))


def follow(node: fx.Node, places: Places) -> Places:
    """What a call makes of places; UnsupportedError where it is no choice of columns."""
    dims, args = places.dims, node.args
    if is_getitem(node):
        return Places(places.mask, (dims[args[1]],))  # type: ignore[index]
    if node.target is aten.select.int and args[1] in (1, -1):
        return Places(places.mask, (dims[args[2]],))  # type: ignore[index]
    if (node.target is aten.unbind.int and args[1:] in ((1,), (-1,))) or (node.target in _SAME and len(dims) == 1):
        return places
    raise refused(node)


def of_first_dims(mask: fx.Node) -> tuple[fx.Node, bool]:
    """What a mask is along its first dims, and the same along all others (``mask.unsqueeze(-1)``, expanded or not), and
    whether it is true where that is not."""
    source: Any = mask.args[0] if mask.args else None
    is_wider = mask.target is aten.unsqueeze.default and mask.args[1] in (-1, mask.meta["val"].dim() - 1)
    is_longer = mask.target in _EXPANDED and mask.meta["val"].dim() == source.meta["val"].dim()
    if not (is_wider or is_longer or mask.target in _NEGATED):
        return mask, False
    found, negated = of_first_dims(source)
    return found, negated != (mask.target in _NEGATED)


def joined(each: Sequence[Places], node: fx.Node) -> Places:
    """Lists that together index one value."""
    masks, dims = {places.mask for places in each}, tuple(dim for places in each for dim in places.dims)
    if len(masks) != 1 or len(set(dims)) != len(dims) or any(len(places.dims) != 1 for places in each):
        raise refused(node)
    return Places(masks.pop(), dims)


def is_one_each(places: Places) -> bool:
    """Whether the mask is true once at most along the dims that are missing: one number among different ones, as in
    ``torch.where(topk.indices == expert)``."""
    mask = places.mask
    if not places.missing:
        return True
    indices: Any = mask.args[0]
    from_end = places.missing[0] - mask.meta["val"].dim()
    if mask.target is not aten.eq.Scalar or len(places.missing) > 1:
        return False
    while (
        indices.target in VIEWS and indices.meta["val"].shape[from_end:] == indices.args[0].meta["val"].shape[from_end:]
    ):
        indices = indices.args[0]
    made = indices.args[0] if is_getitem(indices) and indices.args[1] == 1 else indices
    if made.target not in (_SORTED if made is not indices else _ARGSORTED):
        return False
    rank: int = indices.meta["val"].dim()
    return bool(schema_arguments(made)["dim"] % rank - rank == from_end)


def counted_mask(count: Any) -> fx.Node | None:
    """The mask of two dims of which a value says how many places of each row are true; None where it is none."""
    while count.target in _SAME_NUMBERS:
        count = count.args[0]
    if count.target is not aten.sum.dim_IntList or count.args[1] not in ([-1], [1]):
        return None
    mask = count.args[0]
    assert isinstance(mask, fx.Node)
    return mask if mask.meta["val"].dim() == 2 and mask.meta["val"].dtype == torch.bool else None
