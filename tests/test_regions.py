"""Layout and placement on DT-FM's networks and on a thousand devices: never slower than others, found in time."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from cost_model.cluster import Cluster

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))
import regions  # noqa: E402

sys.path.remove(str(FOLDER))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "gain"), [(1, 1.0), (2, 1.0), (3, 1.2), (4, 1.2), (5, 1.2)])
def test_layouts_of_the_five_networks(number: int, gain: float) -> None:
    """Against the published placement by so much, and against Megatron-LM's default and random ones."""
    found = regions.compared(regions.job_of(24, 1024, Cluster.load(f"dtfm-case{number}")))
    assert found["automatic_s"] * gain <= found["published_s"]
    assert found["automatic_s"] <= min(found["megatron_s"], *found["random_s"])
    assert found["search_cpu_s"] < 12  # 10 on a quiet machine, where it is 5 to 7


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_devices_in_32_regions_are_planned_within_a_minute() -> None:
    job = regions.job_of(24, 16384, regions.large())
    start = time.process_time()
    decision = job.decide(time.perf_counter())
    assert time.process_time() - start < 60
    assert sorted(decision.plan.placement) == list(range(1024))
    by_hand = [regions.published(decision.plan.pp, decision.plan.dp), tuple(range(1024))]
    own_s = regions.seconds(job, decision.plan)
    for placement in by_hand:
        assert own_s <= regions.seconds(job, regions.replace(decision.plan, placement=placement))
