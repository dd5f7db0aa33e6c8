"""Placements on uneven networks: exact on small ones, over a bound on large ones, alike each time."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import autopar
from autopar.planner.placed_prices import Prices
from autopar.planner.placement import Placed, improved, place, sketched
from autopar.planner.places import Places
from autopar.planner.traffic import Traffic
from cost_model.cluster import Cluster
from cost_model.device import Device

SGD = functools.partial(torch.optim.SGD, lr=1e-2)
REGIONS = """\
schema = 1
name = "sites"
backend = "gloo"
source = "a test"
[transport]
start = "1 ms"
efficiency = 1
source = "a test"
{nodes}
[within]
latency = "1 ms"
bandwidth = "1 GB/s"
source = "a test"
[between]
latency = "50 ms"
bandwidth = "10 MB/s"
source = "a test"
"""
NODES = '[[nodes]]\nregion = "{}"\ndevice = "{}"\n'


def sites(*nodes: tuple[str, str]) -> Cluster:
    return Cluster.from_toml(REGIONS.format(nodes="".join(NODES.format(*node) for node in nodes)), "sites.toml")


def traffic(pp: int, dp: int, tp: int = 1, *, sent: float = 1e6, reduced: float = 1e8) -> Traffic:
    return Traffic(pp, dp, tp, 8, 0.1, sent, reduced)


def brute_force_s(cluster: Cluster, what: Traffic) -> float:
    prices = Prices(Places(cluster), what)
    orders = itertools.permutations(range(cluster.num_devices))
    return min(prices.cost_s(np.array(order).reshape(what.pp, what.dp, what.tp)) for order in orders)


MIXED = [("a", "v100-sxm2-16gb"), ("b", "a100-sxm-40gb"), ("a", "v100-sxm2-16gb"), ("c", "v100-sxm2-16gb")]


@pytest.mark.parametrize("nodes", [MIXED, [*MIXED, ("b", "v100-sxm2-16gb"), ("a", "a100-sxm-40gb")]])
@pytest.mark.parametrize("sent", [1e4, 1e7])
def test_small_clusters_are_placed_exactly(nodes: list[tuple[str, str]], sent: float) -> None:
    cluster = sites(*nodes)
    for pp, dp in ((2, len(nodes) // 2), (len(nodes), 1), (1, len(nodes))):
        what = traffic(pp, dp, sent=sent)
        found = place(cluster, what)
        assert found.exact and sorted(found.devices) == list(range(len(nodes)))
        assert found.cost_s == pytest.approx(brute_force_s(cluster, what), rel=1e-12)
        assert Prices(Places(cluster), what).bound_s() <= found.cost_s * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_no_placement_is_under_the_bound(seed: int) -> None:
    """Of devices of two kinds in regions of any size, with ends of stages moved or not; where a stage or a border is
    slow, the bound says so."""
    draw = np.random.default_rng(seed)
    kinds = ("v100-sxm2-16gb", "a100-sxm-40gb")
    cluster = sites(*(("abc"[int(draw.integers(2 + seed % 2))], kinds[int(draw.integers(2))]) for _ in range(12)))
    for pp, dp, tp in (
        (1, 12, 1),
        (2, 6, 1),
        (3, 4, 1),
        (6, 2, 1),
        (12, 1, 1),
        (2, 3, 2),
        (2, 1, 6),
        (1, 2, 6),
        (3, 1, 4),
    ):
        what = replace(traffic(pp, dp, tp, sent=10.0 ** draw.uniform(3, 7)), reduced_bytes=10.0 ** draw.uniform(4, 9))
        what = replace(what, exchanged_bytes=10.0 ** draw.uniform(3, 7) if tp > 1 else 0.0)
        total = pp * what.reduced_bytes
        ends = (draw.uniform(0, total / 2), draw.uniform(0, total / 2)) if pp > 1 else (0.0, 0.0)
        what = replace(what, segments=pp * int(draw.integers(1, 9)), end_bytes=ends)
        prices = Prices(Places(cluster), what, moved=bool(seed % 2))
        drawn = prices.costs_s(np.array([draw.permutation(12) for _ in range(200)]).reshape(-1, pp, dp, tp))
        assert prices.bound_s() <= min(improved(sketched(prices, 0.0)).cost_s, drawn.min()) * (1 + 1e-12)


@pytest.mark.parametrize("exchanged", [0.0, 1e7])
def test_shards_may_lie_in_several_regions(exchanged: float) -> None:
    """Of two stages of four shards on two regions of four devices no message need cross, if shards exchange little."""
    cluster = sites(*[("a", "v100-sxm2-16gb")] * 4, *[("b", "v100-sxm2-16gb")] * 4)
    what = replace(traffic(2, 1, 4, sent=1e3), exchanged_bytes=exchanged)
    found, bound_s = place(cluster, what), Prices(Places(cluster), what).bound_s()
    assert found.exact and bound_s <= found.cost_s <= 1.1 * bound_s
    crossing = regions_of(found, cluster, (2, 4))
    assert (crossing[0] != crossing[1]) == (exchanged > 0)


def test_a_bound_knows_of_slow_devices_and_of_borders() -> None:
    """Of four replicas on four devices two are slow, and three of them are summed over the border of a region."""
    slow = sites(("a", "a100-sxm-40gb"), ("a", "v100-sxm2-16gb"), ("a", "a100-sxm-40gb"), ("b", "v100-sxm2-16gb"))
    alone = replace(traffic(1, 4, sent=0.0, reduced=0.0), stage_s=1.0)
    longest = slow.devices[1].product_s() / slow.devices[0].product_s()
    assert Prices(Places(slow), alone).bound_s() == pytest.approx(1 + 7 * longest)
    summed = replace(alone, stage_s=0.0, reduced_bytes=1e8)
    assert Prices(Places(slow), summed).bound_s() == pytest.approx(3 * 2e8 / 4 / 1e7)


@pytest.mark.parametrize(("sizes", "tp"), [((2, 2), 4), ((1, 3), 2), ((3, 3), 2)])
def test_a_bound_knows_of_shards_that_cross_the_border_of_a_node(sizes: tuple[int, ...], tp: int) -> None:
    """More than a node has, or of some stage where they do not divide its devices: a hundred times as slow."""
    inside = 'devices = {}\n[nodes.inside]\nlatency = "1 us"\nbandwidth = "100 GB/s"\nsource = "a test"\n'
    nodes = "".join(NODES.format("a", "v100-sxm2-16gb") + (inside.format(n) if n > 1 else "") for n in sizes)
    cluster = Cluster.from_toml(REGIONS.format(nodes=nodes), "sites.toml")
    what = replace(traffic(1, sum(sizes) // tp, tp, reduced=0.0), exchanged_bytes=1e9)
    bound_s = Prices(Places(cluster), what).bound_s()
    assert 7 * (0.1 + 1.0) < bound_s <= brute_force_s(cluster, what) * (1 + 1e-12)


def regions_of(found: Placed, cluster: Cluster, shape: tuple[int, int]) -> list[list[str]]:
    assert cluster.network is not None
    return [[cluster.network.region(d) for d in row] for row in np.array(found.devices).reshape(shape).tolist()]


def test_what_sends_more_stays_in_a_region() -> None:
    """Large activations keep pipelines together, large gradients replicas of a stage."""
    cluster = sites(*[("a", "v100-sxm2-16gb")] * 2, *[("b", "v100-sxm2-16gb")] * 2)
    pipelines = regions_of(place(cluster, traffic(2, 2, sent=1e7, reduced=1e6)), cluster, (2, 2))
    assert pipelines[0] == pipelines[1] and len(set(pipelines[0])) == 2
    replicas = regions_of(place(cluster, traffic(2, 2, sent=1e4, reduced=1e9)), cluster, (2, 2))
    assert all(len(set(row)) == 1 for row in replicas)


@pytest.mark.parametrize("number", [3, 4, 5])
@pytest.mark.parametrize(("pp", "dp", "tp"), [(8, 8, 1), (4, 16, 1), (4, 8, 2)])
def test_large_clusters_lie_between_the_bound_and_placements_by_hand(number: int, pp: int, dp: int, tp: int) -> None:
    cluster = Cluster.load(f"dtfm-case{number}")
    what = traffic(pp, dp, tp, sent=8e6, reduced=4e8)
    prices, found = Prices(Places(cluster), what), place(cluster, what)
    assert sorted(found.devices) == list(range(64)) and not found.exact
    assert found.cost_s == pytest.approx(prices.cost_s(np.array(found.devices).reshape(pp, dp, tp)))
    assert found == place(cluster, what)
    every = np.arange(64)
    by_hand = [every.reshape(pp, dp, tp), every.reshape(dp, pp, tp).transpose(1, 0, 2)]
    by_hand += [np.random.default_rng(seed).permutation(64).reshape(pp, dp, tp) for seed in range(3)]
    assert 0 < found.bound_s <= found.cost_s <= min(map(prices.cost_s, by_hand))
    assert found.gap == found.cost_s / found.bound_s - 1


def test_a_slow_device_slows_its_replica_alone() -> None:
    cluster = sites(("a", "a100-sxm-40gb"), ("a", "v100-sxm2-16gb"), ("a", "a100-sxm-40gb"), ("a", "v100-sxm2-16gb"))
    what = replace(traffic(2, 2, sent=0.0, reduced=0.0), stage_s=1.0)
    slow = cluster.devices[1].product_s() / cluster.devices[0].product_s()
    schedule = Prices(Places(cluster), what).parts_s(np.array([[0, 1], [2, 3]]).reshape(1, 2, 2, 1))[0][0]
    assert schedule[1] / schedule[0] == pytest.approx(slow, rel=0.05)
    assert Device.load("a100-sxm-40gb").product_s() < Device.load("v100-sxm2-16gb").product_s()


def test_messages_to_both_neighbours_share_a_rate() -> None:
    """Of three stages the one in the middle sends two messages a microbatch, to devices at equal distance."""
    text = REGIONS.replace('backend = "gloo"', 'backend = "nccl"\nshared_egress = {}')
    nodes = "".join(NODES.format("a", "v100-sxm2-16gb") for _ in range(3))
    costs = []
    for shared in ("true", "false"):
        cluster = Cluster.from_toml(text.format(shared, nodes=nodes), "sites.toml")
        prices = Prices(Places(cluster), traffic(3, 1, sent=1e9))
        costs.append(prices.cost_s(np.arange(3).reshape(3, 1, 1)))
    assert costs[0] - costs[1] == pytest.approx(7 * 1.0)  # a second more for each microbatch but the first


def test_groups_of_shards_are_priced_where_they_are() -> None:
    """Two devices of a node exchange over its link; two of different nodes share a rate with the others."""
    node = NODES.format("a", "v100-sxm2-16gb") + "devices = 2\n[nodes.inside]\nlatency = 0\n"
    node += 'bandwidth = "100 GB/s"\nsource = "a test"\n'
    text = REGIONS.replace('source = "a test"\n[transport]', 'source = "a test"\nshared_egress = true\n[transport]')
    cluster = Cluster.from_toml(text.format(nodes=node * 2), "sites.toml")
    prices = Prices(Places(cluster), replace(traffic(1, 2, 2, reduced=0.0), stage_s=0.0, exchanged_bytes=1e9))
    together, apart = (np.array(cells).reshape(1, 2, 2) for cells in ([0, 1, 2, 3], [0, 2, 1, 3]))
    per_microbatch = [prices.parts_s(cells[None])[0].max() / 8 for cells in (together, apart)]
    assert per_microbatch == pytest.approx([0.01, 2.0])


class Deep(nn.Module):
    """Layers of one width; its activations are small beside its parameters."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x.square().mean()


def cpu_sites() -> Cluster:
    return sites(("a", "cpu"), ("b", "cpu"), ("a", "cpu"), ("b", "cpu"))


def test_a_plan_is_placed_by_region_and_never_slower_than_counting_up() -> None:
    model, batch = Deep(256, 4), {"x": torch.randn(8, 256)}
    estimates = {}
    for placement in (None, (0, 1, 2, 3), (0, 2, 1, 3)):
        pins = autopar.Parallelism(pp=2, dp=2, tp=1, placement=placement)
        estimates[placement] = autopar.estimate(model, cpu_sites(), batch, optimizer=SGD, parallelism=pins)
    free = estimates.pop(None)
    assert free.step_time_s <= min(each.step_time_s for each in estimates.values()) * (1 + 1e-9)
    assert math.isfinite(free.gap) and any("every placement was tried" in note for note in free.notes)
    again = autopar.estimate(
        model, cpu_sites(), batch, optimizer=SGD, parallelism=autopar.Parallelism(pp=2, dp=2, tp=1)
    )
    assert again.plan.to_json() == free.plan.to_json()


def test_a_free_search_is_never_slower_than_any_mesh() -> None:
    model, batch = Deep(256, 4), {"x": torch.randn(8, 256)}
    free = autopar.estimate(model, cpu_sites(), batch, optimizer=SGD)
    for pp, dp, tp in ((1, 4, 1), (4, 1, 1), (2, 2, 1), (1, 1, 4)):
        pins = autopar.Parallelism(pp=pp, dp=dp, tp=tp)
        pinned = autopar.estimate(model, cpu_sites(), batch, optimizer=SGD, parallelism=pins)
        assert free.step_time_s <= pinned.step_time_s * 1.02, (pp, dp, tp)


def test_many_devices_are_planned_and_placed_alike_each_time() -> None:
    cluster = sites(*[("a", "cpu")] * 6, *[("b", "cpu")] * 4)
    found = [autopar.estimate(Deep(64, 12), cluster, {"x": torch.randn(20, 64)}, optimizer=SGD) for _ in range(2)]
    assert found[0].plan == found[1].plan
    assert sorted(found[0].plan.placement) == list(range(10)) and math.isfinite(found[0].step_time_s)


def test_the_plan_says_what_is_where() -> None:
    from autopar.options import Options
    from autopar.planning import plan_model
    from autopar.report import plan_text

    pins = autopar.Parallelism(pp=2, dp=2, tp=1, placement=(0, 2, 1, 3), window=1)
    options = Options.of(None, SGD, pins, None, None, None)
    text = plan_text(plan_model(Deep(16, 4), cpu_sites(), {"x": torch.randn(8, 16)}, options), cpu_sites())
    rows = [line.split() for line in text.split("Placement")[1].splitlines()[3:5]]
    assert rows == [["a", "0", "0..1"], ["b", "1", "0..1"]]


def test_sums_over_all_ranks_go_round_them_as_they_are_placed() -> None:
    """Where they are priced: a ring in the order of ranks may cross slow links that the stages keep off."""
    from autopar.options import Options
    from autopar.payload import groups
    from autopar.planning import plan_model

    pins = autopar.Parallelism(pp=4, dp=1, tp=1, placement=(0, 2, 3, 1))
    options = Options.of(None, SGD, pins, None, None, None)
    linked = plan_model(Deep(16, 4), cpu_sites(), {"x": torch.randn(8, 16)}, options).linked
    assert groups(linked)["world"] == [[0, 2, 3, 1]]


def drawn_matrix(count: int, backend: str = "nccl") -> Cluster:
    """Links that all differ, each way too."""
    draw = np.random.default_rng(1)
    latency_s = np.exp(draw.uniform(np.log(1e-4), np.log(0.2), (count, count)))
    bandwidth = np.exp(draw.uniform(np.log(6e6), np.log(2.5e9), (count, count)))
    device = "cpu" if backend == "gloo" else "v100-sxm2-16gb"
    cluster = Cluster.from_matrix(device=device, latency_s=latency_s, bandwidth_bytes_per_s=bandwidth)
    return replace(cluster, backend=backend)


def test_seven_unlike_devices_are_placed_exactly() -> None:
    cluster, what = drawn_matrix(7), traffic(7, 1)
    found, every = place(cluster, what), np.array(list(itertools.permutations(range(7)))).reshape(-1, 7, 1, 1)
    assert found.exact and found.cost_s == Prices(Places(cluster), what).costs_s(every).min()


@pytest.mark.parametrize(("backend", "off"), [("gloo", 0.1), ("nccl", 0.3)])
@pytest.mark.parametrize("nbytes", [1e6, 5e7, 1e9])
def test_rings_are_priced_as_collectives_are(backend: str, off: float, nbytes: float) -> None:
    """Of gloo in the direction in which they go round, and with what waits until it is asked for."""
    cluster = drawn_matrix(24, backend)
    assert cluster.network is not None
    for pp, dp in ((4, 6), (1, 24)):
        cells = np.random.default_rng(0).permutation(24).reshape(pp, dp)
        priced = Prices(Places(cluster), traffic(pp, dp, reduced=nbytes)).parts_s(cells[None, :, :, None])[1][0, :, 0]
        taken = [cluster.network.collective_s("all_reduce", nbytes, tuple(row), backend) for row in cells.tolist()]
        assert priced == pytest.approx(taken, rel=off)


def test_exchanges_find_a_way_through_links_that_all_differ() -> None:
    """From the nearest device on to the next one is several times as slow."""
    for count in (12, 40):
        cluster = drawn_matrix(count)
        prices = Prices(Places(cluster), traffic(count, 1, sent=8e6, reduced=0.0))
        assert place(cluster, prices.traffic).cost_s < sketched(prices, prices.bound_s()).cost_s / 2


def test_ends_that_share_a_parameter_are_near_each_other() -> None:
    """Four stages in two regions: between the first and the last a large gradient is summed, between others little
    is sent."""
    cluster = sites(*[("a", "v100-sxm2-16gb")] * 2, *[("b", "v100-sxm2-16gb")] * 2)
    apart = regions_of(place(cluster, traffic(4, 1, sent=1e3)), cluster, (4, 1))
    near = regions_of(place(cluster, replace(traffic(4, 1, sent=1e3), tied_bytes=1e8)), cluster, (4, 1))
    assert apart[0] != apart[-1] and near[0] == near[-1]


def test_shards_that_repeat_all_take_no_slow_links() -> None:
    """Of two replicas on two nodes, the shards of each may lie on both: those of one number are neighbours then."""
    cluster = sites(*[("a", "v100-sxm2-16gb")] * 4, *[("b", "v100-sxm2-16gb")] * 4)
    prices = Prices(Places(cluster), traffic(1, 2, 4, reduced=1e8))
    apart, beside = np.arange(8).reshape(1, 2, 4), np.arange(8).reshape(4, 2).T[None]
    assert prices.cost_s(beside) < prices.cost_s(apart) / 5
    assert prices.shard_link(beside).bandwidth_bytes_per_s < prices.shard_link(apart).bandwidth_bytes_per_s
