"""Sites: devices of a cluster that a stage may have: those that nothing tells apart, and neighbours all together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from cost_model.cluster import Cluster
from cost_model.network import Network

Devices = tuple[int, ...]
FloatArray = npt.NDArray[np.float64]


def alike(cluster: Cluster) -> list[Devices]:
    """Devices that may be exchanged for each other: of one kind, with equal links to each other and to all others."""
    found: list[list[int]] = []
    for device in range(cluster.num_devices):
        own = next((group for group in found if _interchangeable(cluster, group[0], device)), None)
        if own is None:
            found.append([device])
        else:
            own.append(device)
    return [tuple(group) for group in found]


def together(cluster: Cluster, groups: list[Devices], nbytes: float) -> list[Devices]:
    """Groups that a stage may have all of, by what a message of so many bytes takes: each and the nearest, joined to
    the next one after the other; of two that are nearest also one and some of the other. Of one kind any two, and all:
    where links are too slow for shards, a device that repeats what others of its stage do delays no one. In both
    orders: the first ones are those that send."""
    if cluster.network is None:
        return []
    seconds = cluster.network.delays_s + nbytes * cluster.network.shared_s_per_byte
    found = [*_merged(groups, np.maximum(seconds, seconds.T)), *_of_one_kind(cluster, groups)]
    return [each for each in dict.fromkeys(found) if len(each) < cluster.num_devices and each not in groups]


def _merged(groups: list[Devices], seconds: FloatArray) -> Iterator[Devices]:
    joined = list(groups)
    while len(joined) > 1:
        pairs = [(a, b) for a in range(len(joined)) for b in range(a)]
        a, b = min(pairs, key=lambda pair: float(seconds[np.ix_(joined[pair[0]], joined[pair[1]])].min()))
        one, other = joined[b], joined[a]
        if one in groups and other in groups:
            for whole, parted in ((one, other), (other, one)):
                parts = [parted[:count] for count in range(1, len(parted))]
                yield from itertools.chain.from_iterable(((*whole, *part), (*part, *whole)) for part in parts)
            yield (*other, *one)
        yield (*one, *other)
        joined = [(*one, *other) if number == b else each for number, each in enumerate(joined) if number != a]


def _of_one_kind(cluster: Cluster, groups: list[Devices]) -> Iterator[Devices]:
    for kind in dict.fromkeys(cluster.devices):
        own = [group for group in groups if cluster.devices[group[0]] == kind]
        yield from ((*one, *other) for one, other in itertools.combinations(own, 2))
        yield tuple(device for group in own for device in group)


def only(cluster: Cluster, devices: Devices) -> Cluster:
    """Some devices of a cluster, in that order; the whole cluster where it has no links of pairs."""
    if cluster.network is None:
        return cluster
    values = cluster.network.latencies_s, 1 / cluster.network.shared_s_per_byte
    rows = [tuple(tuple(float(each[a, b]) for b in devices) for a in devices) for each in values]
    network = replace(Network.of_matrix(*rows), start_s=cluster.network.start_s)
    return Cluster("some devices", tuple(cluster.devices[i] for i in devices), (), cluster.backend, network)


def _interchangeable(cluster: Cluster, a: int, b: int) -> bool:
    if cluster.devices[a] != cluster.devices[b]:
        return False
    network = cluster.network
    return network is None or all(_same(each, a, b) for each in (network.latencies_s, network.bandwidths))


def _same(values: FloatArray, a: int, b: int) -> bool:
    """Whether rows and columns are equal but for the two, and those between them."""
    others = np.delete(np.arange(len(values)), [a, b])
    rows, columns = values[[a, b]][:, others], values[others][:, [a, b]]
    return bool((rows[0] == rows[1]).all() and (columns[:, 0] == columns[:, 1]).all() and values[a, b] == values[b, a])
