"""The search on an uneven network: every mesh is placed before it is judged.

A mesh's bound is its price on the fastest device and link there is. Meshes come in the order of their bounds; each is
placed, and the search ends at a bound above the best price found. The best few are then planned in full (``search``,
every degree pinned) and simulated on their own links, under each schedule; the fastest is the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopar.planner.bounds import Objective
from autopar.planner.chain import Chain
from autopar.planner.configuration import Configuration, ConfigurationSolver, quick_bound_s
from autopar.planner.factor_graph import FactorGraph
from autopar.planner.placement import Placed, Traffic, place, slowness
from autopar.planner.search import Infeasible, Pins, Solution, Space, configurations
from autopar.planner.segment import Segment
from cost_model.cluster import Cluster, Level
from cost_model.collectives import Link

FINALISTS, FINALISTS_OF_FEW, FEW = 3, 8, 8  # the latter on clusters of so many devices, where each takes no time
MAX_MICROBATCH = 16
MANY = 10**6
Search = Callable[[Pins], Solution | Infeasible]
Simulate = Callable[[Solution], tuple[float, Solution]]


@dataclass(frozen=True)
class Candidate:
    """A mesh with a placement, at the placement's price."""

    configuration: Configuration
    placed: Placed


def fastest_view(cluster: Cluster) -> Cluster:
    """As many devices as the cluster has, all as fast as its fastest and as near as its nearest."""
    network = cluster.network
    assert network is not None
    off = ~np.eye(cluster.num_devices, dtype=bool)
    latency_s, bandwidth = float(network.latencies_s[off].min()), float(network.bandwidths[off].max())
    # What does not fit on the smallest is no plan.
    device = cluster.devices[int(slowness(cluster).argmin())]
    usable = min(device.usable_bytes for device in cluster.devices)
    fastest = device.with_memory(usable + device.reserve_bytes)
    level = Level("fastest", cluster.num_devices, network.start_s, Link(latency_s, bandwidth))
    return Cluster(cluster.name, (fastest,) * cluster.num_devices, (level,), cluster.backend)


def search_placed(
    cluster: Cluster,
    space: Space,
    batch: int,
    pins: Pins,
    sent_bytes: Callable[[int], float],
    reduced_bytes: float,
    search: Search,
    simulate: Simulate,
) -> Solution | Infeasible:
    """The fastest plan with its placement. ``space`` is that of the fastest view.

    sent_bytes(microbatch_size): the largest activation between stages; reduced_bytes: all gradients;
    search: plans a mesh in full; simulate: the seconds of a placed plan, and it with the better schedule.
    """
    found, bound_s = _candidates(cluster, space, batch, pins, sent_bytes, reduced_bytes)
    best: tuple[float, Solution] | None = None
    short: Infeasible | None = None
    for candidate in found[: _finalists(cluster)]:
        c = candidate.configuration
        answer = search(replace(pins, dp=c.dp, tp=c.tp, pp=c.pp, microbatch_size=c.microbatch_size))
        if isinstance(answer, Infeasible):
            short = answer if short is None or answer.needed_bytes < short.needed_bytes else short
            continue
        gap, note = max(0.0, candidate.placed.cost_s / bound_s - 1.0), _note(candidate.placed)
        for devices in (candidate.placed.devices, *candidate.placed.others):
            step_s, placed = simulate(replace(answer, placement=devices))
            if best is None or step_s < best[0]:
                best = (step_s, replace(placed, gap=gap, notes=(*placed.notes, note)))
    if best is not None:
        return best[1]
    return short if short is not None else search(pins)


def _finalists(cluster: Cluster) -> int:
    return FINALISTS_OF_FEW if cluster.num_devices <= FEW else FINALISTS


def _note(placed: Placed) -> str:
    how = "every placement was tried" if placed.exact else f"its placement is within {placed.gap:.1%} of a bound"
    return f"devices and links differ: the plan was placed on them, and {how}"


def _candidates(
    cluster: Cluster,
    space: Space,
    batch: int,
    pins: Pins,
    sent_bytes: Callable[[int], float],
    reduced_bytes: float,
) -> tuple[list[Candidate], float]:
    """Placed meshes, the cheapest first, and a bound under all of them."""
    queue = sorted(_bounded(cluster, space, batch, pins, sent_bytes), key=lambda item: item[:2])
    found: list[tuple[float, int, Candidate]] = []
    bounds, wanted = [], _finalists(cluster)
    for bound_s, number, c, whole_s in queue:
        if len(found) >= wanted and bound_s > sorted(found, key=lambda item: item[:2])[wanted - 1][0]:
            bounds.append(bound_s)
            break
        traffic = Traffic(
            c.pp,
            c.dp,
            c.tp,
            c.microbatches,
            whole_s / c.pp,
            sent_bytes(c.microbatch_size),
            reduced_bytes / c.pp / c.tp,
        )
        placed = place(cluster, traffic)
        bounds.append(placed.bound_s)
        found.append((placed.cost_s, number, Candidate(c, placed)))
    return [candidate for _, _, candidate in sorted(found, key=lambda item: item[:2])], min(bounds, default=math.inf)


def _bounded(
    cluster: Cluster, space: Space, batch: int, pins: Pins, sent_bytes: Callable[[int], float]
) -> Iterator[tuple[float, int, Configuration, float]]:
    """Every mesh that may be: its bound, its place in the order that breaks ties, and seconds of a whole microbatch."""
    segments: dict[FactorGraph, Segment] = {}
    for number, c in enumerate(configurations(cluster.num_devices, batch, pins)):
        if pins.microbatch_size is None and c.microbatch_size > MAX_MICROBATCH:
            continue
        if pins.tp is None and not _may_shard(space, cluster, c, sent_bytes):
            continue
        chain = space.chain(c.dp, c.tp, c.microbatch_size)
        if chain is None or c.pp > len(chain):
            continue
        first = _first_chain(chain, segments)
        bound_s = math.inf if first is None else ConfigurationSolver(*first, c, math.inf).quick_bound_s()
        if first is not None and math.isfinite(bound_s):
            yield bound_s, number, c, _whole_s(*first)


def _first_chain(chain: Chain, segments: dict[FactorGraph, Segment]) -> tuple[Chain, list[Segment]] | None:
    """With the first label of every shared variable; None where one has none."""
    domains = chain.shared_domains()
    if not all(domains.values()):
        return None
    fixed = chain.fixed({name: labels[0] for name, labels in domains.items()})
    return fixed, [segments.setdefault(graph, Segment(graph)) for graph in fixed.kinds]


def _whole_s(chain: Chain, segments: Sequence[Segment]) -> float:
    """Seconds of all segments, forward and backward, of one microbatch: of so many that the step counts for nothing."""
    return quick_bound_s(chain, segments, Objective(1, MANY)) / MANY


def _may_shard(space: Space, cluster: Cluster, c: Configuration, sent_bytes: Callable[[int], float]) -> bool:
    """Whether tensor parallelism can pay: shards of a segment exchange its activation at least once each way, on the
    fastest link at best, which must take less than they save. On few devices everything is tried."""
    whole = space.chain(c.dp, 1, c.microbatch_size)
    if c.tp == 1 or whole is None or cluster.num_devices <= FEW:
        return True
    first = _first_chain(whole, {})
    if first is None:
        return True
    nbytes = int(sent_bytes(c.microbatch_size))
    exchanged_s = 2 * fastest_view(cluster).collective_time_s("all_reduce", nbytes, tuple(range(c.tp)))
    return exchanged_s < _whole_s(*first) / len(whole) * (1 - 1 / c.tp)
