"""Which device is which: cells (stage, replica, shard) placed on an uneven network.

The price of a placement is that of its slowest replica plus that of its slowest gradient reduction:

    max over replicas of  sum of stages + sum of transfers + (microbatches - 1) x slowest stage with its transfers
    + max over (stage, shard) of the ring over replicas.

Where there are few distinct placements all are tried; else blocks of neighbouring cells are laid along orders of the
regions, the best are improved by exchanges, and a bound says how much is left. Equal input gives an equal placement.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cost_model.cluster import Cluster
from cost_model.network import Network

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MAX_EXACT = 3000
OTHERS, NEAR = 7, 1.2
EXCHANGES = 1500
KEPT_BLOCKS = 3
TIE = 1e-3  # of the means beside the largest, so that what is not the slowest yet counts a little
SEED = 0


@dataclass(frozen=True)
class Traffic:
    """What cells do and send on the fastest device. stage_s: forward and backward of one microbatch; sent_bytes: the
    activation of one microbatch, and its gradient, of one shard; reduced_bytes: gradients of one (stage, shard)."""

    pp: int
    dp: int
    tp: int
    microbatches: int
    stage_s: float
    sent_bytes: float
    reduced_bytes: float


@dataclass(frozen=True)
class Placed:
    """devices: of each (stage, replica, shard), in that order; cost_s, bound_s: as the module prices them.

    exact: whether every placement was tried. others: some of the next best, for the simulator to judge.
    """

    devices: tuple[int, ...]
    cost_s: float
    bound_s: float
    exact: bool
    others: tuple[tuple[int, ...], ...] = ()

    @property
    def gap(self) -> float:
        return 0.0 if self.exact else max(0.0, self.cost_s / self.bound_s - 1.0) if self.bound_s else math.inf


def place(cluster: Cluster, traffic: Traffic) -> Placed:
    """The best placement that was found. The cluster has a network, and one device for each cell."""
    prices = Prices(cluster, traffic)
    bound_s = prices.bound_s()
    if prices.distinct <= MAX_EXACT:
        every = ((prices.cost_s(cells), tuple(cells.ravel().tolist())) for cells in prices.every())
        (cost_s, best), *others = heapq.nsmallest(1 + OTHERS, every)
        return Placed(best, cost_s, cost_s, True, tuple(devices for _, devices in others))
    cells = _exchanged(prices, _laid_out(prices))
    cost_s, devices = prices.cost_s(cells), np.arange(cells.size)
    t = traffic
    by_hand = (devices.reshape(t.pp, t.dp, t.tp), devices.reshape(t.dp, t.pp, t.tp).transpose(1, 0, 2))
    near = tuple(tuple(each.ravel().tolist()) for each in by_hand if prices.cost_s(each) < cost_s * NEAR)
    return Placed(tuple(cells.ravel().tolist()), cost_s, bound_s, False, near)


class Prices:
    """The price of placements, as arrays [stage, replica, shard] of devices."""

    def __init__(self, cluster: Cluster, traffic: Traffic) -> None:
        assert cluster.network is not None
        self.network: Network = cluster.network
        self.traffic = traffic
        self.shape = (traffic.pp, traffic.dp, traffic.tp)
        self.slowness = slowness(cluster)
        self.hop_s = self._hops_s(cluster.rendezvous)

    def cost_s(self, cells: IntArray) -> float:
        replicas, groups = self.parts_s(cells)
        return float(replicas.max() + groups.max())

    def tied_s(self, cells: IntArray) -> float:
        """The price, with a little of all that is not the slowest."""
        replicas, groups = self.parts_s(cells)
        return float(replicas.max() + groups.max() + TIE * (replicas.mean() + groups.mean()))

    def parts_s(self, cells: IntArray) -> tuple[FloatArray, FloatArray]:
        """[replica] seconds of the schedule, [stage, shard] of the reduction."""
        busy = self.traffic.stage_s * self.slowness[cells].max(axis=2)
        there = self.hop_s[cells[:-1], cells[1:]].max(axis=2)
        back = self.hop_s[cells[1:], cells[:-1]].max(axis=2)
        turn = busy.copy()
        turn[1:] += there
        turn[:-1] += back
        along = busy.sum(axis=0) + there.sum(axis=0) + back.sum(axis=0)
        schedule: FloatArray = along + (self.traffic.microbatches - 1) * turn.max(axis=0)
        return schedule, self._rings_s(cells)

    def bound_s(self) -> float:
        """No placement has a lower price: either some replica spans two regions, or each group of replicas does."""
        t, best = self.traffic, self.slowness.min()
        inside, across = self._fastest_hops_s()
        whole = t.pp * t.stage_s * best
        alone = (
            whole
            + (t.pp - 1) * 2 * inside
            + (t.microbatches - 1) * (t.stage_s * best + (2 if t.pp > 2 else 1) * inside)
        )
        if t.pp == 1:
            alone = whole + (t.microbatches - 1) * t.stage_s * best
        crossing = whole + 2 * (t.pp - 2) * inside + 2 * across + (t.microbatches - 1) * (t.stage_s * best + across)
        sizes = Counter(self.region.tolist())
        rooms = sorted((size // (t.pp * t.tp) for size in sizes.values()), reverse=True)
        groups = sorted((size // t.tp for size in sizes.values()), reverse=True)
        bounds = []
        if sum(rooms) >= t.dp:
            bounds.append(alone + self._ring_bound_s(_fewest(rooms, t.dp)))
        if t.pp > 1 and len(sizes) > 1:
            bounds.append(crossing + self._ring_bound_s(_fewest(groups, t.dp)))
        return float(min(bounds, default=whole))

    @cached_property
    def region(self) -> IntArray:
        return np.array(self.network.region_of)[list(self.network.node_of)]

    @cached_property
    def classes(self) -> IntArray:
        """Devices of one class may be exchanged: alone on a node of one region, and as fast."""
        sizes = Counter(self.network.node_of)
        keys = [
            (int(self.region[d]), float(self.slowness[d]), -1 if sizes[node] == 1 else node)
            for d, node in enumerate(self.network.node_of)
        ]
        order = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        return np.array([order[key] for key in keys])

    @cached_property
    def distinct(self) -> float:
        """How many placements differ in their classes."""
        counts = Counter(self.classes.tolist())
        return math.exp(math.lgamma(len(self.classes) + 1) - sum(math.lgamma(n + 1) for n in counts.values()))

    def every(self) -> Iterator[IntArray]:
        """One placement for each way to spread the classes over the cells."""
        members = {int(c): [int(d) for d in np.flatnonzero(self.classes == c)] for c in np.unique(self.classes)}
        for spread in _spreads(Counter(self.classes.tolist()), len(self.classes)):
            left = {c: iter(devices) for c, devices in members.items()}
            yield np.array([next(left[c]) for c in spread]).reshape(self.shape)

    def _hops_s(self, rendezvous: bool) -> FloatArray:
        """[device, device] seconds of a message of one shard while its node's other devices send too."""
        network = self.network
        node = np.array(network.node_of)
        outside = node[:, None] != node[None, :]
        sizes = np.bincount(node)[node] if network.shares_egress else np.ones(len(node))
        per_byte = np.where(outside, sizes[:, None], 1.0) / network.bandwidths + outside * network.copy_s_per_byte
        notices = network.latencies_s.T if rendezvous else 0.0
        hops: FloatArray = network.start_s + network.latencies_s + notices + self.traffic.sent_bytes * per_byte
        return hops

    def _rings_s(self, cells: IntArray) -> FloatArray:
        """[stage, shard] all_reduce around the replicas: the slowest link in every round, each latency as often as a
        message passes it."""
        dp = self.traffic.dp
        if dp == 1:
            return np.zeros((self.traffic.pp, self.traffic.tp))
        after = np.roll(cells, -1, axis=1)
        slowest = self.network.bandwidths[cells, after].min(axis=1)
        latencies = self.network.latencies_s[cells, after].sum(axis=1)
        rounds = 2 * (dp - 1)
        found: FloatArray = rounds * (self.traffic.reduced_bytes / dp / slowest + latencies / dp)
        return found

    def _fastest_hops_s(self) -> tuple[float, float]:
        """The fastest message within a region, and between two; infinite where there is none."""
        same = self.region[:, None] == self.region[None, :]
        off = ~np.eye(len(self.region), dtype=bool)
        inside, across = (self.hop_s[chosen & off] for chosen in (same, ~same))
        return float(inside.min(initial=np.inf)), float(across.min(initial=np.inf))

    def _ring_bound_s(self, regions: int) -> float:
        """A ring through at least so many regions: each has a link to another one, of which the slowest counts."""
        dp = self.traffic.dp
        if dp == 1:
            return 0.0
        bandwidths = self.network.bandwidths
        if regions == 1:
            best = bandwidths[~np.eye(len(self.region), dtype=bool)].max()
        else:
            out = [bandwidths[np.ix_(self.region == r, self.region != r)].max() for r in np.unique(self.region)]
            best = sorted(out, reverse=True)[regions - 1]
        return float(2 * (dp - 1) / dp * self.traffic.reduced_bytes / best)


def slowness(cluster: Cluster) -> FloatArray:
    """[device] how much longer a large product takes than on the fastest."""
    times = {id(device): device.product_s() for device in cluster.devices}
    fastest = min(times.values())
    return np.array([times[id(device)] / fastest for device in cluster.devices])


def _fewest(rooms: Sequence[int], wanted: int) -> int:
    """How many of these, the largest first, hold so many together."""
    for count, total in enumerate(itertools.accumulate(rooms), start=1):
        if total >= wanted:
            return count
    return len(rooms)


def _spreads(counts: Counter[int], length: int) -> Iterator[tuple[int, ...]]:
    """All distinct orders of a multiset."""
    if length == 0:
        yield ()
        return
    for item in sorted(counts):
        if counts[item]:
            counts[item] -= 1
            for rest in _spreads(counts, length - 1):
                yield (item, *rest)
            counts[item] += 1


# --- Large clusters


def _laid_out(prices: Prices) -> IntArray:
    """The best of blocks of cells laid along orders of the regions."""
    tried = [
        (prices.tied_s(_along(prices, order, block)), index, order, block)
        for index, (order, block) in enumerate(itertools.product(_orders(prices), _blocks(prices.traffic)))
    ]
    best = [_reordered(prices, order, block) for _, _, order, block in sorted(tried)[:KEPT_BLOCKS]]
    return min(best, key=prices.tied_s)


def _blocks(traffic: Traffic) -> list[tuple[int, int]]:
    """Sizes of blocks in stages and replicas."""
    stages, replicas = (_powers(size) for size in (traffic.pp, traffic.dp))
    return list(itertools.product(stages, replicas))


def _powers(size: int) -> list[int]:
    return [d for d in range(1, size + 1) if size % d == 0]


def _orders(prices: Prices) -> list[tuple[int, ...]]:
    """From each region on to the nearest that is left; of many regions, from a few."""
    regions = [int(r) for r in np.unique(prices.region)]
    first = {r: int(np.flatnonzero(prices.region == r)[0]) for r in regions}
    orders = []
    for start in regions[:8]:
        order, left = [start], [r for r in regions if r != start]
        while left:
            nearest = min(left, key=lambda r: (float(prices.hop_s[first[order[-1]], first[r]]), r))
            order.append(nearest)
            left.remove(nearest)
        orders.append(tuple(order))
    return orders


def _along(prices: Prices, order: Sequence[int], block: tuple[int, int]) -> IntArray:
    """Devices in the order of their regions, put into cells block by block; a block stage by stage."""
    rank = np.empty(len(order), dtype=np.int64)
    rank[list(order)] = np.arange(len(order))
    devices = np.lexsort((np.arange(len(prices.region)), prices.slowness, rank[prices.region]))
    stages, replicas, shards = np.indices(prices.shape).reshape(3, -1)
    keys = (shards, replicas % block[1], stages % block[0], replicas // block[1], stages // block[0])
    cells = np.empty(len(devices), dtype=np.int64)
    cells[np.lexsort(keys)] = devices
    return cells.reshape(prices.shape)


def _reordered(prices: Prices, order: tuple[int, ...], block: tuple[int, int]) -> IntArray:
    """Pairs of regions exchanged in the order while that helps."""
    best, cost_s = order, prices.tied_s(_along(prices, order, block))
    improved = True
    while improved:
        improved = False
        for a, b in itertools.combinations(range(len(order)), 2):
            tried = list(best)
            tried[a : b + 1] = reversed(tried[a : b + 1])
            tried_s = prices.tied_s(_along(prices, tried, block))
            if tried_s < cost_s * (1 - 1e-9):
                best, cost_s, improved = tuple(tried), tried_s, True
    return _along(prices, best, block)


def _exchanged(prices: Prices, cells: IntArray) -> IntArray:
    """Two devices, two replicas or two stages exchanged at random, kept where that helps."""
    draw = np.random.default_rng(SEED)
    best, cost_s = cells, prices.tied_s(cells)
    for _ in range(EXCHANGES):
        tried = best.copy()
        axis = int(draw.integers(3))
        if axis == 2:
            a, b = draw.integers(tried.size, size=2)
            flat = tried.reshape(-1)
            flat[[a, b]] = flat[[b, a]]
        else:
            a, b = draw.integers(tried.shape[axis], size=2)
            index = np.arange(tried.shape[axis])
            index[[a, b]] = index[[b, a]]
            tried = np.take(tried, index, axis=axis)
        tried_s = prices.tied_s(tried)
        if tried_s < cost_s * (1 - 1e-12):
            best, cost_s = tried, tried_s
    return best
