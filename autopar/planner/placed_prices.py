"""What a placement costs: cells (stage, replica, shard) on the devices of an uneven network.

The price is that of the slowest replica under a schedule that keeps enough microbatches under way, plus that of the
slowest gradient reduction:

    max over replicas of  once through all stages and messages, there and back
                          + (microbatches - 1) x the slowest stage or channel
    + max over (stage, shard) of the ring over replicas.

A stage has as much of the model as its slowest device takes as long for as those of the others take for theirs. No
schedule takes less than the former where all stages are equally long: the first microbatch goes there and back, and the
slowest stage or channel, which it passes on the way, does as much for every other one.
"""

from __future__ import annotations

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
MOST = 700.0  # e to this is a number


@dataclass(frozen=True)
class Traffic:
    """What cells do and send. stage_s: forward and backward of one microbatch on the fastest device, of one of equal
    stages, exchanges within it left out; sent_bytes: the activation of one microbatch, and its gradient, of one shard;
    reduced_bytes: gradients of one (stage, shard); exchanged_bytes: what a shard sends to the others of its stage for
    one microbatch; dtype: of its products, None where each device has its fastest.
    """

    pp: int
    dp: int
    tp: int
    microbatches: int
    stage_s: float
    sent_bytes: float
    reduced_bytes: float
    exchanged_bytes: float = 0.0
    dtype: str | None = None


class Prices:
    """The price of placements, as arrays [stage, replica, shard] of devices."""

    def __init__(self, cluster: Cluster, traffic: Traffic) -> None:
        assert cluster.network is not None
        self.network: Network = cluster.network
        self.traffic = traffic
        self.shape = (traffic.pp, traffic.dp, traffic.tp)
        self.slowness = slowness(cluster, traffic.dtype)
        self.delay_s = self.network.awaited_delays_s if cluster.rendezvous else self.network.delays_s

    def cost_s(self, cells: IntArray) -> float:
        replicas, groups = self.parts_s(cells)
        return float(replicas.max() + groups.max())

    def parts_s(self, cells: IntArray) -> tuple[FloatArray, FloatArray]:
        """[replica] seconds of the schedule, [stage, shard] of the reduction."""
        along, slowest = self._pipeline_s(cells)
        schedule: FloatArray = along + (self.traffic.microbatches - 1) * slowest
        return schedule, self._rings_s(cells)

    def window(self, cells: IntArray) -> int:
        """The narrowest window of 1f1b that keeps the slowest stage or channel busy: the first stage sends as many
        microbatches on their way as fit into the time that one takes to come back."""
        if self.traffic.pp == 1:
            return 1
        along, slowest = self._pipeline_s(cells)
        return max(1, math.ceil(float((along / slowest).max() - 1) / (self.traffic.pp - 1)))

    def _pipeline_s(self, cells: IntArray) -> tuple[FloatArray, FloatArray]:
        """[replica] seconds once through all stages and messages, there and back; those of the slowest of these."""
        slow = self.slowness[cells].max(axis=2)
        fast = 1.0 / slow.max(axis=1, keepdims=True)
        busy = self.traffic.stage_s * slow * fast / fast.mean() + self._exchanges_s(cells)
        there, back = (cells[:-1], cells[1:]), (cells[1:], cells[:-1])
        sent_there, sent_back = self.busy_s(*there), self.busy_s(*back)
        along = busy.sum(axis=0) + (self.delay_s[there] + sent_there).max(axis=2).sum(axis=0)
        along += (self.delay_s[back] + sent_back).max(axis=2).sum(axis=0)
        slowest = busy.max(axis=0)
        if len(cells) > 1:
            slowest = np.maximum(slowest, np.maximum(sent_there, sent_back).max(axis=(0, 2)))
        if len(cells) > 2 and self.network.shares_egress:
            both = np.where(self._share(cells), sent_there[1:] + sent_back[:-1], 0.0)
            slowest = np.maximum(slowest, both.max(axis=(0, 2)))
        return along, slowest

    def bound_s(self) -> float:
        """No placement has a lower price: either some replica spans two regions, or each group of replicas does."""
        t, best = self.traffic, float(self.slowness.min())
        (inside, inside_busy), (across, across_busy) = self._fastest_hops_s()
        stage_s = t.stage_s * best
        alone = t.pp * stage_s + (t.microbatches - 1) * stage_s
        crossing = math.inf
        if t.pp > 1:
            near = min(inside, across)
            crossing = t.pp * stage_s + 2 * (t.pp - 2) * near + 2 * across
            crossing += (t.microbatches - 1) * max(stage_s, across_busy)
            alone = t.pp * stage_s + 2 * (t.pp - 1) * inside + (t.microbatches - 1) * max(stage_s, inside_busy)
        sizes = Counter(self.region.tolist())
        rooms = sorted((size // (t.pp * t.tp) for size in sizes.values()), reverse=True)
        groups = sorted((size // t.tp for size in sizes.values()), reverse=True)
        bounds = []
        if sum(rooms) >= t.dp:
            bounds.append(alone + self._ring_bound_s(_fewest(rooms, t.dp)))
        if t.pp > 1 and len(sizes) > 1:
            bounds.append(crossing + self._ring_bound_s(_fewest(groups, t.dp)))
        return float(min(bounds, default=(t.pp + t.microbatches - 1) * stage_s))

    def busy_s(self, sources: IntArray, targets: IntArray) -> FloatArray:
        """Seconds for which messages keep their channels busy."""
        seconds: FloatArray = self.traffic.sent_bytes * self.network.shared_s_per_byte[sources, targets]
        return seconds

    @property
    def region(self) -> IntArray:
        """[device]"""
        return self.network.regions_by_device

    @property
    def node(self) -> IntArray:
        """[device]"""
        return self.network.nodes_by_device

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
        logarithm = math.lgamma(len(self.classes) + 1) - sum(math.lgamma(n + 1) for n in counts.values())
        return math.exp(min(logarithm, MOST))

    def every(self) -> Iterator[IntArray]:
        """One placement for each way to spread the classes over the cells."""
        members = {int(c): [int(d) for d in np.flatnonzero(self.classes == c)] for c in np.unique(self.classes)}
        for spread in _spreads(Counter(self.classes.tolist()), len(self.classes)):
            left = {c: iter(devices) for c, devices in members.items()}
            yield np.array([next(left[c]) for c in spread]).reshape(self.shape)

    def _share(self, cells: IntArray) -> npt.NDArray[np.bool_]:
        """[inner stage, replica, shard] whether messages to both neighbours share a rate."""
        here, channels = cells[1:-1], self.network.channels
        after = channels[here, cells[2:]]
        shared: npt.NDArray[np.bool_] = (after == channels[here, cells[:-2]]) & (after >= 0)
        return shared

    def _exchanges_s(self, cells: IntArray) -> FloatArray | float:
        """[stage, replica] around the shards."""
        t = self.traffic
        if t.tp == 1 or not t.exchanged_bytes:
            return 0.0
        after = np.roll(cells, -1, axis=2)
        users = self._users(cells, 2)
        found: FloatArray = (t.exchanged_bytes / self.network.bandwidths[cells, after] * users).max(axis=2)
        return found

    def _rings_s(self, cells: IntArray) -> FloatArray:
        """[stage, shard] all_reduce over the replicas, in groups of a region first where that is faster: the slowest
        link in every round, each latency as often as a message passes it."""
        found, grouped = self._ring_s(cells), self._grouped(cells)
        return grouped[1] if grouped is not None and grouped[1].max() < found.max() else found

    def dp_inner(self, cells: IntArray) -> int:
        """Replicas of a group in which gradients are best summed first; 1 where they are not."""
        grouped = self._grouped(cells)
        return grouped[0] if grouped is not None and grouped[1].max() < self._ring_s(cells).max() else 1

    def _grouped(self, cells: IntArray) -> tuple[int, FloatArray] | None:
        """Size of the largest groups that lie in one region each, and [stage, shard] sums by them."""
        for size in self._group_sizes:
            grid = cells.reshape(cells.shape[0], -1, size, cells.shape[2])
            region = self.region[grid]
            if (region == region[:, :, :1]).all():
                return size, self._groups_s(grid)
        return None

    @cached_property
    def _group_sizes(self) -> tuple[int, ...]:
        """Of groups of replicas, the largest first; none where there is one region."""
        sizes = range(self.traffic.dp // 2, 1, -1) if len(set(self.region.tolist())) > 1 else ()
        return tuple(size for size in sizes if self.traffic.dp % size == 0)

    def _groups_s(self, grid: IntArray) -> FloatArray:
        """[stage, shard] of [stage, group, replica, shard]: around each group, a part around the groups, and back."""
        part, (count, size) = self.traffic.reduced_bytes / grid.shape[2], grid.shape[1:3]
        total = np.zeros((grid.shape[0], grid.shape[3]))
        for axis, ranks, nbytes in ((2, size, self.traffic.reduced_bytes), (1, count, part)):
            after = np.roll(grid, -1, axis=axis)
            slowest = (self._users(grid, axis) / self.network.bandwidths[grid, after]).max(axis=axis)
            latencies = self.network.latencies_s[grid, after].sum(axis=axis)
            seconds: FloatArray = 2 * (ranks - 1) / ranks * (nbytes * slowest + latencies)
            total += seconds.max(axis=1)
        return total

    def _ring_s(self, cells: IntArray) -> FloatArray:
        """[stage, shard] all_reduce around all replicas."""
        dp = self.traffic.dp
        if dp == 1:
            return np.zeros((self.traffic.pp, self.traffic.tp))
        after = np.roll(cells, -1, axis=1)
        slowest = (self._users(cells, 1) / self.network.bandwidths[cells, after]).max(axis=1)
        latencies = self.network.latencies_s[cells, after].sum(axis=1)
        rounds = 2 * (dp - 1)
        found: FloatArray = rounds * (self.traffic.reduced_bytes / dp * slowest + latencies / dp)
        return found

    def _users(self, cells: IntArray, axis: int) -> FloatArray | float:
        """Of each link around an axis: how many groups like its own share its sender's node (see ``Network``)."""
        sizes = np.array(self.network.sizes)
        if not self.network.shares_egress or sizes.max() == 1:
            return 1.0
        nodes = self.node[cells]
        leaving = nodes != np.roll(nodes, -1, axis=axis)
        beside = np.moveaxis(nodes, axis, -1)
        same = (beside[..., :, None] == beside[..., None, :]).sum(axis=-1)
        sharing = np.maximum(1, sizes[beside] // same)
        found: FloatArray = np.where(leaving, np.moveaxis(sharing, -1, axis), 1)
        return found

    def _fastest_hops_s(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Within a region and between two, what no message is faster than, and the least that one occupies a channel;
        infinite where there is none."""
        network, sent = self.network, self.traffic.sent_bytes
        within, between = (
            (latency_s, sent * s_per_byte)
            for latency_s, s_per_byte in (network.nearest_within, network.nearest_between)
        )
        return (sum(within), within[1]), (sum(between), between[1])

    def _ring_bound_s(self, regions: int) -> float:
        """Replicas in at least so many regions: each sends as much whether they go around one ring or several, and a
        region sends to another one at least a part for each other region."""
        dp, network = self.traffic.dp, self.network
        if dp == 1:
            return 0.0
        sent = 2 * self.traffic.reduced_bytes / dp
        across_s = 0.0 if regions == 1 else (regions - 1) * sent / network.bandwidths_out[regions - 1]
        return float(max((dp - 1) * sent / network.fastest_bandwidth, across_s))


def slowness(cluster: Cluster, dtype: str | None = None) -> FloatArray:
    """[device] how much longer a large product takes than on the fastest."""
    times = {id(device): device.product_s(dtype) for device in cluster.devices}
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
