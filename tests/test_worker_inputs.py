"""What a worker is given: the user's modules, and of a batch what its stage and replica read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from models import example_gpt
from parity import SGD, cpu_cluster
from regression import BATCH, TWO, Regression
from thread_ranks import thread_ranks  # noqa: F401

import autopar

TESTS = Path(__file__).resolve().parent
MODULE = """
import torch

class Slow(torch.optim.SGD):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr / 2)

def loss(outputs, inputs):
    return 3 * outputs
"""
SCRIPT = """
import autopar
from beside import Slow, loss
from parity import cpu_cluster
from regression import BATCH, Regression

with autopar.compile(Regression(), cpu_cluster(1), BATCH, optimizer=Slow, loss_fn=loss) as exe:
    print([exe.step(BATCH) for _ in range(3)])
model = Regression()
optimizer = Slow(model.parameters())
losses = []
for _ in range(3):
    losses.append(3 * model(**BATCH))
    optimizer.zero_grad()
    losses[-1].backward()
    optimizer.step()
print([float(found) for found in losses])
"""


def test_modules_beside_the_script_are_found_by_workers(tmp_path: Path) -> None:
    """Whatever the working directory is."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "beside.py").write_text(MODULE)
    (folder / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS)))}
    done = subprocess.run(
        [sys.executable, str(folder / "script.py")], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, expected = (eval(line) for line in done.stdout.splitlines())
    assert found == pytest.approx(expected, rel=1e-5)


def parts(**pins: Any) -> list[dict[str, list[int]]]:
    """Rank -> the shapes it gets of the leaves of a batch of 8 x 16."""
    model, batch = example_gpt(n_layer=1, tied=False)
    devices = pins.get("dp", 1) * pins.get("tp", 1) * pins.get("pp", 1)
    exe = autopar.compile(model, cpu_cluster(devices), batch, optimizer=SGD, parallelism=autopar.Parallelism(**pins))
    with exe:
        found = exe.parts(exe.batch_tensors(batch))
    return [{name: list(tensor.shape) for name, tensor in found[rank].items()} for rank in range(devices)]


def test_a_rank_gets_the_leaves_of_its_stage_and_the_rows_of_its_replica(
    thread_ranks: None,  # noqa: F811
) -> None:
    """The labels are counted over the whole batch, so that the last stage needs all of them."""
    assert parts(pp=2) == [{"idx": [8, 16]}, {"targets": [8, 16]}]
    assert parts(dp=2, tp=1) == [{"idx": [4, 16], "targets": [8, 16]}] * 2
    assert parts(dp=2, pp=2) == [{"idx": [4, 16]}] * 2 + [{"targets": [8, 16]}] * 2


def test_replicas_get_their_own_rows_and_the_estimate_counts_those(thread_ranks: None) -> None:  # noqa: F811
    with autopar.compile(Regression(), TWO, BATCH, optimizer=SGD, parallelism=autopar.Parallelism(dp=2)) as exe:
        found = exe.parts(exe.batch_tensors(BATCH))
        assert [part["x"].tolist() for part in found.values()] == [BATCH["x"][:4].tolist(), BATCH["x"][4:].tolist()]
        held = sum(tensor.nbytes for tensor in found[0].values())
        assert exe.estimate.stages[0].memory.inputs == held == sum(tensor.nbytes for tensor in BATCH.values()) // 2
