"""The mesh of axes that the ranks of one replica of a stage form, and how its axes and groups are called."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cost_model.collectives import FLAT, Link

TP = "tp"
DP = "dp"
ACROSS, INSIDE = "dp0", "dp1"
"""Replicas in groups of neighbours: those at one place of each group, and those of a group."""
NO_LINK = Link(0.0, math.inf)


@dataclass(frozen=True)
class Axes:
    """sizes: ranks of each axis, the outermost first: ranks of the last one are neighbours.

    links: what collectives over each axis, and over each set of axes together, move at, by name in the mesh's order;
    copy: what a copy on a device does. They choose between ways to redistribute a tensor, so a plan keeps them: its
    program depends on nothing that is measured anew.
    One axis is called "tp", several "tp0", "tp1" and so on; ranks of several axes together by all their names, in the
    order in which they count ("tp1_tp0"), and by "tp" where they are all, in the mesh's own order.
    """

    sizes: tuple[int, ...]
    links: Mapping[str, Link] = field(hash=False)
    copy: Link

    def __post_init__(self) -> None:
        assert all(size > 1 for size in self.sizes) or len(self.sizes) == 1, self.sizes

    @classmethod
    def flat(cls, size: int) -> Axes:
        """One axis, on which there is one way to redistribute."""
        return cls((size,), {TP: NO_LINK}, NO_LINK)

    @classmethod
    def of(cls, sizes: Sequence[int], link: Callable[[tuple[int, ...]], Link], copy: Link) -> Axes:
        """link: of some axes together."""
        count = len(sizes)
        every = [axes for n in range(1, count + 1) for axes in itertools.combinations(range(count), n)]
        return cls(tuple(sizes), {axes_name(axes, count): link(axes) for axes in every}, copy)

    def __str__(self) -> str:
        return " x ".join(map(str, self.sizes))

    @property
    def size(self) -> int:
        return math.prod(self.sizes)

    def ranks(self, axes: Sequence[int]) -> int:
        """Ranks of some axes together."""
        return math.prod(self.sizes[axis] for axis in axes)

    def name(self, axes: Sequence[int]) -> str:
        """Of some axes together, the outermost of them first."""
        return axes_name(axes, len(self.sizes))

    def coordinates(self, index: int) -> tuple[int, ...]:
        """A rank's place on each axis."""
        found: list[int] = []
        for size in reversed(self.sizes):
            index, place = divmod(index, size)
            found.insert(0, place)
        return tuple(found)

    def collective_s(self, kind: str, nbytes: int, axes: Sequence[int]) -> float:
        """Seconds of a collective over some axes together."""
        return FLAT[kind](self.ranks(axes), nbytes, self.links[self.name(sorted(axes))])

    def copy_s(self, nbytes: int, dtype: str) -> float:
        """Seconds of a local copy of so many bytes."""
        return self.copy.seconds(nbytes)


def axes_name(axes: Sequence[int], count: int) -> str:
    """Of some of ``count`` axes together, as ``Axes.name``."""
    return TP if tuple(axes) == tuple(range(count)) else "_".join(f"{TP}{axis}" for axis in axes)


def is_inside_replica(name: str) -> bool:
    """Whether a group of ranks belongs to one replica of one stage."""
    return all(part.startswith(TP) and (part == TP or part[len(TP) :].isdigit()) for part in name.split("_"))


def members(name: str, count: int) -> tuple[bool, tuple[int, ...]] | None:
    """(whether replicas belong to a group, its axes) on a mesh of ``count`` axes; None where it is of another kind."""
    parts = name.split("_")
    with_dp, own = parts[0] == DP, [part for part in parts if part != DP]
    if not is_inside_replica("_".join(own)) and own:
        return None
    axes = tuple(range(count)) if own == [TP] else tuple(int(part[len(TP) :] or -1) for part in own)
    return (with_dp, axes) if all(0 <= axis < count for axis in axes) else None
