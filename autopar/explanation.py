"""Explain: what a plan is bound by, what the best plans of other kinds cost, and what memory is worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from torch import Tensor, nn

from autopar.binding import COMPUTING, savings
from autopar.curve import POINTS, CurvePoint, check_points, curve, curve_table, falling, plot_curve
from autopar.kernel_calls import with_kernel_calls
from autopar.kinds import AUTOMATIC, CHOSEN, NO_CAP_BYTES, UNLIMITED, Candidate, Kind, candidate, kinds, without_degrees
from autopar.options import COLUMNS, DEFAULT_OPTIMIZER, EAGER, OptimizerFactory, Options
from autopar.planner.solution import is_interrupted
from autopar.planning import Job
from autopar.progress import say
from autopar.relaxations import decided
from autopar.report import bytes_text, cluster_text, make_table, percent_text, render, seconds_text
from autopar.why import Why, why
from cost_model.cluster import Cluster
from cost_model.estimate import Estimate
from cost_model.parallelism import Parallelism
from cost_model.plan import Plan
from cost_model.precision import Precision

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
class Explanation:
    """chosen: the plan that is explained, one of ``candidates``; shares: part of its step time by cause, largest first.

    savings: what is saved of the step where computing, or the links of one name, are twice as fast, largest first.
    memory_share: peak of ``fullest_stage`` over the cap; reference: the automatic plan, or the chosen one without any.
    cap_cost: how much longer the step is than without a cap, relative to the latter. curve: the best plan under each
    of several caps, the smallest first; why: of each op that was asked for. notes: what was left out.
    """

    cluster: Cluster
    chosen: Estimate
    reference: Estimate
    shares: tuple[tuple[str, float], ...]
    savings: tuple[tuple[str, float], ...]
    fullest_stage: int
    memory_share: float
    cap_cost: float
    candidates: tuple[Candidate, ...]
    curve: tuple[CurvePoint, ...]
    why: tuple[Why, ...]
    notes: tuple[str, ...]

    def sentences(self) -> tuple[str, ...]:
        """What binds, in words."""
        cause, share = self.shares[0]
        cap = bytes_text(self.chosen.plan.memory_cap_bytes)
        peak = f"{bytes_text(self.chosen.peak_bytes)} of {cap} ({percent_text(self.memory_share)})"
        return (
            f"Time: {percent_text(share)} of the step goes to {cause}; {self._savings_text()}.",
            f"Memory: stage {self.fullest_stage} holds most, {peak}; {self._cap_text()}.",
            *(each.sentence() for each in self.why),
        )

    def _savings_text(self) -> str:
        known = [(name, part) for name, part in self.savings if part > _NOTICEABLE]
        texts = [f"{_thing(name)} twice as fast would save {percent_text(part)}" for name, part in known]
        return ", ".join(texts) or "nothing twice as fast would save any"

    def _cap_text(self) -> str:
        if self.cap_cost > _NOTICEABLE:
            return f"the cap binds: the step is {percent_text(self.cap_cost)} longer than without it"
        return "the cap costs no time"

    def summary(self) -> str:
        """The sentences, the shares of the step, the candidates, the curve and the notes as text."""
        head = f"{self.chosen.plan.mesh_text()} on {cluster_text(self.cluster)}"
        parts = [_share_table(self), _candidate_table(self)]
        parts += [curve_table(self.curve)] if self.curve else []
        parts += [each.table() for each in self.why]
        notes = "\n".join(f"note: {note}" for note in self.notes)
        return render("\n".join((head, *self.sentences(), "")), *parts, notes)

    def plot(self, path: str | Path) -> None:
        """Draw the curve. Errors: UnsupportedError without matplotlib, ConfigError."""
        plot_curve(self.curve, path)

    def as_dict(self) -> dict[str, Any]:
        """Every figure, for JSON; plans are left out but for their degrees."""
        return {
            "chosen": _figures(self.chosen),
            "binds": list(self.sentences()),
            "shares": dict(self.shares),
            "savings": dict(self.savings),
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
            "curve": [point.as_dict() for point in self.curve],
            "why": [each.as_dict() for each in self.why],
            "notes": list(self.notes),
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
    points: int = POINTS,
    why: tuple[str, ...] = (),
) -> Explanation:
    """Explain the plan that these keywords of ``compile`` lead to; the model is traced once, nothing is run.

    Pins on the schedule and the microbatch size hold for every candidate, pins on degrees for the explained plan.
    points: caps of the curve of step time against memory, 0 for none. why: ops whose placement is to be explained, by
    node, or by a parameter or module they use. Ctrl-C leaves out what has not been searched yet, and says so.
    Errors: as for ``compile``, and UnknownNameError for an op.
    """
    check_points(points)
    start = time.perf_counter()
    options = Options.of(loss_fn, optimizer, parallelism, memory_cap, precision, plan, solver=solver, backend=backend)
    cluster = with_kernel_calls(cluster, options)
    job = Job.of(model, cluster, inputs, options)
    chosen = job.planned(decided(job, start)).estimate
    job = job.having(chosen.plan.precision)
    parts = _Parts(job, chosen, searched=plan is None)
    try:
        parts.gather(points, why)
    except KeyboardInterrupt:
        parts.interrupt()
    return parts.explanation()


class _Parts:
    """What is known so far; each part is whole once it is there."""

    def __init__(self, job: Job, chosen: Estimate, *, searched: bool) -> None:
        self.job, self.chosen, self.searched = job, chosen, searched
        self.cap, self.pins = job.options.memory_cap_bytes, job.options.parallelism
        self.asked = self.pins if searched else without_degrees(self.pins)
        self.candidates: list[Candidate] = []
        self.curve: list[CurvePoint] = []
        self.why: list[Why] = []
        self.notes: tuple[str, ...] = ()
        if not searched or without_degrees(self.pins) != self.pins:
            self.candidates.append(Candidate(CHOSEN, chosen, None, None))

    def gather(self, points: int, names: tuple[str, ...]) -> None:
        for name in names:
            self.why.append(why(self.job, self.chosen.plan, name))
        for kind, cap in self._wanted():
            say(f"explain: the best plan, {kind.name}")
            found = candidate(kind, self.job, cap)
            self.candidates.append(found)
            self._stop_if_interrupted(found.estimate)
        free = self.candidates[-1].estimate
        if points and free is not None:
            for point in curve(self.job, self.asked, free, points):
                self.curve.append(point)
                self._stop_if_interrupted(point.estimate)

    def _wanted(self) -> Iterator[tuple[Kind, int | None]]:
        for kind in kinds(self.pins, self.job.cluster.num_devices):
            yield kind, self.cap
        yield Kind(UNLIMITED, (self.asked,)), NO_CAP_BYTES

    def _stop_if_interrupted(self, found: Estimate | None) -> None:
        """A search that is interrupted gives its best so far: nothing more is wanted, then."""
        if found is not None and is_interrupted(found.notes):
            raise KeyboardInterrupt

    def interrupt(self) -> None:
        self.notes = ("interrupted: what had not been searched is left out",)

    def explanation(self) -> Explanation:
        """A given plan says nothing of the cap: there the automatic plan stands beside the one without a cap."""
        of_kind = {each.kind: each.estimate for each in self.candidates}
        chosen = self.chosen
        reference, free = of_kind.get(AUTOMATIC) or chosen, of_kind.get(UNLIMITED)
        capped = chosen if self.searched else reference
        seconds = asdict(chosen.breakdown)
        shares = [(cause, seconds[name] / chosen.step_time_s) for name, cause in _CAUSES.items() if seconds[name] > 0]
        fullest = max(chosen.stages, key=lambda stage: stage.peak_bytes)
        return Explanation(
            cluster=self.job.cluster,
            chosen=chosen,
            reference=reference,
            shares=tuple(sorted(shares, key=lambda item: -item[1])),
            savings=savings(self.job.program(chosen.plan), self.job.cluster),
            fullest_stage=fullest.stage,
            memory_share=fullest.peak_bytes / chosen.plan.memory_cap_bytes,
            cap_cost=0.0 if free is None else max(0.0, capped.step_time_s / free.step_time_s - 1.0),
            candidates=tuple(self.candidates),
            curve=falling(self.curve),
            why=tuple(self.why),
            notes=self.notes,
        )


def _thing(name: str) -> str:
    return name if name == COMPUTING or name.startswith("links ") else f"{name} (a link)"


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
