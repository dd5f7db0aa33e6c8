"""One rank as a program: `python -m autopar.runtime.worker`, started and driven by autopar.runtime.pool.

It joins the process group, builds the target named by its parent, and answers one message at a time.
It never outlives its parent.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from typing import Any

import torch
import torch.distributed as dist

from autopar.runtime.allocator import keep_freed_memory
from autopar.runtime.channel import (
    CLOSE,
    ERROR,
    INIT,
    OK,
    Channel,
    Frame,
    Tree,
    WorkerConfig,
    decode,
    encode,
)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Servant:
    """Builds the target at the first message and calls its methods at the later ones."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._target: Any = None

    def answer(self, method: str, payload: Tree) -> Frame:
        """The reply to one message: ("ok", result) or ("error", type name, message, formatted traceback)."""
        try:
            return encode((OK, self._call(method, payload)), f"the reply to {method!r}")
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the parent raises it
            return encode((ERROR, type(error).__name__, str(error), traceback.format_exc()))

    def _call(self, method: str, payload: Tree) -> Tree:
        if method == INIT:
            self._target = _load(self._config.target)(
                rank=self._config.rank, world_size=self._config.world_size, payload=payload
            )
            return None
        return getattr(self._target, method)(payload)


def main() -> None:
    """Join the other ranks, say so, and serve until told to leave or until the parent is gone."""
    config = WorkerConfig.from_environment()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    _tie_to_parent(config)
    sys.path[:] = dict.fromkeys((*config.paths, *sys.path))  # modules of the user's, an optimizer's say
    os.set_inheritable(config.channel_fd, False)
    channel = Channel(socket.socket(fileno=config.channel_fd))
    inbox = _listen(channel)
    channel.send(encode(_join(config)))
    _serve(Servant(config), channel, inbox)


def _tie_to_parent(config: WorkerConfig) -> None:
    """Die with the parent even while a native call holds the interpreter, where the kernel offers it."""
    if sys.platform == "linux" and config.dies_with_parent:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != config.parent_pid:
        os._exit(1)


def _listen(channel: Channel) -> queue.SimpleQueue[bytearray]:
    """Receive on a thread of its own, which ends the process at EOF even in the middle of a collective."""
    inbox: queue.SimpleQueue[bytearray] = queue.SimpleQueue()

    def receive_until_the_parent_is_gone() -> None:
        try:
            while True:
                inbox.put(channel.receive())
        finally:
            os._exit(1)

    threading.Thread(target=receive_until_the_parent_is_gone, daemon=True).start()
    return inbox


def _join(config: WorkerConfig) -> Tree:
    """Join the process group; a reply like any other, for the ready message."""
    try:
        torch.set_num_threads(1)
        keep_freed_memory()
        if config.backend == "nccl":
            torch.cuda.set_device(config.rank)
        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", config.store_port, config.world_size, is_master=False
        )
        dist.init_process_group(config.backend, store=store, rank=config.rank, world_size=config.world_size)
    except (RuntimeError, ValueError, AssertionError) as error:
        return ERROR, type(error).__name__, str(error), traceback.format_exc()
    return OK, None


def _serve(servant: Servant, channel: Channel, inbox: queue.SimpleQueue[bytearray]) -> None:
    while True:
        method, payload = decode(inbox.get())
        if method == CLOSE:
            _leave()
        channel.send(servant.answer(method, payload))
        del payload


def _leave() -> None:
    """Leave together and at once: gloo now and then aborts in the interpreter's own teardown."""
    try:
        dist.barrier()
        dist.destroy_process_group()
    finally:
        os._exit(0)


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    main()
