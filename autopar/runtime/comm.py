"""Collectives as generated programs call them: one object per rank, over torch.distributed process groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.runtime.exchange import End, Exchange, exchange_of
from autopar.runtime.ranges import SegmentRange
from cost_model.placement import REPLICATE, Placements, Shard, as_held


@dataclass(frozen=True)
class Begun:
    """A collective on its way: what it makes, and what ends it."""

    made: Tensor
    end: End


class Comm:
    """axes: name -> ranks of this rank's group (global ranks, in axis order); groups: name -> process group.

    Shards follow ``cost_model.placement.Shard(dim, outer)``: dim = outer x n x inner, n over the axis.
    With ``stage_buffers`` every collective runs on a persistent copy, so that allocator events on the
    backend's threads do not blur a memory measurement.
    """

    def __init__(self, rank: int, axes: Mapping[str, Sequence[int]], groups: Mapping[str, dist.ProcessGroup]) -> None:
        self._rank, self._axes, self._groups = rank, axes, groups
        self.stage_buffers = False
        self._segment = SegmentRange()
        self._exchanges: dict[str, Exchange] = {}
        self._buffers: dict[tuple[torch.dtype, int], Tensor] = {}
        self.collected: dict[int, list[Tensor]] = {}

    def collect(self, x: Tensor, number: int) -> Tensor:
        """``x``, kept as one microbatch's part of an output of the model."""
        self.collected.setdefault(number, []).append(x.cpu() if x.is_cuda else x.clone())
        return x

    def segment(self, label: str | None = None) -> None:
        """What follows belongs to a segment of the model, or to none: for profilers."""
        self._segment.enter(label)

    def index(self, axis: str) -> int:
        """This rank's place on an axis."""
        return list(self._axes[axis]).index(self._rank)

    def all_reduce(self, x: Tensor, axis: str, op: str) -> Tensor:
        """A new tensor with the reduction of ``x`` over the axis."""
        return self.all_reduce_(x.clone(memory_format=torch.contiguous_format), axis, op)

    def all_reduce_(self, x: Tensor, axis: str, op: str) -> Tensor:
        """``x``, overwritten by its reduction over the axis."""
        target = self._staged(x, 0)
        self._exchange(axis, x).begin_all_reduce(target, op)()
        return x if target is x else x.copy_(target)

    def all_gather(self, x: Tensor, axis: str, size: int, dim: int, outer: int) -> Tensor:
        """All shards joined along ``dim``."""
        source = self._staged(x.contiguous(), 0)
        parts = self._fresh((size, *x.shape), x)
        self._gather(parts, source, axis)
        return _join(parts, dim, outer, copy=self.stage_buffers)

    def reduce_scatter(self, x: Tensor, axis: str, size: int, dim: int, outer: int) -> Tensor:
        """This rank's shard of the sum of ``x`` over the axis."""
        parts = self._staged(_parts(x, size, dim, outer), 0)
        out = x.new_empty(parts.shape[1:])
        self._scatter(out, parts, axis)
        return out

    def reduce_scatter_(self, x: Tensor, axis: str) -> Tensor:
        """This rank's part of ``x``, overwritten by its sum over the axis; the rest of ``x`` is undefined."""
        mine = self._mine(x, axis)
        self._scatter(mine, self._staged(x, 0), axis)
        return mine

    def all_gather_(self, x: Tensor, axis: str) -> Tensor:
        """``x``, each part of it taken from the rank whose part it is."""
        source = self._staged(self._mine(x, axis), 0)
        target = self._fresh(x.shape, x) if self.stage_buffers else x
        self._gather(target, source, axis)
        return x if target is x else x.copy_(target)

    def begin_all_reduce(self, x: Tensor, axis: str, op: str) -> Begun:
        """``all_reduce``, to be waited for."""
        return self.begin_all_reduce_(x.clone(memory_format=torch.contiguous_format), axis, op)

    def begin_all_reduce_(self, x: Tensor, axis: str, op: str) -> Begun:
        """``all_reduce_``, to be waited for."""
        if self.stage_buffers:
            return Begun(self.all_reduce_(x, axis, op), _at_once)
        return Begun(x, self._exchange(axis, x).begin_all_reduce(x, op))

    def begin_all_gather(self, x: Tensor, axis: str, size: int, dim: int, outer: int) -> Begun:
        """``all_gather`` of shards that lie one behind the other, to be waited for. ``x`` stays as it is until
        ``settle``."""
        whole = x.new_empty([s * size if d == dim else s for d, s in enumerate(x.shape)])
        if not self.stage_buffers:
            return Begun(whole, self._exchange(axis, x).begin_gather(whole.view(-1), x.view(-1)))
        target = self._fresh(whole.shape, x)
        self._gather(target, self._staged(x, 0), axis)
        return Begun(whole.copy_(target), _at_once)

    def begin_reduce_scatter(self, x: Tensor, axis: str, size: int, dim: int, outer: int) -> Begun:
        """``reduce_scatter`` of shards that lie one behind the other, to be ended by ``sum_arrived``. ``x`` stays as it
        is until then."""
        arriving = x.new_empty(x.numel() // size * (size - 1))
        out = arriving[: x.numel() // size]
        if not self.stage_buffers:
            return Begun(out, self._exchange(axis, x).begin_scatter(out, x.view(-1), arriving))
        row = self._staged(x, 0).view(-1)
        self._exchange(axis, x).begin_scatter(out, row, self._buffer(arriving.shape, x, 1))()
        return Begun(out, _at_once)

    def wait(self, begun: Begun) -> Tensor:
        """What a collective has made."""
        begun.end()
        return begun.made

    def sum_arrived(self, x: Tensor, begun: Begun, axis: str, size: int, dim: int, outer: int) -> Tensor:
        """This rank's shard of the sum of ``x``."""
        begun.end()
        return begun.made.view([s // size if d == dim else s for d, s in enumerate(x.shape)])

    def settle(self) -> None:
        """Wait until nobody reads what this rank has given to ``begin_all_gather``."""
        for exchange in self._exchanges.values():
            exchange.settle()

    def _exchange(self, axis: str, x: Tensor) -> Exchange:
        """Made at first use, which comes at the same moment for all ranks of the axis."""
        if axis not in self._exchanges:
            self._exchanges[axis] = exchange_of(self._groups[axis], x.device)
        return self._exchanges[axis]

    def _gather(self, whole: Tensor, part: Tensor, axis: str) -> None:
        self._exchange(axis, part).gather(whole.view(-1), part.view(-1))

    def _scatter(self, out: Tensor, x: Tensor, axis: str) -> None:
        """With persistent buffers as much is allocated for a moment as without."""
        size = len(self._axes[axis])
        arriving = x.new_empty(x.numel() // size * (size - 1))
        kept = self._buffer(arriving.shape, x, 1) if self.stage_buffers else arriving
        self._exchange(axis, x).begin_scatter(out.view(-1), x.view(-1), kept)()

    def _mine(self, x: Tensor, axis: str) -> Tensor:
        return x.view(len(self._axes[axis]), -1)[self.index(axis)]

    def all_to_all(self, x: Tensor, axis: str, size: int, split_dim: int, concat_dim: int) -> Tensor:
        """``split_dim`` is split over the axis, ``concat_dim`` made whole."""
        parts = self._staged(_parts(x, size, split_dim, 1), 0)
        received = self._fresh(parts.shape, x)
        dist.all_to_all_single(received, parts, group=self._groups[axis])
        return _join(received, concat_dim, 1, copy=self.stage_buffers)

    def take_shard(self, x: Tensor, axis: str, size: int, dim: int, outer: int) -> Tensor:
        """This rank's shard of a value that all ranks hold, as a tensor of its own."""
        return shard_of(x, self.index(axis), size, dim, outer).clone(memory_format=torch.contiguous_format)

    def shard_ids(self, ids: Tensor, axis: str, size: int, extent: int) -> Tensor:
        """Row numbers within this rank's ``extent`` rows; -1 for rows of other ranks."""
        local = ids - self.index(axis) * extent
        return local.masked_fill_((local < 0) | (local >= extent), -1)

    def buffer_bytes(self) -> int:
        """Bytes of the persistent buffers."""
        return sum(b.numel() * b.element_size() for b in self._buffers.values())

    def drop_buffers(self) -> None:
        self._buffers.clear()

    def release(self) -> None:
        """Let go of the process groups; no collective can be called any more."""
        self._groups = {}
        for exchange in self._exchanges.values():
            exchange.close()
        self._exchanges.clear()

    def _staged(self, x: Tensor, slot: int) -> Tensor:
        return x if not self.stage_buffers else self._buffer(x.shape, x, slot).copy_(x)

    def _fresh(self, shape: Sequence[int], like: Tensor) -> Tensor:
        return like.new_empty(tuple(shape)) if not self.stage_buffers else self._buffer(shape, like, 1)

    def _buffer(self, shape: Sequence[int], like: Tensor, slot: int) -> Tensor:
        """A persistent buffer of at least this size, one per dtype and slot."""
        count = int(torch.Size(shape).numel())
        held = self._buffers.get((like.dtype, slot))
        if held is None or held.numel() < count:
            held = self._buffers[(like.dtype, slot)] = torch.empty(count, dtype=like.dtype, device=like.device)
        return held[:count].view(tuple(shape))


def _at_once() -> None:
    """The end of what has ended where it began."""


def shard_of(x: Tensor, index: int, size: int, dim: int, outer: int) -> Tensor:
    """Shard ``index`` of ``size`` along ``dim`` seen as outer x n x inner; shape [..., extent / size, ...]."""
    return _viewed(x, dim, (outer, size, x.shape[dim] // outer // size)).select(dim + 1, index).flatten(dim, dim + 1)


def _viewed(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """``x`` with one dim seen as several."""
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def _parts(x: Tensor, size: int, dim: int, outer: int) -> Tensor:
    """[size, ...shard shape], contiguous: every rank's shard in a row."""
    seen = _viewed(x, dim, (outer, size, x.shape[dim] // outer // size))
    return seen.movedim(dim + 1, 0).flatten(dim + 1, dim + 2).contiguous()


def _join(parts: Tensor, dim: int, outer: int, *, copy: bool) -> Tensor:
    """Inverse of ``_parts``; contiguous, as programs are traced (around dims of size 1 ``flatten`` alone is a view)."""
    seen = _viewed(parts, dim + 1, (outer, parts.shape[dim + 1] // outer))
    whole = seen.movedim(0, dim + 1).flatten(dim, dim + 2).contiguous()
    return whole.clone() if copy and whole.data_ptr() == parts.data_ptr() else whole


def join_mesh(held: Sequence[Tensor], places: Placements, sizes: Sequence[int]) -> Tensor:
    """The whole tensor from what the ranks of a mesh hold of it, of equal pieces the first."""
    for axis in reversed(range(len(sizes))):
        rows = [held[start : start + sizes[axis]] for start in range(0, len(held), sizes[axis])]
        own = as_held((*places[: axis + 1], *[REPLICATE] * (len(sizes) - axis - 1)), axis, sizes)
        held = [join_shards(row, own.dim, own.outer) if isinstance(own, Shard) else row[0] for row in rows]
    return held[0]


def join_shards(shards: Sequence[Tensor], dim: int, outer: int) -> Tensor:
    """The whole tensor from the shards of all ranks of an axis."""
    return _join(torch.stack(list(shards)), dim, outer, copy=False)
