"""Ranks forked from a process that has imported what they need, in place of interpreters of their own.

To import torch and its optimizers takes a rank five seconds of a core. All else is as ``autopar.runtime.pool`` has it:
a rank is a child of this process in a session of its own, with its own environment, channel and log. Tests of starting
ranks (``started_ranks``) have interpreters.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO

import pytest
from processes import descendants

from autopar.runtime import pool
from autopar.runtime.channel import WorkerConfig

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
START_S = 60.0
POLL_S = 0.01


class Forked:
    """What ``autopar.runtime.pool`` asks of a ``subprocess.Popen``."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(POLL_S)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Nursery:
    """Forks ranks; its process starts with the first."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        if self._process is not None:
            return
        self._ours, theirs = socket.socketpair()
        self._ours.settimeout(START_S)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nursery"],
                env={**os.environ, **pool.WORKER_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=theirs,
            )

    def spawn(self, config: WorkerConfig, environment: Mapping[str, str], log: IO[bytes]) -> Forked:
        """As ``autopar.runtime.pool._spawn``."""
        self.start()
        message = json.dumps({**environment, **config.to_environment()}).encode()
        _adopt(True)
        try:
            socket.send_fds(self._ours, [message], [config.channel_fd, log.fileno()])
            answer = self._ours.recv(64)
            assert answer, "no rank was forked"
            pid = int(answer)
            while _parent(pid) != os.getpid():
                time.sleep(0.001)
        finally:
            _adopt(False)
        return Forked(pid)

    def end(self) -> None:
        if self._process is not None:
            self._ours.close()
            self._process.wait(START_S)
            self._process = None


def _adopt(orphans: bool) -> None:
    """Whether orphans among this process's descendants become its children."""
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(orphans), 0, 0, 0) == 0


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[1])


NURSERY = Nursery()
_started = pool._spawn


@contextmanager
def forked() -> Iterator[None]:
    """Ranks are forked within, where the system can hand them over."""
    with pytest.MonkeyPatch.context() as patch:
        if sys.platform == "linux":
            patch.setattr(pool, "_spawn", NURSERY.spawn)
        yield


def workers() -> list[int]:
    """What this process and its ranks have started, but for the process that ranks are forked from."""
    return [pid for pid in descendants(os.getpid()) if pid != NURSERY.pid]


@pytest.fixture(scope="module")
def started_ranks() -> Iterator[None]:
    """Ranks of this module start as they do for users."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "_spawn", _started)
        yield
