"""What goes over links in fewer bytes, where the user lets the planner choose: each way is searched and simulated."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from autopar.report import seconds_text
from cost_model.precision import SENT, Precision

if TYPE_CHECKING:
    from autopar.planning import Decision, Job

WORTH = 0.01
"""The least part of a step that a less simple program must save."""


def narrower(job: Job, exact: Decision, start: float) -> Decision:
    """The fastest of what is found for each precision that the plan may have; exact: for the first of them, which
    stays unless another one is worth its rounding."""
    best = exact
    for precision in job.ways[1:]:
        found = job.having(precision).found(start)
        if found is None or job.step_s(found.plan) >= (1 - WORTH) * job.step_s(best.plan):
            continue
        seconds = f"{seconds_text(job.step_s(found.plan))} against {seconds_text(job.step_s(exact.plan))}"
        note = f"{_what(job.ways[0], precision)}, chosen by price: {seconds}"
        best = replace(found, notes=(*found.notes, note))
    return best


def _what(exact: Precision, precision: Precision) -> str:
    parts = {"gradients are summed": precision.reduce != exact.reduce, "stages send": precision.wire != exact.wire}
    return " and ".join(f"{what} in {SENT}" for what, differs in parts.items() if differs)
