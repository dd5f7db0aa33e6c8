"""Reductions: how the gradients of a plan that was found are summed over replicas.

The search moves no collective behind compute, and prices a parameter by its bytes at the rate of large messages. So
collectives may move once a plan is found; sums of whole gradients can hide behind backward where those of parts cannot,
and what is left whole beside them takes a collective of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import add
from typing import TYPE_CHECKING

from autopar.narrower import WORTH
from autopar.planner.solution import is_interrupted
from autopar.report import seconds_text
from autopar.rescheduled import Scheduled
from cost_model.plan import Plan
from cost_model.prices import hidable_s
from cost_model.program import StageProgram
from passes.zero import stateless

if TYPE_CHECKING:
    from autopar.planning import Job


def reduced(job: Job, found: Scheduled) -> tuple[Plan, tuple[str, ...]]:
    """The plan as its gradients are summed fastest, and what is to be told of it. Errors: InfeasiblePlanError."""
    best, notes = _behind_compute(job, found.plan)
    for zero in _levels(job, found):
        pins = replace(job.options.parallelism, zero=zero)
        other = job.under(pins, job.options.memory_cap_bytes).plan(found.solution)
        if not _may_be_faster(job, other, job.step_s(best)):
            continue
        hides = best.overlap or not zero  # gradients of split state are summed after backward, whatever moves
        other, more = _behind_compute(job, other) if hides else (other, ())
        if job.step_s(other) < job.step_s(best):
            seconds = f"{seconds_text(job.step_s(other))} against {seconds_text(job.step_s(best))}"
            where = "split over replicas" if zero else "whole on every replica"
            best, notes = other, (f"optimizer state is {where}, chosen after the search: {seconds}", *more)
    return best, notes


def _levels(job: Job, found: Scheduled) -> Sequence[int]:
    """Of ZeRO, for all parameters alike: those that no microbatch sees, where the planner chooses and they differ."""
    pins, c, plan = job.options.parallelism, found.solution.configuration, found.plan
    grouped = (pins.dp_inner or c.dp_inner or 1) > 1
    if pins.zero is not None or grouped or not job.space.divisible or is_interrupted(found.solution.notes):
        return ()
    if any(stateless(stage.choices) is None for stage in plan.stages):
        return ()
    stages = [own for own, mesh in zip(job.program(plan).stages, plan.meshes, strict=True) if mesh.dp > 1]
    splits = any(own.updated_tensors > len(own.buckets) for own in stages)
    joins = any(own.buckets for own in stages) and _whole_state_fits(job, plan)
    return (*([1] if splits else []), *([0] if joins else []))


def _whole_state_fits(job: Job, plan: Plan) -> bool:
    """Whether optimizer state may have room on every replica, beside what each stage holds already."""
    needed = map(add, job.held_bytes(plan), map(_shared_bytes, job.program(plan).stages))
    return all(each <= cap for each, cap in zip(needed, job.stage_caps(plan), strict=True))


def _shared_bytes(own: StageProgram) -> float:
    """Optimizer state of a stage that other replicas have and a rank does not."""
    updated = sum(own.step.optimized_bytes or ())
    missing = sum(bucket.updated.nbytes * (bucket.dp - 1) for bucket in own.buckets if bucket.trainable)
    return missing * own.step.optimizer_state_bytes / updated if missing else 0.0


def _may_be_faster(job: Job, plan: Plan, limit_s: float) -> bool:
    """Whether a plan fits and could take less, were its collectives hidden as far as they can be."""
    pinned = job.options.parallelism.overlap
    if not job.fits(plan) or (pinned and not job.fits(replace(plan, overlap=True))):
        return False
    hidden_s = 0.0 if pinned is False else hidable_s(job.program(plan), job.cluster)
    return job.step_s(plan) - hidden_s < limit_s


def _behind_compute(job: Job, plan: Plan) -> tuple[Plan, tuple[str, ...]]:
    """The plan with its collectives behind compute, where that is pinned, or faster and fits."""
    other, pinned = replace(plan, overlap=True), job.options.parallelism.overlap
    worth_s = WORTH * job.step_s(plan)
    if pinned is False or (pinned is None and hidable_s(job.program(plan), job.cluster) < worth_s):
        return plan, ()
    if pinned:
        job.check_overlap(other)
        return other, ()
    before_s, after_s = job.step_s(plan), job.step_s(other)
    if before_s - after_s < worth_s or not job.fits(other):
        return plan, ()
    seconds = f"{seconds_text(after_s)} against {seconds_text(before_s)}"
    return other, (f"collectives move behind compute, chosen after the search: {seconds}",)
