"""What each rank of tests/test_torchrun.py runs, under torchrun: launched.py MODE FOLDER.

A rank leaves what it saw in FOLDER/rank<n>.pt.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parity import SGD, cpu_cluster
from regression import BATCH, TWO, Regression

import autopar
from cost_model.errors import AutoparError

RANK = int(os.environ["RANK"])
STEPS = 3
NEVER_CLOSED: list[Any] = []


@atexit.register  # before autopar's own, so it runs after them
def say_what_is_left() -> None:
    """Threads of gloo that would still run while the interpreter is torn down."""
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    print(f"rank {RANK} left with {len(names)} thread(s), {sum('gloo' in name for name in names)} of gloo", flush=True)


def compiled(batch: Any = BATCH, *, model: Any = None, cluster: Any = TWO, memory_cap: Any = None, **pins: Any) -> Any:
    """The same executable on every rank, unless a test wants another."""
    parallelism = autopar.Parallelism(**pins)
    chosen = Regression() if model is None else model
    return autopar.compile(chosen, cluster, batch, optimizer=SGD, parallelism=parallelism, memory_cap=memory_cap)


def save(seen: dict[str, Any]) -> None:
    torch.save(seen, Path(sys.argv[2]) / f"rank{RANK}.pt")


def trains() -> None:
    """Executables in a group that autopar makes, in one of the script's own, and ones that are never closed."""
    with compiled(tp=2) as exe:
        with compiled(dp=2) as beside:
            beside.step(BATCH)
        first = {"losses": [exe.step(BATCH) for _ in range(STEPS)], "state": exe.full_state_dict()}
        first |= {"is_main": exe.is_main, "plan": exe.plan.to_json(), "notes": exe.notes}
    left_by_close = not dist.is_initialized()
    dist.init_process_group("gloo")
    with compiled(None, dp=2) as exe:
        second = [exe.step(BATCH) for _ in range(STEPS)]
    kept_by_close = dist.is_initialized()
    dist.destroy_process_group()
    NEVER_CLOSED.append(compiled(dp=2))
    NEVER_CLOSED[0].step(BATCH)
    save({"first": first, "second": second, "left_by_close": left_by_close, "kept_by_close": kept_by_close})


def refuses() -> None:
    """Errors that every rank must see alike, a step that works after them, and an error that nobody catches."""
    seen = {
        "world size": _error(lambda: compiled(cluster=cpu_cluster(3))),
        "world size, lazily": _error(lambda: compiled(None, cluster=cpu_cluster(1)).step(BATCH)),
        "pins": _error(lambda: compiled(dp=2, tp=2, pp=1)),
        "cap": _error(lambda: compiled(memory_cap="1 KiB", dp=2)),
        "weights": _error(lambda: compiled(model=_model_of_this_rank(), dp=2).step(BATCH)),
        "batch": _error(lambda: compiled(dp=2).step({name: value + RANK for name, value in BATCH.items()})),
        "shapes": _error(lambda: compiled(dp=2).step({name: value[:4] for name, value in BATCH.items()})),
        "step": compiled(dp=2).step(BATCH),
    }
    save(seen)
    compiled(memory_cap="1 KiB", dp=2)


def _error(run: Callable[[], object]) -> dict[str, Any]:
    try:
        run()
    except AutoparError as error:
        return {"type": type(error).__name__, "message": str(error), **vars(error)}
    return {"type": None}


def _model_of_this_rank() -> Regression:
    model = Regression()
    with torch.no_grad():
        model.up.weight += RANK
    return model


def dies() -> None:
    """Rank 1 is killed between steps while rank 0 steps on."""
    exe = compiled(dp=2)
    exe.step(BATCH)
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        exe.step(BATCH)


def fails() -> None:
    """Rank 1 raises between steps and so leaves the block while rank 0 steps on."""
    with compiled(dp=2) as exe:
        exe.step(BATCH)
        if RANK == 1:
            raise RuntimeError("the user's own error on one rank")
        while True:
            exe.step(BATCH)


if __name__ == "__main__":
    {"trains": trains, "refuses": refuses, "dies": dies, "fails": fails}[sys.argv[1]]()
