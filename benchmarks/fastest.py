"""The chosen plan beside every grid on this machine's ranks: all are run in turn.

    python benchmarks/fastest.py [--ranks 2] [--models gpt mlp ...] [--rounds 8] [--within 1.5] [--recompute none ...]

Grids: all dp x tp x pp of the ranks, microbatch sizes, ZeRO 0, 1, 3 and the levels of recompute asked for (none:
no memory is short here). Those whose estimate is more than --within times the least are counted, not run. In each round
every program takes two steps, in another order, of which the second counts, on the slowest rank. The chosen plan and
those within 10 % of the fastest then take four times as many rounds among themselves, which alone count: of twenty that
are as fast as each other, the fastest is one that was lucky. They are compared by their medians, and within rounds, as
a machine that changes its speed does so for all of a round; what says more against the chosen plan counts. The exit
code is 1 where a grid is more than 5 % faster than the chosen plan. Run it with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from local import MODELS
from torch import Tensor

import autopar
from cost_model.errors import AutoparError
from cost_model.parallelism import RECOMPUTES

AT_MOST = 1.05
NEAR = 1.1
FIVE = ("gpt", "hf gpt2", "llama", "mlp", "resnet")
WARM_UP = 2
FINAL = 4
ZEROS = (0, 1, 3)


@dataclass
class Program:
    """A compiled plan with its estimate and its times in seconds, the slowest rank's."""

    name: str
    exe: autopar.Executable
    times_s: list[float] = field(default_factory=list)

    @property
    def estimate_s(self) -> float:
        return self.exe.estimate.step_time_s

    @property
    def median_s(self) -> float:
        return statistics.median(self.times_s)

    def ratio(self, other: Program) -> float:
        """How often the other's time this one takes, in the median of rounds that both were part of."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.times_s, other.times_s, strict=True))

    def run(self, batch: dict[str, Tensor]) -> None:
        """Two steps, of which the second counts: in training a step finds in cache and memory what one before left."""
        self.exe.step(batch)
        dist.barrier()
        start = time.perf_counter()
        self.exe.step(batch)
        seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        self.times_s.append(float(seconds))


def grids(ranks: int, batch: int, recomputes: list[str]) -> Iterator[autopar.Parallelism]:
    """All of them; one replica has nothing to split over replicas."""
    degrees = [d for d in range(1, ranks + 1) if ranks % d == 0]
    for dp, tp in itertools.product(degrees, degrees):
        if ranks % (dp * tp) == 0 and batch % dp == 0:
            sizes = [size for size in range(1, batch // dp + 1) if batch // dp % size == 0]
            for size, zero, recompute in itertools.product(sizes, ZEROS if dp > 1 else (0,), recomputes):
                yield autopar.Parallelism(dp, tp, ranks // dp // tp, zero, recompute, microbatch_size=size)


def compiled(name: str, cluster: autopar.Cluster, pins: autopar.Parallelism | None, within_s: float) -> Program | None:
    """The program of a model under some pins; None where there is none, or none that is estimated fast enough."""
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    try:
        found = autopar.estimate(model, cluster, batch, parallelism=pins)
    except AutoparError:
        return None
    if found.step_time_s > within_s:
        return None
    plan = found.plan
    text = f"dp={plan.dp} tp={plan.tp} pp={plan.pp} {plan.microbatches} x {plan.microbatch_size} {plan.schedule_text()}"
    return Program(text + plan.saving_text(), autopar.compile(model, cluster, batch, plan=plan))


def is_fastest(name: str, given: argparse.Namespace) -> bool:
    """Whether the chosen plan of a model is among the fastest; rank 0 prints every program."""
    cluster = autopar.Cluster.local(given.ranks)
    batch = MODELS[name]()[1]
    samples = len(next(iter(batch.values())))
    chosen = compiled(name, cluster, None, float("inf"))
    assert chosen is not None
    every = list(grids(given.ranks, samples, given.recompute))
    tried = [compiled(name, cluster, pins, given.within * chosen.estimate_s) for pins in every]
    programs = [chosen, *{p.exe.plan: p for p in tried if p is not None and p.exe.plan != chosen.exe.plan}.values()]
    _say(f"{name} on {given.ranks} ranks: {len(every)} grids, {len(programs)} different programs are run")
    for rounds in (WARM_UP, given.rounds):
        take_turns(programs, rounds, batch)
    near_s = NEAR * min(program.median_s for program in programs)
    near = [program for program in programs if program is chosen or program.median_s <= near_s]
    _say_all([program for program in programs if program not in near], chosen)
    take_turns(near, FINAL * given.rounds, batch)
    _say(f" {len(near)} of them among themselves:")
    _say_all(near, chosen)
    ratio = max(max(chosen.ratio(program), chosen.median_s / program.median_s) for program in near)
    _say(f"{name} on {given.ranks} ranks: the chosen plan takes {ratio:.3f} of the fastest")
    return ratio <= AT_MOST


def take_turns(programs: Sequence[Program], rounds: int, batch: dict[str, Tensor]) -> None:
    """So many steps of each, whose times alone are kept; in another order each time, as what ran before a program
    leaves caches and clocks as they are."""
    for program in programs:
        program.times_s.clear()
    for number in range(rounds):
        for program in random.Random(number).sample(programs, len(programs)):
            program.run(batch)


def _say_all(programs: Sequence[Program], chosen: Program) -> None:
    for program in sorted(programs, key=lambda p: p.median_s):
        seconds = f"{program.median_s * 1e3:.1f} ms, estimated {program.estimate_s * 1e3:.1f}"
        beside = "  <- chosen" if program is chosen else f", chosen {chosen.ratio(program):.3f} of it"
        _say(f"  {program.name}: {seconds}{beside}")


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def launch(ranks: int, name: str) -> int:
    """Run this file once per rank for one model: what tens of programs of each leave behind would fill the memory."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *sys.argv[1:], "--models", name], env=environment, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(FIVE))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--within", type=float, default=1.5)
    parser.add_argument("--recompute", nargs="+", choices=RECOMPUTES, default=["none"])
    given = parser.parse_args()
    if "RANK" not in os.environ:
        autopar.Cluster.local(given.ranks)  # measured before there are other ranks
        codes = [launch(given.ranks, name) for name in given.models]
        sys.exit(int(any(codes)))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    (name,) = given.models
    is_slower = not is_fastest(name, given)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(int(is_slower))  # gloo's threads must not outlive the interpreter


if __name__ == "__main__":
    main()
