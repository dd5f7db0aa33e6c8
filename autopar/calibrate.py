"""This machine as a cluster: CUDA devices by their name, or CPU ranks measured once and kept."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from autopar.calibrate_cold import COLD_PRODUCTS, products_size
from autopar.calibrate_fit import Machine, MessageTime, OpTime, render_cluster
from autopar.calibrate_probes import all_probes
from autopar.calibrate_rate import usual_seconds
from autopar.calibrate_worker import MESSAGE_KINDS, MOVING_KINDS, STEP_KINDS, Cold, Probe, Steps, message_ranks
from autopar.runtime.pool import WORKER_ENVIRONMENT, WorkerPool
from cost_model.cluster import BEHIND, TRANSFER, Cluster, cluster_names
from cost_model.device import BLAS, Device, device_names
from cost_model.errors import ClusterFileError, ConfigError, WorkerError
from cost_model.program import OpCost

CALIBRATION_VERSION = 23
"""To be raised when what is measured, or how, changes: older results are then measured anew."""
CACHE_VARIABLE = "AUTOPAR_CACHE_DIR"
MESSAGE_BYTES = (2**10, 2**14, 2**17, 2**20, 2**22, 2**24, 2**26)
MOVING_BYTES = MESSAGE_BYTES[:-1]
_PASSES = 6
_OP_BUDGET_S = 0.003
_PRODUCT_BUDGET_S = 0.1
_COLD_BUDGET_S = 0.04
_CLEARLY = 0.92  # of the time that torch's own way takes
_MESSAGE_BUDGET_S = 0.008
_MOST_REPEATS = 3  # of a pass: what differs is the passes
_OS_SHARE = 0.05  # of memory, left to the system and its file cache
_RANK_WAIT_S = 900.0
_POLL_S = 0.2
_SPEED_VARIABLES = ("OMP_", "KMP_", "MKL_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "THP_MEM_ALLOC")
Step = Callable[[str], None]


def local_cluster(num_devices: int, *, refresh: bool = False) -> Cluster:
    """n devices of this machine: CUDA devices on nccl if there are so many, else CPU ranks of one thread on gloo.

    CPU ranks are measured once, all at the same time, and kept in the user's cache directory (AUTOPAR_CACHE_DIR);
    refresh measures again. Under torchrun local rank 0 measures and the others wait for its file.
    Errors: ConfigError, WorkerError; KeyboardInterrupt leaves neither processes nor a file.
    """
    if isinstance(num_devices, bool) or not isinstance(num_devices, int) or num_devices < 1:
        raise ConfigError(f"a local cluster has a whole number of devices above zero, not {num_devices!r}")
    if torch.cuda.is_available() and torch.cuda.device_count() >= num_devices:
        return _cuda_cluster(num_devices)
    path = cache_path(num_devices)
    rank = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))
    return _awaited(path) if rank != "0" else _kept_or_measured(path, num_devices, refresh)


def cache_path(num_devices: int) -> Path:
    """Where the measures of so many ranks of this machine are kept; all that they depend on is in the name."""
    key = {
        "version": CALIBRATION_VERSION,
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "environment": rank_environment(),
        "probes": [probe.label for probe in all_probes(BLAS)],
    }
    return kept_path(f"local-{num_devices}", "toml", key)


def kept_path(name: str, suffix: str, key: Mapping[str, object]) -> Path:
    """Where a measure of this machine is kept; key: all that it depends on."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("autopar")
    return Path(folder) / f"{name}-{digest}.{suffix}"


def rank_environment() -> dict[str, str]:
    """What in the environment of local ranks changes how fast they are: threads and memory allocation."""
    environment = {**os.environ, **WORKER_ENVIRONMENT}
    return {name: environment[name] for name in sorted(environment) if name.startswith(_SPEED_VARIABLES)}


def usable_cores() -> float:
    """Cores this process may use: its affinity, and the CPU quota of its control group where there is one."""
    cores = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, float(quota) / float(period))
    return cores


def usable_memory_bytes() -> int:
    """Bytes of memory this process may use: the machine's, or its control group's limit if lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return total


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _cuda_cluster(num_devices: int) -> Cluster:
    """Data files for the devices that CUDA reports, with their real memory. Errors: ConfigError for unknown ones."""
    reported = {torch.cuda.get_device_name(index) for index in range(num_devices)}
    devices = [device for device in map(Device.load, device_names()) if reported <= set(device.reported_as)]
    if not devices:
        raise ConfigError(
            f"no device file for {', '.join(sorted(reported))}; known: {', '.join(device_names())}. "
            "Next: describe the machine in a TOML file and give its path to Cluster.load"
        )
    memory_bytes = min(torch.cuda.get_device_properties(index).total_memory for index in range(num_devices))
    device = devices[0].with_memory(memory_bytes)
    base = _node_of(devices[0].name, num_devices)
    return dataclasses.replace(base, name=f"local-{num_devices}", devices=(device,) * num_devices)


def _node_of(device: str, num_devices: int) -> Cluster:
    """The first shipped cluster with such a device and a node that large. Errors: ConfigError."""
    for name in cluster_names():
        cluster = Cluster.load(name)
        if cluster.devices[0].name == device and cluster.num_devices >= num_devices:
            return Cluster.load(name, num_devices)
    raise ConfigError(
        f"no shipped cluster has a node of {num_devices} {device}; "
        "describe the links between them in a TOML file and give its path to Cluster.load"
    )


def _kept_or_measured(path: Path, num_devices: int, refresh: bool) -> Cluster:
    """The kept file, or a new one; whoever comes second waits for the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = None if refresh else _kept(path)
        return kept or _write(path, measure(num_devices, note=f"kept in {path}"))


def _kept(path: Path) -> Cluster | None:
    """The cluster in this file; None, after saying so, where it cannot be read."""
    if not path.exists():
        return None
    try:
        return Cluster.load(path)
    except ClusterFileError as error:
        print(f"autopar: {error}; measuring again", file=sys.stderr)
        return None


def _write(path: Path, text: str) -> Cluster:
    """Check the text, then put it in place whole."""
    cluster = Cluster.from_toml(text, str(path))
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return cluster


def _awaited(path: Path) -> Cluster:
    """The cluster that local rank 0 measures. Errors: WorkerError if it does not appear in time."""
    deadline = time.monotonic() + _RANK_WAIT_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise WorkerError(0, f"has not written {path} in {_RANK_WAIT_S:.0f} s; see its output, then start again")
        time.sleep(_POLL_S)
    return Cluster.load(path)


def measure(num_ranks: int, note: str = "") -> str:
    """Measure this machine with so many ranks at once and return the text of its cluster file."""
    description = f"{cpu_model()}, {num_ranks} rank(s) at once, one thread each, torch {torch.__version__}"
    steps = (len(all_probes(BLAS)) + len(COLD_PRODUCTS) + 1 + len(_messages(num_ranks))) * _PASSES
    with (
        _progress(f"measuring this machine with {num_ranks} rank(s)", steps, note) as step,
        WorkerPool(num_ranks, target="autopar.calibrate_worker:Calibrator") as pool,
    ):
        pool.call("__init__", None)
        resident = max(pool.call("resident_bytes", None))
        library = _fastest_products(pool)
        times, messages, beside = _measured(pool, num_ranks, library, step)
    memory_bytes = usable_memory_bytes() // num_ranks
    reserve_bytes = min(resident + round(_OS_SHARE * memory_bytes), memory_bytes - 1)
    machine = Machine(description, num_ranks, usable_cores(), memory_bytes, reserve_bytes, library, *beside)
    dtypes = {time.row.removeprefix("dtype:"): time.seconds for time in times if time.row.startswith("dtype:")}
    return render_cluster(machine, times, dtypes, messages)


def _fastest_products(pool: WorkerPool) -> str:
    """What multiplies matrices of float32 here: torch's own way unless another is clearly faster on all ranks."""
    replies = pool.call("product_s", _PRODUCT_BUDGET_S)
    seconds = {library: max(reply[library] for reply in replies) for library in replies[0]}
    best = min(seconds, key=lambda library: seconds[library])
    return best if seconds[best] < _CLEARLY * seconds[BLAS] else BLAS


def _measured(
    pool: WorkerPool, num_ranks: int, library: str, step: Step
) -> tuple[list[OpTime], list[MessageTime], tuple[list[Cold], Steps]]:
    """Ops and messages in turn, so that the passes of both span the whole time: a processor that is faster for half a
    minute, as shared ones are, then counts less."""
    probes = all_probes(library)
    ops: list[list[tuple[OpCost, list[float]]]] = [[] for _ in probes]
    cold: dict[tuple[int, int], list[Cold]] = {}
    messages: dict[tuple[str, int, int], list[float]] = {}
    whole: list[Steps] = []
    for _ in range(_PASSES):
        for index, probe in enumerate(probes):
            step(probe.label)
            ops[index].append(_op_seconds(pool, index, library))
        for products in COLD_PRODUCTS:
            step("calls behind {1} product(s) of {0}".format(*products))
            cold.setdefault(products, []).append(_cold_seconds(pool, products, library))
        step("steps of nothing")
        whole.append(_step_seconds(pool, library))
        for key, seconds in _message_seconds(pool, num_ranks, step):
            messages.setdefault(key, []).append(seconds)
    crowding = max(1.0, num_ranks / usable_cores())
    any_s, each_s = map(statistics.median, zip(*whole, strict=True))
    return _op_times(probes, ops, crowding), _message_times(messages), (_cold_calls(cold), (any_s, each_s))


def _step_seconds(pool: WorkerPool, library: str) -> Steps:
    """Of one pass, on the slowest rank."""
    any_s, each_s = map(max, zip(*pool.call("measure_step", library), strict=True))
    return any_s, each_s


def _cold_seconds(pool: WorkerPool, products: tuple[int, int], library: str) -> Cold:
    """Of one pass, on the slowest rank."""
    replies = pool.call("measure_cold", {"products": products, "library": library, "budget_s": _COLD_BUDGET_S})
    between_s, op_s, view_s, product_s = map(max, zip(*replies, strict=True))
    return between_s, op_s, view_s, product_s


def _cold_calls(found: Mapping[tuple[int, int], Sequence[Cold]]) -> list[Cold]:
    """Medians over passes; what stands between calls takes as long as all such products say."""
    sizes = {products: products_size(*products) for products in found}
    rate = statistics.median(sizes[products] / row[0] for products, rows in found.items() for row in rows)
    return [
        (sizes[products] / rate, *(statistics.median(longer_s) for longer_s in list(zip(*rows, strict=True))[1:]))
        for products, rows in found.items()
    ]


def _op_seconds(pool: WorkerPool, index: int, library: str) -> tuple[OpCost, list[float]]:
    """Of one pass, by rank."""
    replies = pool.call("measure_op", {"index": index, "library": library, "budget_s": _OP_BUDGET_S})
    return _cost(replies[0]), [reply["seconds"] for reply in replies]


def _op_times(
    probes: Sequence[Probe], passes: Sequence[Sequence[tuple[OpCost, list[float]]]], crowding: float
) -> list[OpTime]:
    """What each op usually takes where all ranks wait for the slowest, from its cost and times of each pass.

    crowding: ranks per core; CPU time does not see that ranks take turns on a core.
    """
    seconds = crowding * usual_seconds(np.array([[by_rank for _, by_rank in taken] for taken in passes]))
    return [
        OpTime(probe.row, taken[0][0], float(usual))
        for probe, taken, usual in zip(probes, passes, seconds, strict=True)
    ]


def _message_times(found: Mapping[tuple[str, int, int], Sequence[float]]) -> list[MessageTime]:
    """From what the slowest rank took in each pass."""
    if not found:
        return []
    seconds = usual_seconds(np.array(list(found.values()))[:, :, None])
    return [MessageTime(*key, float(usual)) for key, usual in zip(found, seconds, strict=True)]


def _cost(reply: Mapping[str, Any]) -> OpCost:
    names = ("kind", "flops", "nbytes", "dtype", "gemm", "op", "rows")
    return OpCost(**{name: reply[name] for name in names})


def _messages(num_ranks: int) -> list[tuple[str, int, int]]:
    """Kind, ranks of the group and bytes of each message to be timed; sizes innermost and growing."""
    groups = [(kind, ranks) for ranks in message_ranks(num_ranks) for kind in MESSAGE_KINDS]
    pairs = [("transfer", 2)] if num_ranks > 1 else []
    wanted = pairs + [group for group in groups if group[0] != "transfer"]
    wanted += [(kind, ranks) for ranks in message_ranks(num_ranks) for kind in STEP_KINDS]
    plain = [(kind, ranks, nbytes) for kind, ranks in wanted for nbytes in MESSAGE_BYTES]
    moving = [(kind, ranks) for ranks in message_ranks(num_ranks) for kind in MOVING_KINDS]
    moving += [(TRANSFER + BEHIND, ranks) for _, ranks in pairs]
    return [*plain, *((kind, ranks, nbytes) for kind, ranks in moving for nbytes in MOVING_BYTES)]


def _message_seconds(pool: WorkerPool, num_ranks: int, step: Step) -> Iterator[tuple[tuple[str, int, int], float]]:
    """Every message once: the slowest rank."""
    last_s = 0.0
    for kind, ranks, nbytes in _messages(num_ranks):
        step(f"{kind} of {ranks}, {nbytes / 2**10:,.0f} KiB")
        before_s = 0.0 if nbytes == min(MESSAGE_BYTES) else last_s  # of the size before, not of another kind
        repeats = max(1, min(_MOST_REPEATS, round(_MESSAGE_BUDGET_S / max(before_s, 1e-6))))
        payload = {"kind": kind, "ranks": ranks, "nbytes": nbytes, "repeats": repeats}
        last_s = max(pool.call("measure_message", payload))
        yield (kind, ranks, nbytes), last_s


@contextlib.contextmanager
def _progress(what: str, steps: int, note: str) -> Iterator[Step]:
    """A bar on a terminal, two plain lines elsewhere; both on stderr."""
    console = Console(stderr=True)
    start = time.monotonic()
    console.print(f"autopar: {what}, once; {note}", highlight=False, soft_wrap=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting ranks", total=steps)
        yield lambda label: bar.update(task, description=label, advance=1)
    console.print(f"autopar: measured in {time.monotonic() - start:.0f} s", highlight=False)
