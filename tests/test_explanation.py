"""Explanations: what binds, what other plans lose, what memory is worth, and why an op lies as it does."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from models import example_gpt
from parity import ADAMW, cpu_cluster
from regression import BATCH, Regression

import autopar
from autopar import explanation
from autopar.kinds import UNLIMITED
from autopar.options import Options
from autopar.planning import Job
from autopar.report import WIDTH, strategy_words
from autopar.why import why
from cost_model.errors import ConfigError, UnknownNameError, UnsupportedError
from cost_model.parallelism import Parallelism


def explained(**keywords: Any) -> autopar.Explanation:
    pins = autopar.Parallelism(**keywords.pop("pins", {}))
    cluster = keywords.pop("cluster", cpu_cluster(2))
    return autopar.explain(Regression(), cluster, BATCH, optimizer=ADAMW, parallelism=pins, **keywords)


@functools.cache
def of_four_points() -> autopar.Explanation:
    return explained(points=4)


@functools.cache
def gpt_job() -> Job:
    model, batch = example_gpt(n_layer=1)
    pins = Parallelism(tp=2, microbatch_size=4)
    return Job.of(model, cpu_cluster(2), batch, Options.of(None, ADAMW, pins, None, None, None))


@pytest.mark.parametrize(("bandwidth", "most"), [(1e5, "links between nodes"), (1e15, "computing")])
def test_what_binds_is_what_would_save_most_if_it_were_faster(bandwidth: float, most: str) -> None:
    found = explained(cluster=cpu_cluster(2, bandwidth), pins={"dp": 2, "zero": 0}, points=0)
    name, saved = found.savings[0]
    assert name == most and 0.3 < saved <= 0.5
    assert sum(part for _, part in found.savings) <= 0.5 + 1e-9
    assert f"{most} twice as fast would save" in found.sentences()[0]


def test_the_curve_falls_and_its_plans_fit() -> None:
    found = of_four_points()
    caps, steps = zip(*((p.cap_bytes, p.estimate.step_time_s) for p in found.curve if p.estimate), strict=True)
    assert len(found.curve) == 4 and list(caps) == sorted(caps) and list(steps) == sorted(steps, reverse=True)
    assert all(p.estimate is None or p.estimate.peak_bytes <= p.cap_bytes for p in found.curve)
    free = found.candidates[-1]
    assert free.kind == UNLIMITED and free.estimate is not None
    assert caps[-1] == free.estimate.peak_bytes and steps[-1] <= free.estimate.step_time_s
    tree = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert [point["step_time_s"] for point in tree["curve"][-len(steps) :]] == list(steps)
    text = found.summary()
    assert "Step time against the memory cap" in text and max(map(len, text.splitlines())) <= WIDTH


def test_a_curve_of_one_point_is_refused() -> None:
    """Before anything is searched."""
    with pytest.raises(ConfigError, match="at least 2 points, not 1"):
        autopar.explain(Regression(), cpu_cluster(2), {}, points=1)


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = of_four_points()
    found.plot(tmp_path / "curve.svg")
    assert "memory cap" in (tmp_path / "curve.svg").read_text() or (tmp_path / "curve.svg").stat().st_size > 1000
    for name in ("no/curve.png", "curve.xyz"):
        with pytest.raises(ConfigError, match="name a .png, .svg or .pdf"):
            found.plot(tmp_path / name)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'autopar\[plot\]'"):
        of_four_points().plot(tmp_path / "curve.png")


def test_the_chosen_placement_of_an_op_is_the_fastest_and_the_others_say_what_they_cost() -> None:
    job = gpt_job()
    decided = job.planned(job.decide(0.0))
    found = why(job, decided.plan, "blocks.0.mlp.up.weight")
    assert found.call == "aten.linear.default" and "blocks.0" in found.segment
    assert found.chosen.step_time_s == pytest.approx(decided.estimate.step_time_s)
    chain = job.pinned_space().chain(1, 2, 4)
    assert chain is not None
    labels = {label for graph in chain.kinds for label in graph.domains.get(f"op:{found.op}", ())}
    assert {found.chosen.placement, *(other.placement for other in found.others)} == labels and len(labels) > 3
    steps = [other.step_time_s for other in found.others if other.step_time_s is not None]
    assert steps == sorted(steps) and steps[0] >= found.chosen.step_time_s * 0.99
    assert strategy_words(found.chosen.placement) in found.sentence() and "the next best" in found.sentence()
    assert why(job, decided.plan, "blocks.0.mlp.up") == why(job, decided.plan, found.op) == found


def test_an_op_of_a_stage_with_a_mesh_of_its_own_is_explained_on_that_mesh() -> None:
    """On the stage of two shards; the other has one, where there is nothing to explain."""
    model, batch = example_gpt(n_layer=2)
    pins = Parallelism(dp=1, tp=(1, 2), microbatch_size=4, schedule="1f1b")
    job = Job.of(model, cpu_cluster(3), batch, Options.of(None, ADAMW, pins, None, None, None))
    decided = job.planned(job.decide(0.0))
    first, last = decided.plan.segment_labels[0], "blocks.1.mlp.up"
    found = why(job, decided.plan, last)
    assert found.chosen.step_time_s == pytest.approx(decided.estimate.step_time_s)
    assert found.chosen.placement == decided.plan.stages[1].choices[f"op:{found.op}"]
    assert len({found.chosen.placement, *(other.placement for other in found.others)}) > 3
    steps = [other.step_time_s for other in found.others if other.step_time_s is not None]
    assert len(set(steps)) > 1 and steps == sorted(steps)
    with pytest.raises(ConfigError, match="its stage 0 has tp=1"):
        why(job, decided.plan, first)


def test_ops_that_cannot_be_explained() -> None:
    job = gpt_job()
    plan = job.planned(job.decide(0.0)).plan
    with pytest.raises(UnknownNameError, match="did you mean 'blocks.0.mlp.up.weight'"):
        why(job, plan, "blocks.0.mlp.upp.weight")
    with pytest.raises(ConfigError, match="the plan has tp=1; pin tp"):
        why(job, dataclasses.replace(plan, tp=1, dp=2, microbatches=1), "blocks.0.mlp.up")


def test_an_interruption_leaves_out_what_was_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    search, asked = explanation.candidate, []

    def stopped(*arguments: Any) -> Any:
        asked.append(arguments)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return search(*arguments)

    monkeypatch.setattr(explanation, "candidate", stopped)
    found = explained()
    assert [each.kind for each in found.candidates] == ["automatic", "data parallel"]
    assert found.curve == () and found.notes == ("interrupted: what had not been searched is left out",)
    assert "note: interrupted" in found.summary() and found.cap_cost == 0.0
