"""Which device is which: cells (stage, replica, shard) placed on an uneven network.

Where there are few distinct placements all are tried; else blocks of neighbouring cells are laid along orders of the
regions, the best are improved by exchanges, and a bound says how much is left. Equal input gives an equal placement.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.planner.placed_prices import Prices
from autopar.planner.places import FloatArray, IntArray, Places
from autopar.planner.traffic import Traffic
from cost_model.cluster import Cluster

MAX_EXACT_CELLS = 8 * math.factorial(8)
"""All placements are tried where they have no more cells than those of eight unlike devices."""
OTHERS, NEAR = 7, 1.2
AT_ONCE, AIMED = 64, 48  # exchanges of which the best is taken, and how many of them are of what takes longest
EXCHANGES, QUICK = 96, 24  # so many times; what a first look takes
MOST_TURNED, TURNED = 64, 8192  # orders tried at once, and in all
MOST_CELLS = 1 << 15  # priced at once
TURNED_CELLS, EXCHANGED_CELLS = 1 << 19, 6 << 19  # priced in all, which on many devices are fewer placements
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
    cells = np.concatenate([_along(prices, orders, block) for block in blocks])
    ranked = np.argsort(_tied_s(prices, cells), kind="stable")[:KEPT_BLOCKS]
    return Sketched(prices, prices.cost_s(cells[ranked[0]]), bound_s, tuple(layouts[index] for index in ranked))


def place(cluster: Cluster, traffic: Traffic) -> Placed:
    """The best placement that was found. The cluster has a network, and one device for each cell."""
    prices = Prices(Places(cluster), traffic)
    return exactly(prices) if is_exact(prices.places) else improved(sketched(prices, prices.bound_s()))


def is_exact(places: Places) -> bool:
    """Whether all placements of one mesh are few enough to be tried."""
    return places.distinct * len(places.region) <= MAX_EXACT_CELLS * (1 + 1e-9)


def exactly(prices: Prices) -> Placed:
    """The best of all."""
    orders = prices.places.every
    cells = orders.reshape(-1, *prices.shape)
    step = max(1, MOST_CELLS // orders.shape[1])
    costs_s = np.concatenate([prices.costs_s(cells[i : i + step]) for i in range(0, len(cells), step)])
    best, *others = (tuple(orders[i].tolist()) for i in np.argsort(costs_s, kind="stable")[: 1 + OTHERS])
    cost_s = float(costs_s.min())
    return Placed(best, cost_s, cost_s, True, tuple(others))


def glanced(sketched: Sketched) -> IntArray:
    """[stage, replica, shard] The best layout with a few devices exchanged."""
    order, block = sketched.layouts[0]
    return _exchanged(sketched.prices, _along(sketched.prices, [order], block)[0], QUICK)


def improved(sketched: Sketched, *known: IntArray) -> Placed:
    """The best of the layouts, with regions exchanged, and of placements that are known, with devices exchanged."""
    prices = sketched.prices
    laid_out = np.stack([*(_reordered(prices, *layout) for layout in sketched.layouts), *known])
    cells = _exchanged(prices, laid_out[_tied_s(prices, laid_out).argmin()], EXCHANGES)
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
    regions, first = np.unique(prices.places.region, return_index=True)
    hop_s = _hops_s(prices, first)
    orders = []
    for start in range(len(regions))[:FIRST_REGIONS]:
        order, left_s = [start], hop_s.copy()
        for _ in regions[1:]:
            left_s[:, order[-1]] = np.inf
            order.append(int(left_s[order[-1]].argmin()))
        orders.append(tuple(regions[order].tolist()))
    return orders


def _hops_s(prices: Prices, devices: IntArray) -> FloatArray:
    """[device, device] of a message."""
    pairs = np.ix_(devices, devices)
    hops_s: FloatArray = prices.places.delay_s[pairs] + prices.busy_s(*pairs)
    return hops_s


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
    """Parts of the order of regions turned round, the best of all each time (of many a few), while that helps."""
    best: IntArray = _along(prices, [order], block)[0]
    cost_s = float(_tied_s(prices, best[None])[0])
    pairs, draw = list(itertools.combinations(range(len(order)), 2)), np.random.default_rng(SEED)
    in_vain = 0
    for _ in range(min(TURNED, TURNED_CELLS // best.size) // MOST_TURNED):
        if in_vain >= len(pairs):
            break
        chosen = [pairs[i] for i in draw.permutation(len(pairs))[:MOST_TURNED]]
        orders = [(*order[:a], *reversed(order[a : b + 1]), *order[b + 1 :]) for a, b in chosen]
        tried = _along(prices, orders, block)
        tried_s = _tied_s(prices, tried)
        least = int(tried_s.argmin())
        if tried_s[least] < cost_s * (1 - 1e-9):
            order, best, cost_s, in_vain = orders[least], tried[least], float(tried_s[least]), 0
        else:
            in_vain += len(chosen)
    return best


def _exchanged(prices: Prices, cells: IntArray, times: int) -> IntArray:
    """Two devices, two replicas or two stages exchanged at random, the best of a few each time, where that helps; most
    of the devices are those of the replica and of the group of replicas that take longest."""
    draw, numbers = np.random.default_rng(SEED), np.arange(cells.size).reshape(cells.shape)
    best, cost_s, aims = cells, float(_tied_s(prices, cells[None])[0]), _slowest(prices, cells, numbers)
    for _ in range(min(times, max(1, EXCHANGED_CELLS * times // (EXCHANGES * AT_ONCE * cells.size)))):
        tried = np.repeat(best[None], AT_ONCE, axis=0)
        drawn = draw.integers(1 << 30, size=(AT_ONCE, 3))
        for each, (kind, first, second) in zip(tried[AIMED:], drawn[AIMED:].tolist(), strict=True):
            rows = (each, each.swapaxes(0, 1), each.reshape(-1))[kind % 3]
            a, b = first % len(rows), second % len(rows)
            rows[[a, b]] = rows[[b, a]]
        _aimed(best, tried[:AIMED], aims, drawn[:AIMED])
        tried_s = _tied_s(prices, tried)
        least = int(tried_s.argmin())
        if tried_s[least] < cost_s * (1 - 1e-12):
            best, cost_s = tried[least], float(tried_s[least])
            aims = _slowest(prices, best, numbers)
    return best


def _slowest(prices: Prices, cells: IntArray, numbers: IntArray) -> IntArray:
    """The numbers of the cells of the replica, and of the group of replicas, that take longest."""
    replicas, groups = prices.parts_s(cells[None])
    stage, shard = np.unravel_index(int(groups[0].argmax()), groups[0].shape)
    return np.concatenate([numbers[:, int(replicas[0].argmax())].ravel(), numbers[stage, :, shard]])


def _aimed(best: IntArray, tried: IntArray, aims: IntArray, drawn: IntArray) -> None:
    """Make each of some placements the best with a cell that is aimed at and any other exchanged."""
    flat, rows = best.reshape(-1), np.arange(len(tried))
    tried[:] = best
    each, a, b = tried.reshape(len(tried), -1), aims[drawn[:, 1] % len(aims)], drawn[:, 2] % best.size
    each[rows, a], each[rows, b] = flat[b], flat[a]
