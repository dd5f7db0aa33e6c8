"""One rank on a slow network: reads what to compile and how often to step, a line of JSON each, and answers in kind.

RANK=0 WORLD_SIZE=3 MASTER_ADDR=... MASTER_PORT=... python slow_rank.py
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import autopar
from cost_model.errors import AutoparError

SGD = functools.partial(torch.optim.SGD, lr=1e-3)


class Residual(nn.Module):
    """Layers of one width: what crosses any cut is as large as what crosses any other."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x.square().mean()


def compiled(told: dict[str, Any]) -> autopar.Executable:
    """A model of ``layers`` of ``width`` for ``batch`` samples, on the cluster of a file, with pins."""
    torch.manual_seed(0)
    return autopar.compile(
        Residual(told["width"], told["layers"]),
        autopar.Cluster.load(Path(told["cluster"])),
        batch(told),
        optimizer=SGD,
        parallelism=autopar.Parallelism(**told["pins"]),
        precision=autopar.Precision(**told.get("precision", {})),
        timeout_s=told.get("timeout_s"),
    )


def batch(told: dict[str, Any]) -> dict[str, Tensor]:
    return {"x": torch.randn(told["batch"], told["width"], generator=torch.Generator().manual_seed(1))}


def answer(told: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step after the first two, and the estimate; where asked to, says when these two are done."""
    with compiled(told) as exe:
        data, times = batch(told), []
        for _ in range(told["steps"] + 2):
            start = time.perf_counter()
            exe.step(data)
            times.append(time.perf_counter() - start)
            if len(times) == 2 and told.get("announced"):
                print(json.dumps({"running": True}), flush=True)
        plan = exe.plan
        mesh = {
            "dp": plan.dp,
            "tp": plan.tp,
            "pp": plan.pp,
            "schedule": plan.schedule,
            "window": plan.window,
            "microbatches": plan.microbatches,
            "precision": str(plan.precision),
        }
        estimate = dataclasses.asdict(exe.estimate.breakdown)
        return {"steps_s": times[2:], "estimate_s": exe.estimate.step_time_s, "breakdown": estimate, "plan_found": mesh}


def main() -> None:
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except AutoparError as error:
            reply = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
