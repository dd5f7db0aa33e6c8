"""What each rank of tests/test_torchrun.py runs, under torchrun: launched.py MODE FOLDER.

A rank leaves what it saw in FOLDER/rank<n>.pt.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import example_gpt
from parity import SGD, cpu_cluster
from regression import BATCH, TWO, Regression
from torch.distributed.checkpoint import FileSystemWriter
from torch.optim.lr_scheduler import StepLR
from torch.profiler import ProfilerActivity, profile
from torch.utils.data.distributed import DistributedSampler

import autopar
from autopar.runtime.executor import RankExecutor
from cost_model.errors import AutoparError, CheckpointError
from cost_model.simulate import simulate

RANK = int(os.environ["RANK"])
STEPS = 3
RESUMED_STEPS = 8
PLANS: dict[str, dict[str, Any]] = {
    "dp": {"dp": 2},
    "tp": {"tp": 2},
    "pp": {"pp": 2, "microbatch_size": 2, "schedule": "1f1b"},
    "zero": {"dp": 2, "zero": 3},
}
NEVER_CLOSED: list[Any] = []


@atexit.register  # before autopar's own, so it runs after them
def say_what_is_left() -> None:
    """Threads of gloo that would still run while the interpreter is torn down."""
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    print(f"rank {RANK} left with {len(names)} thread(s), {sum('gloo' in name for name in names)} of gloo", flush=True)


def compiled(batch: Any = BATCH, *, model: Any = None, cluster: Any = TWO, **keywords: Any) -> Any:
    """The same executable on every rank, unless a test wants another."""
    pins = {name: keywords.pop(name) for name in autopar.Parallelism.__dataclass_fields__ if name in keywords}
    chosen = Regression() if model is None else model
    return autopar.compile(chosen, cluster, batch, optimizer=SGD, parallelism=autopar.Parallelism(**pins), **keywords)


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
    model = Regression()
    with compiled(None, model=model, dp=2) as exe:
        second = [exe.step(BATCH) for _ in range(STEPS)]
    kept_by_close = dist.is_initialized()
    dist.destroy_process_group()
    NEVER_CLOSED.append(compiled(dp=2))
    NEVER_CLOSED[0].step(BATCH)
    save(
        {
            "first": first,
            "second": second,
            "left_by_close": left_by_close,
            "kept_by_close": kept_by_close,
            "model": model.state_dict(),
        }
    )


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
        "batch after a checkpoint": _error(_goes_on_with_another_batch),
        "rate": _error(_changes_its_own_rate),
        "batch to evaluate": _error(lambda: compiled(dp=2).eval().eval_step(_batch_of_this_rank(8))),
        "shape to evaluate": _error(lambda: compiled(dp=2).eval().eval_step(_batch_of_this_rank(4 + 4 * RANK))),
        "step": compiled(dp=2).step(BATCH),
    }
    save(seen)
    compiled(memory_cap="1 KiB", dp=2)


def _batch_of_this_rank(samples: int) -> dict[str, torch.Tensor]:
    return {name: value[:samples] + RANK for name, value in BATCH.items()}


def _changes_its_own_rate() -> None:
    with compiled(dp=2) as exe:
        exe.optimizer.param_groups[0]["lr"] = 0.1 / (1 + RANK)
        exe.step(BATCH)
        exe.save(Path(sys.argv[2]) / "run")


def _goes_on_with_another_batch() -> None:
    with compiled(dp=2) as exe:
        exe.save(Path(sys.argv[2]) / "run")
        exe.step(_batch_of_this_rank(8))


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
    """Rank 1 is killed between steps while rank 0 steps on, or saves; MODE is "dies:PLAN:step" or "dies:PLAN:save"."""
    _, plan, does = sys.argv[1].split(":")
    exe = compiled(**PLANS[plan])
    exe.step(BATCH)
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        exe.step(BATCH) if does == "step" else exe.save(Path(sys.argv[2]) / "run")


def fails() -> None:
    """Rank 1 raises between steps and so leaves the block while rank 0 steps on."""
    with compiled(dp=2) as exe:
        exe.step(BATCH)
        if RANK == 1:
            raise RuntimeError("the user's own error on one rank")
        while True:
            exe.step(BATCH)


def goes_on() -> None:
    """Trains on from the newest checkpoint, saving every second step; MODE is "resumes:PLAN:RANK:WHEN".

    WHEN: a method that RANK is killed in, in the first run of the script; or in how many runs one is at any moment.
    """
    _, plan, rank, when = sys.argv[1].split(":")
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if when.isdigit():
        _die_at_random(attempt, int(when))
    elif attempt == 0 and int(rank) == RANK:
        _die_in(when)
    folder, log = Path(sys.argv[2]), (Path(sys.argv[2]) / "losses.txt").open("a")
    batch, rates = (
        {n: tensor.double() for n, tensor in BATCH.items()},
        functools.partial(StepLR, step_size=2, gamma=0.8),
    )
    with compiled(batch, model=Regression().double(), **PLANS[plan], scheduler=rates) as exe:
        if (folder / "run").exists():
            with contextlib.suppress(CheckpointError):  # it died before the first was complete
                exe.load(folder / "run")
        while exe.steps < RESUMED_STEPS or (when.isdigit() and attempt < int(when)):
            step, loss = exe.steps, exe.step(batch)
            if RANK == 0:
                print(step, repr(loss), file=log, flush=True)
            if exe.steps % 2 == 0:
                exe.save(folder / "run")


def _die_in(method: str) -> None:
    """Be killed in the fifth call of a method of the executor, or in the second while a checkpoint is written."""
    owner: Any = FileSystemWriter if method == "write_data" else RankExecutor
    original, calls = getattr(owner, method), itertools.count(1)

    def deadly(*args: Any, **keywords: Any) -> Any:
        if next(calls) == (2 if method == "write_data" else 5):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **keywords)

    setattr(owner, method, deadly)


def _die_at_random(attempt: int, deaths: int) -> None:
    """One of the ranks, up to a second after training began, in whatever it does then; it leaves a file death<n>."""
    draw = random.Random(attempt)
    victim, delay_s, begun = draw.randrange(2), draw.uniform(0.0, 1.0), threading.Event()

    def slowed(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **keywords: Any) -> Any:
            begun.set()
            time.sleep(0.01)
            return original(*args, **keywords)

        return run

    def die() -> None:
        begun.wait()
        time.sleep(delay_s)
        (Path(sys.argv[2]) / f"death{attempt}").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    if attempt < deaths and victim == RANK:
        for owner, method in ((RankExecutor, "_timed"), (FileSystemWriter, "write_data")):
            setattr(owner, method, slowed(getattr(owner, method)))
        threading.Thread(target=die, daemon=True).start()


def uses() -> None:
    """What training needs, with the answers of this rank."""
    with compiled(dp=2, max_grad_norm=0.5) as exe:
        losses = [exe.step(BATCH), exe.step(BATCH, update=False), exe.step(BATCH, update=False)]
        norms = [exe.grad_norm, exe.clip_grad_norm_(0.25)]
        exe.update()
        exe.save(Path(sys.argv[2]) / "run", extra={"epoch": 3})
        losses += [exe.eval_step(BATCH), exe.trace(Path(sys.argv[2]) / f"trace{RANK}.json", BATCH)]
    with compiled(tp=2, max_grad_norm=0.5) as exe:
        extra = exe.load(Path(sys.argv[2]) / "run")
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            losses += [exe.step(BATCH)]
        steps, timeline = exe.steps, simulate(exe.planned.linked.program, TWO).timeline
        unnamed = {event.title for event in timeline}.union(exe.plan.segment_labels)
        unnamed -= {event.name for event in profiled.events()}
    seen = {"losses": losses, "norms": norms, "extra": extra, "steps": steps, "unnamed": unnamed}
    save({**seen, **own_rows("dp"), "tp": own_rows("tp")})


def labelled() -> tuple[Any, dict[str, Any]]:
    """A GPT and a batch with most labels of the first samples ignored."""
    model, batch = example_gpt(n_layer=1)
    batch["targets"][:3, 2:] = -100
    return model, batch


def own_rows(axis: str) -> dict[str, Any]:
    """Training on the samples of this rank's replica, on devices that do not count upwards."""
    model, batch = labelled()
    shapes = {name: tensor.to("meta") for name, tensor in batch.items()}
    pins = autopar.Parallelism(**{axis: 2}, placement=(1, 0))
    with autopar.compile(model, TWO, shapes, optimizer=SGD, parallelism=pins, local_batches=True) as exe:
        place = exe.data_parallel_rank, exe.data_parallel_size
        mine = {name: tensor.chunk(place[1])[place[0]] for name, tensor in batch.items()}
        wrong = {name: tensor + RANK for name, tensor in mine.items()} if axis == "tp" else batch
        errors = [_error(lambda: exe.step(wrong))]
        losses = [exe.step(mine) for _ in range(STEPS)]
        model.load_state_dict(exe.full_state_dict())
        logits, loss = exe.eval().forward({"idx": mine["idx"]}), exe.eval_step(mine)
        forward_error = float((logits - model(mine["idx"])).abs().max()), abs(loss - float(model(**batch)))
        gathers = exe.code(0).count("run.gather_rows(")
    return {"place": place, "local": losses, "errors": errors, "gathers": gathers, "forward_error": forward_error}


def profiles() -> None:
    """What a pipeline should show a profiler under each schedule, and does not."""
    unseen = {}
    for schedule in ("1f1b", "zero_bubble", "interleaved"):
        model, batch = example_gpt(n_layer=4)
        pins = {"pp": 2, "microbatch_size": 2, "schedule": schedule}
        with compiled(batch, model=model, max_grad_norm=1.0, **pins) as exe:
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                exe.step(batch)
            timeline, parts = simulate(exe.planned.linked.program, TWO).timeline, exe.plan.stages[RANK::2]
            labels = {label for p in parts for label in exe.plan.segment_labels[p.first_segment : p.last_segment]}
            expected = {event.title for event in timeline if event.stage == RANK} | labels
        seen = {event.name for event in profiled.events()}
        unseen[schedule] = {"unseen": expected - seen, "labels": labels, "titles": expected - labels}
    save(unseen)


class Counted(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Samples, and the numbers of those that were asked for."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.values = torch.randn(2, count, 8, generator=generator)
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self.values.shape[1]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.loaded.append(index)
        return dict(zip(("x", "y"), self.values[:, index], strict=True))


def loads() -> None:
    """Four ranks that load the samples of their replica alone, through torch's own sampler, for two epochs."""
    size, seen = 8, {}
    for name, pins in {"dp": {"dp": 4}, "dp x pp": {"dp": 2, "pp": 2}, "dp x tp": {"dp": 2, "tp": 2}}.items():
        shapes = {leaf: torch.empty(size, 8, device="meta") for leaf in ("x", "y")}
        with compiled(shapes, cluster=cpu_cluster(4), local_batches=True, **pins) as exe:
            data, replicas = Counted(3 * size), exe.data_parallel_size
            sampler = DistributedSampler(data, num_replicas=replicas, rank=exe.data_parallel_rank, seed=3)
            loader = torch.utils.data.DataLoader(data, batch_size=size // replicas, sampler=sampler)
            losses = []
            for epoch in range(2):
                sampler.set_epoch(epoch)
                losses += [exe.step(batch) for batch in loader]
            seen[name] = {"losses": losses, "loaded": len(data.loaded), "replicas": replicas}
    save(seen)
    exe = compiled(shapes, cluster=cpu_cluster(4), local_batches=True, dp=2, pp=2)
    own = {leaf: torch.ones(size // 2, 8) for leaf in shapes}
    exe.step(own)
    while True:
        exe.step({leaf: rows[:3] for leaf, rows in own.items()} if RANK == 1 else own)


def hooks() -> None:
    """A hook of rank 0 alone that asks for what is known on all; one that raises on every rank; one on rank 1 alone."""

    def raises(record: Any) -> None:
        raise RuntimeError(f"the hook of rank {RANK} at step {record.step}")

    scales: list[float] = []
    with compiled(dp=2, max_grad_norm=1.0, precision=autopar.Precision(params="fp16", master="fp32")) as exe:
        if RANK == 0:
            exe.add_hook(lambda record: scales.extend([exe.loss_scale, record.loss_scale, exe.grad_norm]))
        exe.step(BATCH)
        remove = exe.add_hook(raises)
        told = []
        for _ in range(2):
            try:
                exe.step(BATCH)
            except RuntimeError as error:
                told.append(str(error))
        remove()
        exe.step(BATCH)
        save({"told": told, "steps": exe.steps, "scales": scales})
        if RANK == 1:
            exe.add_hook(raises)
        while True:
            exe.step(BATCH)


if __name__ == "__main__":
    modes = {"trains": trains, "refuses": refuses, "dies": dies, "fails": fails, "uses": uses, "resumes": goes_on}
    modes |= {"profiles": profiles, "loads": loads, "hooks": hooks}
    modes[sys.argv[1].partition(":")[0]]()
