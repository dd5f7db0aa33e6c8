"""The curve of step time against memory: the best plan under each of several caps, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group

from autopar.planning import Job
from autopar.progress import say
from autopar.report import bytes_text, make_table, percent_text, seconds_text
from cost_model.errors import ConfigError, UnsupportedError
from cost_model.estimate import Estimate
from cost_model.parallelism import Parallelism

POINTS = 6


@dataclass(frozen=True)
class CurvePoint:
    """The best plan under a cap; None where none fits."""

    cap_bytes: int
    estimate: Estimate | None

    def as_dict(self) -> dict[str, Any]:
        found = self.estimate
        if found is None:
            return {"cap_bytes": self.cap_bytes, "step_time_s": None, "peak_bytes": None, "plan": None}
        plan = f"{found.plan.mesh_text()}{found.plan.saving_text()}"
        figures = {"step_time_s": found.step_time_s, "peak_bytes": found.peak_bytes, "plan": plan}
        return {"cap_bytes": self.cap_bytes, **figures}


def check_points(points: int) -> None:
    """ConfigError unless there is a curve of so many points, or none is wanted."""
    if points < 2 and points != 0:
        raise ConfigError(f"a curve has at least 2 points, not {points}; use points=0 for none")


def curve(job: Job, pins: Parallelism, free: Estimate, points: int) -> Iterator[CurvePoint]:
    """From what the plan without a cap takes down to what the plan that needs least takes, one point at a time.

    A point may be given a plan of a lower cap: what fits under less fits under more.
    """
    least = job.under(pins, 0).attempt()
    assert isinstance(least, int)
    yield CurvePoint(free.peak_bytes, free)
    for number in range(1, points):
        cap = round(free.peak_bytes * (min(least, free.peak_bytes) / free.peak_bytes) ** (number / (points - 1)))
        say(f"curve {number + 1} of {points}: the best plan under {bytes_text(cap)}")
        found = job.under(pins, cap).attempt()
        yield CurvePoint(cap, None if isinstance(found, int) else found.estimate)


def falling(points: Sequence[CurvePoint]) -> tuple[CurvePoint, ...]:
    """By cap, the smallest first; where the plan of a lower cap is faster, that one counts."""
    best: Estimate | None = None
    found = []
    for point in sorted(points, key=lambda each: each.cap_bytes):
        known = [each for each in (best, point.estimate) if each is not None]
        best = min(known, key=lambda each: each.step_time_s) if known else None
        found.append(replace(point, estimate=best))
    return tuple(found)


def curve_table(points: Sequence[CurvePoint]) -> Group:
    fastest = min((p.estimate.step_time_s for p in points if p.estimate is not None), default=1.0)
    rows = [(bytes_text(point.cap_bytes), *_cells(point.estimate, fastest)) for point in points]
    return make_table("Step time against the memory cap", ("cap", "plan", "step", "longer by", "peak"), rows, words=2)


def _cells(found: Estimate | None, fastest_s: float) -> tuple[str, ...]:
    if found is None:
        return "no plan fits", "", "", ""
    plan, longer = found.plan, round(found.step_time_s / fastest_s - 1.0, 3) + 0.0
    text = f"{plan.mesh_text()}, {plan.microbatches} x {plan.microbatch_size}{plan.saving_text()}"
    return text, seconds_text(found.step_time_s), percent_text(longer), bytes_text(found.peak_bytes)


def plot_curve(points: Sequence[CurvePoint], path: str | Path) -> None:
    """Draw the curve into a file whose ending says the format. Errors: UnsupportedError, ConfigError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UnsupportedError("a picture needs matplotlib: pip install 'autopar[plot]'") from error
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    known = [(point.cap_bytes / 2**30, point.estimate.step_time_s) for point in points if point.estimate is not None]
    axes.step(*zip(*known, strict=True), where="post", marker="o")
    axes.set(xlabel="memory cap of a device (GiB)", ylabel="step time (s)", ylim=(0, None))
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot draw {str(path)!r}: {error}; name a .png, .svg or .pdf in a folder") from error
