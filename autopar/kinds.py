"""Kinds: the plans that people compare with, each the best of its kind by the same search and the same simulator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from autopar.planning import Job
from autopar.report import bytes_text
from cost_model.errors import BatchError, ParallelismError, UnsupportedError
from cost_model.estimate import Estimate
from cost_model.parallelism import RECOMPUTES, Parallelism

AUTOMATIC, UNLIMITED, CHOSEN = "automatic", "without a memory cap", "as asked"
NO_CAP_BYTES = 2**60


@dataclass(frozen=True)
class Kind:
    """A name and the pins that make it; of several, the fastest counts."""

    name: str
    pins: tuple[Parallelism, ...]


@dataclass(frozen=True)
class Candidate:
    """The best plan of a kind, or why there is none.

    estimate: None where no plan fits or is possible; needed_bytes: a cap that would do, where none fits.
    """

    kind: str
    estimate: Estimate | None
    needed_bytes: int | None
    reason: str | None

    def slowdown(self, reference: Estimate) -> float | None:
        """How much longer its step is than the reference's, relative to that; None without a plan."""
        return None if self.estimate is None else self.estimate.step_time_s / reference.step_time_s - 1.0


def kinds(pins: Parallelism, num_devices: int) -> Iterator[Kind]:
    """The automatic plan, and those known by name. Pins on schedule and microbatch size hold for all."""
    free = without_degrees(pins)
    yield Kind(AUTOMATIC, (free,))
    if num_devices > 1:
        replicas = replace(free, dp=num_devices, tp=1, pp=1)
        yield Kind("data parallel", (replace(replicas, zero=0),))
        yield Kind("ZeRO-3", (replace(replicas, zero=3),))
        yield Kind("tensor parallel", (replace(free, dp=1, tp=num_devices, pp=1),))
        yield Kind("pipeline", (replace(free, dp=1, tp=1, pp=num_devices),))
        levels = RECOMPUTES if pins.recompute is None else (pins.recompute,)
        yield Kind("Megatron grid", tuple(replace(free, zero=1, recompute=level) for level in levels))


def without_degrees(pins: Parallelism) -> Parallelism:
    return replace(pins, dp=None, tp=None, pp=None, placement=None)


def candidate(kind: Kind, job: Job, memory_cap_bytes: int | None) -> Candidate:
    """The fastest plan under any of the kind's pins; else what would do, or why nothing would."""
    found = [_attempt(kind.name, job.under(pins, memory_cap_bytes)) for pins in kind.pins]
    plans = [each for each in found if each.estimate is not None]
    if plans:
        return min(plans, key=lambda each: each.estimate.step_time_s if each.estimate else 0.0)
    return _nearest(found)


def _nearest(found: Sequence[Candidate]) -> Candidate:
    return min(found, key=lambda each: float("inf") if each.needed_bytes is None else each.needed_bytes)


def _attempt(name: str, job: Job) -> Candidate:
    try:
        found = job.attempt()
    except (ParallelismError, BatchError, UnsupportedError) as error:
        return Candidate(name, None, None, str(error))
    if isinstance(found, int):
        return Candidate(name, None, found, f"does not fit under {bytes_text(job.cap_bytes)}")
    return Candidate(name, found.estimate, None, None)
