"""Relaxations: which pins given up, or how many more devices, would make a plan fit; each is searched for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from autopar.progress import say
from cost_model.errors import BatchError, InfeasiblePlanError, ParallelismError, Relaxation, UnsupportedError
from cost_model.parallelism import Parallelism

if TYPE_CHECKING:
    from autopar.planning import Decision, Job

TIMES_AS_MANY = (2, 4, 8)
_TOGETHER = (
    ("dp", "tp", "pp", "placement"),
    ("microbatch_size",),
    ("recompute",),
    ("zero",),
    ("schedule", "virtual_stages"),
)


def decided(job: Job, start: float) -> Decision:
    """The job's decision. Errors: as for ``Job.decide``; where no plan fits, the error says what would help."""
    try:
        return job.decide(start)
    except InfeasiblePlanError as error:
        if job.options.plan is not None:
            raise
        raise error.relaxed(_known(job)) from None
    finally:
        job.spaces.forget()


def _known(job: Job) -> tuple[Relaxation, ...]:
    """Every relaxation that was tried, those before Ctrl-C if it was pressed."""
    found: list[Relaxation] = []
    try:
        found.extend(_fewer_pins(job))
        found.extend(_more_devices(job))
    except KeyboardInterrupt:
        say("interrupted: other ways to make a plan fit were not tried")
    return tuple(found)


def _fewer_pins(job: Job) -> Iterator[Relaxation]:
    """Without one kind of pin, for each; without all of them where none of these is enough."""
    pins, found = job.options.parallelism, []
    for names in _TOGETHER:
        given = [name for name in names if getattr(pins, name) is not None]
        if given:
            text = f"{' and '.join(given)} left to the planner"
            found.append(_tried(job, replace(pins, **dict.fromkeys(names)), text))
            yield found[-1]
    if len(found) > 1 and not any(each.fits for each in found):
        yield _tried(job, Parallelism(), "every pin left to the planner")


def _more_devices(job: Job) -> Iterator[Relaxation]:
    """Twice, four and eight times as many, up to the first that is enough; more replicas where all degrees are pinned.

    Numbers whose memory cannot hold the parameters and the optimizer state are not tried.
    """
    pins, least = replace(job.options.parallelism, placement=None), job.least_devices
    if None not in (pins.dp, pins.tp, pins.pp):
        pins = replace(pins, dp=None)
    for times in TIMES_AS_MANY:
        number = times * job.cluster.num_devices
        try:
            cluster = job.cluster.resized(number)
        except UnsupportedError:
            return
        if least is None or number < least:
            continue
        found = _tried(job.on(cluster), pins, f"{number} devices")
        yield found
        if found.fits:
            return


def _tried(job: Job, pins: Parallelism, text: str) -> Relaxation:
    say(f"no plan fits; trying {text}")
    try:
        found = job.under(pins, job.cap_bytes).attempt()
    except (ParallelismError, BatchError, UnsupportedError):
        return Relaxation(text, None, None)
    return (
        Relaxation(text, None, found) if isinstance(found, int) else Relaxation(text, found.estimate.step_time_s, None)
    )
