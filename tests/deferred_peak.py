"""A script for plain processes and torchrun: prints how much the peak memory of each process grows by a large model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from parity import SGD, cpu_cluster
from torch import nn

import autopar
from autopar.ranks import LocalRanks

WIDTH, LAYERS = 2048, 24


class Stack(nn.Module):
    """403 MB of weights; frozen but for the last, so that gradients do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        self.last = nn.Linear(WIDTH, 1)
        self.layers.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layers(x)).square().mean()


def peak_bytes(pid: int | str) -> int:
    """Largest resident size so far."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch, pins = {"x": torch.ones(4, WIDTH)}, autopar.Parallelism(dp=1, tp=2, pp=1)
    before = peak_bytes("self")
    with autopar.compile(autopar.deferred(Stack), cpu_cluster(2), batch, optimizer=SGD, parallelism=pins) as exe:
        ranks, pids = exe._running(), ["self"]
        if isinstance(ranks, LocalRanks):
            ranks.pool.wait_ready()
            pids += [str(worker.process.pid) for worker in ranks.pool._crew.workers]
        starts = [before, *map(peak_bytes, pids[1:])]
        loss = exe.step(batch)
        assert loss > 0
        grown = [peak_bytes(pid) - start for pid, start in zip(pids, starts, strict=True)]
    print(json.dumps({"grown": grown, "whole": 4 * WIDTH * WIDTH * LAYERS}), flush=True)


if __name__ == "__main__":
    main()
