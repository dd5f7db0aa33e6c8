"""A traced step of real ranks: the names of the estimate, in an order that can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import example_gpt
from parity import SGD, cpu_cluster
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)

import autopar

pytestmark = pytest.mark.usefixtures("shared_ranks")


def spans(events: list[dict[str, Any]], process: int) -> dict[tuple[int, str], float]:
    """(stream, name) -> when it ended, microseconds."""
    return {(e["tid"], e["name"]): e["ts"] + e["dur"] for e in events if e["ph"] == "X" and e["pid"] == process}


PINS: tuple[dict[str, Any], ...] = (
    {"dp": 2},
    {"dp": 2, "zero": 3},
    {"tp": 2},
    {"pp": 2, "microbatch_size": 4},
    {"pp": 2, "microbatch_size": 4, "schedule": "zero_bubble"},
    {"pp": 2, "microbatch_size": 4, "virtual_stages": 2},
)


@pytest.mark.parametrize("pins", PINS, ids=str)
def test_a_traced_step_lies_beside_the_estimated_one(tmp_path: Path, pins: dict[str, int]) -> None:
    parallelism = autopar.Parallelism(**pins)
    model, batch = example_gpt(n_layer=4)
    with autopar.compile(
        model, cpu_cluster(2), batch, optimizer=SGD, parallelism=parallelism, max_grad_norm=1.0
    ) as exe:
        losses = [exe.eval_step(batch), exe.trace(tmp_path / "step.json", batch)]
        assert losses[0] == losses[1] and exe.steps == 1 and exe.eval_step(batch) < losses[0]
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    labels = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    stages = range(exe.plan.pp)
    assert [labels[stage] for stage in stages] == [f"stage {stage}, estimated" for stage in stages]
    for rank in range(2):
        stage = rank if "pp" in pins else 0
        assert labels[1000 + rank] == f"rank {rank} of stage {stage}, measured"
        measured, estimated = spans(events, 1000 + rank), spans(events, stage)
        assert measured.keys() == estimated.keys()
        assert measured[(0, "forward 0")] < measured[(0, "backward 0")] < measured[(0, "all_reduce world")]
