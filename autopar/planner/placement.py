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

from autopar.planner.placed_prices import IntArray, Prices, Traffic
from cost_model.cluster import Cluster

MAX_EXACT = 3000
OTHERS, NEAR = 7, 1.2
EXCHANGES = 1500
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
    tried = [
        (_tied_s(prices, _along(prices, order, block)), index, (order, block))
        for index, (order, block) in enumerate(itertools.product(_orders(prices), _blocks(prices.traffic)))
    ]
    best = tuple(layout for _, _, layout in sorted(tried)[:KEPT_BLOCKS])
    return Sketched(prices, prices.cost_s(_along(prices, *best[0])), bound_s, best)


def place(cluster: Cluster, traffic: Traffic) -> Placed:
    """The best placement that was found. The cluster has a network, and one device for each cell."""
    prices = Prices(cluster, traffic)
    return exactly(prices) if prices.distinct <= MAX_EXACT else improved(sketched(prices, prices.bound_s()))


def exactly(prices: Prices) -> Placed:
    """The best of all."""
    every = ((prices.cost_s(cells), tuple(cells.ravel().tolist())) for cells in prices.every())
    (cost_s, best), *others = heapq.nsmallest(1 + OTHERS, every)
    return Placed(best, cost_s, cost_s, True, tuple(devices for _, devices in others))


def improved(sketched: Sketched) -> Placed:
    """The best of the layouts, with regions and then devices exchanged."""
    prices = sketched.prices
    laid_out = [_reordered(prices, *layout) for layout in sketched.layouts]
    cells = _exchanged(prices, min(laid_out, key=lambda each: _tied_s(prices, each)))
    cost_s, devices = prices.cost_s(cells), np.arange(cells.size)
    t = prices.traffic
    by_hand = (devices.reshape(t.pp, t.dp, t.tp), devices.reshape(t.dp, t.pp, t.tp).transpose(1, 0, 2))
    near = tuple(tuple(each.ravel().tolist()) for each in by_hand if prices.cost_s(each) < cost_s * NEAR)
    return Placed(tuple(cells.ravel().tolist()), cost_s, sketched.bound_s, False, near)


def _tied_s(prices: Prices, cells: IntArray) -> float:
    """The price, with a little of all that is not the slowest."""
    replicas, groups = prices.parts_s(cells)
    return float(replicas.max() + groups.max() + TIE * (replicas.mean() + groups.mean()))


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
    return float(prices.delay_s[source, target] + busy_s)


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
    best, cost_s = order, _tied_s(prices, _along(prices, order, block))
    improved = True
    while improved:
        improved = False
        for a, b in itertools.combinations(range(len(order)), 2):
            tried = list(best)
            tried[a : b + 1] = reversed(tried[a : b + 1])
            tried_s = _tied_s(prices, _along(prices, tried, block))
            if tried_s < cost_s * (1 - 1e-9):
                best, cost_s, improved = tuple(tried), tried_s, True
    return _along(prices, best, block)


def _exchanged(prices: Prices, cells: IntArray) -> IntArray:
    """Two devices, two replicas or two stages exchanged at random, kept where that helps."""
    draw = np.random.default_rng(SEED)
    best, cost_s = cells, _tied_s(prices, cells)
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
        tried_s = _tied_s(prices, tried)
        if tried_s < cost_s * (1 - 1e-12):
            best, cost_s = tried, tried_s
    return best
