"""Places: the devices of an uneven network that cells may lie on, told apart once for all meshes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cost_model.cluster import Cluster
from cost_model.network import Network

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
MOST = 700.0  # e to this is a number


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

    @cached_property
    def messages(self) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """[pair] of an empty message there and back, and what a byte more keeps the channel busy for; of a pair
        (a, b), which is number a x devices + b."""
        busy = self.network.shared_s_per_byte
        return self.delay_s.ravel(), self.delay_s.T.ravel(), busy.ravel(), busy.T.ravel()

    @cached_property
    def channels(self) -> tuple[IntArray, IntArray]:
        """[pair] of messages there and back."""
        channels = self.network.channels
        return channels.ravel(), channels.T.ravel()

    @cached_property
    def links(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """[pair] bandwidths, latencies there and back."""
        latencies_s = self.network.latencies_s
        return self.network.bandwidths.ravel(), latencies_s.ravel(), latencies_s.T.ravel()

    @cached_property
    def round_s(self) -> FloatArray:
        """[pair] of a message without bytes in a collective."""
        _, there_s, back_s = self.links
        return there_s + back_s if self.asks else there_s

    @cached_property
    def least_round_s(self) -> float:
        """Of two devices that are nearest."""
        return float(self.round_s[~np.eye(len(self.network), dtype=bool).ravel()].min())

    @cached_property
    def sharing(self) -> IntArray:
        """[node x (devices of the largest + 1) + those of a group there] groups like it that a node has room for."""
        size = int(self.sizes.max())
        rooms: IntArray = np.maximum(1, self.sizes[:, None] // np.maximum(1, np.arange(size + 1))).ravel()
        return rooms

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
    def borders(self) -> tuple[tuple[int, float], ...]:
        """Of each region the devices, and the fastest bandwidth by which something can both leave it and come in; none
        where there is one region."""
        if len(self.region_sizes) == 1:
            return ()
        _, number, sizes = np.unique(self.region, return_inverse=True, return_counts=True)
        between = np.where(number[:, None] != number[None], self.network.bandwidths, 0.0)
        found = np.zeros((2, len(sizes)))
        for axis in (0, 1):
            np.maximum.at(found[axis], number, between.max(axis=axis))
        return tuple(zip(sizes.tolist(), found.min(axis=0).tolist(), strict=True))

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
