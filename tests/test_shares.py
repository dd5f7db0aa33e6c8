"""Shares of the model that stages have where slow links sum gradients: meshes are judged by those they will have."""

from __future__ import annotations

import numpy as np
import pytest
from test_uneven import FAST, job_of, solved, step_s

from autopar.planner.shares import equally_long, soonest
from cost_model.cluster import Cluster
from cost_model.collectives import Link
from cost_model.network import Network


@pytest.mark.parametrize("seed", range(4))
def test_no_shares_cost_less(seed: int) -> None:
    draw = np.random.default_rng(seed)
    work_s, once_s = draw.exponential(size=5), draw.exponential(size=5)
    once_s[draw.integers(5)] *= seed % 2  # a stage of one replica sums nothing

    def costs_s(of: np.ndarray) -> np.ndarray:
        return (of * work_s).max(axis=1) + (of * once_s).max(axis=1)

    found = soonest(work_s[None], once_s[None], 0.0)
    drawn = 5 * draw.dirichlet(np.ones(5), size=20_000)
    assert found.sum(axis=1) == pytest.approx(5)
    assert costs_s(found)[0] <= costs_s(drawn).min() * (1 + 1e-9)
    near = np.abs(found * (1 + draw.normal(scale=1e-3, size=(1000, 5))))
    assert costs_s(found)[0] <= costs_s(5 * near / near.sum(axis=1, keepdims=True)).min() * (1 + 1e-9)
    held = soonest(work_s[None], once_s[None], 0.5)
    assert held.sum(axis=1) == pytest.approx(5) and held.min() >= 0.5 * (1 - 1e-9)


def test_stages_that_sum_nothing_are_equally_long() -> None:
    work_s = np.array([[1.0, 2.0, 4.0]])
    assert soonest(work_s, np.zeros((1, 3)), 0.0) == pytest.approx(equally_long(work_s, 0.0))
    assert np.ptp(equally_long(work_s, 0.0) * work_s) == pytest.approx(0)


def nodes(*sizes: int, gbits: float = 0.16) -> Cluster:
    """Nodes of so many devices, far from each other."""
    count = len(sizes)
    rates = tuple(tuple(5e9 if a == b else gbits / 8 * 1e9 for b in range(count)) for a in range(count))
    delays = tuple(tuple(1e-4 if a == b else 0.02 for b in range(count)) for a in range(count))
    node_of = tuple(node for node, size in enumerate(sizes) for _ in range(size))
    inside = (Link(1e-5, 4e10),) * count
    network = Network(tuple(map(str, range(count))), delays, rates, tuple(range(count)), node_of, inside, 1e-5)
    return Cluster("nodes", (FAST,) * sum(sizes), (), "nccl", network)


@pytest.mark.parametrize(("sizes", "pins"), [((3, 5, 8), {"dp": 8, "pp": 2}), ((3, 5, 4), {"dp": 4, "pp": 3})])
def test_meshes_are_judged_with_ends_of_stages_moved(sizes: tuple[int, ...], pins: dict[str, int]) -> None:
    """A stage of which replicas lie on several nodes has next to nothing of the model; they are placed so that few
    are."""
    cluster = nodes(*sizes)
    free, pinned = (job_of(cluster, 2048, 12, microbatch_size=512, **own) for own in ({}, pins))
    found, known = solved(free), solved(pinned)
    assert min(stage.last - stage.first for stage in known.stages) <= 2
    assert step_s(free, found) <= step_s(pinned, known) * (1 + 1e-6)


def test_microbatches_are_as_large_as_samples_gain_by() -> None:
    """Samples of one row each: a device computes thousands of them as fast as hundreds."""
    cluster = nodes(3, 5, 4)
    free, pinned = (job_of(cluster, 2048, 6, dp=4, pp=3, **own) for own in ({}, {"microbatch_size": 16}))
    found = solved(free)
    assert found.configuration.microbatch_size > 16
    assert step_s(free, found) < 0.9 * step_s(pinned, solved(pinned))


def test_devices_behind_slow_links_may_repeat_what_others_do() -> None:
    """On nine devices, no mesh of which has groups of replicas or shards within nodes."""
    cluster = nodes(5, 4, gbits=0.02)
    free, pinned = (job_of(cluster, 2048, 4, **own) for own in ({"tp": None}, {"tp": 9}))  # type: ignore[arg-type]
    found_s, apart = step_s(free, solved(free)), job_of(cluster, 2048, 4, dp=9)
    assert found_s <= step_s(pinned, solved(pinned)) * 1.01
    assert found_s < 0.2 * step_s(apart, solved(apart))
