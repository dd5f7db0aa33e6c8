"""A network by pairs: what a message costs from each device to each other one, in regions or in a matrix.

Devices sit on nodes, nodes in regions. A message inside a node takes the node's link, any other one the link of the
two regions. A matrix is the case of one device a node and one node a region.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cost_model.collectives import FLAT, Link, chain_s, ring_s, slowest, tree_s
from cost_model.gloo_ring import all_reduce_s

Rows = tuple[tuple[float, ...], ...]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Channel = tuple[int, float, float]


@dataclass(frozen=True)
class Network:
    """Links of devices by node and region.

    latency_s, bandwidth_bytes_per_s: [region of the sender][region of the receiver], the diagonal between two nodes of
    one region. regions: their names. region_of: region of each node; node_of: node of each device, counting up.
    inside: the link within each node, None on nodes of one device. start_s: paid once by each collective and transfer.
    copy_s_per_byte: what both ends spend on copying a message between nodes to and from the wire (NCCL over sockets);
    nobody shares it, and collectives, which move in pieces, hide it behind the wire.
    shares_egress: whether destinations with equal latency and bandwidth share that bandwidth of the sending node, as
    one traffic class of a shaped interface does; links within a node are never shared.
    """

    regions: tuple[str, ...]
    latency_s: Rows
    bandwidth_bytes_per_s: Rows
    region_of: tuple[int, ...]
    node_of: tuple[int, ...]
    inside: tuple[Link | None, ...]
    start_s: float = 0.0
    copy_s_per_byte: float = 0.0
    shares_egress: bool = False

    def __post_init__(self) -> None:
        count = len(self.regions)
        assert len(self.latency_s) == len(self.bandwidth_bytes_per_s) == count
        assert len(self.region_of) == len(self.inside) == max(self.node_of) + 1 and max(self.region_of) < count
        assert all(b - a in (0, 1) for a, b in zip(self.node_of, self.node_of[1:], strict=False))

    @classmethod
    def of_matrix(cls, latency_s: Rows, bandwidth_bytes_per_s: Rows) -> Network:
        """One device a node, one node a region; diagonals are not read."""
        every = tuple(range(len(latency_s)))
        names = tuple(f"device {index}" for index in every)
        return cls(names, latency_s, bandwidth_bytes_per_s, every, every, (None,) * len(every))

    def __len__(self) -> int:
        return len(self.node_of)

    def region(self, device: int) -> str:
        return self.regions[self.region_of[self.node_of[device]]]

    def link(self, source: int, target: int, users: int = 1) -> Link:
        """What each of so many senders of a node gets from device to device."""
        here, there = self.node_of[source], self.node_of[target]
        inner = self.inside[here]
        if here == there and inner is not None:
            return inner
        between = self._between[self.region_of[here]][self.region_of[there]]
        if users == 1 or not self.shares_egress:
            return between
        return Link(between.latency_s, between.bandwidth_bytes_per_s / users)

    def transfer_s(self, nbytes: float, source: int, target: int, senders: int | None = None) -> float:
        """Seconds of one message while so many devices of its node send in its channel (None: all of them)."""
        node = self.node_of[source]
        if node == self.node_of[target]:
            return self.start_s + self.link(source, target).seconds(nbytes)
        link = self.link(source, target, self._sizes[node] if senders is None else senders)
        return self.start_s + link.seconds(nbytes) + nbytes * self.copy_s_per_byte

    def senders(self, pairs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """Of messages that go on all the time: how many, for each, are in its channel."""
        channels = [self.channel(*pair) for pair in pairs]
        users = Counter(channels)
        return tuple(1 if channel is None else users[channel] for channel in channels)

    def channel(self, source: int, target: int) -> Channel | None:
        """What messages must have in common to share a sender's bandwidth; None where they share nothing."""
        if not self.shares_egress or self.node_of[source] == self.node_of[target]:
            return None
        link = self.link(source, target)
        return self.node_of[source], link.latency_s, link.bandwidth_bytes_per_s

    def collective_s(self, kind: str, nbytes: float, devices: tuple[int, ...], backend: str) -> float:
        """Seconds of a collective, with groups like this one at work on the other devices of its nodes.

        A ring in the order of the group. NCCL may reduce or gather along a tree where that is faster, and broadcasts
        along a chain where that is. gloo moves what its receiver has asked for: its all_reduce goes round the other way
        in segments, its gather (as autopar runs it) asks in every round, its broadcast is a tree, and its
        reduce_scatter (as autopar runs it) and all_to_all exchange parts.
        """
        if backend == "gloo":
            return self.start_s + self._asked_s(kind, nbytes, devices)
        if kind == "all_to_all":
            return self.start_s + self._exchange_s(nbytes, devices)
        links = self._ring(devices)
        if kind == "broadcast":
            along_s = tree_s(len(devices), nbytes, slowest(links))
            return self.start_s + min(along_s, chain_s(links[:-1], nbytes))
        by_tree_s = FLAT[kind](len(devices), nbytes, slowest(links))
        rounds = (2 if kind == "all_reduce" else 1) * (len(devices) - 1)
        return self.start_s + min(ring_s(links, nbytes / len(devices), rounds), by_tree_s)

    def _asked_s(self, kind: str, nbytes: float, devices: tuple[int, ...]) -> float:
        """Seconds of one of gloo's collectives."""
        if kind in ("all_to_all", "reduce_scatter"):
            return self._exchange_s(nbytes, devices, asked=True)
        if kind == "all_reduce":
            devices = devices[::-1]
        links, asking_s = self._ring(devices), tuple(self._asking_s(a, b) for a, b in _around(devices))
        if kind == "all_reduce":
            return all_reduce_s(links, asking_s, nbytes)
        if kind == "broadcast":
            return max(asking_s) + tree_s(len(devices), nbytes, slowest(links))
        awaited = [Link(x.latency_s + s, x.bandwidth_bytes_per_s) for x, s in zip(links, asking_s, strict=True)]
        return ring_s(awaited, nbytes / len(devices), len(devices) - 1)

    def _asking_s(self, source: int, target: int) -> float:
        """Until a sender knows that it is awaited."""
        return self.link(target, source).latency_s

    @cached_property
    def uniform(self) -> bool:
        """Whether every device is as near to every other."""
        off = ~np.eye(len(self.node_of), dtype=bool)
        return all(len(np.unique(values[off])) <= 1 for values in (self.latencies_s, self.bandwidths))

    @cached_property
    def latencies_s(self) -> FloatArray:
        """[device, device]"""
        return self._by_device(np.array(self.latency_s), "latency_s")

    @cached_property
    def bandwidths(self) -> FloatArray:
        """[device, device] bytes per second of a message while nothing else is sent, copying left out."""
        return self._by_device(np.array(self.bandwidth_bytes_per_s), "bandwidth_bytes_per_s")

    @cached_property
    def delays_s(self) -> FloatArray:
        """[device, device] of an empty message."""
        delays: FloatArray = self.start_s + self.latencies_s
        return delays

    @cached_property
    def awaited_delays_s(self) -> FloatArray:
        """[device, device] of an empty message whose sender learns first that it is awaited."""
        delays: FloatArray = self.delays_s + self.latencies_s.T
        return delays

    @cached_property
    def nearest_within(self) -> tuple[float, float]:
        """The least delay, and the least seconds per byte, between two devices of a region; infinite where none are."""
        return self._nearest(same=True)

    @cached_property
    def nearest_between(self) -> tuple[float, float]:
        """The same between two regions."""
        return self._nearest(same=False)

    def _nearest(self, *, same: bool) -> tuple[float, float]:
        region = self.regions_by_device
        chosen = (region[:, None] == region[None, :]) == same
        np.fill_diagonal(chosen, val=False)
        delay_s, per_byte_s = (values[chosen].min(initial=np.inf) for values in (self.delays_s, self.shared_s_per_byte))
        return float(delay_s), float(per_byte_s)

    @cached_property
    def fastest_bandwidth(self) -> float:
        """Between any two devices."""
        return float(self.bandwidths[~np.eye(len(self), dtype=bool)].max())

    @cached_property
    def bandwidth_between_nodes(self) -> float:
        """Between any two devices of different nodes; nothing where there is one node."""
        return float(self.bandwidths[~self.same_node].max(initial=0.0))

    @cached_property
    def bandwidths_out(self) -> tuple[float, ...]:
        """The fastest that leaves each region for another one, the largest first."""
        region = self.regions_by_device
        out = [self.bandwidths[np.ix_(region == r, region != r)].max(initial=0.0) for r in np.unique(region)]
        return tuple(sorted(map(float, out), reverse=True))

    @cached_property
    def nodes_by_device(self) -> IntArray:
        return np.array(self.node_of)

    @cached_property
    def regions_by_device(self) -> IntArray:
        return np.array(self.region_of)[self.nodes_by_device]

    @cached_property
    def shared_s_per_byte(self) -> FloatArray:
        """[device, device] of a message while all devices of the sender's node send."""
        sizes = np.array([self._sizes[node] for node in self.node_of]) if self.shares_egress else np.ones(len(self))
        outside = ~self.same_node
        rates: FloatArray = np.where(outside, sizes[:, None], 1.0) / self.bandwidths + outside * self.copy_s_per_byte
        return rates

    @cached_property
    def channels(self) -> IntArray:
        """[device, device] equal in a row for targets that share the sender's rate; -1 where nothing is shared."""
        rates = np.stack([np.array(self.latency_s), np.array(self.bandwidth_bytes_per_s)], axis=-1).reshape(-1, 2)
        numbers = np.unique(rates, axis=0, return_inverse=True)[1].reshape(len(self.regions), -1)
        region = self.regions_by_device
        shared = ~self.same_node & self.shares_egress
        found: IntArray = np.where(shared, numbers[np.ix_(region, region)], -1)
        return found

    @cached_property
    def same_node(self) -> BoolArray:
        """[device, device]"""
        node = self.nodes_by_device
        same: BoolArray = node[:, None] == node[None, :]
        return same

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Devices of each node."""
        return tuple(self._sizes[node] for node in range(len(self.inside)))

    @cached_property
    def _between(self) -> tuple[tuple[Link, ...], ...]:
        """Links between regions; a diagonal that nothing uses may hold no link."""
        every = range(len(self.regions))
        alone = {region for region, count in Counter(self.region_of).items() if count == 1}
        return tuple(
            tuple(
                Link(0.0, 1.0)
                if a == b and a in alone
                else Link(self.latency_s[a][b], self.bandwidth_bytes_per_s[a][b])
                for b in every
            )
            for a in every
        )

    def _by_device(self, rows: FloatArray, inner: str) -> FloatArray:
        node = np.array(self.node_of)
        region = np.array(self.region_of)[node]
        whole: FloatArray = rows[np.ix_(region, region)]
        for index, link in enumerate(self.inside):
            if link is not None:
                own = np.flatnonzero(node == index)
                whole[np.ix_(own, own)] = getattr(link, inner)
        return whole

    def _ring(self, devices: tuple[int, ...]) -> tuple[Link, ...]:
        """Links to the next of the group. Where its nodes have further devices, those are in groups like it."""
        inside = Counter(self.node_of[device] for device in devices)
        beside = {node: max(1, self._sizes[node] // count) for node, count in inside.items()}
        return tuple(self.link(a, b, beside[self.node_of[a]]) for a, b in _around(devices))

    def _exchange_s(self, nbytes: float, devices: tuple[int, ...], *, asked: bool = False) -> float:
        """All parts leave at once: a sender's own take turns on its link, or on what they share. asked: once the sender
        knows that they are awaited."""
        part, latest = nbytes / len(devices), 0.0
        for source in devices:
            busy: Counter[Channel | None] = Counter()
            for target in devices:
                if source != target:
                    link = self.link(source, target)
                    busy[self.channel(source, target)] += part / link.bandwidth_bytes_per_s  # type: ignore[assignment]
                    delay_s = link.latency_s + (self._asking_s(source, target) if asked else 0.0)
                    latest = max(latest, delay_s + max(busy.values()))
        return latest

    @cached_property
    def _sizes(self) -> Counter[int]:
        """Devices of each node."""
        return Counter(self.node_of)


def _around(devices: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Each with the next, the last with the first."""
    return zip(devices, (*devices[1:], devices[0]), strict=True)
