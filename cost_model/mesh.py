"""Mesh: the ranks of one pipeline stage, and degrees that stages may have of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Degree = int | tuple[int, ...]
"""One number for all stages, or one for each, not all equal."""


@dataclass(frozen=True, order=True)
class Mesh:
    """dp replicas of tp shards."""

    dp: int
    tp: int

    def __post_init__(self) -> None:
        assert self.dp >= 1 and self.tp >= 1

    @property
    def size(self) -> int:
        return self.dp * self.tp

    def cells(self) -> Iterator[tuple[int, int]]:
        """(dp replica, tp shard) of each rank, in the order in which placements list them."""
        return ((dp, tp) for dp in range(self.dp) for tp in range(self.tp))


def of_stage(degree: Degree, stage: int) -> int:
    """The degree of one stage."""
    return degree if isinstance(degree, int) else degree[stage]


def of_stages(degrees: Sequence[int]) -> Degree:
    """Inverse of ``of_stage``: one number where all are equal."""
    return degrees[0] if len(set(degrees)) == 1 else tuple(degrees)


def meshes_of(dp: Degree, tp: Degree, pp: int) -> tuple[Mesh, ...]:
    """The mesh of each stage."""
    return tuple(Mesh(of_stage(dp, stage), of_stage(tp, stage)) for stage in range(pp))
