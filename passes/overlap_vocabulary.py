"""Collectives in two halves: one that begins and moves on behind what follows, and one that waits for it.

What a half that begins returns is on its way: it may be read by the half that waits and by nothing else, exactly once
(``passes.overlap`` makes such pairs, ``cost_model.background`` checks them).
"""

from __future__ import annotations

from torch import Tensor

from passes.vocabulary import define


@define("begin_all_reduce(Tensor x, str axis, str op) -> Tensor")
def begin_all_reduce(x: Tensor, axis: str, op: str) -> Tensor:
    """What is being reduced."""
    return x.new_empty(x.shape)


@define("begin_all_gather(Tensor x, str axis, int size, int dim, int outer) -> Tensor")
def begin_all_gather(x: Tensor, axis: str, size: int, dim: int, outer: int) -> Tensor:
    """The whole, into which parts arrive; shards must lie one behind the other in it."""
    return x.new_empty([s * size if d == dim else s for d, s in enumerate(x.shape)])


@define("begin_reduce_scatter(Tensor x, str axis, int size, int dim, int outer) -> Tensor")
def begin_reduce_scatter(x: Tensor, axis: str, size: int, dim: int, outer: int) -> Tensor:
    """A row of what other ranks send to this one: their terms of its part. The operand leaves meanwhile."""
    return x.new_empty([x.numel() // size * (size - 1)])


@define("wait(Tensor(a) begun) -> Tensor(a)")
def wait(begun: Tensor) -> Tensor:
    """What has been gathered or reduced, in the same memory."""
    return begun.view(begun.shape)


@define("sum_arrived(Tensor x, Tensor(a) arriving, str axis, int size, int dim, int outer) -> Tensor(a)")
def sum_arrived(x: Tensor, arriving: Tensor, axis: str, size: int, dim: int, outer: int) -> Tensor:
    """This rank's part of the sum of ``x`` over the axis, in the memory of what has arrived."""
    return arriving[: x.numel() // size].view([s // size if d == dim else s for d, s in enumerate(x.shape)])


@define("complete(str group) -> ()")
def complete(group: str) -> None:
    """Says that the gradients of a group are complete, if this is the step's last microbatch."""


BEGIN = "begin_"
"""Before the name of the collective that an op begins."""
BEGINS = (begin_all_reduce, begin_all_gather, begin_reduce_scatter)
ENDS = (wait, sum_arrived)
