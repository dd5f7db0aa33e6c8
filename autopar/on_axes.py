"""On axes: what was found, with tp as two axes where that is faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from autopar.narrower import WORTH
from autopar.planner.local_model import Sizes
from autopar.planner.search import search
from autopar.planner.several_axes import pairs, spans_levels
from autopar.planner.solution import Infeasible, Pins, Solution, is_interrupted
from autopar.report import seconds_text
from cost_model.errors import ParallelismError

if TYPE_CHECKING:
    from autopar.planning import Job


def on_axes(
    job: Job, pins: Pins, found: Solution | Infeasible, step_s: Callable[[Solution], float] | None
) -> Solution | Infeasible:
    """The fastest of what was found, the same degrees with tp as two axes, where links or factors suggest it, and what
    fewer devices do, repeated on the others.

    Degrees alike are compared by their prices, others by ``step_s``, waiting and all; None where devices differ: no
    others are looked at then. Ctrl-C leaves the fastest so far.
    """
    is_final = isinstance(found, Infeasible) or is_interrupted(found.notes)
    if is_final or job.options.parallelism.tp_axes is not None:
        return found
    assert isinstance(found, Solution)
    best = found
    with suppress(KeyboardInterrupt):
        for tried, axes in _same_degrees(job, found):
            other = _searched(job, tried, axes)
            if isinstance(other, Solution) and other.objective_s < best.objective_s * (1 - WORTH):
                best = _with_note(found, other, axes, found.objective_s, other.objective_s)
        if step_s is not None:
            best = _or_repeated(job, pins, best, step_s)
    return replace(best, gap=max(0.0, best.objective_s / best.bound_s - 1)) if best is not found else found


def _or_repeated(job: Job, pins: Pins, found: Solution, step_s: Callable[[Solution], float]) -> Solution:
    """What was found, or what fewer devices do, repeated on the others."""
    best, best_s = found, step_s(found)
    for tried, axes in _repeated(job, pins, found, best_s):
        other = _searched(job, tried, axes)
        if isinstance(other, Solution) and step_s(other) < best_s * (1 - WORTH):
            best = _with_note(found, other, axes, best_s, step_s(other))
    return best


def _with_note(found: Solution, other: Solution, axes: Sizes, before_s: float, after_s: float) -> Solution:
    """The other, whose bound is to hold for what was found, too; what was noted of that is not of this."""
    note = (
        f"tp={other.configuration.tp} is {axes[0]} x {axes[1]} axes: {seconds_text(after_s)} against "
        f"{seconds_text(before_s)} of tp={found.configuration.tp} on one; the gap is to plans with one"
    )
    return replace(other, bound_s=min(found.bound_s, other.objective_s), notes=(*other.notes, note))


def _searched(job: Job, tried: Pins, axes: Sizes) -> Solution | Infeasible:
    dp, tp, pp, size = tried.dp, tried.tp, tried.pp, tried.microbatch_size
    pinned = replace(job.options.parallelism, dp=dp, tp=tp, pp=pp, microbatch_size=size, tp_axes=axes)
    found = job.under(pinned, job.options.memory_cap_bytes)._searched()
    if isinstance(found, Infeasible):
        return found
    return replace(found, configuration=replace(found.configuration, tp_axes=axes))


def _same_degrees(job: Job, found: Solution) -> Iterator[tuple[Pins, Sizes]]:
    c, sequence = found.configuration, job.options.parallelism.sequence_parallel
    for axes in job.space.worth_splitting(c.dp, c.tp, c.microbatch_size, sequence):
        yield Pins(c.dp, c.tp, c.pp, c.microbatch_size), axes


def _repeated(job: Job, pins: Pins, found: Solution, found_s: float) -> Iterator[tuple[Pins, Sizes]]:
    """The degrees of the fastest plan of fewer devices, if it takes less: ranks of the outer axis do the same.

    One axis on which all do the same is looked at by the search.
    """
    best, best_s = None, found_s * (1 - WORTH)
    for outer, inner in _outer_and_inner(job, pins, found, best_s):
        count, fewer = job.cluster.num_devices // outer, replace(pins, tp=inner)
        try:
            other = search(job.pinned_space(), count, job.batch, cap_bytes=job.cap_bytes, pins=fewer, cutoff_s=best_s)
        except ParallelismError:  # none is possible, or as fast
            continue
        if isinstance(other, Solution) and other.objective_s < best_s:
            c, best_s = other.configuration, other.objective_s
            best = Pins(c.dp, outer * inner, c.pp, c.microbatch_size), (outer, inner)
    if best is not None:
        yield best


def _outer_and_inner(job: Job, pins: Pins, found: Solution, most_s: float) -> Iterator[Sizes]:
    """Axes where so many times fewer devices may be faster: the outer ones are as many as all together take longer than
    they compute, at most. The inner one's ranks are all that are near, so that other groups lie as they would alone."""
    c, count = found.configuration, job.cluster.num_devices
    floor = job.space.floor(c.dp, (1,), c.microbatch_size, -1.0)
    alone_s = 0.0 if floor is None else floor.time_s / job.space.slowing * c.dp * c.microbatches
    for tp in (n for n in range(4, count + 1) if count % n == 0 and pins.tp in (None, n)):
        for outer, inner in pairs(tp):
            if alone_s * outer / count < most_s and spans_levels(job.space.mesh_prices(1, (2, inner)).axes):
                yield outer, inner
