"""Where a rank's tensors lie in the whole ones of a checkpoint: as blocks of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    from autopar.runtime.held import Held

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, extents) of a block of a tensor."""


@dataclass(frozen=True)
class Layout:
    """Where a rank's shard lies in the whole tensor.

    shape: of the whole; dim: None where the rank holds all of it, else dim = outer x size x inner and the rank holds
    place ``index`` of ``size``. writes: whether this rank is the one that writes it. writes_pieces: whether it would be
    if it held a piece that no other replica holds. span: elements [start, stop) of the flattened shard, if it holds
    these alone.
    """

    shape: tuple[int, ...]
    dim: int | None
    outer: int
    index: int
    size: int
    writes: bool
    writes_pieces: bool = False
    span: tuple[int, int] | None = None

    @property
    def shard_shape(self) -> tuple[int, ...]:
        return tuple(n // self.size if d == self.dim else n for d, n in enumerate(self.shape))

    @property
    def local_shape(self) -> tuple[int, ...]:
        return self.shard_shape if self.span is None else (self.span[1] - self.span[0],)

    @property
    def is_first(self) -> bool:
        """Whether it holds the shard's first element."""
        return self.span is None or self.span[0] == 0

    def pieces(self, key: str, local: Tensor) -> Iterator[Piece]:
        """What the rank holds as blocks of the whole."""
        if self.span is None:
            for offsets, extents in self._in_whole((0,) * len(self.shape), self.shard_shape):
                yield self._piece(key, offsets, _cut(local, self.dim, self._local(offsets), extents))
            return
        strides = [math.prod(self.shard_shape[d + 1 :]) for d in range(len(self.shape))]
        for first, extents in boxes(self.shard_shape, *self.span):
            start = sum(a * b for a, b in zip(first, strides, strict=True)) - self.span[0]
            block = local[start : start + math.prod(extents)].view(extents)
            begin = 0 if self.dim is None else first[self.dim]
            for offsets, sizes in self._in_whole(first, extents):
                yield self._piece(key, offsets, _cut(block, self.dim, self._local(offsets) - begin, sizes))

    def _piece(self, key: str, offsets: tuple[int, ...], local: Tensor) -> Piece:
        return Piece(key, self.shape, offsets, local)

    @property
    def _extent(self) -> int:
        """Of one of the ``outer`` blocks along ``dim`` that make the shard."""
        assert self.dim is not None
        return self.shape[self.dim] // self.outer // self.size

    def _in_whole(self, first: tuple[int, ...], extents: tuple[int, ...]) -> Iterator[Box]:
        """A block of the shard as blocks of the whole: cut along ``dim`` where the shard's neighbours lie apart."""
        if self.dim is None:
            yield first, extents
            return
        at, end = first[self.dim], first[self.dim] + extents[self.dim]
        while at < end:
            outer, inside = divmod(at, self._extent)
            count = min(self._extent - inside, end - at)
            offset = (outer * self.size + self.index) * self._extent + inside
            yield _with(first, self.dim, offset), _with(extents, self.dim, count)
            at += count

    def _local(self, offsets: tuple[int, ...]) -> int:
        """Where along ``dim`` of the shard a block of the whole begins."""
        if self.dim is None:
            return 0
        outer, inside = divmod(offsets[self.dim], self._extent * self.size)
        return outer * self._extent + inside % self._extent


@dataclass(frozen=True)
class Piece:
    """A block of the whole tensor called ``key`` that begins at ``offsets``; local: a view of this rank's memory."""

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    local: Tensor

    @property
    def chunk(self) -> ChunkStorageMetadata:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata  # takes 50 MB of memory

        return ChunkStorageMetadata(torch.Size(self.offsets), self.local.shape)


def held_layouts(rank: Held) -> dict[str, Layout]:
    return {name: Layout(**described) for name, described in rank.spec["layouts"].items()}


def updated_layouts(rank: Held) -> dict[str, Layout]:
    """Of what the optimizer updates: of parameters in buckets that is a piece, which this rank alone writes for its
    place on the other axes."""
    layouts = held_layouts(rank)
    found = {name: layouts[name] for name in rank.updated if name in layouts}
    for name, span in rank.spans.items():
        if name in layouts:
            found[name] = replace(layouts[name], span=span, writes=layouts[name].writes_pieces)
    return found


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Elements [start, stop) of a flattened tensor as blocks of it, in order."""
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    above, below = -(-start // row), stop // row  # whole rows [above, below)
    if above > below:
        yield from _in_row(shape, below, start - below * row, stop - below * row)
        return
    yield from _in_row(shape, above - 1, start - (above - 1) * row, row) if start < above * row else ()
    if above < below:
        yield (above, *(0,) * (len(shape) - 1)), (below - above, *shape[1:])
    yield from _in_row(shape, below, 0, stop - below * row)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    for offsets, extents in boxes(shape[1:], start, stop):
        yield (row, *offsets), (1, *extents)


def _with(numbers: tuple[int, ...], at: int, value: int) -> tuple[int, ...]:
    return (*numbers[:at], value, *numbers[at + 1 :])


def _cut(tensor: Tensor, dim: int | None, start: int, extents: tuple[int, ...]) -> Tensor:
    return tensor if dim is None else tensor.narrow(dim, start, extents[dim])
