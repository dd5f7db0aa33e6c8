"""How gradients are summed over replicas is chosen once more, where collectives may move behind compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
from models import example_gpt
from parity import ADAMW

from autopar.options import Options
from autopar.planning import Job
from autopar.reductions import _whole_state_fits
from cost_model.cluster import Cluster
from cost_model.parallelism import Parallelism

ZERO_1 = "zero 1"


@pytest.fixture(scope="module")
def job() -> Job:
    """Two replicas behind a slow link, where sums of whole gradients hide behind backward."""
    model, batch = example_gpt(n_layer=4, n_embd=64)
    batch = {name: value.repeat(16, 1) for name, value in batch.items()}
    cluster, pins = Cluster.load("p3.2xlarge", num_devices=2), Parallelism(dp=2, tp=1, pp=1)
    return Job.of(model, cluster, batch, Options.of(None, ADAMW, pins, None, None, None))


def test_state_is_whole_where_sums_then_hide_behind_backward(job: Job) -> None:
    chosen = job.decide(0.0)
    pins = job.options.parallelism
    steps_s = [job.step_s(job.under(replace(pins, zero=zero), None).decide(0.0).plan) for zero in (0, 1)]
    assert ZERO_1 in job.plan(job.solve()).saving_text() and ZERO_1 not in chosen.plan.saving_text()
    assert job.step_s(chosen.plan) <= min(steps_s) < steps_s[1]
    assert any("whole on every replica" in note for note in chosen.notes)


def test_state_stays_split_where_there_is_no_room_for_all_of_it(job: Job) -> None:
    split = job.under(replace(job.options.parallelism, zero=1, recompute="none"), None).decide(0.0).plan
    whole = job.under(replace(job.options.parallelism, zero=0, recompute="none"), None).decide(0.0).plan
    (needed,), (fewer,) = job.held_bytes(whole), job.held_bytes(split)
    roomy, tight = (job.under(job.options.parallelism, cap) for cap in (round(1.001 * needed), round(0.999 * needed)))
    assert fewer < 0.98 * needed and _whole_state_fits(roomy, split) and not _whole_state_fits(tight, split)
    least = job.under(job.options.parallelism, max(job.peaks(split)))
    assert least.fits(least.decide(0.0).plan)
