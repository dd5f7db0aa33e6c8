"""Hiding: what a step may take less than its price since sums of gradients move behind compute."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopar.planner.configuration import Configuration
from autopar.planner.solution import Solution

if TYPE_CHECKING:
    from autopar.planning import Job

_BACKWARD = 2 / 3
"""Of the time of a microbatch that recomputes nothing: a backward multiplies twice what the forward did once."""


def hidden_of(job: Job, solution: Solution) -> float:
    """The most that a plan that was found may take less than its price."""
    c = solution.configuration
    return hidden_s(job, c, solution.objective_s / c.objective.balanced[0])


def hidden_s(job: Job, c: Configuration, along_s: float) -> float:
    """The most that sums of gradients over replicas can hide behind the last microbatch's backward; nothing where they
    may not move, or have to be of parts since the state of all parameters has no room on every replica.

    along_s: of a microbatch through all stages.
    """
    pins = job.options.parallelism
    if c.dp == 1 or pins.overlap is False or pins.zero or job.state_bytes > job.cap_bytes * c.tp * c.pp:
        return 0.0
    ranks = tuple(range(0, c.dp * c.tp, c.tp))
    sums_s = job.cluster.collective_time_s("all_reduce", job.reduced_bytes / (c.tp * c.pp), ranks)
    return min(sums_s, _BACKWARD * along_s / c.pp)
