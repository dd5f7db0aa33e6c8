"""Ranks: who runs the program, worker processes of this one or this process as one rank of a launched job."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import hashlib
import os
import sys
import time
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # its defaults keep, for good, a default group that exists when it is imported
from torch import Tensor

from autopar.ambient import as_written
from autopar.runtime.allocator import keep_freed_memory
from autopar.runtime.executor import RankExecutor
from autopar.runtime.faults import named_faults
from autopar.runtime.pool import WorkerPool
from cost_model.cluster import Cluster
from cost_model.errors import AutoparError, ConfigError, WorldSizeError

Answer = TypeVar("Answer")
_SAMPLES = 64  # of each tensor, to tell one initialisation from another
ANSWERED_ALIKE = (
    "step", "accumulate", "evaluate", "clip", "gradient_norm", "scaling", "configure", "update", "discard",
)  # fmt: skip
"""Methods whose answer is the same on every rank, so that none has to be collected."""
_RETRY = datetime.timedelta(seconds=0.2)
_EXIT_TIMEOUT = datetime.timedelta(seconds=5)  # how long a script that has ended waits for those of other ranks


class Ranks(Protocol):
    """hosted: the ranks that this process feeds."""

    hosted: Sequence[int]

    def load(self, payloads: Mapping[int, Any]) -> None:
        """Give every hosted rank its program."""

    def call(self, method: str, payloads: Mapping[int, Any]) -> list[Any]:
        """The results of a method by rank; payloads: of every hosted rank."""

    def check_same(self, what: str, tensors: Mapping[str, Tensor], advice: str, among: int = 0) -> None:
        """Refuse tensors that differ between processes that say the same ``among``; ConfigError on all of them."""

    def from_all(self, mine: Any) -> list[Any]:
        """What each process that runs the script has, in order."""

    def close(self) -> None:
        """Leave; called once."""


def under_launcher() -> bool:
    """Whether this process is one rank of a launched job (torchrun) rather than a plain script or notebook."""
    return dist.is_initialized() or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def is_main() -> bool:
    """True in a plain process and on rank 0 of a launched job."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    return not under_launcher() or rank == 0


def process_index() -> int:
    """Of this process among those that run the script: its rank in a launched job, else 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def start_ranks(cluster: Cluster) -> Ranks:
    """Join the launched job, or start workers. Errors: WorldSizeError."""
    return LaunchedRank(cluster) if under_launcher() else LocalRanks(cluster)


class LocalRanks:
    """All ranks as worker processes of this one."""

    def __init__(self, cluster: Cluster) -> None:
        _check_devices(cluster)
        self.pool = WorkerPool(cluster.num_devices, backend=cluster.backend)
        self.hosted: Sequence[int] = range(cluster.num_devices)

    def load(self, payloads: Mapping[int, Any]) -> None:
        self.pool.call("__init__", [payloads[rank] for rank in self.hosted])

    def call(self, method: str, payloads: Mapping[int, Any]) -> list[Any]:
        return self.pool.call(method, [payloads[rank] for rank in self.hosted])

    def check_same(self, what: str, tensors: Mapping[str, Tensor], advice: str, among: int = 0) -> None:
        """There is one process."""

    def from_all(self, mine: Any) -> list[Any]:
        return [mine]

    def close(self) -> None:
        self.pool.close()


def _check_devices(cluster: Cluster) -> None:
    """ConfigError where a cluster of CUDA devices is not this machine."""
    needed = sum(device.kind == "cuda" for device in cluster.devices)
    if needed > torch.cuda.device_count():
        raise ConfigError(
            f"cluster {cluster.name!r} has {needed} CUDA device(s) and this machine {torch.cuda.device_count()}: start "
            "the script there under torchrun, use autopar.estimate, or run on autopar.Cluster.local(n)"
        )


class LaunchedRank:
    """One rank in this process; the launcher runs the others."""

    def __init__(self, cluster: Cluster) -> None:
        _LaunchedGroup.join(cluster, self)
        keep_freed_memory()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.hosted: Sequence[int] = (self.rank,)
        self.executor: RankExecutor | None = None

    def load(self, payloads: Mapping[int, Any]) -> None:
        own = {part: {n: t.clone() for n, t in payloads[self.rank][part].items()} for part in ("params", "buffers")}
        self.executor = RankExecutor(self.rank, self.world_size, {**payloads[self.rank], **own})

    def call(self, method: str, payloads: Mapping[int, Any]) -> list[Any]:
        with as_written():
            mine = getattr(self.executor, method)(payloads[self.rank])
        return [mine] * self.world_size if method in ANSWERED_ALIKE else _from_all(mine)

    def check_same(self, what: str, tensors: Mapping[str, Tensor], advice: str, among: int = 0) -> None:
        firsts: dict[int, tuple[int, dict[str, str]]] = {}
        for rank, (group, digests) in enumerate(_from_all((among, {n: _digest(t) for n, t in tensors.items()}))):
            first_rank, first = firsts.setdefault(group, (rank, digests))
            differing = sorted(name for name in first if digests.get(name) != first[name])
            if differing:
                raise ConfigError(
                    f"rank {rank} has another {what} than rank {first_rank} ({differing[0]!r} differs); {advice}"
                )

    def from_all(self, mine: Any) -> list[Any]:
        return _from_all(mine)

    def release(self) -> None:
        """Let go of the process groups of the program, which live as long as anybody refers to them."""
        if self.executor is not None:
            self.executor.release()
            self.executor = None

    def close(self) -> None:
        _LaunchedGroup.leave(self)


class _LaunchedGroup:
    """The launcher's process group: joined by the first executable, left by the last, ended if autopar made it.

    Threads of gloo must not outlive the interpreter: one that drops the last reference to a tensor while Python
    finalizes aborts the process ("terminate called without an active exception"). Only the end of the last reference
    to a group ends its threads, so executables that were never closed let go of theirs when the script ends.

    Each group that autopar makes has keys of its own in the launcher's store, which outlives groups and, where the
    launcher restarts a job, processes: under the same keys a rank would read where those of another group listened.
    """

    users = 0
    unclosed: weakref.WeakSet[LaunchedRank] = weakref.WeakSet()
    made = 0
    is_ours = False
    store: Any = None
    token = ""
    keys: Any = None

    @classmethod
    def join(cls, cluster: Cluster, user: LaunchedRank) -> None:
        """Errors: WorldSizeError where its size is not the cluster's."""
        world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
        if world_size != cluster.num_devices:
            raise WorldSizeError(world_size, cluster.num_devices)
        atexit.unregister(cls.leave_at_exit)
        atexit.register(cls.leave_at_exit)
        if not dist.is_initialized():
            if cluster.backend == "nccl":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            cls._make(cluster.backend)
        cls.users += 1
        cls.unclosed.add(user)

    @classmethod
    def _make(cls, backend: str) -> None:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if cls.store is None:
            cls.store = next(dist.rendezvous("env://"))[0]  # type: ignore[attr-defined]
            cls.token = _common_token(cls.store, rank, world_size)
        cls.made += 1
        cls.keys = dist.PrefixStore(f"autopar/{cls.token}/{cls.made}", cls.store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=cls.keys, rank=rank, world_size=world_size)
        cls.is_ours = True

    @classmethod
    def leave(cls, user: LaunchedRank) -> None:
        """While an exception passes, the group is left to the launcher: other ranks may never come to the barrier."""
        cls.users -= 1
        cls.unclosed.discard(user)
        user.release()
        if cls.users or not cls.is_ours or not dist.is_initialized() or sys.exc_info()[0] is not None:
            return
        dist.barrier()
        cls._destroy()

    @classmethod
    def leave_at_exit(cls) -> None:
        """For executables that were never closed; after an error nothing is waited for, and the launcher ends the job.

        Other ranks are waited for in the store, where nothing else that they do is in the way, but not for long.
        """
        if hasattr(sys, "last_value"):
            return
        for user in list(cls.unclosed):
            user.release()
        if not cls.is_ours or not dist.is_initialized():
            return
        with contextlib.suppress(RuntimeError):
            cls.keys.set(f"left_{dist.get_rank()}", "")
            cls.keys.wait([f"left_{rank}" for rank in range(dist.get_world_size())], _EXIT_TIMEOUT)
        cls._destroy()

    @classmethod
    def _destroy(cls) -> None:
        dist.destroy_process_group()
        cls.is_ours = False


def _common_token(store: Any, rank: int, world_size: int) -> str:
    """A name that the processes of this very start of a job have in common, and no earlier one had.

    Launchers do not number the restarts of a job alike on all nodes, and what earlier processes wrote is still there.
    So rank 0 makes up a name, the others answer to it with names of their own, and rank 0 repeats those: who finds its
    own among them knows that it has not read an old one.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("autopar/first", mine)
        store.set(f"autopar/{mine}/0", mine)
        answers = [store.get(f"autopar/{mine}/{other}").decode() for other in range(world_size)]
        store.set(f"autopar/{mine}/all", " ".join(answers))
        return mine
    while True:
        first: str = store.get("autopar/first").decode()
        store.set(f"autopar/{first}/{rank}", mine)
        with contextlib.suppress(dist.DistStoreError):
            store.wait([f"autopar/{first}/all"], _RETRY)
            if store.get(f"autopar/{first}/all").decode().split()[rank] == mine:
                return first
        time.sleep(_RETRY.total_seconds())


def agree_with_rank_0(decide: Callable[[], Answer]) -> Answer:
    """Rank 0 decides; every rank gets its answer, or fails with its error."""
    told: list[Answer | AutoparError | None] = [None]
    if dist.get_rank() == 0:
        try:
            told = [decide()]
        except AutoparError as error:
            told = [error]
    with _named_faults(0):
        dist.broadcast_object_list(told, src=0)
    answer = told[0]
    if isinstance(answer, AutoparError):
        raise answer
    assert answer is not None
    return answer


def decided(decide: Callable[[], Answer]) -> Answer:
    """What one process decides for all, in a launched job and in a plain process alike."""
    return agree_with_rank_0(decide) if dist.is_initialized() else decide()


def _from_all(mine: Any) -> list[Any]:
    results: list[Any] = [None] * dist.get_world_size()
    with _named_faults():
        dist.all_gather_object(results, mine)
    return results


def _named_faults(awaited: int | None = None) -> AbstractContextManager[None]:
    """Of what all processes do together. awaited: whom the others wait for; of two, each waits for the other."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    other = 1 - rank if world_size == 2 else None if rank == awaited else awaited
    return named_faults(rank, peer=lambda: other)


def _digest(tensor: Tensor) -> str:
    """Equal for equal shapes, dtypes and, at evenly spread places, values."""
    flat = tensor.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // _SAMPLES)].cpu().contiguous()
    text = f"{tuple(tensor.shape)} {tensor.dtype}".encode()
    return hashlib.sha256(text + some.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
