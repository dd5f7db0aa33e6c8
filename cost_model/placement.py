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
"""

from __future__ import annotations

import math
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

REPLICATE, VARYING, PARTIAL = Replicate(), Varying(), Partial()


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
