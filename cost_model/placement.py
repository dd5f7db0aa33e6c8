"""How one tensor lies on one mesh axis, value and gradient together.

A placement is the pair (value, gradient):

=============  ==================  ====================================================
placement      value               gradient
=============  ==================  ====================================================
``Shard``      split               split the same way
``Replicate``  equal on all ranks  equal on all ranks (JAX: invariant)
``Varying``    equal on all ranks  partial: the sum over ranks is the gradient (JAX: varying)
``Partial``    sum over ranks      equal on all ranks
=============  ==================  ====================================================

``Varying`` is what a replicated value becomes when each rank uses it for its own share of the
work; a parameter in that placement has its gradient summed once per step.

On a mesh of several axes a tensor has a placement on each (``Placements``, the outermost axis first), each stated in
terms of the whole dim, whatever the other axes do: what one axis does can be undone without a word about the others.
Two axes may split one dim: of S(0) and S(0,2) on axes of 2 ranks the first splits it in halves and the second each half
in two; S(0,2) and S(0) are the other nesting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Shard:
    """dim = outer x n x inner with n split over the axis; outer = 1 is the plain contiguous split."""

    dim: int
    outer: int = 1

    def __post_init__(self) -> None:
        assert self.dim >= 0 and self.outer >= 1

    def __str__(self) -> str:
        return f"S({self.dim})" if self.outer == 1 else f"S({self.dim},{self.outer})"

    def is_consecutive(self, shape: tuple[int, ...]) -> bool:
        """Whether the shards of a tensor lie in memory one behind the other, as collectives take and give them."""
        return self.outer == 1 and math.prod(shape[: self.dim]) == 1


@dataclass(frozen=True)
class Replicate:
    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True)
class Varying:
    def __str__(self) -> str:
        return "V"


@dataclass(frozen=True)
class Partial:
    def __str__(self) -> str:
        return "P"


Placement = Shard | Replicate | Varying | Partial

Placements = tuple[Placement, ...]

REPLICATE, VARYING, PARTIAL = Replicate(), Varying(), Partial()
BETWEEN_AXES = " | "


def parse_placement(text: str) -> Placement:
    """Inverse of ``str``: "R", "V", "P", "S(1)", "S(2,3)"."""
    fixed: dict[str, Placement] = {"R": REPLICATE, "V": VARYING, "P": PARTIAL}
    if text in fixed:
        return fixed[text]
    if not (text.startswith("S(") and text.endswith(")")):
        raise ValueError(f"not a placement: {text!r}")
    numbers = [int(part) for part in text[2:-1].split(",")]
    return Shard(*numbers)


def local_shape(shape: tuple[int, ...], placement: Placement, size: int) -> tuple[int, ...]:
    """Shape of one rank's piece on an axis of ``size`` ranks; asserts that the split is even."""
    if not isinstance(placement, Shard):
        return shape
    extent = shape[placement.dim]
    assert extent % (placement.outer * size) == 0, (shape, placement, size)
    return (*shape[: placement.dim], extent // size, *shape[placement.dim + 1 :])


def placements_text(places: Placements) -> str:
    """ "S(0) | V": axis by axis."""
    return BETWEEN_AXES.join(map(str, places))


def parse_placements(text: str) -> Placements:
    """Inverse of ``placements_text``."""
    return tuple(map(parse_placement, text.split(BETWEEN_AXES)))


def mesh_shape(shape: tuple[int, ...], places: Placements, sizes: Sequence[int]) -> tuple[int, ...]:
    """Shape of one rank's piece on a mesh; asserts that no two axes split the same indices, and evenly."""
    if len(places) == 1:
        return local_shape(shape, places[0], sizes[0])
    assert fit(shape, places, sizes), (shape, places, sizes)
    local = list(shape)
    for place, size in zip(places, sizes, strict=True):
        if isinstance(place, Shard):
            local[place.dim] //= size
    return tuple(local)


def fit(shape: tuple[int, ...], places: Placements, sizes: Sequence[int]) -> bool:
    """Whether the shards of each dim lie one inside the other, and divide it evenly."""
    shards = sorted((p.outer, p.dim, n) for p, n in zip(places, sizes, strict=True) if isinstance(p, Shard))
    ends: dict[int, int] = {}
    for outer, dim, size in shards:
        if dim >= len(shape) or outer % ends.get(dim, 1):
            return False
        ends[dim] = outer * size
    return all(shape[dim] % end == 0 for dim, end in ends.items())


def as_held(places: Placements, axis: int, sizes: Sequence[int]) -> Placement:
    """The placement on one axis in terms of the piece that the other axes leave of the tensor."""
    own = places[axis]
    if not isinstance(own, Shard):
        return own
    others = (p for k, p in enumerate(places) if k != axis)
    rest = (n for k, n in enumerate(sizes) if k != axis)
    outside = (n for p, n in zip(others, rest, strict=True) if isinstance(p, Shard) and p < own and p.dim == own.dim)
    return Shard(own.dim, own.outer // math.prod(outside))


def split_axes(places: Placements) -> tuple[int, ...]:
    """The axes that split the tensor."""
    return tuple(axis for axis, place in enumerate(places) if isinstance(place, Shard))


def varying_axes(places: Placements) -> tuple[int, ...]:
    """The axes over which its gradient is a sum."""
    return tuple(axis for axis, place in enumerate(places) if isinstance(place, Varying))
