"""Random networks of regions: the automatic plan against layouts made by hand and random placements of them.

    python benchmarks/unseen_networks.py [--seeds 8] [--devices 24 48 96] [--layers 24] [--mixed] [--again]

Three to six regions of any size, links between them with rates and delays of their own each way, one sender's rate for
all it sends. --mixed: devices of several kinds, nodes of 1, 2 or 4. --again: each search twice, which must agree. All
plans are of GPT-XL as in ``regions.py`` and priced by autopar's simulator. By hand: every pp x dp that fits, replicas
or pipelines side by side, under GPipe and 1F1B. Random: five placements of the fastest of them. Even: the automatic
plan with as many segments in every stage.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from regions import job_of, seconds

from autopar.planner.solution import Pins, Solution
from autopar.planning import Job
from autopar.rescheduled import scheduled
from autopar.uneven import cut_at
from cost_model.cluster import Cluster
from cost_model.collectives import Link
from cost_model.device import Device
from cost_model.network import Network
from cost_model.plan import Plan

KINDS = ("v100-sxm2-16gb", "v100-sxm2-32gb", "a100-sxm-40gb")
RANDOM = 5


def drawn(seed: int, devices: int, *, mixed: bool) -> Cluster:
    """A network by a seed."""
    draw = np.random.default_rng(seed)
    count = int(draw.integers(3, 7))
    nodes = _nodes(draw, devices, mixed)
    region_of = np.sort(draw.integers(0, count, len(nodes)))
    region_of = np.unique(region_of, return_inverse=True)[1]
    count = int(region_of.max()) + 1
    delays, rates = (
        draw.uniform(0.005, 0.15, (count, count)),
        np.exp(draw.uniform(np.log(0.1e9), np.log(5e9), (count,) * 2)) / 8,
    )
    np.fill_diagonal(delays, draw.uniform(0.0001, 0.005, count))
    np.fill_diagonal(rates, draw.uniform(2e9, 25e9, count) / 8)
    kinds = [Device.load(KINDS[int(k)]) for k in draw.integers(0, len(KINDS) if mixed else 1, len(nodes))]
    rows = [tuple(tuple(map(float, row)) for row in table) for table in (delays, rates)]
    inside = tuple(Link(10e-6, 40e9) if size > 1 else None for size in nodes)
    node_of = tuple(node for node, size in enumerate(nodes) for _ in range(size))
    network = Network(
        tuple(f"region {r}" for r in range(count)),
        rows[0],
        rows[1],
        tuple(map(int, region_of)),
        node_of,
        inside,
        shares_egress=True,
    )
    each = tuple(kinds[node] for node in node_of)
    return Cluster(f"seed {seed}", each, (), "nccl", network)


def _nodes(draw: np.random.Generator, devices: int, mixed: bool) -> list[int]:
    """Devices of each node."""
    sizes: list[int] = []
    while (left := devices - sum(sizes)) > 0:
        sizes.append(min(left, int(draw.choice([1, 2, 4])) if mixed else 1))
    return sizes


def by_hand(job: Job) -> Iterator[tuple[float, Plan]]:
    """Seconds and plans of every pp x dp of one sample a microbatch that divides and fits."""
    count = job.cluster.num_devices
    for pp in (d for d in range(1, count + 1) if count % d == 0):
        dp = count // pp
        if job.batch % dp or pp > len(job.traced.segments):
            continue
        found = job.searched_under(Pins(dp, 1, pp, 1, "1f1b"))
        if not isinstance(found, Solution):
            continue
        devices = np.arange(count)
        base = job.plan(found)
        for cells in (devices, devices.reshape(dp, pp).T.ravel()):
            for schedule in ("1f1b", "gpipe"):
                plan = replace(base, placement=tuple(cells.tolist()), schedule=schedule)
                if all(p <= c for p, c in zip(job.peaks(plan), job.stage_caps(plan), strict=True)):
                    yield seconds(job, plan), plan


def even_s(job: Job, solution: Solution) -> float:
    """The same choices, mesh and placement with as many segments in every stage; infinite if one does not fit, or where
    stages have meshes of their own, whose choices are no other stage's."""
    if solution.meshes is not None:
        return math.inf
    count, pp = solution.stages[-1].last, solution.configuration.pp
    even = job.plan(cut_at(solution, tuple((stage + 1) * count // pp for stage in range(pp))))
    fits = all(peak <= cap for peak, cap in zip(job.peaks(even), job.stage_caps(even), strict=True))
    return seconds(job, even) if fits else math.inf


def compared(job: Job) -> dict[str, Any]:
    start, wall = time.process_time(), time.perf_counter()
    solution = job.solve()
    plan = scheduled(job, solution).plan
    cpu_s, wall_s = time.process_time() - start, time.perf_counter() - wall
    hand = list(by_hand(job))
    best_s, best = min(hand, key=lambda each: each[0])
    draw = np.random.default_rng(0)
    count = job.cluster.num_devices
    mixed = [replace(best, placement=tuple(draw.permutation(count).tolist())) for _ in range(RANDOM)]
    return {
        "plan": str(plan).splitlines()[0],
        "segments": [s.last_segment - s.first_segment for s in plan.stages],
        "automatic_s": seconds(job, plan),
        "by_hand_s": best_s,
        "by_hand": best.mesh_text(),
        "random_s": min(seconds(job, each) for each in mixed),
        "even_s": even_s(job, solution),
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "text": plan.to_json(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--devices", nargs="*", type=int, default=[24, 48, 96])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    slower = 0
    for devices in options.devices:
        for seed in range(options.first, options.first + options.seeds):
            cluster = drawn(seed, devices, mixed=options.mixed)
            job = job_of(options.layers, 16 * devices, cluster)
            found = compared(job)
            best = found["automatic_s"]
            others = {name: found[name] / best for name in ("by_hand_s", "random_s", "even_s")}
            slower += min(others.values()) < 1
            kinds = Counter(device.name for device in cluster.devices)
            print(
                f"{devices} devices, seed {seed}, {dict(kinds)}: {best:.2f} s; by hand {others['by_hand_s']:.2f}x "
                f"({found['by_hand']}), random {others['random_s']:.2f}x, even {others['even_s']:.3f}x; "
                f"{found['cpu_s']:.1f} s of CPU, {found['wall_s']:.1f} s\n  {found['plan']} {found['segments']}",
                flush=True,
            )
            if options.again:
                again = job_of(options.layers, 16 * devices, cluster)
                assert scheduled(again, again.solve()).plan.to_json() == found["text"], "another plan for equal input"
    print(f"slower than another: {slower}")
    return slower


if __name__ == "__main__":
    sys.exit(main())
