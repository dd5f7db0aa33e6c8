"""Layout and placement on uneven networks: autopar's against the published ones, Megatron-LM's and random ones.

    python benchmarks/regions.py [--cases 1 2 3 4 5] [--layers 24 32 40] [--batch 1024] [--large] [--json]

GPT-XL (2,048 wide, sequences of 2,048, float16, every block recomputed, SGD) on the 64 devices of each of DT-FM's five
networks. All plans are priced by autopar's simulator. Published: PP 8 x DP 8, GPipe, microbatches of one sample,
pipelines inside a region; Megatron-LM's: the same mesh, 1F1B, replicas of a stage on neighbouring devices; random: the
mean and the fastest of five placements. --large: the search alone, on 1,024 devices in 32 regions.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from reference_models import Shape, meta_model

from autopar.options import Options
from autopar.planning import Job
from cost_model.cluster import Cluster
from cost_model.collectives import Link
from cost_model.collector import collector_paused
from cost_model.device import Device
from cost_model.network import Network
from cost_model.parallelism import Parallelism
from cost_model.plan import Plan
from cost_model.simulate import simulate

SGD = functools.partial(torch.optim.SGD, lr=1e-3)
FIXED = Parallelism(dp=8, tp=1, pp=8, microbatch_size=1, recompute="full")
RANDOM = 5


def job_of(layers: int, batch: int, cluster: Cluster) -> Job:
    model, inputs = meta_model(Shape(layers, 2048, 16, 2048, 29696, fused=True, head=False), batch, torch.float16)
    pins = Parallelism(recompute="full")
    return Job.of(model, cluster, inputs, Options.of(None, SGD, pins, None, None, None))


def published(pp: int, dp: int) -> tuple[int, ...]:
    """Pipeline after pipeline."""
    return tuple(np.arange(pp * dp).reshape(dp, pp).T.ravel().tolist())


def compared(job: Job) -> dict[str, Any]:
    """Seconds of a step under each placement, and of the search."""
    start, wall = time.process_time(), time.perf_counter()
    with collector_paused():  # as wherever plans are made
        decision = job.decide(wall)
    cpu_s, wall_s = time.process_time() - start, time.perf_counter() - wall
    fixed = job.under(FIXED, None).on(job.cluster)
    draw = np.random.default_rng(0)
    base = fixed.plan(fixed.searched_under(_pins()))
    mixed = [tuple(draw.permutation(64).tolist()) for _ in range(RANDOM)]
    return {
        "search_cpu_s": cpu_s,
        "search_wall_s": wall_s,
        "plan": str(decision.plan).splitlines()[0],
        "gap": decision.gap,
        "automatic_s": seconds(job, decision.plan),
        "published_s": seconds(job, replace(base, placement=published(8, 8), schedule="gpipe")),
        "megatron_s": seconds(job, base),
        "random_s": [seconds(job, replace(base, placement=each, schedule="gpipe")) for each in mixed],
    }


def _pins() -> Any:
    from autopar.planner.solution import Pins

    return Pins(FIXED.dp, FIXED.tp, FIXED.pp, FIXED.microbatch_size, "1f1b")


def seconds(job: Job, plan: Plan) -> float:
    return simulate(job.program(plan), job.cluster).step_time_s


def large() -> Cluster:
    """1,024 devices in 32 regions; delays and rates drawn once from the ranges of the world-wide network."""
    draw = np.random.default_rng(0)
    delays, rates = (np.triu(draw.uniform(*span, (32, 32)), 1) for span in ((0.01, 0.24), (0.33e9 / 8, 1.2e9 / 8)))
    delays, rates = delays + delays.T + 0.01 * np.eye(32), rates + rates.T + 2e9 / 8 * np.eye(32)
    every = tuple(range(1024))
    rows = [tuple(tuple(map(float, row)) for row in table) for table in (delays, rates)]
    names = tuple(f"region {index}" for index in range(32))
    inside: tuple[Link | None, ...] = (None,) * 1024
    network = Network(names, rows[0], rows[1], tuple(d // 32 for d in every), every, inside, shares_egress=True)
    return Cluster("1,024 in 32 regions", (Device.load("v100-sxm2-16gb"),) * 1024, (), "nccl", network)


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for layers in options.layers:
        clusters = {f"case {n}": Cluster.load(f"dtfm-case{n}") for n in options.cases}
        job = job_of(layers, options.batch, next(iter(clusters.values())))
        for name, cluster in clusters.items():
            yield {"network": name, "layers": layers, **compared(job.on(cluster))}


def show(row: dict[str, Any]) -> None:
    best = row["automatic_s"]

    def against(other: float) -> str:
        return f"{other:.2f} s ({other / best:.2f}x)"

    print(
        f"{row['network']} L{row['layers']}: automatic {best:.2f} s, published {against(row['published_s'])}, "
        f"Megatron-LM's {against(row['megatron_s'])}, random {against(float(np.mean(row['random_s'])))}, the best "
        f"{against(min(row['random_s']))}\n  {row['plan']}; {row['gap']:.1%} above the bound; "
        f"searched in {row['search_cpu_s']:.1f} s of CPU, {row['search_wall_s']:.1f} s",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--layers", nargs="*", type=int, default=[24, 32, 40])
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.large:
        job = job_of(24, 16384, large())
        cpu, wall = time.process_time(), time.perf_counter()
        with collector_paused():
            decision = job.decide(wall)
        print(f"{decision.plan}\n{time.process_time() - cpu:.1f} s of CPU, {time.perf_counter() - wall:.1f} s")
        return 0
    for row in rows(options):
        print(json.dumps(row)) if options.json else show(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
