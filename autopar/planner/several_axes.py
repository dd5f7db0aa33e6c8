"""Where tp may be worth more as several axes than as one: pairs of axes to search once more."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from autopar.planner.mesh_strategies import MeshSpace
from cost_model.axes import Axes
from cost_model.ops import OpCall, entry_of, price_of

FASTER = 2.0
"""So many times the bandwidth of the outer axis makes an inner axis one of another level of the network."""
_HEAVY = ("matmul", "batched_matmul", "attention", "convolution")


def pairs(tp: int) -> list[tuple[int, int]]:
    """All ways in which tp consists of two axes, the inner one ever larger."""
    return [(tp // inner, inner) for inner in range(2, tp // 2 + 1) if tp % inner == 0]


def spans_levels(axes: Axes) -> bool:
    """Whether ranks of the inner axis are nearer to each other than those of the outer one."""
    outer, inner = (axes.links[axes.name((axis,))].bandwidth_bytes_per_s for axis in (0, 1))
    return inner >= FASTER * outer


def divides_better(space: MeshSpace, tp: int, pair: tuple[int, int]) -> bool:
    """Whether a factor that tp does not divide (experts, groups of heads) is one of an axis, in a call that counts.

    What lies along the first dim of the results, the batch, has axes of its own.
    """
    return any(n % tp and any(n % size == 0 for size in pair) for op in space.ops for n in _extents(op.call))


def _extents(call: OpCall) -> Iterator[int]:
    """Of the factors of a call that takes long, those of the batch left out."""
    cost, entry = price_of(call), entry_of(call.op)
    rule = entry.factors(call) if entry is not None and cost is not None and cost.kind in _HEAVY else None
    if rule is not None:
        rows = set(chain.from_iterable(dims[0] for dims in rule.outputs if dims))
        yield from (extent for name, extent in rule.sizes.items() if name not in rows and rule.splittable(name))
