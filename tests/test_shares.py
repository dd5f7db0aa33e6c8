"""Shares of the model that stages have where slow links sum gradients: meshes are judged by those they will have."""

from __future__ import annotations

import numpy as np
import pytest
from test_uneven import FAST, job_of, sizes, solved, step_s

from autopar.planner.shares import shares
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

    found = shares(work_s, once_s, 0.0)
    drawn = 5 * draw.dirichlet(np.ones(5), size=20_000)
    assert found.sum(axis=1) == pytest.approx(5)
    assert costs_s(found).min() <= costs_s(drawn).min() * (1 + 1e-9)
    near = np.abs(found[costs_s(found).argmin()] * (1 + draw.normal(scale=1e-3, size=(1000, 5))))
    assert costs_s(found).min() <= costs_s(5 * near / near.sum(axis=1, keepdims=True)).min() * (1 + 1e-9)
    held = shares(work_s, once_s, 0.5)
    assert held.sum(axis=1) == pytest.approx(5) and held.min() >= 0.5 * (1 - 1e-9)


def test_meshes_are_judged_with_ends_of_stages_moved() -> None:
    """Nodes of three, five and eight: of two stages, that of which replicas lie on one node takes nearly the model."""
    nodes = (3, 5, 8)
    rates = tuple(tuple(5e9 if a == b else 2e7 for b in range(3)) for a in range(3))
    delays = tuple(tuple(1e-4 if a == b else 0.02 for b in range(3)) for a in range(3))
    node_of = tuple(node for node, size in enumerate(nodes) for _ in range(size))
    inside = (Link(1e-5, 4e10),) * 3
    network = Network(("a", "b", "c"), delays, rates, tuple(range(3)), node_of, inside, 1e-5)
    cluster = Cluster("nodes", (FAST,) * 16, (), "nccl", network)
    free, pinned = (job_of(cluster, 2048, 12, microbatch_size=512, **pins) for pins in ({}, {"dp": 8, "pp": 2}))
    found, known = solved(free), solved(pinned)
    assert sizes(known)[0] <= 2
    assert step_s(free, found) <= step_s(pinned, known) * (1 + 1e-6)
