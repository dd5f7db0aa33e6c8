"""Ranks that tests share: programs that follow each other leave no process group behind, whose thread would go on."""

from __future__ import annotations

from pathlib import Path

import pytest
from regression import BATCH, TWO, Regression
from shared_ranks import _POOLS, shared_ranks  # noqa: F401  (a fixture)

import autopar


@pytest.mark.usefixtures("shared_ranks")
def test_programs_that_follow_each_other_leave_no_threads() -> None:
    threads = []
    for _ in range(3):
        pins = autopar.Parallelism(dp=1, tp=2, pp=1)
        with autopar.compile(Regression(), TWO, BATCH, parallelism=pins) as exe:
            exe.step(BATCH)
        ranks = [worker.process.pid for worker in _POOLS[2]._crew.workers]
        threads.append([len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in ranks])
    assert threads[1] == threads[2]
