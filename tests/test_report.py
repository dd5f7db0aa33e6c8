"""Reports: what they say is what the plan and the estimate hold."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re

import pytest
from models import example_gpt
from parity import ADAMW

import autopar
from autopar.options import Options
from autopar.planning import Job, Planned
from autopar.report import (
    WIDTH,
    bytes_text,
    estimate_text,
    estimate_tree,
    gap_text,
    make_table,
    percent_text,
    placement_text,
    plan_text,
    render,
    seconds_text,
)
from cost_model.labels import folded, split_number
from cost_model.parallelism import Parallelism
from cost_model.placement import Shard, parse_placement
from cost_model.plan import Plan
from cost_model.shards import ParameterShard

CLUSTER = autopar.Cluster.load("dgx2-v100-32gb", num_devices=4)


@functools.cache
def job() -> Job:
    model, batch = example_gpt(n_layer=4)
    return Job.of(model, CLUSTER, batch, Options.of(None, ADAMW, None, None, None, None))


@functools.cache
def planned(**pins: int) -> Planned:
    """The plan of one traced model under pins."""
    under = job().under(Parallelism(**pins), None)
    return under.planned(under.decide(0.0))


MESHES = pytest.mark.parametrize(
    "pins",
    [{"dp": 4, "tp": 1}, {"dp": 1, "tp": 4}, {"dp": 2, "tp": 2}, {"dp": 2, "pp": 2}, {"tp": 2, "pp": 2}],
    ids=str,
)


def rows_under(text: str, title: str) -> list[list[str]]:
    """Cells of the table below a title: runs of words with at least two blanks between."""
    lines = text[text.index(title) :].split("\n\n")[0].splitlines()[3:]
    return [re.split(r"\s{2,}", line.strip()) for line in lines]


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ((), ""),
        (("h.0", "h.1", "h.2"), "h.0..2"),
        (("token", "h.0", "h.1", "norm"), "token, h.0..1, norm"),
        (("h.1", "h.0"), "h.1, h.0"),
        (("h.0", "h.2", "h.3"), "h.0, h.2..3"),
        (("h.0.up", "h.1.up", "h.1.down"), "h.0..1.up, h.1.down"),
        (("block", "block", "head"), "block x 2, head"),
        (("0", "1"), "0..1"),
        (("conv1", "conv2"), "conv1, conv2"),
        (("h.0", "h.0"), "h.0, h.0"),
    ],
)
def test_labels_fold(labels: tuple[str, ...], text: str) -> None:
    assert folded(labels) == text


def test_the_first_number_of_a_name_counts() -> None:
    assert split_number("a.1.b.2") == ("a.", 1, ".b.2")
    assert split_number("a1.b") is None


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (seconds_text(1.234), "1.23 s"),
        (seconds_text(0.0456), "45.6 ms"),
        (seconds_text(789e-6), "789 us"),
        (seconds_text(5e-8), "50.0 ns"),
        (seconds_text(0.0), "0"),
        (bytes_text(512), "512 B"),
        (bytes_text(1536), "1.50 KiB"),
        (bytes_text(30 * 2**30), "30.0 GiB"),
        (percent_text(0.1234), "12.3%"),
        (gap_text(math.inf), "how far its price is from the best is not known"),
        (gap_text(0.0123), "the price of the plan found is at most 1.23% above a proven lower bound"),
        (gap_text(1e-5), "the price of the plan found is at most 0.01% above a proven lower bound"),
        (gap_text(0.0), "no plan that was searched for has a lower price than the one found"),
        (placement_text(Shard(1)), "split along dim 1"),
        (placement_text(Shard(0, 3)), "split along dim 0, each of its 3 parts"),
        (placement_text(parse_placement("V")), "whole; its gradient is summed over tp"),
    ],
)
def test_figures_in_words(found: str, text: str) -> None:
    assert found == text


def test_a_table_as_text() -> None:
    table = make_table("Title", ("name", "[size]"), [("a", "1"), ("bc", "23")])
    assert render(table) == "Title\nname   [size]\n─────────────\na           1\nbc         23\n"


@MESHES
def test_plan_text_is_plain_and_narrow(pins: dict[str, int]) -> None:
    text = plan_text(planned(**pins), CLUSTER)
    plan = planned(**pins).plan
    assert "\x1b" not in text and max(map(len, text.splitlines())) <= WIDTH
    assert f"dp={plan.dp} x tp={plan.tp} x pp={plan.pp}, batch 8: " in text
    assert "4 x v100-sxm2-32gb (dgx2-v100-32gb)" in text


PLACED = {"up.weight": "S(0)", "down.weight": "S(1)", "qkv.weight": "S(0,3)", "head.weight": "S(0)", "bias": "V"}


def placed(found: Planned) -> Planned:
    """The same plan with parameters placed by the ends of their names."""

    def shard(given: ParameterShard) -> ParameterShard:
        text = next((text for end, text in PLACED.items() if given.name.endswith(end)), "R")
        return dataclasses.replace(given, placement=text)

    program = found.linked.program
    stages = [dataclasses.replace(s, parameters=tuple(map(shard, s.parameters))) for s in program.stages]
    linked = dataclasses.replace(found.linked, program=dataclasses.replace(program, stages=tuple(stages)))
    other = dataclasses.replace(found)
    vars(other)["linked"] = linked  # what the property would make
    return other


@MESHES
def test_every_split_parameter_is_named(pins: dict[str, int]) -> None:
    found = placed(planned(**pins))
    text = plan_text(found, CLUSTER)
    if found.plan.tp == 1:
        assert "Parameters on the tp axis" not in text
        return
    stages = found.linked.program.stages
    shards = {shard.name: shard.placement for stage in stages for shard in stage.parameters}
    rows = rows_under(text, "Parameters on the tp axis")
    told = {name: row[1] for row in rows for name in unfolded(row[0])}
    split = {name: placement_text(parse_placement(text)) for name, text in shards.items() if text.startswith("S")}
    assert len(split) == 3 * 4 and {name: told.get(name) for name in split} == split
    assert ["blocks.0..3.attention.qkv.weight", "split along dim 0, each of its 3 parts"] in [row[:2] for row in rows]
    others = sum(int(row[0].split()[0]) for row in rows if row[0].endswith("others"))
    assert others == len(shards) - len(split)


def unfolded(text: str) -> list[str]:
    """Inverse of ``folded``, but for equal neighbours."""
    names = []
    for part in text.split(", "):
        run = re.fullmatch(r"(.*?)(\d+)\.\.(\d+)(.*)", part)
        names += [f"{run[1]}{n}{run[4]}" for n in range(int(run[2]), int(run[3]) + 1)] if run else [part]
    return names


@MESHES
def test_every_collective_is_counted(pins: dict[str, int]) -> None:
    found = planned(**pins)
    rows = rows_under(plan_text(found, CLUSTER), "Communication of each rank")
    told = sum(int(row[4]) * len(unfolded(row[3])) for row in rows if not row[1].startswith("send"))
    sends = sum(int(row[4]) * len(unfolded(row[3])) for row in rows if row[1].startswith("send"))
    stages = found.linked.program.stages
    blocks = sum(len(block.collectives()) for s in stages for chunk in s.chunks for block in chunk.blocks)
    assert told == blocks + sum(len(s.step.collectives) + len(s.step.gathers) for s in stages)
    assert sends == 2 * (found.plan.pp - 1)


@MESHES
def test_stages_cover_the_model_in_order(pins: dict[str, int]) -> None:
    found = planned(**pins)
    labels = [label for stage in range(found.plan.pp) for own in found.plan.labels(stage) for label in own]
    assert tuple(labels) == found.plan.segment_labels
    assert [line.partition(": ")[2] for line in str(found.plan).splitlines()[1:]] == [
        found.plan.labels_text(stage) for stage in range(found.plan.pp)
    ]


def test_choices_of_segments_are_told_with_neighbours_that_are_alike_in_one_row() -> None:
    """Of four equal blocks the second is made again, and holds one parameter whole on every replica."""
    base = planned(dp=4, tp=1, zero=1, recompute="none", schedule="1f1b")
    (stage,), segments = base.plan.stages, base.job.traced.segments
    second = base.plan.segment_labels.index("blocks.1")
    whole = f"zero:{segments[second].parameters[0]}"
    levels = tuple("full" if index == second else "none" for index in range(len(segments)))
    choices = {key: label for key, label in stage.choices.items() if key != whole}
    changed = dataclasses.replace(stage, choices=choices, recompute=levels)
    plan = dataclasses.replace(base.plan, stages=(changed,))
    rows = rows_under(plan_text(dataclasses.replace(base, plan=plan), CLUSTER), "Choices of each segment")
    others = len(segments[second].parameters) - 1
    assert [row[2:] for row in rows] == [
        ["whole", "1", "none"], ["whole", f"0 (1), 1 ({others})", "full"], ["whole", "1", "none"]
    ]  # fmt: skip
    assert [label for row in rows for label in unfolded(row[1])] == list(plan.segment_labels)


def test_split_parameters_are_counted_by_segment() -> None:
    base = planned(dp=2, tp=2)
    (stage,), segments = base.plan.stages, base.job.traced.segments
    last = base.plan.segment_labels.index("blocks.3")
    names = segments[last].parameters
    split = {f"input:{name}": "S(0)" for name in names[:2]}
    plan = dataclasses.replace(base.plan, stages=(dataclasses.replace(stage, choices=stage.choices | split),))
    other = dataclasses.replace(base, plan=plan)
    vars(other)["linked"] = base.linked  # what the property would make
    rows = rows_under(plan_text(other, CLUSTER), "Choices of each segment")
    assert [row[1:3] for row in rows if row[2] != "whole"] == [["blocks.3", f"2 of {len(names)} split"]]


def test_parts_are_shown_with_their_sums() -> None:
    found = planned(dp=2, pp=2)
    text = plan_text(found, CLUSTER)
    assert rows_under(text, "Step time")[-1] == ["step", seconds_text(found.estimate.step_time_s), "100.0%"]
    for row, stage in zip(rows_under(text, "Memory of each device"), found.estimate.stages, strict=True):
        assert float(row[-1]) == pytest.approx(stage.peak_bytes / 2**20, abs=0.06)
        assert sum(map(float, row[1:-1])) == pytest.approx(stage.peak_bytes / 2**20, abs=0.4)


def test_notes_are_shown() -> None:
    found = planned(dp=2, tp=2)
    noted = dataclasses.replace(found.estimate, notes=("aten.strange has no rule", "it [timed] out"))
    for text in (plan_text(dataclasses.replace(found, estimate=noted), CLUSTER), estimate_text(noted, CLUSTER)):
        assert "note: aten.strange has no rule\nnote: it [timed] out\n" in text


@pytest.mark.parametrize("gap", [0.25, math.inf])
def test_the_tree_is_json_and_holds_the_plan(gap: float) -> None:
    estimate = dataclasses.replace(planned(dp=1, tp=4).estimate, gap=gap)
    tree = json.loads(json.dumps(estimate_tree(estimate), allow_nan=False))
    assert Plan.from_json(json.dumps(tree["plan"])) == estimate.plan
    assert tree["gap"] == (0.25 if math.isfinite(gap) else None)
    assert tree["step_time_s"] == pytest.approx(sum(tree["breakdown"].values()))
    assert tree["peak_bytes"] == max(sum(stage["memory"].values()) for stage in tree["stages"])


def test_other_pins_share_the_trace() -> None:
    base = job()
    under = base.under(Parallelism(dp=4, tp=1, pp=1), 2**30)
    assert under.traced is base.traced and under.cap_bytes == 2**30
    assert base.options.parallelism == Parallelism() and base.cap_bytes == CLUSTER.memory_cap_bytes
