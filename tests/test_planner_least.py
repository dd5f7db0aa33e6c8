"""The least that chains cost, and floors of chains that are not made, against the chains."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from effort import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from models import example_gpt
from parity import ADAMW
from random_spaces import random_kind

from autopar.options import Options
from autopar.planner.bounds import TIME_ONLY
from autopar.planner.least import least_costs
from autopar.planner.segment import Price, Segment
from autopar.planner.space import ModelSpace
from autopar.planning import Job
from cost_model.cluster import Cluster
from cost_model.device import Device
from cost_model.device_rows import StreamRow
from cost_model.parallelism import Parallelism

TIME = Price(*TIME_ONLY)


@settings(max_examples=drawn(50), deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(1, 20))
def test_the_product_of_a_row_is_that_from_left_to_right(seed: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    segments = [Segment(random_kind(rng, True, True, False, True)) for _ in range(3)]
    row = tuple(int(kind) for kind in rng.integers(0, 3, length))
    prices = (TIME, Price(1.0, 0.5, 0.1, 0.2))
    for price, found in zip(prices, least_costs(row, segments, prices), strict=True):
        costs = [segments[kind].solve((price,))[0].cost for kind in row]
        whole = functools.reduce(lambda a, b: (a[:, :, None] + b[None]).min(axis=1), costs)
        assert found == pytest.approx(whole.min())


@functools.cache
def space(cluster: str) -> ModelSpace:
    model, inputs = example_gpt(n_layer=3, n_embd=512)
    options = Options.of(None, ADAMW, Parallelism(), None, None, None)
    return Job.of(model, Cluster.load(cluster, 32), inputs, options).space


def least_s(known: ModelSpace, dp: int, tp: int, size: int) -> float:
    chain = known.chain(dp, (tp,), size)
    assert chain is not None
    return float(least_costs(chain.sequence, [Segment(graph) for graph in chain.kinds], (TIME,))[0])


@pytest.mark.parametrize("cluster", ["p3.16xlarge", "dgx-a100-80gb", "a64fx"])
def test_no_chain_goes_below_its_floors(cluster: str) -> None:
    """Nor below those that follow from fewer ranks, in whatever order meshes are asked for."""
    whole = space(cluster).traced.global_graph.batch
    sizes = [size for size in range(1, whole + 1) if whole % size == 0]
    for dp, tp, size in itertools.product((1, 2), (16, 2, 8, 4, 1), sizes):
        time_s, floors_s = least_s(space(cluster), dp, tp, size), [-1.0]
        for _ in range(2):
            floor = space(cluster).floor(dp, (tp,), size, floors_s[-1])
            assert floor is not None and floor.segments == len(space(cluster).structure.segments)
            floors_s.append(floor.time_s)
        assert floors_s[1] <= floors_s[2] <= time_s * (1 + 1e-9), (dp, tp, size)
        assert floors_s[2] > 0.3 * time_s, (dp, tp, size)


def test_a_device_whose_large_ops_are_slower_says_by_how_much() -> None:
    assert StreamRow(((1e3, 2e9), (1e6, 8e9), (1e9, 4e9), (1e10, 5e9)), 0.0).slowing == 2.0
    assert Device.load("a100-sxm-80gb").slowing == 1.0
