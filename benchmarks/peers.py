"""Step time beside PyTorch's own ways to train, on two ranks of one thread each: ratios of medians, alternating.

    python benchmarks/peers.py [--rounds 30] [--only ddp fsdp2] [--json]

The model is a 6-layer GPT of width 256, batch 16 x 128, AdamW. In each round every program takes one step, each peer
right before autopar's program with the same parallelism, so that both see the machine in the same state; the median of
the rounds' ratios is printed beside the ratio of medians. Losses of both must agree. "auto" is the planner's choice;
"any schedule" has the peer's stages and microbatches, and the planner chooses the order of work.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "examples")]

RANKS, BATCH, LENGTH, MICROBATCHES, WARM_UP = 2, 16, 128, 4, 3
TOLERANCE = 1e-4
AT_MOST = {"ddp": 1.00, "fsdp2": 0.90, "dtensor": 0.80, "pipelining": 0.97}
FREE_SCHEDULE = "autopar pipelining, any schedule"
BEST_AT_MOST, HALF_AT_MOST = 0.98, 1.15


@dataclass
class Program:
    """A step function with its times in seconds, the slowest rank's, and its losses."""

    name: str
    step: object
    times_s: list[float]
    losses: list[float]

    def run(self, batch: dict[str, Tensor]) -> None:
        dist.barrier()
        start = time.perf_counter()
        loss = self.step(batch)  # type: ignore[operator]
        seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        self.times_s.append(float(seconds))
        self.losses.append(float(loss))


def make_model() -> nn.Module:
    """The same weights each time."""
    from gpt import GPT, GPTConfig

    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=LENGTH, n_layer=6, n_embd=256, tied=False, fused_qkv=False))


def programs(names: list[str], batch: dict[str, Tensor]) -> list[Program]:
    """One device, then each peer followed by autopar's program, then the planner's choice."""
    import peers_models as peers

    import autopar

    cluster = autopar.Cluster.local(RANKS)
    ways = {
        "ddp": (peers.ddp, autopar.Parallelism(dp=2, tp=1, pp=1, zero=0)),
        "fsdp2": (peers.fsdp2, autopar.Parallelism(dp=2, tp=1, pp=1, zero=3)),
        "dtensor": (peers.dtensor, autopar.Parallelism(dp=1, tp=2, pp=1)),
        "pipelining": (
            functools.partial(peers.pipelining, microbatches=MICROBATCHES),
            autopar.Parallelism(dp=1, tp=1, pp=2, schedule="1f1b", microbatch_size=BATCH // MICROBATCHES),
        ),
    }

    def ours(pins: autopar.Parallelism | None) -> object:
        exe = autopar.compile(make_model(), cluster, batch, optimizer=peers.make_optimizer, parallelism=pins)
        return exe.step

    found = [Program("one device", _alone(peers.one_device(make_model())), [], [])]
    for name in names:
        peer, pins = ways[name]
        found += [Program(name, peer(make_model()), [], []), Program(f"autopar {name}", ours(pins), [], [])]
    if "pipelining" in names:
        found.append(Program(FREE_SCHEDULE, ours(replace(ways["pipelining"][1], schedule=None)), [], []))
    return [*found, Program("autopar auto", ours(None), [], [])]


def _alone(step: object) -> object:
    """On rank 0, while the other waits; the loss is told."""

    def on_rank_0(batch: dict[str, Tensor]) -> float:
        loss = torch.tensor(step(batch) if dist.get_rank() == 0 else 0.0, dtype=torch.float64)  # type: ignore[operator]
        dist.broadcast(loss, 0)
        return float(loss)

    return on_rank_0


def measure(names: list[str], rounds: int) -> dict[str, Program]:
    """All programs, one step each in turn, for so many rounds after the warm-up."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    text = torch.randint(256, (rounds + WARM_UP, BATCH, LENGTH + 1))
    batches = [{"idx": t[:, :-1].contiguous(), "targets": t[:, 1:].contiguous()} for t in text]
    found = programs(names, batches[0])
    if dist.get_rank() == 0:
        print(f"measuring {len(found)} programs for {len(batches)} rounds", file=sys.stderr, flush=True)
    for index, batch in enumerate(batches):
        for program in found:
            program.run(batch)
        if dist.get_rank() == 0 and sys.stderr.isatty():
            print(f"\rround {index + 1}/{len(batches)}", end="", file=sys.stderr, flush=True)
    for program in found:
        del program.times_s[:WARM_UP]
    return {program.name: program for program in found}


def rows(found: dict[str, Program], names: list[str]) -> list[dict[str, object]]:
    """One per figure: ratio of medians, median of ratios, the limit, and whether losses agree."""
    median = {name: statistics.median(program.times_s) for name, program in found.items()}
    best = min(names, key=lambda name: median[name])
    pairs = [(f"autopar {name}", name, AT_MOST[name], 1.0) for name in names]
    pairs.append(("autopar auto", best, BEST_AT_MOST, 1.0))
    if "pipelining" in names:
        pairs.append((FREE_SCHEDULE, "pipelining", AT_MOST["pipelining"], 1.0))
    if "ddp" in names:
        pairs.append(("autopar ddp", "one device", HALF_AT_MOST, 0.5))
    reference = found["one device"].losses
    answer: list[dict[str, object]] = []
    for ours, peer, limit, share in pairs:
        ratios = [a / (b * share) for a, b in zip(found[ours].times_s, found[peer].times_s, strict=True)]
        apart = max(abs(a - b) / abs(b) for a, b in zip(found[ours].losses, reference, strict=True))
        apart = max(apart, *(abs(a - b) / abs(b) for a, b in zip(found[peer].losses, reference, strict=True)))
        answer.append(
            {
                "ours": ours,
                "peer": peer if share == 1 else f"{peer} / 2",
                "ours_s": median[ours],
                "peer_s": median[peer] * share,
                "ratio": median[ours] / (median[peer] * share),
                "median_of_ratios": statistics.median(ratios),
                "at_most": limit,
                "loss_difference": apart,
                "same_losses": apart <= TOLERANCE,
            }
        )
    return answer


def show(answer: list[dict[str, object]]) -> None:
    table = Table("program", "peer", "ours s", "peer s", "ratio", "median of ratios", "at most", "losses differ by")
    for row in answer:
        cells = [f"{row[key]:.3f}" for key in ("ours_s", "peer_s", "ratio", "median_of_ratios", "at_most")]
        table.add_row(str(row["ours"]), str(row["peer"]), *cells, f"{row['loss_difference']:.1e}")
    Console(width=120).print(table)


def launch(arguments: list[str]) -> int:
    """Run this file once per rank."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    return subprocess.run([*command, __file__, *arguments], env=environment, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", nargs="+", choices=list(AT_MOST), default=list(AT_MOST))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        sys.exit(launch(sys.argv[1:]))
    found = measure(copy.copy(options.only), options.rounds)
    if dist.get_rank() == 0:
        answer = rows(found, options.only)
        print(json.dumps(answer, indent=2)) if options.json else show(answer)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads must not outlive the interpreter


if __name__ == "__main__":
    main()
