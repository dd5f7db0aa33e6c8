"""Ctrl-C and progress, in processes of their own: a real SIGINT, a real terminal."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'examples'}"}

SCRIPT = """
import contextlib, json, time
import autopar, autopar.planning
from models import example_gpt
from parity import ADAMW, cpu_cluster

@contextlib.contextmanager
def watched():
    def report(progress):
        if progress.best_s is not None:
            print("found", flush=True)
            time.sleep(100)  # a search that takes long
    yield report

autopar.planning.planning_progress = watched
model, batch = example_gpt(n_layer=1)
found = autopar.estimate(model, cpu_cluster(2), batch, optimizer=ADAMW)
print(json.dumps({"gap": found.gap, "notes": found.notes, "dp": found.plan.dp * found.plan.tp * found.plan.pp}))
"""


def test_a_real_interrupt_gives_the_best_plan_so_far_with_its_gap() -> None:
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "found\n"
        process.send_signal(signal.SIGINT)
        told = json.loads(process.stdout.readline())
        assert process.wait(timeout=60) == 0
    assert any(note.startswith("interrupted after 1 of") for note in told["notes"])
    assert told["gap"] >= 0 and told["dp"] == 2


WATCHED = """
from autopar.planner.search import Configuration
from autopar.planner.solution import Progress
from autopar.progress import planning_progress

with planning_progress() as report:
    if report is not None:
        report(Progress(9, 3, 0.012, 0.01, Configuration(1, 1, 1, "1f1b", 1, 1)))
print(report is not None)
"""


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_progress_is_for_a_terminal_of_rank_0(rank: str, shown: bool) -> None:
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    environment, command = {**ENVIRONMENT, "RANK": rank, "TERM": "xterm"}, [sys.executable, "-c", WATCHED]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=theirs, timeout=60, check=True)
    text = os.read(ours, 100_000).decode() if shown else ""
    assert done.stdout == f"{shown}\n".encode() and ("planning, best 12.0 ms" in text) == shown
    if not shown:
        with pytest.raises(BlockingIOError):
            os.read(ours, 1)
    os.close(ours)
    os.close(theirs)
