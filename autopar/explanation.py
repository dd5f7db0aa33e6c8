"""Explain: what a plan is bound by, and what the best plans of other kinds would cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Group
from torch import Tensor, nn

from autopar.kernel_calls import with_kernel_calls
from autopar.options import COLUMNS, DEFAULT_OPTIMIZER, EAGER, OptimizerFactory, Options
from autopar.planning import Job
from autopar.report import bytes_text, cluster_text, make_table, percent_text, render, seconds_text
from cost_model.cluster import Cluster
from cost_model.errors import BatchError, InfeasiblePlanError, ParallelismError
from cost_model.estimate import Estimate
from cost_model.plan import Parallelism, Plan
from cost_model.precision import Precision

NO_CAP_BYTES = 2**60
AUTOMATIC, UNLIMITED, CHOSEN = "automatic", "without a memory cap", "as asked"
_NOTICEABLE = 0.0005  # half of the last digit shown
_CAUSES = {
    "compute_s": "computing",
    "communication_s": "communication inside the schedule",
    "bubble_s": "waiting for other stages",
    "reduction_s": "summing gradients",
    "optimizer_s": "updating parameters",
    "other_s": "driving the step",
}


@dataclass(frozen=True)
class Candidate:
    """The best plan of a kind, or why there is none.

    estimate: None where no plan fits or is possible; needed_bytes: the smallest cap that would do, where none fits.
    """

    kind: str
    estimate: Estimate | None
    needed_bytes: int | None
    reason: str | None

    def slowdown(self, reference: Estimate) -> float | None:
        """How much longer its step is than the reference's, relative to that; None without a plan."""
        return None if self.estimate is None else self.estimate.step_time_s / reference.step_time_s - 1.0


@dataclass(frozen=True)
class Explanation:
    """chosen: the plan that is explained, one of ``candidates``; shares: part of its step time by cause, largest first.

    memory_share: peak of ``fullest_stage`` over the cap; reference: the automatic plan, or the chosen one without any.
    cap_cost: how much longer the step is than without a cap, relative to the latter.
    """

    cluster: Cluster
    chosen: Estimate
    reference: Estimate
    shares: tuple[tuple[str, float], ...]
    fullest_stage: int
    memory_share: float
    cap_cost: float
    candidates: tuple[Candidate, ...]

    def sentences(self) -> tuple[str, ...]:
        """What binds, in words."""
        cause, share = self.shares[0]
        cap = bytes_text(self.chosen.plan.memory_cap_bytes)
        peak = f"{bytes_text(self.chosen.peak_bytes)} of {cap} ({percent_text(self.memory_share)})"
        return (
            f"Time: {percent_text(share)} of the step goes to {cause}.",
            f"Memory: stage {self.fullest_stage} holds most, {peak}; {self._cap_text()}.",
        )

    def _cap_text(self) -> str:
        if self.cap_cost > _NOTICEABLE:
            return f"the cap binds: the step is {percent_text(self.cap_cost)} longer than without it"
        return "the cap costs no time"

    def summary(self) -> str:
        """The sentences, the shares of the step and the candidates as text."""
        head = f"{self.chosen.plan.mesh_text()} on {cluster_text(self.cluster)}"
        return render("\n".join((head, *self.sentences(), "")), _share_table(self), _candidate_table(self))

    def as_dict(self) -> dict[str, Any]:
        """Every figure, for JSON; plans are left out but for their degrees."""
        return {
            "chosen": _figures(self.chosen),
            "binds": list(self.sentences()),
            "shares": dict(self.shares),
            "fullest_stage": self.fullest_stage,
            "memory_share": self.memory_share,
            "cap_cost": self.cap_cost,
            "candidates": [
                {
                    "kind": c.kind,
                    "plan": None if c.estimate is None else _figures(c.estimate),
                    "slowdown": c.slowdown(self.reference),
                    "needed_bytes": c.needed_bytes,
                    "reason": c.reason,
                }
                for c in self.candidates
            ],
        }


def explain(
    model: nn.Module,
    cluster: Cluster,
    inputs: Any,
    *,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    optimizer: OptimizerFactory | None = DEFAULT_OPTIMIZER,
    parallelism: Parallelism | None = None,
    memory_cap: str | int | None = None,
    precision: Precision | None = None,
    plan: Plan | None = None,
    solver: str = COLUMNS,
    backend: str = EAGER,
) -> Explanation:
    """Explain the plan that these keywords of ``compile`` lead to; the model is traced once, nothing is run.

    Pins on the schedule and the microbatch size hold for every candidate, pins on degrees for the explained plan.
    Errors: as for ``compile``.
    """
    start = time.perf_counter()
    options = Options.of(loss_fn, optimizer, parallelism, memory_cap, precision, plan, solver=solver, backend=backend)
    cluster = with_kernel_calls(cluster) if options.compiles else cluster
    job = Job.of(model, cluster, inputs, options)
    chosen = job.planned(job.decide(start)).estimate
    pins, cap = job.options.parallelism, job.options.memory_cap_bytes
    candidates = [_candidate(kind, job.under(wanted, cap)) for kind, wanted in _kinds(pins, cluster.num_devices)]
    if plan is not None or _without_degrees(pins) != pins:
        candidates.insert(0, Candidate(CHOSEN, chosen, None, None))
    candidates.append(_candidate(UNLIMITED, job.under(pins, NO_CAP_BYTES)))
    return _explanation(cluster, chosen, tuple(candidates), searched=plan is None)


def _kinds(pins: Parallelism, num_devices: int) -> Iterator[tuple[str, Parallelism]]:
    free = _without_degrees(pins)
    yield AUTOMATIC, free
    if num_devices > 1:
        yield "data parallel", replace(free, dp=num_devices, tp=1, pp=1)
        yield "tensor parallel", replace(free, dp=1, tp=num_devices, pp=1)
        yield "pipeline", replace(free, dp=1, tp=1, pp=num_devices)


def _without_degrees(pins: Parallelism) -> Parallelism:
    return replace(pins, dp=None, tp=None, pp=None)


def _candidate(kind: str, job: Job) -> Candidate:
    try:
        estimate = job.planned(job.decide(time.perf_counter())).estimate
    except InfeasiblePlanError as error:
        return Candidate(kind, None, error.needed_bytes, f"does not fit under {bytes_text(error.cap_bytes)}")
    except (ParallelismError, BatchError) as error:
        return Candidate(kind, None, None, str(error))
    return Candidate(kind, estimate, None, None)


def _explanation(
    cluster: Cluster, chosen: Estimate, candidates: tuple[Candidate, ...], *, searched: bool
) -> Explanation:
    """A given plan says nothing of the cap: there the automatic plan stands beside the one without a cap."""
    of_kind = {candidate.kind: candidate.estimate for candidate in candidates}
    reference, free = of_kind[AUTOMATIC] or chosen, of_kind[UNLIMITED]
    capped = chosen if searched else reference
    seconds = asdict(chosen.breakdown)
    shares = [(cause, seconds[name] / chosen.step_time_s) for name, cause in _CAUSES.items() if seconds[name] > 0]
    fullest = max(chosen.stages, key=lambda stage: stage.peak_bytes)
    return Explanation(
        cluster=cluster,
        chosen=chosen,
        reference=reference,
        shares=tuple(sorted(shares, key=lambda item: -item[1])),
        fullest_stage=fullest.stage,
        memory_share=fullest.peak_bytes / chosen.plan.memory_cap_bytes,
        cap_cost=0.0 if free is None else max(0.0, capped.step_time_s / free.step_time_s - 1.0),
        candidates=candidates,
    )


def _figures(estimate: Estimate) -> dict[str, Any]:
    plan = estimate.plan
    names = ("dp", "tp", "pp", "schedule", "microbatch_size", "microbatches", "zero", "recompute")
    figures = {"step_time_s": estimate.step_time_s, "peak_bytes": estimate.peak_bytes}
    return {**figures, **{name: getattr(plan, name) for name in names}}


def _share_table(found: Explanation) -> Group:
    rows = [(cause, percent_text(share)) for cause, share in found.shares]
    return make_table("Where the step goes on the rank that finishes last", ("cause", "share"), rows)


def _candidate_table(found: Explanation) -> Group:
    columns = ("plan", "degrees and microbatch", "step", "longer by", "peak")
    rows = [_candidate_row(candidate, found.reference) for candidate in found.candidates]
    return make_table("The best plan of each kind", columns, rows, words=2)


def _candidate_row(candidate: Candidate, reference: Estimate) -> tuple[str, ...]:
    estimate = candidate.estimate
    if estimate is None:
        needed = "" if candidate.needed_bytes is None else f"needs {bytes_text(candidate.needed_bytes)}"
        return candidate.kind, candidate.reason or "", "", "", needed
    plan, slower = estimate.plan, candidate.slowdown(reference) or 0.0
    text = f"{plan.mesh_text()}, {plan.microbatches} x {plan.microbatch_size}{plan.saving_text()}"
    return (
        candidate.kind,
        text,
        seconds_text(estimate.step_time_s),
        percent_text(round(slower, 3) + 0.0),
        bytes_text(estimate.peak_bytes),
    )
