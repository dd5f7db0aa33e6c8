"""What a placement costs: cells (stage, replica, shard) on the devices of an uneven network.

The price is that of the slowest replica under a schedule that keeps enough microbatches under way, plus that of the
slowest gradient reduction:

    max over replicas of  once through all stages and messages, there and back
                          + (microbatches - 1) x the slowest stage or channel
    + max over (stage, shard) of the ring over replicas,

where a microbatch takes no less than its part of the way through all stages and back with as many under way as the
widest window has.

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
from cost_model.gloo_ring import segments
from cost_model.network import Network

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
MOST = 700.0  # e to this is a number
MAX_WINDOW = 8
"""Of 1f1b."""


@dataclass(frozen=True)
class Traffic:
    """What cells do and send. stage_s: forward and backward of one microbatch on the fastest device, of one of equal
    stages, exchanges within it left out; sent_bytes: the activation of one microbatch, and its gradient, of one shard;
    reduced_bytes: gradients of one (stage, shard); exchanged_bytes: what a shard sends to the others of its stage for
    one microbatch.
    """

    pp: int
    dp: int
    tp: int
    microbatches: int
    stage_s: float
    sent_bytes: float
    reduced_bytes: float
    exchanged_bytes: float = 0.0


@dataclass(frozen=True, eq=False)
class Places:
    """The devices that cells may lie on, told apart once for all meshes.

    dtype: of products, None where each device has its fastest.
    """

    cluster: Cluster
    dtype: str | None = None

    @property
    def network(self) -> Network:
        assert self.cluster.network is not None
        return self.cluster.network

    @property
    def region(self) -> IntArray:
        """[device]"""
        return self.network.regions_by_device

    @property
    def node(self) -> IntArray:
        """[device]"""
        return self.network.nodes_by_device

    @cached_property
    def slowness(self) -> FloatArray:
        """[device] how much longer a large product takes than on the fastest."""
        devices, dtype = self.cluster.devices, self.dtype
        times = {key: device.product_s(dtype) for key, device in {id(device): device for device in devices}.items()}
        fastest = min(times.values())
        return np.array([times[id(device)] / fastest for device in devices])

    @cached_property
    def delay_s(self) -> FloatArray:
        """[device, device] of an empty message."""
        return self.network.awaited_delays_s if self.cluster.rendezvous else self.network.delays_s

    @property
    def asks(self) -> bool:
        """Whether a part of a collective leaves once its receiver has asked for it, as gloo's do."""
        return self.cluster.backend == "gloo"

    @cached_property
    def sizes(self) -> IntArray:
        """[node] devices."""
        return np.array(self.network.sizes)

    @cached_property
    def shares_nodes(self) -> bool:
        """Whether devices of a node share what it sends."""
        return self.network.shares_egress and int(self.sizes.max()) > 1

    @cached_property
    def region_sizes(self) -> tuple[int, ...]:
        return tuple(Counter(self.region.tolist()).values())

    @cached_property
    def classes(self) -> IntArray:
        """Devices of one class may be exchanged: alone on a node of one region, and as fast."""
        keys = [
            (int(self.region[d]), float(self.slowness[d]), -1 if self.sizes[node] == 1 else node)
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

    @cached_property
    def every(self) -> IntArray:
        """[order, device] One order of the devices for each way to spread the classes, from the first by number on."""
        spreads = np.array(list(_spreads(Counter(self.classes.tolist()), len(self.classes))))
        found = np.empty_like(spreads)
        found[np.arange(len(spreads))[:, None], np.argsort(spreads, axis=1, kind="stable")] = np.argsort(
            self.classes, kind="stable"
        )
        return found


class Prices:
    """The prices of placements: arrays [placement, stage, replica, shard] of devices, many at once, since one by one
    most of the time is that of calling numpy."""

    def __init__(self, places: Places, traffic: Traffic) -> None:
        self.places, self.network, self.traffic = places, places.network, traffic
        self.shape = (traffic.pp, traffic.dp, traffic.tp)

    def cost_s(self, cells: IntArray) -> float:
        """Of one placement, [stage, replica, shard]."""
        return float(self.costs_s(cells[None])[0])

    def costs_s(self, cells: IntArray) -> FloatArray:
        """[placement]"""
        replicas, groups = self.parts_s(cells)
        found: FloatArray = replicas.max(axis=-1) + groups.max(axis=(-2, -1))
        return found

    def parts_s(self, cells: IntArray) -> tuple[FloatArray, FloatArray]:
        """[placement, replica] seconds of the schedule, [placement, stage, shard] of the reduction."""
        along, slowest = self._pipeline_s(cells)
        slowest = np.maximum(slowest, along / (1 + MAX_WINDOW * (self.traffic.pp - 1)))
        schedule: FloatArray = along + (self.traffic.microbatches - 1) * slowest
        return schedule, self._rings_s(cells)

    def window(self, cells: IntArray) -> int:
        """The narrowest window of 1f1b that keeps the slowest stage or channel of one placement busy: the first stage
        sends as many microbatches on their way as fit into the time that one takes to come back."""
        if self.traffic.pp == 1:
            return 1
        along, slowest = self._pipeline_s(cells[None])
        return max(1, math.ceil(float((along / slowest).max() - 1) / (self.traffic.pp - 1)))

    def _pipeline_s(self, cells: IntArray) -> tuple[FloatArray, FloatArray]:
        """[placement, replica] seconds once through all stages and messages, there and back; those of the slowest of
        these."""
        slow = self.places.slowness[cells].max(axis=-1)
        fast = 1.0 / slow.max(axis=-1, keepdims=True)
        busy = self.traffic.stage_s * slow * fast / fast.mean(axis=-2, keepdims=True) + self._exchanges_s(cells)
        there, back = (cells[:, :-1], cells[:, 1:]), (cells[:, 1:], cells[:, :-1])
        sent_there, sent_back = self.busy_s(*there), self.busy_s(*back)
        delay_s = self.places.delay_s
        along = busy.sum(axis=-2) + (delay_s[there] + sent_there).max(axis=-1).sum(axis=-2)
        along += (delay_s[back] + sent_back).max(axis=-1).sum(axis=-2)
        slowest = busy.max(axis=-2)
        if self.traffic.pp > 1:
            slowest = np.maximum(slowest, np.maximum(sent_there, sent_back).max(axis=(-3, -1)))
        if self.traffic.pp > 2 and self.network.shares_egress:
            both = np.where(self._share(cells), sent_there[:, 1:] + sent_back[:, :-1], 0.0)
            slowest = np.maximum(slowest, both.max(axis=(-3, -1)))
        return along, slowest

    def bound_s(self) -> float:
        """No placement has a lower price: either some replica spans two regions, or each group of replicas does."""
        t, best, sizes = self.traffic, float(self.places.slowness.min()), self.places.region_sizes
        (inside, inside_busy), (across, across_busy) = self._fastest_hops_s()
        stage_s = t.stage_s * best
        alone = t.pp * stage_s + (t.microbatches - 1) * stage_s
        crossing = math.inf
        if t.pp > 1:
            near = min(inside, across)
            crossing = t.pp * stage_s + 2 * (t.pp - 2) * near + 2 * across
            crossing += (t.microbatches - 1) * max(stage_s, across_busy)
            alone = t.pp * stage_s + 2 * (t.pp - 1) * inside + (t.microbatches - 1) * max(stage_s, inside_busy)
        rooms = sorted((size // (t.pp * t.tp) for size in sizes), reverse=True)
        groups = sorted((size // t.tp for size in sizes), reverse=True)
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

    def _share(self, cells: IntArray) -> npt.NDArray[np.bool_]:
        """[placement, inner stage, replica, shard] whether messages to both neighbours share a rate."""
        here, channels = cells[:, 1:-1], self.network.channels
        after = channels[here, cells[:, 2:]]
        shared: npt.NDArray[np.bool_] = (after == channels[here, cells[:, :-2]]) & (after >= 0)
        return shared

    def _exchanges_s(self, cells: IntArray) -> FloatArray | float:
        """[placement, stage, replica] around the shards."""
        t = self.traffic
        if t.tp == 1 or not t.exchanged_bytes:
            return 0.0
        after = np.roll(cells, -1, axis=-1)
        users = self._users(cells, -1)
        found: FloatArray = (t.exchanged_bytes / self.network.bandwidths[cells, after] * users).max(axis=-1)
        return found

    def _rings_s(self, cells: IntArray) -> FloatArray:
        """[placement, stage, shard] all_reduce over the replicas, in groups of a region first where that is faster: the
        slowest link in every round, each latency as often as a message passes it."""
        return self._reduced(cells)[1]

    def dp_inner(self, cells: IntArray) -> int:
        """Replicas of a group in which gradients of one placement are best summed first; 1 where they are not."""
        return int(self._reduced(cells[None])[0][0])

    def _reduced(self, cells: IntArray) -> tuple[IntArray, FloatArray]:
        """[placement] replicas of a group, the largest groups that lie in one region each, 1 where one ring is as fast;
        [placement, stage, shard] seconds."""
        found, sizes = self._ring_s(cells), np.ones(len(cells), dtype=np.int64)
        open_ = np.ones(len(cells), dtype=bool)
        for size in self._group_sizes:
            grid = cells.reshape(len(cells), self.traffic.pp, -1, size, self.traffic.tp)
            region = self.places.region[grid]
            inside = open_ & (region == region[:, :, :, :1]).all(axis=(-4, -3, -2, -1))
            open_ &= ~inside
            grouped = self._groups_s(grid[inside])
            better = grouped.max(axis=(-2, -1)) < found[inside].max(axis=(-2, -1))
            chosen = np.flatnonzero(inside)[better]
            found[chosen], sizes[chosen] = grouped[better], size
            if not open_.any():
                break
        return sizes, found

    @cached_property
    def _group_sizes(self) -> tuple[int, ...]:
        """Of groups of replicas, the largest first; none where there is one region."""
        sizes = range(self.traffic.dp // 2, 1, -1) if len(self.places.region_sizes) > 1 else ()
        return tuple(size for size in sizes if self.traffic.dp % size == 0)

    def _groups_s(self, grid: IntArray) -> FloatArray:
        """[placement, stage, shard] of [placement, stage, group, replica, shard]: around each group, a part around the
        groups, and back."""
        nbytes = self.traffic.reduced_bytes
        inside = self._around_s(grid, -2, nbytes).max(axis=-2)
        across = self._around_s(grid, -3, nbytes / grid.shape[-2]).max(axis=-2)
        found: FloatArray = inside + across
        return found

    def _ring_s(self, cells: IntArray) -> FloatArray:
        """[placement, stage, shard] all_reduce around all replicas."""
        if self.traffic.dp == 1:
            return np.zeros((len(cells), self.traffic.pp, self.traffic.tp))
        return self._around_s(cells, -2, self.traffic.reduced_bytes)

    def _around_s(self, cells: IntArray, axis: int, nbytes: float) -> FloatArray:
        """All_reduce around an axis, which is no more one of the result: the slowest link in every round, or what all
        of them take on average. gloo's goes the other way, in segments of which two are under way: each waits until the
        one before last has been received and asked for."""
        ranks, asked = cells.shape[axis], self.places.asks
        cells = np.flip(cells, axis) if asked else cells
        after, rounds = np.roll(cells, -1, axis=axis), 2 * (ranks - 1)
        busy_s = nbytes / ranks * self._users(cells, axis) / self.network.bandwidths[cells, after]
        latency_s, parts = self.network.latencies_s[cells, after], segments(nbytes, ranks) if asked else 1
        found: FloatArray = (busy_s / parts + latency_s).mean(axis=axis)
        if asked:
            asking_s = self.network.latencies_s[after, cells]
            busy_s = np.maximum(busy_s, (busy_s + parts * (latency_s + asking_s)) / 2)
        found = rounds * np.maximum(found, busy_s.max(axis=axis))
        return found

    def _users(self, cells: IntArray, axis: int) -> FloatArray | float:
        """Of each link around an axis: how many groups like its own share its sender's node (see ``Network``)."""
        if not self.places.shares_nodes:
            return 1.0
        nodes = self.places.node[cells]
        leaving = nodes != np.roll(nodes, -1, axis=axis)
        beside = np.moveaxis(nodes, axis, -1)
        same = (beside[..., :, None] == beside[..., None, :]).sum(axis=-1)
        sharing = np.maximum(1, self.places.sizes[beside] // same)
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
