"""Which changes of placement exist on one axis, in which steps, and the collectives each costs.

=========  =========  ======================  ======================
from       to         forward                 backward
=========  =========  ======================  ======================
R          V          nothing                 all_reduce
R          P          (divide)                nothing
V          P          (divide)                (divide)
R          S          slice                   all_gather
P          R          all_reduce              nothing
P          S          reduce_scatter          all_gather
S          R          all_gather              slice
S          V          all_gather              reduce_scatter
S(i)       S(j)       all_to_all              all_to_all
=========  =========  ======================  ======================

The rest is composed: P -> V through R, S(i, outer) -> S(j) through R. From V only P can be reached, since a
partial gradient cannot be read off a whole one.
"""

from __future__ import annotations

from dataclasses import dataclass

from cost_model.placement import REPLICATE, Partial, Placement, Replicate, Shard, Varying


@dataclass(frozen=True)
class StepCollectives:
    """Collective kinds of one conversion step, "" for none, "slice" for a local copy."""

    forward: str
    backward: str


def conversion_steps(source: Placement, target: Placement) -> tuple[tuple[Placement, Placement], ...]:
    """Elementary steps from ``source`` to ``target``; ValueError where there is no way."""
    if source == target:
        return ()
    if step_collectives(source, target) is not None:
        return ((source, target),)
    if isinstance(source, Partial | Shard):
        return ((source, REPLICATE), (REPLICATE, target))
    raise ValueError(f"no conversion from {source} to {target}")


def can_convert(source: Placement, target: Placement) -> bool:
    return source == target or not isinstance(source, Varying) or isinstance(target, Partial)


def step_collectives(source: Placement, target: Placement) -> StepCollectives | None:
    """Collectives of an elementary step; None where the step is not elementary."""
    match source, target:
        case Replicate(), Varying():
            return StepCollectives("", "all_reduce")
        case Replicate(), Partial():
            return StepCollectives("slice", "")
        case Varying(), Partial():
            return StepCollectives("slice", "slice")
        case Replicate(), Shard():
            return StepCollectives("slice", "all_gather")
        case Partial(), Replicate():
            return StepCollectives("all_reduce", "")
        case Partial(), Shard():
            return StepCollectives("reduce_scatter", "all_gather")
        case Shard(), Replicate():
            return StepCollectives("all_gather", "slice")
        case Shard(), Varying():
            return StepCollectives("all_gather", "reduce_scatter")
        case Shard(dim=i, outer=1), Shard(dim=j, outer=1) if i != j:
            return StepCollectives("all_to_all", "all_to_all")
    return None
