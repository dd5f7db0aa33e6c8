"""Candidates: meshes of an uneven network, each with what it sends and a price that none of its placements is under.

A mesh is priced on the fastest view of the cluster. That of one with shards is asked for no earlier than by the time
its turn would come if they were as fast as can be.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from autopar.planner.bounds import Objective
from autopar.planner.chain import Chain
from autopar.planner.configuration import Configuration
from autopar.planner.factor_graph import FactorGraph
from autopar.planner.layouts import configurations
from autopar.planner.least import quick_bound_s
from autopar.planner.placed_prices import Prices
from autopar.planner.places import Places
from autopar.planner.segment import Segment
from autopar.planner.solution import Pins, Space
from autopar.planner.traffic import Traffic
from cost_model.cluster import Cluster, Level
from cost_model.collectives import Link
from cost_model.network import Network

FEW = 16
"""On so many devices everything is tried, since each takes no time."""
ENOUGH = 0.01
"""Microbatches are as large as some of which a sample takes at most so much longer than of any others."""
MOST_MOVED = 128
"""On clusters of up to so many devices ends of stages are moved, which is quick there."""
LEAST_PART = 0.01
"""Of the segments, that shards divide unless they are said to repeat all."""
MANY = 10**6
EXCHANGES_PER_SEGMENT = 4  # all_reduces of an activation: two each way, as in an attention and a perceptron


class Volumes(Protocol):
    """What a model sends on a mesh: the largest activation between segments, or between so many stages, all gradients,
    those of the first, of the last and of both segments; of how many segments it is, in which dtype its products are,
    and how often replicas exchange something in every microbatch.
    """

    def sent_bytes(self, microbatch_size: int, pp: int | None = None) -> float: ...

    @property
    def reduced_bytes(self) -> float: ...

    @property
    def end_bytes(self) -> tuple[float, float, float]: ...

    @property
    def segments(self) -> int: ...

    @property
    def product_dtype(self) -> str: ...

    @property
    def meetings(self) -> int: ...


@dataclass(frozen=True)
class Candidate:
    """A mesh with what it sends; order: breaks ties; repeats: whether each shard does all that its stage does, and
    exchanges nothing."""

    order: int
    configuration: Configuration
    prices: Prices
    bound_s: float
    repeats: bool = False

    @property
    def shape(self) -> tuple[object, ...]:
        """Alike for all sizes of microbatches."""
        return *self.prices.shape, self.repeats


def fastest_view(cluster: Cluster, dtype: str) -> Cluster:
    """As many devices as the cluster has, all as fast as its fastest and with as much memory as the one with the least,
    in equal nodes of as many as the cluster can be divided into, and as near as its nearest.

    dtype: in which devices are compared.
    """
    network = cluster.network
    assert network is not None
    device = cluster.devices[int(Places(cluster, dtype).slowness.argmin())]
    usable = min(device.usable_bytes for device in cluster.devices)
    fastest = device.with_memory(usable + device.reserve_bytes)
    inner, count = _largest_group(network), cluster.num_devices
    levels = [_level("between", network, count, ~network.same_node if inner > 1 else ~np.eye(count, dtype=bool))]
    if 1 < inner:
        levels.insert(0, _level("inside", network, inner, network.same_node & ~np.eye(count, dtype=bool)))
    return Cluster(cluster.name, (fastest,) * count, tuple(levels[: 1 if inner == count else 2]), cluster.backend)


def with_shards(view: Cluster, shards: int, link: Link) -> Cluster:
    """The view, where so many neighbours are joined by a link that is no faster than theirs there."""
    outer = view.levels[-1]
    known = next(level for level in view.levels if level.group_size >= shards).link
    slower = Link(max(link.latency_s, known.latency_s), min(link.bandwidth_bytes_per_s, known.bandwidth_bytes_per_s))
    inner = Level("shards", shards, outer.start_s, slower)
    return replace(view, levels=(inner, outer) if shards < view.num_devices else (inner,))


def _largest_group(network: Network) -> int:
    """Of so many devices the largest equal groups are that lie on one node each."""
    return math.gcd(*network.sizes)


def _level(name: str, network: Network, size: int, chosen: np.typing.NDArray[np.bool_]) -> Level:
    """The fastest of some links."""
    chosen = chosen if chosen.any() else ~np.eye(len(network), dtype=bool)
    link = Link(float(network.latencies_s[chosen].min()), float(network.bandwidths[chosen].max()))
    return Level(name, size, network.start_s, link)


def may_move(cluster: Cluster, pins: Pins) -> bool:
    """Whether ends of stages are moved once a plan is placed."""
    return cluster.num_devices <= MOST_MOVED and pins.virtual_stages in (None, 1)


def candidates(cluster: Cluster, space: Space, batch: int, pins: Pins, volumes: Volumes) -> Iterator[Candidate]:
    """Every mesh that may be, in the order of their bounds."""
    whole_s, moved = _whole_seconds(space, volumes), may_move(cluster, pins)
    view, places = fastest_view(cluster, volumes.product_dtype), Places(cluster, volumes.product_dtype)
    every = list(configurations(cluster.num_devices, batch, pins))
    most = _largest(whole_s, sorted({c.microbatch_size for c in every}), volumes)

    def priced(c: Configuration, alone_s: float, part: float) -> Prices:
        return Prices(places, _traffic(c, alone_s, part, volumes), moved=moved)

    waiting: list[tuple[float, int, bool, Configuration, Prices | None]] = []
    for number, c in enumerate(every):
        if c.pp > volumes.segments or c.microbatch_size > most:
            continue
        one_s = whole_s(c.dp, 1, c.microbatch_size)
        if c.tp > 1 and math.isfinite(one_s):
            repeated = priced(c, one_s, 0.0)
            waiting.append((repeated.bound_s(), number, True, c, repeated))
        if c.tp == 1 or pins.tp is not None or _may_shard(whole_s, view, c, volumes):
            least = min(priced(c, _divided_s(whole_s, c, p), p).bound_s() for p in ((0.0, 1.0) if c.tp > 1 else (1.0,)))
            waiting.append((least, number, False, c, None))
    heapq.heapify(waiting)
    while waiting:
        bound_s, number, repeats, c, prices = heapq.heappop(waiting)
        if prices is not None:
            yield Candidate(number, c, prices, bound_s, repeats)
            continue
        alone_s, part = _alone(view, c, whole_s, volumes)
        if math.isfinite(alone_s) and (c.tp == 1 or part > LEAST_PART):
            prices = priced(c, alone_s, part)
            heapq.heappush(waiting, (prices.bound_s(), number, False, c, prices))


WholeSeconds = Callable[[int, int, int], float]


def _whole_seconds(space: Space, volumes: Volumes) -> WholeSeconds:
    """Seconds of all segments, forward and backward, of one microbatch on a mesh (dp, tp, microbatch size), by the
    first label of every shared variable; infinite where the mesh cannot be."""
    segments: dict[FactorGraph, Segment] = {}

    @functools.cache
    def alike_s(dp: int, tp: int, microbatch_size: int) -> float:
        chain = space.chain(dp, tp, microbatch_size)
        first = None if chain is None else _first_labels(chain)
        if first is None:
            return math.inf
        own = [segments.setdefault(graph, Segment(graph)) for graph in first.kinds]
        # Of so many microbatches, what is done once per step counts for nothing.
        return quick_bound_s(first, own, Objective(1, MANY)) / MANY

    # Replicas that do not meet take as long, however many there are.
    return lambda dp, tp, size: alike_s(dp if volumes.meetings else 1, tp, size)


def _largest(whole_s: WholeSeconds, sizes: Sequence[int], volumes: Volumes) -> float:
    """The smallest microbatch than which no larger one gains anything on a device alone; where replicas exchange
    something in every microbatch, each has one, however large."""
    if volumes.meetings:
        return math.inf
    samples_s = [whole_s(1, 1, size) / size for size in sizes]
    least_s = min(samples_s, default=math.inf)
    enough = (size for size, own_s in zip(sizes, samples_s, strict=True) if own_s <= least_s * (1 + ENOUGH))
    return next(enough, math.inf)


def _first_labels(chain: Chain) -> Chain | None:
    domains = chain.shared_domains()
    return chain.fixed({name: labels[0] for name, labels in domains.items()}) if all(domains.values()) else None


def _divided_s(whole_s: WholeSeconds, c: Configuration, part: float) -> float:
    """Seconds of all segments of one microbatch if shards divide such a part of them, and are as fast as can be: no
    more than ``_alone`` for that part."""
    seconds = whole_s(c.dp, 1, c.microbatch_size) * (1 - part * (1 - 1 / c.tp))
    return seconds if math.isfinite(seconds) else 0.0


def _alone(view: Cluster, c: Configuration, whole_s: WholeSeconds, volumes: Volumes) -> tuple[float, float]:
    """Seconds of all segments of one microbatch but for what shards exchange, which is priced where the shards are,
    infinite where the mesh cannot be; and the part of the segments that shards divide: the rest each of them repeats,
    and exchanges nothing for it."""
    whole, one = (whole_s(c.dp, tp, c.microbatch_size) for tp in (c.tp, 1))
    if c.tp == 1 or not math.isfinite(whole) or not math.isfinite(one):
        return whole, 1.0
    exchange_s = _exchanged(c, volumes) / view.levels[0].link.bandwidth_bytes_per_s
    saved_s, saved_at_most_s = max(0.0, one - whole), one * (1 - 1 / c.tp) - exchange_s
    part = float(saved_s > 0) if saved_s >= saved_at_most_s else saved_s / saved_at_most_s
    return max(whole - part * exchange_s, _divided_s(whole_s, c, part)), part


def _exchanged(c: Configuration, volumes: Volumes) -> float:
    """Bytes of all segments that a shard sends to the others for one microbatch where they divide everything."""
    sent = volumes.sent_bytes(c.microbatch_size)
    return EXCHANGES_PER_SEGMENT * 2 * (1 - 1 / c.tp) * sent * volumes.segments


def _traffic(c: Configuration, alone_s: float, part: float, volumes: Volumes) -> Traffic:
    first, last, both = volumes.end_bytes if c.pp > 1 else (0.0, 0.0, 0.0)
    shard = 1 - part * (1 - 1 / c.tp)
    return Traffic(
        c.pp,
        c.dp,
        c.tp,
        c.microbatches,
        alone_s / c.pp,
        volumes.sent_bytes(c.microbatch_size, c.pp),
        shard * (volumes.reduced_bytes + both) / c.pp,
        part * _exchanged(c, volumes) / c.pp,
        volumes.segments,
        volumes.meetings / c.pp,
        (shard * first, shard * last),
        shard * both / c.dp,
    )


def smallest_cuts(cuts: Sequence[float], pp: int) -> list[float]:
    """Of each end of a stage but the last, the least of the cuts that are nearer to it than to others, of stages of
    equally many segments. cuts[i]: before segment i + 1."""
    count = len(cuts) + 1
    ends = (range(math.ceil(count * (k - 0.5) / pp), math.ceil(count * (k + 0.5) / pp)) for k in range(1, pp))
    return [min(cuts[i - 1] for i in own if 0 < i < count) for own in ends]


def _may_shard(whole_s: WholeSeconds, view: Cluster, c: Configuration, volumes: Volumes) -> bool:
    """Whether tensor parallelism can pay: shards of a segment exchange its activation at least once each way, on the
    fastest links at best, which must take less than they save. On few devices everything is tried."""
    if c.tp == 1 or view.num_devices <= FEW:
        return True
    alone_s = whole_s(c.dp, 1, c.microbatch_size)
    if not math.isfinite(alone_s):
        return True
    nbytes = int(volumes.sent_bytes(c.microbatch_size))
    exchanged_s = 2 * view.collective_time_s("all_reduce", nbytes, tuple(range(c.tp)))
    return exchanged_s * volumes.segments < alone_s * (1 - 1 / c.tp)
