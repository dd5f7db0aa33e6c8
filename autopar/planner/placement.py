"""Which device is which: cells (stage, replica, shard) placed on an uneven network.

Where there are few distinct placements all are tried; else blocks of neighbouring cells are laid along orders of the
regions, the best are improved by exchanges, and a bound says how much is left. Equal input gives an equal placement.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.planner.placed_prices import FloatArray, IntArray, Places, Prices, Traffic
from cost_model.cluster import Cluster

MAX_EXACT = 3000
OTHERS, NEAR = 7, 1.2
EXCHANGES, AT_ONCE = 3072, 16
MOST_CELLS = 1 << 15  # priced at once
KEPT_BLOCKS = 3
FIRST_REGIONS = 8
TIE = 1e-3  # of the means beside the largest, so that what is not the slowest yet counts a little
SEED = 0
Layout = tuple[tuple[int, ...], tuple[int, int]]
"""An order of the regions, and a block of so many stages and replicas."""


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


@dataclass(frozen=True)
class Sketched:
    """The layouts that look best, before anything is exchanged; cost_s: of the best of them."""

    prices: Prices
    cost_s: float
    bound_s: float
    layouts: tuple[Layout, ...]


def sketched(prices: Prices, bound_s: float) -> Sketched:
    """Layouts of cells on devices, and what they cost."""
    orders, blocks = _orders(prices), _blocks(prices.traffic)
    layouts = [(order, block) for block in blocks for order in orders]
    costs_s = np.concatenate([_tied_s(prices, _along(prices, orders, block)) for block in blocks])
    best = tuple(layouts[index] for index in np.argsort(costs_s, kind="stable")[:KEPT_BLOCKS])
    order, block = best[0]
    return Sketched(prices, prices.cost_s(_along(prices, [order], block)[0]), bound_s, best)


def place(cluster: Cluster, traffic: Traffic) -> Placed:
    """The best placement that was found. The cluster has a network, and one device for each cell."""
    prices = Prices(Places(cluster), traffic)
    return exactly(prices) if prices.places.distinct <= MAX_EXACT else improved(sketched(prices, prices.bound_s()))


def exactly(prices: Prices) -> Placed:
    """The best of all."""
    orders = list(prices.places.every())
    costs_s = prices.costs_s(np.array(orders).reshape(-1, *prices.shape))
    cost_s, best = min(zip(costs_s.tolist(), orders, strict=True))
    others = heapq.nsmallest(1 + OTHERS, zip(costs_s.tolist(), orders, strict=True))[1:]
    return Placed(best, cost_s, cost_s, True, tuple(devices for _, devices in others))


def improved(sketched: Sketched) -> Placed:
    """The best of the layouts, with regions and then devices exchanged."""
    prices = sketched.prices
    laid_out = np.stack([_reordered(prices, *layout) for layout in sketched.layouts])
    cells = _exchanged(prices, laid_out[_tied_s(prices, laid_out).argmin()])
    cost_s, devices = prices.cost_s(cells), np.arange(cells.size)
    t = prices.traffic
    by_hand = (devices.reshape(t.pp, t.dp, t.tp), devices.reshape(t.dp, t.pp, t.tp).transpose(1, 0, 2))
    near = tuple(tuple(each.ravel().tolist()) for each in by_hand if prices.cost_s(each) < cost_s * NEAR)
    return Placed(tuple(cells.ravel().tolist()), cost_s, sketched.bound_s, False, near)


def _tied_s(prices: Prices, cells: IntArray) -> FloatArray:
    """[placement] The price, with a little of all that is not the slowest."""
    found = np.empty(len(cells))
    step = max(1, MOST_CELLS // cells[0].size)
    for first in range(0, len(cells), step):
        replicas, groups = prices.parts_s(cells[first : first + step])
        most_s = replicas.max(axis=-1) + groups.max(axis=(-2, -1))
        mean_s = replicas.mean(axis=-1) + groups.mean(axis=(-2, -1))
        found[first : first + step] = most_s + TIE * mean_s
    return found


def _blocks(traffic: Traffic) -> list[tuple[int, int]]:
    """Sizes of blocks in stages and replicas."""
    stages, replicas = (_powers(size) for size in (traffic.pp, traffic.dp))
    return list(itertools.product(stages, replicas))


def _powers(size: int) -> list[int]:
    return [d for d in range(1, size + 1) if size % d == 0]


def _orders(prices: Prices) -> list[tuple[int, ...]]:
    """From each region on to the nearest that is left; of many regions, from a few."""
    regions = [int(r) for r in np.unique(prices.places.region)]
    first = {r: int(np.flatnonzero(prices.places.region == r)[0]) for r in regions}
    orders = []
    for start in regions[:FIRST_REGIONS]:
        order, left = [start], [r for r in regions if r != start]
        while left:
            nearest = min(left, key=lambda r: (_hop_s(prices, first[order[-1]], first[r]), r))
            order.append(nearest)
            left.remove(nearest)
        orders.append(tuple(order))
    return orders


def _hop_s(prices: Prices, source: int, target: int) -> float:
    busy_s = prices.traffic.sent_bytes * prices.network.shared_s_per_byte[source, target]
    return float(prices.places.delay_s[source, target] + busy_s)


def _along(prices: Prices, orders: Sequence[tuple[int, ...]], block: tuple[int, int]) -> IntArray:
    """[order, stage, replica, shard] Devices in each order of their regions, put into cells block by block; a block
    stage by stage."""
    places, count = prices.places, len(prices.places.region)
    rank = np.empty((len(orders), len(orders[0])), dtype=np.int64)
    np.put_along_axis(rank, np.array(orders), np.arange(len(orders[0]))[None], axis=1)
    alike = np.broadcast_to(places.slowness, (len(orders), count))
    devices = np.lexsort((alike, rank[:, places.region]), axis=1)
    stages, replicas, shards = np.indices(prices.shape).reshape(3, -1)
    keys = (shards, replicas % block[1], stages % block[0], replicas // block[1], stages // block[0])
    cells = np.empty_like(devices)
    cells[:, np.lexsort(keys)] = devices
    return cells.reshape(-1, *prices.shape)


def _reordered(prices: Prices, order: tuple[int, ...], block: tuple[int, int]) -> IntArray:
    """Parts of the order of regions turned round, the best of all each time, while that helps."""
    best: IntArray = _along(prices, [order], block)[0]
    cost_s = float(_tied_s(prices, best[None])[0])
    pairs = list(itertools.combinations(range(len(order)), 2))
    while pairs:
        orders = [(*order[:a], *reversed(order[a : b + 1]), *order[b + 1 :]) for a, b in pairs]
        tried = _along(prices, orders, block)
        tried_s = _tied_s(prices, tried)
        least = int(tried_s.argmin())
        if not tried_s[least] < cost_s * (1 - 1e-9):
            break
        order, best, cost_s = orders[least], tried[least], float(tried_s[least])
    return best


def _exchanged(prices: Prices, cells: IntArray) -> IntArray:
    """Two devices, two replicas or two stages exchanged at random, the best of a few each time, where that helps."""
    draw = np.random.default_rng(SEED)
    best, cost_s = cells, float(_tied_s(prices, cells[None])[0])
    for _ in range(EXCHANGES // AT_ONCE):
        tried = np.repeat(best[None], AT_ONCE, axis=0)
        for each, (kind, first, second) in zip(tried, draw.integers(1 << 30, size=(AT_ONCE, 3)), strict=True):
            rows = (each, each.swapaxes(0, 1), each.reshape(-1))[kind % 3]
            a, b = first % len(rows), second % len(rows)
            rows[[a, b]] = rows[[b, a]]
        tried_s = _tied_s(prices, tried)
        least = int(tried_s.argmin())
        if tried_s[least] < cost_s * (1 - 1e-12):
            best, cost_s = tried[least], float(tried_s[least])
    return best
