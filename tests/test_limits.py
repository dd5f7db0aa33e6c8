"""Memory as the system sees it: a plan runs in what it says it needs, and a long run needs no more than a short one."""

from __future__ import annotations

import resource
from typing import Any

import pytest
from forked_ranks import started_ranks, workers  # noqa: F401  (a fixture)
from models import example_gpt
from parity import ADAMW, cpu_cluster
from regression import BATCH, Regression
from shared_ranks import end_ranks, fresh_ranks, shared_ranks  # noqa: F401  (fixtures)

import autopar
from autopar import Parallelism, Precision
from autopar.runtime import pool
from cost_model.errors import WorkerError

MIB = 2**20
HEAP_SHARE = 0.02
"""Pieces of memory too small for the next request."""
THREADS_BYTES = 4 * 8 * MIB + 8 * MIB
"""Counted though never touched: stacks of the two threads of each of two new process groups; and the program's text."""
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Ranks keep what they free, to be fast; with these they give it back, and the system's count is the allocator's."""


SETTLED = 600
"""Steps after which the heap of a rank has found its size: from 300 MiB it grows by 1 % before."""


def data_bytes(pid: int) -> int:
    """What RLIMIT_DATA counts: memory that a process may write and shares with no other."""
    with open(f"/proc/{pid}/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["VmData"].split()[0]) * 1024


def resident_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def train_within(cap_bytes: int, model: Any, batch: Any, **keywords: Any) -> list[float]:
    """Two steps on ranks that may take no more than the cap beside what a tiny program takes."""
    with autopar.compile(Regression(), cpu_cluster(2), BATCH, optimizer=ADAMW) as tiny:
        tiny.step(BATCH)
    allowed = int((1 + HEAP_SHARE) * cap_bytes) + THREADS_BYTES
    limits = {pid: data_bytes(pid) + allowed for pid in workers()}
    with autopar.compile(model, cpu_cluster(2), batch, optimizer=ADAMW, **keywords) as exe:
        for pid, limit in limits.items():
            resource.prlimit(pid, resource.RLIMIT_DATA, (limit, limit))
        return [exe.step(batch) for _ in range(2)]


@pytest.mark.slow
@pytest.mark.usefixtures("started_ranks", "fresh_ranks")
def test_what_fits_a_cap_runs_in_it_and_plain_data_parallel_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "WORKER_ENVIRONMENT", {**pool.WORKER_ENVIRONMENT, **GIVES_BACK})
    model, batch = example_gpt(n_embd=384, n_layer=6, n_head=6, vocab_size=2048, block_size=128, tied=True)
    length = 128 // batch["idx"].shape[1]
    batch = {name: value.repeat(1, length) for name, value in batch.items()}
    plain = Parallelism(dp=2, zero=0, recompute="none", microbatch_size=4)
    free = autopar.estimate(model, cpu_cluster(2), batch, optimizer=ADAMW, parallelism=plain)
    cap = int(0.6 * free.peak_bytes)
    pins = Parallelism(dp=2, tp=1, pp=1)
    losses = train_within(cap, model, batch, memory_cap=cap, parallelism=pins)
    assert losses[1] < losses[0]
    end_ranks()
    with pytest.raises(WorkerError, match="can't allocate memory|was killed|MemoryError|bad_alloc"):
        train_within(cap, model, batch, memory_cap=2 * free.peak_bytes, parallelism=plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "pins"),
    [
        (Precision(), {"dp": 2, "zero": 1}),
        (Precision(), {"pp": 2, "microbatch_size": 2}),
        (Precision(params="bf16", grads="fp32", master="fp32"), {"dp": 2, "zero": 3}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("started_ranks", "fresh_ranks")
def test_two_hundred_steps_take_no_more_memory(precision: Precision, pins: dict[str, int]) -> None:
    model, batch = example_gpt(tied=True)
    parallelism = Parallelism(**{"dp": 1, "tp": 1, "pp": 1, **pins})
    with autopar.compile(
        model, cpu_cluster(2), batch, optimizer=ADAMW, precision=precision, parallelism=parallelism, max_grad_norm=1.0
    ) as exe:
        for _ in range(SETTLED):
            exe.step(batch)
        early = [resident_bytes(pid) for pid in workers()]
        for _ in range(200):
            exe.step(batch)
        late = [resident_bytes(pid) for pid in workers()]
    growth = [b - a for a, b in zip(early, late, strict=True)]
    assert max(growth) < MIB // 2, growth
