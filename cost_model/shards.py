"""What a rank holds of parameters: shards, and buckets whose state is split over replicas."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from functools import cached_property

from cost_model.precision import Kept
from cost_model.tensor import TensorMeta


@dataclass(frozen=True)
class ParameterShard:
    """One parameter or buffer on one rank of a stage.

    reduce_axis: axis over which its gradient is summed once per step (None: already complete).
    tied: name of the cross-stage group whose copies share one gradient (None mostly).
    kept: dtypes of its gradient and of what is updated; None: its own.
    """

    name: str
    meta: TensorMeta
    placement: str
    trainable: bool
    reduce_axis: str | None
    tied: str | None
    kept: Kept | None = None

    @property
    def gradient(self) -> TensorMeta:
        """As accumulated."""
        return self.meta if self.kept is None else replace(self.meta, dtype=self.kept.grads)

    @property
    def updated(self) -> TensorMeta:
        """What the optimizer updates."""
        return self.meta if self.kept is None else replace(self.meta, dtype=self.kept.updated)


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a flattened parameter, which lie at ``offset`` of a rank's part of a bucket."""

    parameter: str
    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Bucket:
    """Parameters of one dtype laid out in a row, of which each of ``dp`` ranks owns an equal part (ZeRO).

    zero: what a rank holds of its part alone: 1 the optimizer state, 2 gradients too, 3 parameters too.
    parameters: (name, elements) in order; numel: all of them, padded to a multiple of dp.
    trainable: whether they have gradients; varying: the axes of the mesh over which these are summed too, by name,
    empty where there are none; tied, kept: as in ``ParameterShard``.
    """

    name: str
    zero: int
    dtype: str
    dp: int
    parameters: tuple[tuple[str, int], ...]
    trainable: bool
    varying: str
    tied: str | None
    kept: Kept | None = None

    @cached_property
    def numel(self) -> int:
        return -(-sum(count for _, count in self.parameters) // self.dp) * self.dp

    @property
    def meta(self) -> TensorMeta:
        return TensorMeta((self.numel,), self.dtype)

    @property
    def part(self) -> TensorMeta:
        """What one rank owns."""
        return TensorMeta((self.numel // self.dp,), self.dtype)

    @property
    def weights(self) -> TensorMeta:
        """The parameters that a rank holds."""
        return self.part if self.zero == 3 else self.meta

    @property
    def gradients(self) -> TensorMeta | None:
        """The gradient buffer that a rank holds."""
        held = self.meta if self.zero == 1 else self.part
        return replace(held, dtype=self.types.grads) if self.trainable else None

    @property
    def reduced(self) -> TensorMeta:
        """All gradients as they are summed over ranks."""
        return replace(self.meta, dtype=self.types.reduce)

    @property
    def reduced_part(self) -> TensorMeta:
        return replace(self.part, dtype=self.types.reduce)

    @property
    def updated(self) -> TensorMeta:
        """What a rank updates: its part, or a master copy of it."""
        return replace(self.part, dtype=self.types.updated)

    @property
    def types(self) -> Kept:
        return self.kept or Kept(self.dtype, self.dtype, self.dtype)

    def offsets(self) -> dict[str, int]:
        """Where each parameter begins."""
        offsets, end = {}, 0
        for name, count in self.parameters:
            offsets[name] = end
            end += count
        return offsets

    @cached_property
    def _laid(self) -> tuple[list[str], list[int], list[int]]:
        """The parameters in order, where each begins and where each ends."""
        begins = list(self.offsets().values())
        return list(self.offsets()), begins, [begin + c for begin, (_, c) in zip(begins, self.parameters, strict=True)]

    def pieces(self, index: int) -> tuple[Piece, ...]:
        """What rank ``index`` of the dp axis owns."""
        first, last = index * self.numel // self.dp, (index + 1) * self.numel // self.dp
        found, (names, begins, ends) = [], self._laid
        for place in range(bisect_right(ends, first), bisect_left(begins, last)):
            begin, start, stop = begins[place], max(first, begins[place]), min(last, ends[place])
            if start < stop:
                found.append(Piece(names[place], start - begin, stop - begin, start - first))
        return tuple(found)
