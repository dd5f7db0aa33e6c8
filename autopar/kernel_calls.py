"""Kernels that torch.compile makes: whether they can be made here, what a call costs, and where they are worth it."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import torch

from autopar.calibrate import cpu_model, kept_path
from autopar.options import Options
from autopar.runtime.pool import WorkerPool
from cost_model.cluster import Cluster
from cost_model.device import Device
from cost_model.errors import MissingCompilerError
from cost_model.program import OpCost, Program
from passes.group import Worth

_MEASURED = "measured"


def check_compiler(cluster: Cluster) -> None:
    """MissingCompilerError unless what makes kernels for these devices is installed on this machine."""
    if cluster.backend != "gloo":
        if importlib.util.find_spec("triton") is None:
            raise MissingCompilerError("triton", "install it (pip install triton), or use backend='eager'")
        return
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        advice = "install it (apt install g++), name another in the environment variable CXX, or use backend='eager'"
        raise MissingCompilerError(compiler, advice)


def with_kernel_calls(cluster: Cluster, options: Options) -> Cluster:
    """The cluster with what calling a compiled kernel costs on its devices, measured where they are this machine's.

    Measured once, if options ask for kernels, and kept beside the measures of ``Cluster.local``. Other devices: as
    their files say, else as an op. What is no cluster is left to ``check_target``. Errors: MissingCompilerError,
    WorkerError.
    """
    if not options.compiles or not isinstance(cluster, Cluster):
        return cluster
    own = {id(d): d for d in cluster.devices if d.kind == "cpu" and d.sources.get("device") == _MEASURED}
    if not own:
        return cluster
    check_compiler(cluster)
    call_s = _kept_call_s()
    changed = {key: dataclasses.replace(device, kernel_overhead_s=call_s) for key, device in own.items()}
    return dataclasses.replace(cluster, devices=tuple(changed.get(id(d), d) for d in cluster.devices))


def _kept_call_s() -> float:
    """Seconds of a call that does next to nothing; whoever comes second waits for the first."""
    path = kept_path("kernel-call", "txt", {"cpu": cpu_model(), "torch": torch.__version__, "python": sys.version})
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return float(path.read_text()) if path.exists() else _measured_call_s(path)


def _measured_call_s(path: Path) -> float:
    with WorkerPool(1, target="autopar.runtime.compiled:CallTimer") as pool:
        pool.call("__init__", None)
        (call_s,) = pool.call("call_s", None)
    unfinished = path.with_suffix(".new")
    unfinished.write_text(repr(call_s))
    unfinished.replace(path)
    return float(call_s)


def worth_compiling(cluster: Cluster) -> Worth:
    """Whether a kernel takes less time than its ops one by one, on the first device."""
    device: Device = cluster.devices[0]

    def worth(cost: OpCost) -> bool:
        return device.op_time_s(cost) < sum(map(device.op_time_s, cost.parts))

    return worth


def kernel_notes(program: Program) -> tuple[str, ...]:
    """What is compiled, and what the search did not know of it."""
    blocks = [block for stage in program.stages for chunk in stage.chunks for block in chunk.blocks]
    parts = [i.cost.parts for block in blocks for i in block.instructions if i.cost is not None and i.cost.parts]
    if not parts:
        return ("nothing is compiled: no neighbouring ops would take less time as one kernel",)
    ops = sum(map(len, parts))
    return (f"{ops} ops run as {len(parts)} compiled kernels; the search priced them one by one",)
