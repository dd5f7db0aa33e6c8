"""Networks by pairs: regions in files, matrices, shared egress, and what collectives cost on uneven links."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_model.cluster import Cluster
from cost_model.collectives import Link, all_gather_s, ring_s
from cost_model.errors import ClusterFileError, ConfigError

GOOD = """\
schema = 1
name = "sites"
backend = "gloo"
source = "notes"
shared_egress = true

[transport]
start = "1 ms"
efficiency = 0.5
source = "notes"

[[nodes]]
region = "west"
device = "v100-sxm2-16gb"
count = 2

[[nodes]]
region = "east"
device = "a100-sxm-40gb"
devices = 4
[nodes.inside]
latency = "1 us"
bandwidth = "100 GB/s"
source = "notes"

[within]
latency = "1 ms"
bandwidth = "2 Gbit/s"
source = "notes"

[[links]]
regions = ["west", "east"]
latency = "50 ms"
bandwidth = "0.25 GB/s"
source = "notes"
"""


def good(extra: str = "") -> Cluster:
    return Cluster.from_toml(GOOD + extra, "sites.toml")


def test_nodes_of_several_sizes_and_devices() -> None:
    cluster = good()
    assert [device.name for device in cluster.devices] == ["v100-sxm2-16gb"] * 2 + ["a100-sxm-40gb"] * 4
    assert cluster.network is not None
    assert [cluster.network.region(device) for device in range(6)] == ["west"] * 2 + ["east"] * 4
    assert cluster.memory_cap_bytes == min(device.usable_bytes for device in cluster.devices)


def test_each_pair_has_the_link_of_its_level() -> None:
    cluster = good()
    assert cluster.transfer_time_s(125e6, 0, 1) == pytest.approx(0.001 + 0.001 + 1.0)  # half of 2 Gbit/s
    assert cluster.transfer_time_s(125e6, 1, 2) == pytest.approx(0.001 + 0.050 + 1.0)  # half of 0.25 GB/s
    assert cluster.transfer_time_s(50e9, 2, 5) == pytest.approx(0.001 + 1e-6 + 1.0)
    assert cluster.transfer_time_s(5, 3, 3) == 0.0


def test_a_link_of_a_pair_comes_before_that_of_its_level_and_may_be_one_way() -> None:
    extra = '[[links]]\nregions = ["{}"]\nlatency = "7 ms"\nbandwidth = "1 GB/s"\nefficiency = 1\nsource = "notes"\n'
    inside = good(extra.format('west", "west'))
    assert inside.transfer_time_s(0, 0, 1) == pytest.approx(0.008)
    one_way = GOOD.replace('regions = ["west", "east"]', 'regions = ["west", "east"]\none_way = true')
    back = extra.format('east", "west') + "one_way = true\n"
    both = Cluster.from_toml(one_way + back, "sites.toml")
    assert both.transfer_time_s(0, 0, 2) == pytest.approx(0.051)
    assert both.transfer_time_s(0, 2, 0) == pytest.approx(0.008)


def test_figures_of_a_level_for_all_regions() -> None:
    level = GOOD.replace('[[links]]\nregions = ["west", "east"]', "[between]")
    assert Cluster.from_toml(level, "x.toml").transfer_time_s(0, 0, 2) == good().transfer_time_s(0, 0, 2)


def test_copying_is_added_to_the_wire() -> None:
    copied = GOOD.replace("efficiency = 0.5", 'efficiency = 0.5\ncopy_bandwidth = "125 MB/s"')
    cluster = Cluster.from_toml(copied, "sites.toml")
    assert cluster.transfer_time_s(125e6, 0, 1) == pytest.approx(0.002 + 1.0 + 1.0)
    for same in (good(), cluster):
        assert same.transfer_time_s(50e9, 2, 3) == good().transfer_time_s(50e9, 2, 3)
        assert same.collective_time_s("all_gather", 125e6, (0, 1)) == pytest.approx(0.003 + 0.5)  # asked for


@pytest.mark.parametrize(
    ("old", "new", "key", "line", "nearest"),
    [
        ('region = "west"\n', "", "nodes[0].region", 12, None),
        ('device = "a100-sxm-40gb"', 'device = "a100-sxm-40g"', "nodes[1].device", 19, "a100-sxm-40gb"),
        ("count = 2", "count = 0", "nodes[0].count", 15, None),
        ("[nodes.inside]", "[nodes.insid]", "nodes[1].insid", 21, "inside"),
        ('bandwidth = "2 Gbit/s"', 'bandwidth = "2 Gb/s"', "within.bandwidth", 28, None),
        ('bandwidth = "0.25 GB/s"', "bandwidth = 0", "links[0].bandwidth", 34, None),
        ('["west", "east"]', '["west", "easst"]', "links[0].regions", 32, "east"),
        ('["west", "east"]', '["west"]', "links[0].regions", 32, None),
        ("shared_egress = true", "shared_egress = 1", "shared_egress", 5, None),
        ("efficiency = 0.5", "efficiency = 0", "transport.efficiency", 9, None),
        ('[within]\nlatency = "1 ms"', '[within]\nlatency = "-1 ms"', "within.latency", 27, None),
    ],
)
def test_faults_name_file_key_line_and_the_nearest_name(
    old: str, new: str, key: str, line: int, nearest: str | None
) -> None:
    assert old in GOOD
    with pytest.raises(ClusterFileError) as caught:
        Cluster.from_toml(GOOD.replace(old, new), "sites.toml")
    error = caught.value
    assert (error.path, error.key, error.line, error.nearest) == ("sites.toml", key, line, nearest)


def test_links_that_are_missing_or_said_twice() -> None:
    head, link = GOOD.split("[[links]]")
    with pytest.raises(ClusterFileError, match=r"missing from west to east; add \[\[links\]\] with regions"):
        Cluster.from_toml(head, "sites.toml")
    with pytest.raises(ClusterFileError, match="from west to west; .* a table .within"):
        Cluster.from_toml(GOOD.replace("[within]", "[between]"), "sites.toml")
    with pytest.raises(ClusterFileError, match="the link from west to east was given before"):
        Cluster.from_toml(f"{GOOD}[[links]]{link}", "sites.toml")
    with pytest.raises(ClusterFileError, match=r"give the link between the 4 devices of a node"):
        Cluster.from_toml(GOOD.split("[nodes.inside]")[0] + "[within]" + GOOD.split("[within]")[1], "sites.toml")


def test_a_file_of_nodes_has_its_own_number_of_devices(tmp_path: Path) -> None:
    path = tmp_path / "sites.toml"
    path.write_text(GOOD)
    assert Cluster.load(path, 6).num_devices == 6
    with pytest.raises(ConfigError, match=r"lists nodes of 6 device\(s\), so num_devices cannot be 4"):
        Cluster.load(path, 4)


@pytest.mark.parametrize("number", range(1, 6))
def test_the_networks_of_dtfm(number: int) -> None:
    cluster = Cluster.load(f"dtfm-case{number}")
    assert cluster.num_devices == 64 and cluster.network is not None
    assert len(cluster.network.regions) == (1, 1, 2, 4, 8)[number - 1]
    sizes = {cluster.network.node_of.count(node) for node in cluster.network.node_of}
    assert sizes == ({8}, {1, 4}, {1}, {1}, {1})[number - 1]


def test_regions_of_the_world() -> None:
    network = Cluster.load("dtfm-case5").network
    assert network is not None
    far = network.link(24, 40)  # Tokyo to London
    assert (network.region(24), network.region(40)) == ("Tokyo", "London")
    assert far.latency_s == 0.21
    assert far.bandwidth_bytes_per_s == pytest.approx(0.95 * 0.366e9 / 8)


# --- Shared egress


def test_devices_of_a_node_share_its_rate() -> None:
    """Those of a node of four get a quarter each, to another node; nothing is shared where a node has one device."""
    cluster = good()
    assert cluster.transfer_time_s(125e6, 2, 0) == pytest.approx(0.001 + 0.050 + 4.0)
    assert cluster.transfer_time_s(125e6, 0, 2) == pytest.approx(0.001 + 0.050 + 1.0)
    alone = Cluster.from_toml(GOOD.replace("shared_egress = true", "shared_egress = false"), "x.toml")
    assert alone.transfer_time_s(125e6, 2, 0) == pytest.approx(0.001 + 0.050 + 1.0)


def test_only_those_that_send_share() -> None:
    cluster = good()
    assert cluster.senders([(2, 0), (3, 1), (4, 5), (0, 1), (0, 2)]) == (2, 2, 1, 1, 1)
    assert cluster.transfer_time_s(125e6, 2, 0, 1) == pytest.approx(0.001 + 0.050 + 1.0)
    assert Cluster.load("p3.2xlarge", 4).senders([(0, 1), (0, 2)]) == (1, 1)


def test_destinations_of_one_limit_are_one_channel_of_the_sender() -> None:
    network = good().network
    assert network is not None
    assert network.channel(2, 0) == network.channel(3, 1) is not None
    assert network.channel(0, 1) != network.channel(0, 2)
    assert network.channel(4, 5) is None


def test_groups_beside_each_other_share_the_nodes_rate() -> None:
    """Four rings over two nodes of four leave each a quarter; one ring through all devices has the whole rate."""
    nodes = '[[nodes]]\nregion = "west"\ndevice = "v100-sxm2-16gb"\ncount = 2\ndevices = 4\n[nodes.inside]\n'
    text = GOOD.split("[[nodes]]")[0] + nodes + GOOD.split("[nodes.inside]\n")[1].split("[[links]]")[0]
    cluster = Cluster.from_toml(text, "x.toml")
    four = cluster.collective_time_s("all_gather", 8e6, (0, 4))
    whole = cluster.collective_time_s("all_gather", 8e6, tuple(range(8)))
    assert four == pytest.approx(0.001 + 2 * 0.001 + 4e6 / (125e6 / 4))
    assert whole == pytest.approx(0.001 + 7 * (1e6 / 125e6) + 2 * 0.001, rel=0.01)


# --- Collectives on uneven links

LINKS = st.lists(
    st.builds(Link, st.sampled_from([0.0, 0.5, 3.0]), st.sampled_from([1.0, 2.0, 8.0])), min_size=2, max_size=6
)


def ring_by_events(links: Sequence[Link], nbytes: float, rounds: int) -> float:
    """Message by message: every rank sends at once, then what it was sent, as soon as its link is free."""
    count, free, last = len(links), [0.0] * len(links), 0.0
    ready = [(0.0, 0, rank) for rank in range(count)]
    while ready:
        now, sent, rank = heapq.heappop(ready)
        if sent < rounds:
            free[rank] = max(now, free[rank]) + nbytes / links[rank].bandwidth_bytes_per_s
            arrival = free[rank] + links[rank].latency_s
            last = max(last, arrival)
            heapq.heappush(ready, (arrival, sent + 1, (rank + 1) % count))
    return last


@given(LINKS, st.integers(1, 12))
def test_a_ring_takes_as_long_as_its_messages(links: list[Link], rounds: int) -> None:
    found = ring_s(links, 4.0, rounds)
    assert found == pytest.approx(ring_by_events(links, 4.0, rounds))
    assert found <= rounds * max(link.seconds(4.0) for link in links) * (1 + 1e-9)


def test_a_slow_link_delays_a_ring_once_a_round_but_a_long_one_only_twice() -> None:
    """The rate of the slowest link counts in every round; a latency only as often as a message passes it."""
    fast = Link(0.0, 1.0)
    assert ring_s([fast] * 7 + [Link(0.0, 0.1)], 1.0, 14) == pytest.approx(14 * 10, rel=0.1)
    assert ring_s([fast] * 7 + [Link(10.0, 1.0)], 1.0, 14) == pytest.approx(14 + 2 * 10)


def test_gloo_takes_the_ring_where_nccl_may_take_a_tree() -> None:
    def matrix(backend: str) -> Cluster:
        return Cluster.from_matrix(
            device="cpu",
            latency_s=np.full((8, 8), 0.02),
            bandwidth_bytes_per_s=np.full((8, 8), 1e6),
            backend=backend,
        )

    everyone = tuple(range(8))
    assert matrix("gloo").collective_time_s("all_reduce", 8, everyone) == pytest.approx(14 * 0.02, rel=1e-3)
    assert matrix("nccl").collective_time_s("all_reduce", 8, everyone) == pytest.approx(3 * 0.02, rel=1e-3)
    same = Link(0.02, 1e6)
    assert matrix("nccl").collective_time_s("all_gather", 1e6, everyone) == all_gather_s(8, 1e6, same)


def test_parts_that_are_exchanged_wait_for_the_link_not_for_each_other() -> None:
    cluster = Cluster.from_matrix(
        device="cpu", latency_s=np.full((4, 4), 0.5), bandwidth_bytes_per_s=np.full((4, 4), 100.0), backend="gloo"
    )
    assert cluster.collective_time_s("reduce_scatter", 400.0, (0, 1, 2, 3)) == pytest.approx(3 * 1.0 + 2 * 0.5)


def test_a_network_of_equal_links_is_even() -> None:
    everywhere = {"latency_s": np.full((3, 3), 0.1), "bandwidth_bytes_per_s": np.full((3, 3), 1e9)}
    assert not Cluster.from_matrix(device="cpu", **everywhere).uneven
    assert Cluster.from_matrix(device=["cpu", "cpu", "a64fx"], **everywhere).uneven
    everywhere["latency_s"][0, 1] = 0.2
    assert Cluster.from_matrix(device="cpu", **everywhere).uneven
    assert good().uneven and not Cluster.load("dgx-h100", 16).uneven


def test_a_file_of_regions_without_nodes_says_so() -> None:
    head = 'schema = 1\nname = "x"\nbackend = "nccl"\nsource = "a test"\nshared_egress = true\n'
    with pytest.raises(ClusterFileError, match=r"missing; add a table \[transport\]"):
        Cluster.from_toml(head, "x.toml")
    transport = '[transport]\nstart = 0\nefficiency = 1\nsource = "a test"\n'
    with pytest.raises(ClusterFileError, match=r"missing; add tables \[\[nodes\]\]"):
        Cluster.from_toml(head + transport, "x.toml")
