"""The chosen plan beside every grid on this machine's ranks: all are run in turn.

    python benchmarks/fastest.py [--ranks 2] [--models gpt mlp ...] [--most 64] [--within 1.5] [--recompute none ...]

Grids: all dp x tp x pp of the ranks, microbatch sizes, ZeRO 0, 1, 3 and the levels of recompute asked for (none:
no memory is short here). Those whose estimate is more than --within times the least are counted, not run. In each round
every program takes a turn of four steps, in another order, of which all but the first count, on the slowest rank. The
others are compared with the chosen plan by their medians, and within rounds, as a machine that changes its speed does
so for all of a round; what says more against the chosen plan counts. Single steps scatter by a tenth and more (of four
copies of one program one was 6 % faster than another over 30 rounds), so a program is left out of further rounds only
once the chosen plan is three standard errors below 1.05 of its time; the others go on for --most rounds. The exit code
is 1 where a grid is more than 5 % faster than the chosen plan. Run it with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import math
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
FIVE = ("gpt", "hf gpt2", "llama", "mlp", "resnet")
WARM_UP = 2
COUNTED = 3
"""Steps of a turn, after one that finds in cache and memory what another program left."""
AT_ONCE = 4
"""Rounds before it is asked which programs are done with."""
SURE = 3
"""Standard errors: of many programs that are asked about several times, one that is off by two is nothing rare."""
OF_MEDIAN = math.sqrt(math.pi / 2)
"""The standard error of a median over that of a mean, of normal samples."""
ZEROS = (0, 1, 3)
AT_A_TIME = 24
"""Programs that are compiled and timed together with the chosen one: of about a hundred the memory would not do."""


@dataclass
class Program:
    """A compiled plan with its estimate and the time of each of its turns in seconds, the slowest rank's; exe: until it
    is done with."""

    name: str
    exe: autopar.Executable | None
    estimate_s: float
    times_s: list[float] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        return statistics.median(self.times_s)

    def text(self) -> str:
        seconds = f"{self.median_s * 1e3:.1f} ms, estimated {self.estimate_s * 1e3:.1f}"
        return f"{self.name}: {seconds} ({len(self.times_s)} turns)"

    def run(self, batch: dict[str, Tensor]) -> None:
        """One turn: in training a step finds what one before it left."""
        assert self.exe is not None
        self.exe.step(batch)
        self.times_s.append(statistics.median(self._step_s(self.exe, batch) for _ in range(COUNTED)))

    def close(self) -> None:
        if self.exe is not None:
            self.exe.close()
        self.exe = None

    @staticmethod
    def _step_s(exe: autopar.Executable, batch: dict[str, Tensor]) -> float:
        dist.barrier()
        start = time.perf_counter()
        exe.step(batch)
        seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds)


@dataclass(frozen=True)
class Comparison:
    """The chosen plan beside another program, over the rounds that both were part of, from one on."""

    chosen: Program
    other: Program
    since: int

    @property
    def ratio(self) -> float:
        """How often the other's time the chosen plan takes: by medians or within rounds, whichever is more."""
        times_s = self._beside()
        return max(statistics.median(times_s) / self.other.median_s, math.exp(statistics.median(self._within())))

    @property
    def is_settled(self) -> bool:
        """Whether the other is surely not more than 5 % faster."""
        within = self._within()
        error = OF_MEDIAN * statistics.stdev(within) / math.sqrt(len(within))
        return math.log(AT_MOST / self.ratio) > SURE * error

    def _within(self) -> list[float]:
        """Of each round, the logarithm of the ratio."""
        return [math.log(mine / its) for mine, its in zip(self._beside(), self.other.times_s, strict=True)]

    def _beside(self) -> list[float]:
        """The chosen plan takes part in all rounds."""
        return self.chosen.times_s[self.since : self.since + len(self.other.times_s)]


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
    return Program(text + plan.saving_text(), autopar.compile(model, cluster, batch, plan=plan), found.step_time_s)


def is_fastest(name: str, given: argparse.Namespace) -> bool:
    """Whether the chosen plan of a model is among the fastest; rank 0 prints every program."""
    cluster = autopar.Cluster.local(given.ranks)
    batch = MODELS[name]()[1]
    samples = len(next(iter(batch.values())))
    chosen = compiled(name, cluster, None, float("inf"))
    assert chosen is not None and chosen.exe is not None
    every, known = list(grids(given.ranks, samples, given.recompute)), {chosen.exe.plan}
    compared: list[Comparison] = []
    for first in range(0, len(every), AT_A_TIME):
        tried = [compiled(name, cluster, pins, given.within * chosen.estimate_s) for pins in every[first:][:AT_A_TIME]]
        others = {p.exe.plan: p for p in tried if p is not None and p.exe is not None and p.exe.plan not in known}
        known |= set(others)
        compared += measure(chosen, list(others.values()), given.most, batch)
    _say(f"{name} on {given.ranks} ranks: {len(every)} grids, {len(known)} different programs were run")
    _say(f"  {chosen.text()}  <- chosen")
    for each in sorted(compared, key=lambda each: each.ratio, reverse=True):
        _say(f"  {each.other.text()}, chosen {each.ratio:.3f} of it")
    ratio = max((each.ratio for each in compared), default=1.0)
    _say(f"{name} on {given.ranks} ranks: the chosen plan takes {max(ratio, 1.0):.3f} of the fastest")
    return ratio <= AT_MOST


def measure(chosen: Program, others: Sequence[Program], most: int, batch: dict[str, Tensor]) -> list[Comparison]:
    """Rounds until it is known of each program that it is not more than 5 % faster, or ``most`` of them."""
    take_turns([chosen, *others], WARM_UP, batch)
    for program in others:
        program.times_s.clear()
    compared = [Comparison(chosen, other, len(chosen.times_s)) for other in others]
    left = compared
    for _ in range(math.ceil(most / AT_ONCE)):
        if left:
            take_turns([chosen, *(each.other for each in left)], AT_ONCE, batch)
            left = [each for each in left if not each.is_settled]
    for program in others:
        program.close()
    return compared


def take_turns(programs: Sequence[Program], rounds: int, batch: dict[str, Tensor]) -> None:
    """So many turns of each, in another order each time, as what ran before a program leaves caches and clocks as they
    are."""
    for _ in range(rounds):
        taken = sum(len(program.times_s) for program in programs)
        for program in random.Random(taken).sample(programs, len(programs)):
            program.run(batch)


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
    parser.add_argument("--most", type=int, default=64, help="rounds, at least 1")
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
