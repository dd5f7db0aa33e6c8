"""Prices of collectives: closed forms by hand, laws, and levels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_model.cluster import Cluster, Level, Measured
from cost_model.collectives import FLAT, Link, Tier, all_gather_s, all_reduce_s, collective_s
from cost_model.device import Device
from cost_model.errors import ConfigError, UnknownNameError

A, B = 1e-5, 1e9
LINK = Link(A, B)
KINDS = tuple(FLAT)
CPU = Device.load("cpu")


def flat(kind: str, ranks: int, nbytes: float) -> float:
    return collective_s(kind, nbytes, (Tier(ranks, LINK),))


def test_large_all_reduces_are_rings() -> None:
    assert flat("all_reduce", 4, 4e9) == pytest.approx(6 * (A + 1e9 / B))


def test_small_all_reduces_double() -> None:
    assert flat("all_reduce", 8, 8) == pytest.approx(3 * (A + 8 / B))


def test_gathers_and_scatters_by_hand() -> None:
    for kind in ("all_gather", "reduce_scatter"):
        assert flat(kind, 4, 4e9) == pytest.approx(3 * (A + 1))
        assert flat(kind, 8, 8) == pytest.approx(3 * A + 15 / B)


def test_all_to_all_and_broadcast_by_hand() -> None:
    assert flat("all_to_all", 4, 4e9) == pytest.approx(3 * (A + 1))
    assert flat("broadcast", 4, 8) == pytest.approx(2 * (A + 8 / B))
    assert flat("broadcast", 4, 4e9) == pytest.approx(3 * A + 4)


@given(st.sampled_from(KINDS), st.integers(1, 64), st.floats(0, 1e10), st.floats(1, 4))
def test_more_bytes_never_take_less(kind: str, ranks: int, nbytes: float, more: float) -> None:
    assert flat(kind, ranks, nbytes) <= flat(kind, ranks, nbytes * more) * (1 + 1e-12)
    assert (flat(kind, ranks, nbytes) > 0) == (ranks > 1)


@given(st.integers(2, 64), st.floats(0, 1e10))
def test_an_all_reduce_is_at_most_a_reduce_scatter_and_an_all_gather(ranks: int, nbytes: float) -> None:
    assert all_reduce_s(ranks, nbytes, LINK) <= 2 * (ranks - 1) * LINK.seconds(nbytes / ranks) * (1 + 1e-12)
    assert all_gather_s(ranks, nbytes, LINK) >= nbytes * (ranks - 1) / ranks / B


@given(st.sampled_from(KINDS), st.integers(1, 8), st.integers(1, 8), st.floats(0, 1e10))
def test_levels_help_and_never_hurt(kind: str, inner: int, outer: int, nbytes: float) -> None:
    tiers = (Tier(inner, Link(1e-6, 1e11)), Tier(outer, LINK))
    assert collective_s(kind, nbytes, tiers) <= flat(kind, inner * outer, nbytes) * (1 + 1e-12)


def test_a_hierarchical_all_reduce_by_hand() -> None:
    inner = Link(1e-6, 1e11)
    by_hand = 2 * 7 * (1e-6 + 1e9 / 8 / 1e11) + 2 * 3 * (A + 1e9 / 8 / 4 / B)
    assert collective_s("all_reduce", 1e9, (Tier(8, inner), Tier(4, LINK))) == pytest.approx(by_hand)


def two_levels(num_devices: int) -> Cluster:
    levels = (Level("inner", 4, 2e-6, Link(1e-6, 1e11)), Level("outer", 16, 5e-6, LINK))
    return Cluster("test", (CPU,) * num_devices, levels, "gloo")


def test_a_group_is_priced_by_the_levels_it_spans() -> None:
    cluster, nbytes = two_levels(16), 1e8
    inside = collective_s("all_gather", nbytes, (Tier(4, Link(1e-6, 1e11)),))
    assert cluster.collective_time_s("all_gather", nbytes, (4, 5, 6, 7)) == pytest.approx(2e-6 + inside)
    across = collective_s("all_gather", nbytes, (Tier(4, LINK),))
    assert cluster.collective_time_s("all_gather", nbytes, (1, 5, 9, 13)) == pytest.approx(5e-6 + across)
    both = collective_s("all_gather", nbytes, (Tier(2, Link(1e-6, 1e11)), Tier(2, LINK)))
    assert cluster.collective_time_s("all_gather", nbytes, (0, 1, 4, 5)) == pytest.approx(5e-6 + both)


def test_an_uneven_group_is_priced_as_the_full_one() -> None:
    cluster = two_levels(16)
    uneven = cluster.collective_time_s("all_reduce", 1e8, (0, 1, 2, 3, 4))
    assert uneven == pytest.approx(cluster.collective_time_s("all_reduce", 1e8, tuple(range(8))))


def test_a_measured_curve_replaces_the_formula_for_its_group_size() -> None:
    curve = Measured("all_reduce", 2, ((1000.0, 1e-4), (3000.0, 3e-4)))
    level = Level("loopback", 4, 0.0, LINK, (curve, Measured("transfer", 2, ((1.0, 7e-5),))))
    cluster = Cluster("test", (CPU,) * 4, (level,), "gloo")
    pair = {n: cluster.collective_time_s("all_reduce", n, (0, 1)) for n in (10, 1000, 2000, 3000, 6000)}
    assert pair == {10: 1e-4, 1000: 1e-4, 2000: pytest.approx(2e-4), 3000: 3e-4, 6000: pytest.approx(6e-4)}
    assert cluster.collective_time_s("all_reduce", 2000, (0, 1, 2)) == all_reduce_s(3, 2000, LINK)
    assert cluster.transfer_time_s(1, 0, 3) == 7e-5


def test_rings_over_a_matrix_go_in_the_order_of_the_group() -> None:
    """Four devices whose fast links make the ring 0-2-1-3; a placement may name them in that order."""
    bandwidth = np.full((4, 4), 1e8)
    for i, j in ((0, 2), (2, 1), (1, 3), (3, 0)):
        bandwidth[i, j] = bandwidth[j, i] = 1e10
    cluster = Cluster.from_matrix(device="cpu", latency_s=np.full((4, 4), A), bandwidth_bytes_per_s=bandwidth)
    asked_and_last_s = 2 * 2 * A
    assert cluster.collective_time_s("all_reduce", 4e8, (0, 2, 1, 3)) == pytest.approx(
        asked_and_last_s + 6 * 1e8 / 1e10
    )
    assert cluster.collective_time_s("all_reduce", 4e8, (0, 1, 2, 3)) > 5.0


def test_matrix_and_levels_agree_on_a_uniform_network() -> None:
    n = 6
    uniform = {"latency_s": np.full((n, n), A), "bandwidth_bytes_per_s": np.full((n, n), B)}
    matrix = Cluster.from_matrix(device=CPU, backend="nccl", **uniform)
    levels = Cluster("test", (CPU,) * n, (Level("net", n, 0.0, LINK),), "nccl")
    for kind in set(KINDS) - {"all_to_all"}:  # whose messages wait for each other on a level
        for nbytes in (8, 1e6, 1e9):
            group = (0, 2, 3, 5)
            assert matrix.collective_time_s(kind, nbytes, group) == levels.collective_time_s(kind, nbytes, group)


def test_what_does_not_exist() -> None:
    cluster = two_levels(8)
    with pytest.raises(UnknownNameError, match="did you mean 'all_reduce'"):
        cluster.collective_time_s("allreduce", 8, (0, 1))
    with pytest.raises(ConfigError, match="device 8 of cluster test, which has 0 to 7"):
        cluster.collective_time_s("all_reduce", 8, (0, 8))
    with pytest.raises(ConfigError, match="device -1"):
        cluster.transfer_time_s(8, 0, -1)
    assert cluster.collective_time_s("all_reduce", 8, (3,)) == 0.0
