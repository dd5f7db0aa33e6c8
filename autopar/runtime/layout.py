"""Where a rank's tensors lie in the whole ones of a checkpoint: as blocks of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    from autopar.runtime.held import Held

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, extents) of a block of a tensor."""


Split = tuple[int, int, int, int]
"""(dim, outer, index, size): dim = outer x size x inner of the whole, of which a rank holds place ``index`` of size."""
Run = tuple[int, int, int]
"""(where it begins in the shard, where in the whole, how long) of indices of a dim that a shard has in a row."""


@dataclass(frozen=True)
class Layout:
    """Where a rank's shard lies in the whole tensor.

    shape: of the whole; splits: one for each axis that splits it, those of one dim inside each other. writes: whether
    this rank is the one that writes it. writes_pieces: whether it would be if it held a piece that no other replica
    holds. span: elements [start, stop) of the flattened shard, if it holds these alone.
    """

    shape: tuple[int, ...]
    splits: tuple[Split, ...]
    writes: bool
    writes_pieces: bool = False
    span: tuple[int, int] | None = None

    @property
    def is_whole(self) -> bool:
        return not self.splits and self.span is None

    @property
    def shard_shape(self) -> tuple[int, ...]:
        shape = list(self.shape)
        for dim, _, _, size in self.splits:
            shape[dim] //= size
        return tuple(shape)

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
            yield from self._in_whole(key, (0,) * len(self.shape), local)
            return
        strides = [math.prod(self.shard_shape[d + 1 :]) for d in range(len(self.shape))]
        for first, extents in boxes(self.shard_shape, *self.span):
            start = sum(a * b for a, b in zip(first, strides, strict=True)) - self.span[0]
            yield from self._in_whole(key, first, local[start : start + math.prod(extents)].view(extents))

    def _in_whole(self, key: str, first: tuple[int, ...], block: Tensor) -> Iterator[Piece]:
        """A block of the shard that begins at ``first``, cut where the shard's neighbours lie apart in the whole."""
        cut = (self._runs(dim, begin, block.shape[dim]) for dim, begin in enumerate(first))
        for runs in itertools.product(*cut):
            piece = block
            for dim, ((at, _, count), begin) in enumerate(zip(runs, first, strict=True)):
                piece = piece.narrow(dim, at - begin, count)
            yield Piece(key, self.shape, tuple(offset for _, offset, _ in runs), piece)

    def _runs(self, dim: int, begin: int, count: int) -> Iterator[Run]:
        """Of indices [begin, begin + count) of a dim of the shard."""
        for at, offset, length in self._all_runs[dim]:
            low, high = max(at, begin), min(at + length, begin + count)
            if low < high:
                yield low, offset + low - at, high - low

    @cached_property
    def _all_runs(self) -> list[list[Run]]:
        """Of each dim: split after split, the outermost first, what is in its blocks is kept."""
        found = []
        for dim, extent in enumerate(self.shape):
            kept = [(0, extent)]
            for outer, index, size in sorted(split[1:] for split in self.splits if split[0] == dim):
                kept = [part for start, length in kept for part in _blocks(start, length, extent, outer, index, size)]
            ends = itertools.accumulate((length for _, length in kept), initial=0)
            found.append([(at, start, length) for at, (start, length) in zip(ends, kept, strict=False)])
        return found


def _blocks(start: int, length: int, extent: int, outer: int, index: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, length) of what of [start, start + length) is in blocks ``index`` of size, of outer x size x inner."""
    inner = extent // outer // size
    first = start // (inner * size)
    for number in range(first, -(-(start + length) // (inner * size))):
        low = max(start, (number * size + index) * inner)
        high = min(start + length, (number * size + index + 1) * inner)
        if low < high:
            yield low, high - low


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
