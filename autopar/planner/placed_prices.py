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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from autopar.planner.places import FloatArray, IntArray, Places
from cost_model.gloo_ring import segments

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

    def parts_s(self, cells: IntArray, shares: FloatArray | None = None) -> tuple[FloatArray, FloatArray]:
        """[placement, replica] seconds of the schedule, [placement, stage, shard] of the reduction.

        shares: [placement, stage] how many times an equal part of the model each stage has; as the module says if None.
        """
        busy = self._equally_long_s(cells) if shares is None else self._shared_s(cells, shares)
        along, slowest = self._pipeline_s(cells, busy)
        slowest = np.maximum(slowest, along / (1 + MAX_WINDOW * (self.traffic.pp - 1)))
        schedule: FloatArray = along + (self.traffic.microbatches - 1) * slowest
        rings = self._rings_s(cells)
        return schedule, rings if shares is None else rings * shares[..., None]

    def whole_s(self, cells: IntArray) -> tuple[FloatArray, FloatArray]:
        """[stage] seconds of all microbatches on the slowest replica, and of the slowest reduction, of an equal part of
        the model on each stage of one placement."""
        busy = self._shared_s(cells[None], np.ones((1, self.traffic.pp)))[0].max(axis=-1)
        return self.traffic.microbatches * busy, self._rings_s(cells[None])[0].max(axis=-1)

    def window(self, cells: IntArray) -> int:
        """The narrowest window of 1f1b that keeps the slowest stage or channel of one placement busy: the first stage
        sends as many microbatches on their way as fit into the time that one takes to come back."""
        if self.traffic.pp == 1:
            return 1
        along, slowest = self._pipeline_s(cells[None], self._equally_long_s(cells[None]))
        return max(1, math.ceil(float((along / slowest).max() - 1) / (self.traffic.pp - 1)))

    def _equally_long_s(self, cells: IntArray) -> FloatArray:
        """[placement, stage, replica] of one microbatch where stages are equally long on their slowest devices."""
        slow = _most(self.places.slowness[cells])
        fast = 1.0 / slow.max(axis=-1, keepdims=True)
        found: FloatArray = self.traffic.stage_s * slow * fast / fast.mean(axis=-2, keepdims=True)
        return found + self._exchanges_s(cells)

    def _shared_s(self, cells: IntArray, shares: FloatArray) -> FloatArray:
        """[placement, stage, replica] of one microbatch with so many times an equal part of the model."""
        whole_s = self.traffic.stage_s * _most(self.places.slowness[cells]) + self._exchanges_s(cells)
        found: FloatArray = shares[..., None] * whole_s
        return found

    def _pipeline_s(self, cells: IntArray, busy: FloatArray) -> tuple[FloatArray, FloatArray]:
        """[placement, replica] seconds once through all stages and messages, there and back; those of the slowest of
        these. busy: [placement, stage, replica] those of stages."""
        t, network = self.traffic, self.network
        along, slowest = busy.sum(axis=-2), busy.max(axis=-2)
        if t.pp == 1:
            return along, slowest
        pairs = cells[:, :-1] * len(network) + cells[:, 1:]
        delay_s, delay_back_s, s_per_byte, s_per_byte_back = (table.take(pairs) for table in self.places.messages)
        sent_there, sent_back = t.sent_bytes * s_per_byte, t.sent_bytes * s_per_byte_back
        along += _most(delay_s + sent_there).sum(axis=-2)
        along += _most(delay_back_s + sent_back).sum(axis=-2)
        slowest = np.maximum(slowest, _most(np.maximum(sent_there, sent_back)).max(axis=-2))
        if t.pp > 2 and network.shares_egress:
            both = np.where(self._share(pairs), sent_there[:, 1:] + sent_back[:, :-1], 0.0)
            slowest = np.maximum(slowest, _most(both).max(axis=-2))
        return along, slowest

    def bound_s(self) -> float:
        """No placement has a lower price: each replica lies in one region, or only the shards of each of its stages do,
        or shards of some stage lie in several and exchange what they do between them."""
        t, sizes, slowest = self.traffic, self.places.region_sizes, self._slowest_bound_s()
        (inside, inside_busy), (across, across_busy) = self._fastest_hops_s()
        near, several = min(inside, across), len(sizes) > 1
        bounds = []
        if _divides(t.pp * t.tp, sizes):
            alone = self._replica_bound_s(2 * (t.pp - 1) * inside, inside_busy)
            bounds.append(max(alone, slowest) + self._ring_bound_s(t.pp * t.tp))
        if t.pp > 1 and several and _divides(t.tp, sizes):
            crossing = self._replica_bound_s(2 * (t.pp - 2) * near + 2 * across, across_busy)
            bounds.append(max(crossing, slowest) + self._ring_bound_s(t.tp))
        if t.tp > 1 and several:
            exchange_s = t.exchanged_bytes / self.network.bandwidths_out[0]
            longer_s = exchange_s - self._least_exchange_s
            spread = self._replica_bound_s(2 * (t.pp - 1) * near + longer_s, self._shortest_stage_s + exchange_s)
            bounds.append(max(spread, slowest) + self._ring_bound_s(1))
        return float(min(bounds))

    def _replica_bound_s(self, beside_s: float, busiest_s: float) -> float:
        """Of one that a microbatch spends so long in beside its stages, of which one or a channel takes so long at
        least. The longest takes no less than equal ones would on the fastest devices."""
        stage_s = self.traffic.stage_s + self._least_exchange_s
        return self.traffic.pp * stage_s + beside_s + (self.traffic.microbatches - 1) * max(stage_s, busiest_s)

    @property
    def _shortest_stage_s(self) -> float:
        """Of a stage that has little of the model since it is on the slowest device, in a replica of the fastest."""
        t = self.traffic
        return t.stage_s * t.pp / (1 + (t.pp - 1) * float(self.places.slowness.max()))

    @property
    def _least_exchange_s(self) -> float:
        """Around the shards of a stage."""
        t = self.traffic
        return 0.0 if t.tp == 1 else t.exchanged_bytes / self.network.fastest_bandwidth

    def _slowest_bound_s(self) -> float:
        """Of the slowest replica: some one has a stage on the slowest devices of that stage, some one sends over the
        border of each region of which stages do not divide the devices."""
        t, slowest = self.traffic, self._even_s() + self._least_exchange_s
        (inside, _), (across, _) = self._fastest_hops_s()
        for size, bandwidth in self.places.borders:
            if size % t.pp:
                slowest = max(slowest, t.sent_bytes / bandwidth)
        return self._replica_bound_s(2 * (t.pp - 1) * min(inside, across), slowest)

    def _even_s(self) -> float:
        """What every stage takes on its slowest devices, at least: segments are shared out so that stages are equally
        long there, and they add up to no more speed than where each stage has the fastest devices that are left."""
        slow = np.sort(self.places.slowness).reshape(self.traffic.pp, -1)[:, -1]
        return self.traffic.stage_s / float(np.mean(1.0 / slow))

    def busy_s(self, sources: IntArray, targets: IntArray) -> FloatArray:
        """Seconds for which messages keep their channels busy."""
        seconds: FloatArray = self.traffic.sent_bytes * self.network.shared_s_per_byte[sources, targets]
        return seconds

    def _share(self, pairs: IntArray) -> npt.NDArray[np.bool_]:
        """[placement, inner stage, replica, shard] whether messages to both neighbours share a rate."""
        there, back = self.places.channels
        after = there.take(pairs[:, 1:])
        shared: npt.NDArray[np.bool_] = (after == back.take(pairs[:, :-1])) & (after >= 0)
        return shared

    def _exchanges_s(self, cells: IntArray) -> FloatArray | float:
        """[placement, stage, replica] around the shards."""
        t = self.traffic
        if t.tp == 1 or not t.exchanged_bytes:
            return 0.0
        pairs = cells * len(self.network) + _next(cells, -1)
        found: FloatArray = (t.exchanged_bytes / self.places.links[0].take(pairs) * self._users(cells, -1)).max(axis=-1)
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
        if not self._group_sizes:
            return sizes, found
        region = self.places.region[cells]
        parted = (region[:, :, 1:] != region[:, :, :-1]).any(axis=(1, 3))
        open_ = np.ones(len(cells), dtype=bool)
        for size in self._group_sizes:
            inside = open_ & ~parted[:, np.arange(1, self.traffic.dp) % size > 0].any(axis=1)
            if not inside.any():
                continue
            open_ &= ~inside
            grouped = self._groups_s(
                cells[inside].reshape(-1, self.traffic.pp, self.traffic.dp // size, size, self.traffic.tp)
            )
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
        ranks, asked, (bandwidths, latencies_s, latencies_back_s) = (
            cells.shape[axis],
            self.places.asks,
            self.places.links,
        )
        cells = np.flip(cells, axis) if asked else cells
        pairs, rounds = cells * len(self.network) + _next(cells, axis), 2 * (ranks - 1)
        busy_s = nbytes / ranks * self._users(cells, axis) / bandwidths.take(pairs)
        latency_s, parts = latencies_s.take(pairs), segments(nbytes, ranks) if asked else 1
        found: FloatArray = (busy_s / parts + latency_s).mean(axis=axis)
        if asked:
            asking_s = latencies_back_s.take(pairs)
            busy_s = np.maximum(busy_s, (busy_s + parts * (latency_s + asking_s)) / 2)
        found = rounds * np.maximum(found, busy_s.max(axis=axis))
        return found

    def _users(self, cells: IntArray, axis: int) -> FloatArray | float:
        """Of each link around an axis: how many groups like its own share its sender's node (see ``Network``)."""
        if not self.places.shares_nodes:
            return 1.0
        nodes = self.places.node[cells]
        leaving = nodes != _next(nodes, axis)
        beside = np.moveaxis(nodes, axis, -1)
        groups, count = (
            np.arange(beside.size // beside.shape[-1]).reshape(*beside.shape[:-1], 1),
            len(self.places.sizes),
        )
        own = groups * count + beside
        same = np.bincount(own.ravel(), minlength=groups.size * count).take(own)
        sharing = self.places.sharing.take(beside * (self.places.sharing.size // count) + same)
        found: FloatArray = np.where(leaving, np.moveaxis(sharing, -1, axis), 1)
        return found

    def _fastest_hops_s(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Within a region and between two, what no message is faster than, and the least that one occupies a channel;
        infinite where there is none, nothing where there is one stage."""
        if self.traffic.pp == 1:
            return (0.0, 0.0), (0.0, 0.0)
        network, sent = self.network, self.traffic.sent_bytes
        within, between = (
            (latency_s, sent * s_per_byte)
            for latency_s, s_per_byte in (network.nearest_within, network.nearest_between)
        )
        return (sum(within), within[1]), (sum(between), between[1])

    def _ring_bound_s(self, together: int) -> float:
        """Where so many devices of each replica lie in one region: each replica sends as much whether they go around
        one ring or several, and a region sends to another one at least a part for each other region."""
        dp, network = self.traffic.dp, self.network
        if dp == 1:
            return 0.0
        regions = _fewest([size // together for size in self.places.region_sizes], dp)
        sent = 2 * self.traffic.reduced_bytes / dp
        across_s = 0.0 if regions == 1 else (regions - 1) * sent / network.bandwidths_out[regions - 1]
        return float(max((dp - 1) * sent / network.fastest_bandwidth, across_s, self._border_s(sent)))

    def _border_s(self, sent: float) -> float:
        """Where replicas do not divide the devices of a region, those of some stage lie in it in part, and are summed
        in no larger groups than lie there."""
        dp = self.traffic.dp
        parts = [(min(size, dp - 1), bandwidth) for size, bandwidth in self.places.borders if size % dp]
        inner = {part: next(n for n in range(part, 0, -1) if dp % n == 0) for part, _ in parts}
        return max(((dp / inner[part] - 1) * sent / bandwidth for part, bandwidth in parts), default=0.0)


def _most(values: FloatArray) -> FloatArray:
    """The largest of all shards; there is often one."""
    found: FloatArray = values[..., 0] if values.shape[-1] == 1 else values.max(axis=-1)
    return found


def _next(values: IntArray, axis: int) -> IntArray:
    """Those one further round along an axis."""
    found: IntArray = values.take(np.arange(1, values.shape[axis] + 1) % values.shape[axis], axis)
    return found


def _divides(part: int, sizes: Sequence[int]) -> bool:
    """Whether devices of regions of these sizes can all be in parts that lie in one each."""
    return all(size % part == 0 for size in sizes)


def _fewest(rooms: Sequence[int], wanted: int) -> int:
    """How many of these hold so many together, which all do."""
    totals = itertools.accumulate(sorted(rooms, reverse=True))
    return next(count for count, total in enumerate(totals, start=1) if total >= wanted)
