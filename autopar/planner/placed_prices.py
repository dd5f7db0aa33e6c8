"""What a placement costs: cells (stage, replica, shard) on the devices of an uneven network.

The price is that of the slowest replica under a schedule that keeps enough microbatches under way, plus that of the
slowest gradient reduction:

    max over replicas of  once through all stages and messages, there and back
                          + (microbatches - 1) x the slowest stage or channel
    + max over (stage, shard) of the ring over replicas,

where a microbatch takes no less than its part of the way from any stage on and back with as many under way there as the
widest window has.

Stages are equally long: each has as much of the model as its slowest devices take as long for as those of the others
take for theirs. Where ends of stages may be moved, they have the shares that cost least instead, if that is less (see
``shares``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from autopar.planner.places import FloatArray, IntArray, Places
from autopar.planner.shares import equally_long, soonest
from autopar.planner.traffic import Traffic
from cost_model.collectives import Link
from cost_model.gloo_ring import segments

MAX_WINDOW = 8
"""Of 1f1b."""


class Prices:
    """The prices of placements: arrays [placement, stage, replica, shard] of devices, many at once, since one by one
    most of the time is that of calling numpy."""

    def __init__(self, places: Places, traffic: Traffic, *, moved: bool = False) -> None:
        """moved: whether ends of stages may be."""
        self.places, self.network, self.traffic, self.moved = places, places.network, traffic, moved
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
        work_s, rings_s, hops = self._work_s(cells), self._rings_s(cells), self._hops(cells)
        longest_s = work_s.max(axis=-1)
        shares = equally_long(longest_s, self.traffic.least_share)
        schedule = self._schedule_s(shares, work_s, hops)
        if self.traffic.pp == 1:
            return schedule, rings_s
        groups = self._summed_s(shares, rings_s)
        if self.moved and self.traffic.dp > 1:
            t, once_s = self.traffic, self.traffic.divided * rings_s.max(axis=-1)
            other = soonest(t.microbatches * longest_s, once_s, t.least_share)
            moved, moved_groups = self._schedule_s(other, work_s, hops), self._summed_s(other, rings_s)
            gains = moved.max(axis=-1) + moved_groups.max(axis=(-2, -1)) < (
                schedule.max(axis=-1) + groups.max(axis=(-2, -1))
            )
            schedule[gains], groups[gains] = moved[gains], moved_groups[gains]
        if self.traffic.tied_bytes:
            groups[:, [0, -1]] += self._tied_s(cells)[:, None]
        return schedule, groups

    def _summed_s(self, shares: FloatArray, rings_s: FloatArray) -> FloatArray:
        """[placement, stage, shard] of the reduction, of rings_s for equal parts of all gradients."""
        t = self.traffic
        parts = t.divided * shares
        if any(t.end_bytes):
            parts[:, 0] += t.end_bytes[0] / t.reduced_bytes
            parts[:, -1] += t.end_bytes[1] / t.reduced_bytes
        found: FloatArray = rings_s * parts[..., None]
        return found

    def _tied_s(self, cells: IntArray) -> FloatArray:
        """[placement, shard] all_reduce between the first and the last stage, of the slowest replica."""
        found: FloatArray = self._around_s(cells[:, [0, -1]], 1, self.traffic.tied_bytes).max(axis=-2)
        return found

    def window(self, cells: IntArray) -> int:
        """The narrowest window of 1f1b that keeps the slowest stage or channel of one placement of equally long stages
        busy: each stage but the last sends as many microbatches on their way as fit into the time that one takes to
        come back."""
        if self.traffic.pp == 1:
            return 1
        work_s, (back_s, channel_s) = self._work_s(cells[None]), self._hops(cells[None])
        shares = equally_long(work_s.max(axis=-1), self.traffic.least_share)
        busy, rest = self._rest_s(shares, work_s, back_s)
        slowest = np.maximum(busy.max(axis=-2), channel_s)
        later = np.arange(self.traffic.pp - 1, 0, -1)[:, None]
        return max(1, math.ceil(float(((rest[:, :-1] / slowest[:, None] - 1) / later).max())))

    def _work_s(self, cells: IntArray) -> FloatArray:
        """[placement, stage, replica] of one microbatch and an equal part of the model."""
        found: FloatArray = self.traffic.stage_s * _most(self.places.slowness[cells])
        found += self._exchanges_s(cells) + self._meetings_s(cells)
        return found

    def _schedule_s(self, shares: FloatArray, work_s: FloatArray, hops: tuple[FloatArray, FloatArray]) -> FloatArray:
        """[placement, replica] of all microbatches, of stages with such shares of the model, [placement, stage]."""
        t, (back_s, channel_s) = self.traffic, hops
        busy, rest = self._rest_s(shares, work_s, back_s)
        further = (t.microbatches - 1) * np.maximum(busy.max(axis=-2), channel_s)
        for way_s, held in (
            (rest, 1 + MAX_WINDOW * np.arange(t.pp - 1, -1, -1)),
            (back_s, np.full(t.pp - 1, MAX_WINDOW)),
        ):
            rounds = np.maximum(0, t.microbatches / held - 1)
            further = np.maximum(further, (way_s * rounds[:, None]).max(axis=-2, initial=0.0))
        found: FloatArray = rest[:, 0] + further
        return found

    def _rest_s(self, shares: FloatArray, work_s: FloatArray, back_s: FloatArray) -> tuple[FloatArray, FloatArray]:
        """[placement, stage, replica] one microbatch in a stage, and its way from there to the last stage and back."""
        busy = shares[..., None] * work_s
        rest = busy.copy()
        rest[:, :-1] += back_s
        return busy, rest[:, ::-1].cumsum(axis=-2)[:, ::-1]

    def _hops(self, cells: IntArray) -> tuple[FloatArray, FloatArray]:
        """[placement, stage but the last, replica] of a message to the next stage and one back; [placement, replica]
        what a microbatch keeps the slowest channel busy for."""
        t, network = self.traffic, self.network
        pairs = cells[:, :-1] * len(network) + cells[:, 1:]
        delay_s, delay_back_s, s_per_byte, s_per_byte_back = (table.take(pairs) for table in self.places.messages)
        sent_there, sent_back = t.sent_bytes * s_per_byte, t.sent_bytes * s_per_byte_back
        found: FloatArray = _most(delay_s + sent_there) + _most(delay_back_s + sent_back)
        slowest: FloatArray = _most(np.maximum(sent_there, sent_back)).max(axis=-2, initial=0.0)
        if t.pp > 2 and network.shares_egress:
            both = np.where(self._share(pairs), sent_there[:, 1:] + sent_back[:, :-1], 0.0)
            slowest = np.maximum(slowest, _most(both).max(axis=-2))
        return found, slowest

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
            stages_s = np.full(t.pp, t.stage_s + self._least_exchange_s)
            stages_s[0] = t.stage_s + exchange_s
            longer_s = t.least_share * (exchange_s - self._least_exchange_s)
            spread = self._replica_bound_s(2 * (t.pp - 1) * near + longer_s, _shared_out_s(stages_s))
            bounds.append(max(spread, slowest) + self._ring_bound_s(1))
        return float(min(bounds))

    def _replica_bound_s(self, beside_s: float, busiest_s: float) -> float:
        """Of one that a microbatch spends so long in beside its stages, of which one or a channel takes so long at
        least. The longest takes no less than equal ones would on the fastest devices."""
        stage_s = self.traffic.stage_s + self._least_exchange_s
        return self.traffic.pp * stage_s + beside_s + (self.traffic.microbatches - 1) * max(stage_s, busiest_s)

    @property
    def _least_exchange_s(self) -> float:
        """Around the shards of a stage: more than a node has cross a border of one."""
        t, network = self.traffic, self.network
        if t.tp == 1:
            return 0.0
        alone = t.tp <= max(network.sizes)
        return t.exchanged_bytes / (network.fastest_bandwidth if alone else network.bandwidth_between_nodes)

    @property
    def _crossing_s(self) -> float:
        """What some stage of some replica takes at least where shards do not divide the devices of every node, and it
        crosses a border of one."""
        t, network = self.traffic, self.network
        if t.tp == 1 or _divides(t.tp, network.sizes):
            return 0.0
        stages_s = np.full(t.pp, t.stage_s + self._least_exchange_s)
        stages_s[0] = t.stage_s + t.exchanged_bytes / network.bandwidth_between_nodes
        return _shared_out_s(stages_s)

    def _slowest_bound_s(self) -> float:
        """Of the slowest replica: some one has a stage on the slowest devices of that stage, some one sends over the
        border of each region of which stages do not divide the devices."""
        t, slowest = self.traffic, max(self._even_s(), self._crossing_s)
        (inside, _), (across, _) = self._fastest_hops_s()
        for size, bandwidth in self.places.borders:
            if size % t.pp:
                slowest = max(slowest, t.sent_bytes / bandwidth)
        return self._replica_bound_s(2 * (t.pp - 1) * min(inside, across), slowest)

    def _even_s(self) -> float:
        """What some stage takes on its slowest devices, at least: they add up to no more speed than where each stage
        has the fastest devices that are left."""
        slow = np.sort(self.places.slowness).reshape(self.traffic.pp, -1)[:, -1]
        return _shared_out_s(self.traffic.stage_s * slow + self._least_exchange_s)

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

    def _meetings_s(self, cells: IntArray) -> FloatArray | float:
        """[placement, stage, 1] what replicas wait longer for each other than over the fastest links, in rounds of
        messages that take no longer than their delays: by twos along a tree, over gloo around a ring."""
        t = self.traffic
        if t.dp == 1 or not t.meetings:
            return 0.0
        rounds = t.dp - 1 if self.places.asks else math.ceil(math.log2(t.dp))
        delays_s = self.places.round_s
        longer = delays_s.take(cells * len(self.network) + _next(cells, -2)) - self.places.least_round_s
        found: FloatArray = t.meetings * rounds * longer.max(axis=(-2, -1))[..., None]
        return found

    def shard_link(self, cells: IntArray) -> Link:
        """The slowest between neighbouring shards of one placement."""
        pairs = cells * len(self.network) + _next(cells, -1)
        bandwidths, latencies_s, _ = self.places.links
        slowest = float((bandwidths.take(pairs) / self._users(cells, -1)).min())
        return Link(float(latencies_s.take(pairs).max()), slowest)

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
        """Where replicas do not divide the devices of a region, those of some stage, which may have the least share of
        the model, lie in it in part, and are summed in no larger groups than lie there."""
        dp = self.traffic.dp
        parts = [(min(size, dp - 1), bandwidth) for size, bandwidth in self.places.borders if size % dp]
        inner = {part: next(n for n in range(part, 0, -1) if dp % n == 0) for part, _ in parts}
        found_s = max(((dp / inner[part] - 1) * sent / bandwidth for part, bandwidth in parts), default=0.0)
        return self.traffic.divided * self.traffic.least_share * found_s


def _most(values: FloatArray) -> FloatArray:
    """The largest of all shards; there is often one."""
    found: FloatArray = values[..., 0] if values.shape[-1] == 1 else values.max(axis=-1)
    return found


def _shared_out_s(stages_s: FloatArray) -> float:
    """Of stages that take so long for equal parts of the model, what the slowest takes however it is shared out."""
    return len(stages_s) / float(np.sum(1.0 / stages_s)) if stages_s.all() else 0.0


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
