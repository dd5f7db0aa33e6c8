"""Local ranks as programs of their own, driven from one plain Python process: a script or a notebook."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import selectors
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import torch.distributed as dist

from autopar.runtime.channel import (
    CLOSE,
    OK,
    Channel,
    Frame,
    Tree,
    WorkerConfig,
    decode,
    encode,
)
from autopar.runtime.faults import LOST
from cost_model.errors import ClosedError, ConfigError, LostRankError, UnknownNameError, WorkerError

BACKENDS = ("gloo", "nccl")
STARTUP_TIMEOUT_S = 300.0
_POLL_S = 0.05
_GRACE_S = 0.5  # how long a rank that failed by itself may be behind the ranks that only lost it
_LEAVE_S = 5.0  # how long ranks may take to leave before they are killed
_TAIL_BYTES = 4096
_LOST = (*LOST, LostRankError.__name__.lower())
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONSAFEPATH": "1",
}


class WorkerPool:
    """n ranks on this machine, each a subprocess with one thread, joined in one torch.distributed group.

    The ranks start at once and in the background; the first call waits for them. The first message is
    `call("__init__", payload)`, which builds `target(rank=, world_size=, payload=)` in every rank; later ones
    call its methods with their payload. The caller's script is not imported and nothing is pickled, so it needs no
    `__main__` guard; its modules are found where the caller finds them. Any failure of any rank stops all of them:
    WorkerError, then ClosedError for later calls. No rank outlives this process, however it ends. `env` is laid over
    this process's environment.
    """

    def __init__(
        self,
        world_size: int,
        *,
        target: str = "autopar.runtime.executor:RankExecutor",
        backend: str = "gloo",
        env: Mapping[str, str] | None = None,
    ) -> None:
        _check_arguments(world_size, target, backend)
        self.world_size = world_size
        self._crew = _Crew()
        self._finalizer = weakref.finalize(self, self._crew.stop)
        self._lock = threading.RLock()
        self._ready = False
        self._why_closed: str | None = None
        with self._all_or_closed():
            self._crew.start(world_size, target, backend, _environment(env or {}))

    @property
    def closed(self) -> bool:
        """Whether the ranks are gone."""
        return self._why_closed is not None

    def wait_ready(self) -> None:
        """Return once every rank has joined the group. Errors: WorkerError, ClosedError."""
        with self._lock:
            self._check_open()
            if not self._ready:
                with self._all_or_closed():
                    deadline = time.monotonic() + STARTUP_TIMEOUT_S
                    _gather(self._crew.workers, "the start", deadline)
                    self._ready = True

    def call(self, method: str, payload: Tree = None, *, timeout_s: float | None = None) -> list[Tree]:
        """Call a method on every rank and return the results by rank.

        A payload that is a list has one item per rank; any other payload goes to all of them (wrap a list in a
        tuple to send it whole). `timeout_s` counts from when the ranks are ready. Errors: ConfigError for a
        payload that cannot travel (nothing is sent), WorkerError naming the rank that failed first, ClosedError.
        """
        self._check_open()
        frames = self._frames(method, payload)
        with self._lock:
            self.wait_ready()
            with self._all_or_closed():
                deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
                self._send(frames, deadline)
                return _gather(self._crew.workers, repr(method), deadline)

    def close(self) -> None:
        """Let the ranks leave together, and kill those that do not; may be called again."""
        with self._lock:
            if self.closed:
                return
            self._why_closed = "it was closed"
            try:
                if self._ready:
                    self._send(self._frames(CLOSE, None), time.monotonic() + _LEAVE_S)
                    self._crew.wait(_LEAVE_S)
            finally:
                self._finalizer()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._why_closed is not None:
            raise ClosedError(f"the worker pool is closed: {self._why_closed}. Next: compile again")

    def _frames(self, method: str, payload: Tree) -> list[Frame]:
        """The message of each rank."""
        if not isinstance(payload, list):
            return [encode((method, payload))] * self.world_size
        if len(payload) != self.world_size:
            raise ConfigError(
                f"{len(payload)} payloads for {self.world_size} ranks; send one per rank, or a tuple to all"
            )
        return [encode((method, item), f"the message to rank {rank}") for rank, item in enumerate(payload)]

    def _send(self, frames: list[Frame], deadline: float) -> None:
        """Send to every rank; a rank that cannot be reached shows when its reply is waited for."""
        for worker, frame in zip(self._crew.workers, frames, strict=True):
            with contextlib.suppress(ConnectionError, TimeoutError):
                worker.channel.send(frame, _socket_timeout(deadline))

    @contextlib.contextmanager
    def _all_or_closed(self) -> Iterator[None]:
        """Kill every rank if the block does not finish, KeyboardInterrupt included."""
        reason: str | None = "a call was interrupted"
        try:
            yield
            reason = None
        except WorkerError as error:
            reason = str(error).splitlines()[0]
            raise
        finally:
            if reason is not None:
                self._why_closed = reason
                self._finalizer()


@dataclasses.dataclass
class _Worker:
    """A rank as its parent sees it. log: its stdout and stderr, an open file without a name."""

    rank: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    channel: Channel

    def tail(self) -> str:
        """The last lines it wrote (read without moving the offset, which the process shares)."""
        size = os.fstat(self.log.fileno()).st_size
        return os.pread(self.log.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode(errors="replace")


class _Crew:
    """The processes and all they need; owns nothing that refers to the pool, so that its finalizer can run."""

    def __init__(self) -> None:
        self.workers: list[_Worker] = []
        self._owner_pid = os.getpid()
        self._store: object = None
        self._open = contextlib.ExitStack()

    def start(self, world_size: int, target: str, backend: str, environment: Mapping[str, str]) -> None:
        """Start every rank without waiting for any."""
        store_port = self._open_store(world_size)
        for rank in range(world_size):
            ours, theirs = (self._open.enter_context(end) for end in socket.socketpair())
            log = self._open.enter_context(tempfile.TemporaryFile())
            config = WorkerConfig(
                rank=rank,
                world_size=world_size,
                channel_fd=theirs.fileno(),
                store_port=store_port,
                target=target,
                backend=backend,
                parent_pid=self._owner_pid,
                dies_with_parent=threading.current_thread() is threading.main_thread(),
                paths=[os.path.abspath(path) for path in sys.path],
            )
            with theirs:
                self.workers.append(_Worker(rank, _spawn(config, environment, log), log, Channel(ours)))

    def wait(self, timeout_s: float) -> None:
        """Wait until every process has ended, or for so long."""
        deadline = time.monotonic() + timeout_s
        for worker in self.workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, deadline - time.monotonic()))

    def stop(self) -> None:
        """Kill every process and free what they used; does nothing in a fork of the owner."""
        if os.getpid() != self._owner_pid:
            return
        for worker in self.workers:
            worker.process.kill()
        self.wait(_LEAVE_S)
        self._open.close()
        self._store = None

    def _open_store(self, world_size: int) -> int:
        """Own the rendezvous on a loopback port that is bound here, so nobody can take it first."""
        listener = socket.create_server(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1",
            port,
            world_size,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        return port


@dataclasses.dataclass(frozen=True)
class _Failure:
    """How one rank failed. exit_code: None while its process still ran."""

    rank: int
    message: str
    detail: str
    exit_code: int | None = None

    @property
    def only_lost_a_peer(self) -> bool:
        """Whether it reads like the consequence of another rank's end, as gloo and the sockets word it."""
        text = f"{self.message}\n{self.detail}".lower()
        return self.exit_code != -signal.SIGKILL and any(words in text for words in _LOST)

    def error(self) -> WorkerError:
        """The same as an exception."""
        advice = "(all ranks were stopped; fix the cause and compile again)"
        return WorkerError(
            self.rank, f"{self.message} {advice}", worker_traceback=self.detail, exit_code=self.exit_code
        )


def _gather(workers: list[_Worker], what: str, deadline: float) -> list[Tree]:
    """One reply from every rank. Errors: WorkerError of the rank that failed first.

    Who failed by itself is believed at once; who only lost a peer is believed if nobody else fails within
    _GRACE_S.
    """
    replies: dict[int, Tree] = {}
    failures: dict[int, _Failure] = {}
    with selectors.DefaultSelector() as waiting:
        for worker in workers:
            waiting.register(worker.channel, selectors.EVENT_READ, worker)
        while len(replies) < len(workers):
            _collect(waiting, workers, replies, failures)
            if failures:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
                own = [failure for failure in failures.values() if not failure.only_lost_a_peer]
                if own or time.monotonic() > deadline or len(failures) == len(workers):
                    raise (own or list(failures.values()))[0].error()
            elif time.monotonic() > deadline:
                raise _silence([worker for worker in workers if worker.rank not in replies], what)
    return [replies[worker.rank] for worker in workers]


def _collect(
    waiting: selectors.BaseSelector, workers: list[_Worker], replies: dict[int, Tree], failures: dict[int, _Failure]
) -> None:
    """Take what has arrived within _POLL_S, and who has died before it."""
    dead = [worker for worker in workers if worker.process.poll() is not None]
    for key, _ in waiting.select(0.0 if dead else _POLL_S):
        worker: _Worker = key.data
        outcome = _receive(worker)
        if isinstance(outcome, _Failure):
            waiting.unregister(key.fileobj)
            failures.setdefault(worker.rank, outcome)
        else:
            (replies[worker.rank],) = outcome
    for worker in dead:
        failures.setdefault(worker.rank, _death(worker))


def _receive(worker: _Worker) -> tuple[Tree] | _Failure:
    try:
        status, *rest = decode(worker.channel.receive())
    except EOFError:
        return _death(worker)
    if status == OK:
        return (rest[0],)
    name, message, detail = rest
    return _Failure(worker.rank, f"raised {name}: {message}", detail)


def _death(worker: _Worker) -> _Failure:
    """The failure of a rank whose process ended, or is about to: its channel is closed."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        worker.process.wait(_GRACE_S)
    code = worker.process.returncode
    if code is None:
        message = "closed its connection"
    elif code < 0:
        message = f"was killed by signal {-code} ({signal.strsignal(-code)})"
    else:
        message = f"exited with code {code}"
    return _Failure(worker.rank, message, worker.tail(), code)


def _silence(silent: list[_Worker], what: str) -> WorkerError:
    """The error of ranks that did not reply in time, with where the first of them stands."""
    first = silent[0]
    first.process.send_signal(signal.SIGUSR1)  # faulthandler writes the stacks of all threads to the log
    time.sleep(_GRACE_S)
    ranks = ", ".join(str(worker.rank) for worker in silent)
    failure = _Failure(first.rank, f"did not answer {what} in time, nor did any other of [{ranks}]", first.tail())
    return failure.error()


def _spawn(config: WorkerConfig, environment: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start one rank in a session of its own: Ctrl-C in a terminal reaches only the parent."""
    return subprocess.Popen(
        [sys.executable, "-m", "autopar.runtime.worker"],
        env={**environment, **config.to_environment()},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        pass_fds=[config.channel_fd],
        start_new_session=True,
    )


def _environment(overlay: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, what ranks need, then the caller's overlay; autopar stays importable."""
    loopback = {"GLOO_SOCKET_IFNAME": _loopback_name()}
    environment = {**loopback, **os.environ, **WORKER_ENVIRONMENT, **overlay}
    root = str(Path(__file__).resolve().parents[2])
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        paths = [root, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def _loopback_name() -> str:
    """The loopback interface, which gloo must be told: by itself it asks the host's name, which may not resolve."""
    return min((name for _, name in socket.if_nameindex() if name.startswith("lo")), default="lo")


def _socket_timeout(deadline: float) -> float | None:
    return None if deadline == float("inf") else max(0.001, deadline - time.monotonic())


def _check_arguments(world_size: int, target: str, backend: str) -> None:
    if world_size < 1:
        raise ConfigError(f"a pool of {world_size} ranks; ask for at least 1")
    if backend not in BACKENDS:
        raise UnknownNameError("backend", backend, BACKENDS)
    module, _, name = target.partition(":")
    if not module or not name:
        raise ConfigError(f"target {target!r} names no class; write it as 'package.module:ClassName'")
    if not sys.executable:
        raise ConfigError("this process does not know its Python interpreter; set sys.executable to its path")
