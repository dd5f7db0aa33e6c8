"""Whole state: what a step could gain on its devices if replicas did not split parameters and optimizer state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from autopar.grouped import group_sizes
from cost_model.axes import ACROSS, DP, INSIDE
from cost_model.axis_groups import axis_groups
from cost_model.cluster import Cluster
from cost_model.plan import Plan
from cost_model.program import Collective, Program
from passes.zero import zero_key


def whole_state_gain_s(plan: Plan, program: Program, cluster: Cluster) -> float:
    """The most that a step could gain, of the stage that gains most: what is scattered and gathered once a step, less
    one sum of as many bytes, over all replicas at once or by region first. Infinite where state is moved in every
    microbatch, nothing where none is split."""
    levels = {label for stage in plan.stages for key, label in stage.choices.items() if key.startswith(zero_key(""))}
    if levels - {"1"}:
        return math.inf
    sizes = (1, *group_sizes(plan, cluster)) if levels else ()
    gains = [_gain_s(replace(program, dp_inner=size), stage, cluster) for size in sizes for stage in range(program.pp)]
    return max(gains, default=0.0)


def _gain_s(program: Program, stage: int, cluster: Cluster) -> float:
    step = program.stages[stage].step
    scattered = [c for c in step.collectives if c.kind == "reduce_scatter" and c.axis == DP]
    summed = _summed(sum(c.nbytes for c in scattered), program.dp_inner)
    return _seconds(program, stage, cluster, (*scattered, *step.gathers)) - _seconds(program, stage, cluster, summed)


def _summed(nbytes: int, inner: int) -> tuple[Collective, ...]:
    """Gradients of all replicas, in groups of so many first."""
    if inner == 1:
        return (Collective("all_reduce", DP, nbytes),)
    steps = (
        ("reduce_scatter", INSIDE, nbytes),
        ("all_reduce", ACROSS, nbytes // inner),
        ("all_gather", INSIDE, nbytes),
    )
    return tuple(Collective(*step) for step in steps)


def _seconds(program: Program, stage: int, cluster: Cluster, collectives: Iterable[Collective]) -> float:
    """Of the slowest of the groups that run each."""
    return sum(
        max(cluster.once_time_s(c.kind, c.nbytes, group) for group in axis_groups(program, c.axis, stage))
        for c in collectives
    )
