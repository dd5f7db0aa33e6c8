"""Under torchrun every rank runs the same script: same loss, same errors, and a dead rank ends the job."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import SGD, largest_error, reference
from processes import all_gone, descendants
from regression import BATCH, Regression

import autopar

TESTS = Path(__file__).resolve().parent
TIMEOUT_S = 120.0


def finish(mode: str, folder: Path) -> tuple[int, str]:
    """torchrun --nproc-per-node 2 launched.py MODE FOLDER: exit code and output; it must leave no process.

    On a port of its own, so that other jobs may run beside it.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join((str(TESTS.parent), str(TESTS)))
    with (folder / "output.txt").open("w") as output:
        job = subprocess.Popen(
            [*launcher, str(TESTS / "launched.py"), mode, str(folder)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    ranks = _watch(job)
    text = (folder / "output.txt").read_text()
    assert len(ranks) >= 2 and all_gone(ranks), text
    return job.returncode, text


def _watch(job: subprocess.Popen[bytes]) -> list[int]:
    """Every process that a job started; those of a job that does not end are killed."""
    started: list[int] = []
    deadline = time.monotonic() + TIMEOUT_S
    while job.poll() is None:
        started += [pid for pid in descendants(job.pid) if pid not in started]
        time.sleep(0.1)
        if time.monotonic() > deadline:
            for pid in (job.pid, *started):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    return started


def seen_by_ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def test_both_ranks_train_what_one_device_trains(tmp_path: Path) -> None:
    code, output = finish("trains", tmp_path)
    assert code == 0, output
    assert [f"rank {rank} left with" in output for rank in range(2)] == [True, True]
    assert output.count("thread(s), 0 of gloo") == 2, output
    losses, trained = reference(Regression(), BATCH, SGD)
    for rank, seen in enumerate(seen_by_ranks(tmp_path)):
        assert seen["first"]["losses"] == pytest.approx(losses, rel=1e-5)
        assert seen["second"] == pytest.approx(losses, rel=1e-5)
        assert largest_error(seen["first"]["state"], trained.state_dict()) < 1e-5
        assert (seen["first"]["is_main"], seen["left_by_close"], seen["kept_by_close"]) == (rank == 0, True, True)
    one, two = seen_by_ranks(tmp_path)
    assert all(torch.equal(one["first"]["state"][name], tensor) for name, tensor in two["first"]["state"].items())
    assert [one["first"][name] for name in ("losses", "plan", "notes")] == [
        two["first"][name] for name in ("losses", "plan", "notes")
    ]
    assert autopar.Plan.from_json(one["first"]["plan"]).tp == 2


def test_every_rank_gets_the_same_error_and_may_go_on_until_one_ends_the_job(tmp_path: Path) -> None:
    code, output = finish("refuses", tmp_path)
    assert code != 0
    assert "InfeasiblePlanError: no plan fits under 1.0 KiB per device; the smallest cap that would do is" in output
    one, two = seen_by_ranks(tmp_path)
    assert one == two
    types = {name: error["type"] for name, error in one.items() if name != "step"}
    assert types == {
        "world size": "WorldSizeError",
        "world size, lazily": "WorldSizeError",
        "pins": "ParallelismError",
        "cap": "InfeasiblePlanError",
        "weights": "ConfigError",
        "batch": "ConfigError",
        "shapes": "BatchError",
    }
    assert (one["world size"]["world_size"], one["world size"]["num_devices"]) == (2, 3)
    assert one["cap"]["cap_bytes"] == 1024 < one["cap"]["needed_bytes"] and one["cap"]["tensors"]
    assert (
        "rank 1 has another model than rank 0 ('up.weight' differs); call torch.manual_seed"
        in one["weights"]["message"]
    )
    assert "rank 1 has another batch than rank 0 ('x' differs); pass the same global batch" in one["batch"]["message"]
    assert one["step"] == pytest.approx(reference(Regression(), BATCH, SGD)[0][0], rel=1e-5)


@pytest.mark.parametrize(
    ("mode", "reason"), [("dies", "Signal 9 (SIGKILL)"), ("fails", "RuntimeError: the user's own error on one rank")]
)
def test_a_rank_that_is_gone_ends_the_job(tmp_path: Path, mode: str, reason: str) -> None:
    code, output = finish(mode, tmp_path)
    assert code != 0 and reason in output
