"""The process that ``forked_ranks`` forks ranks from: it has imported what every rank imports, and has one thread.

A message on its standard input, a socket, is a rank's environment, with two descriptors: of the rank's channel, and of
its log. The answer is the rank's process id. Nobody asks any more once the other end is closed.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch._dynamo  # of every optimizer, at its first use
import torch.distributed.checkpoint

from autopar.runtime import executor, worker
from autopar.runtime.channel import ENVIRONMENT_KEY

MESSAGE_BYTES = 1 << 20
assert executor and torch.distributed.checkpoint


def main() -> None:
    with socket.socket(fileno=os.dup(0)) as asked:
        while True:
            message, descriptors, _, _ = socket.recv_fds(asked, MESSAGE_BYTES, 2)
            if not message:
                return
            assert len(list(Path("/proc/self/task").iterdir())) == 1, "a fork has one thread"
            between = os.fork()
            if between == 0:
                _fork_and_leave(asked, json.loads(message), *descriptors)
            os.waitpid(between, 0)
            for descriptor in descriptors:
                os.close(descriptor)


def _fork_and_leave(asked: socket.socket, environment: dict[str, str], channel: int, log: int) -> NoReturn:
    """Whose parent has left is handed to its nearest ancestor that asks for such: whoever wants the rank."""
    rank = os.fork()
    if rank == 0:
        asked.close()
        _become_a_rank(environment, channel, log)
    asked.sendall(str(rank).encode())
    os._exit(0)


def _become_a_rank(environment: dict[str, str], channel: int, log: int) -> NoReturn:
    try:
        os.setsid()
        os.environ.clear()
        os.environ.update(environment)
        config = json.loads(environment[ENVIRONMENT_KEY])
        while os.getppid() != config["parent_pid"]:
            time.sleep(0.001)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        environment[ENVIRONMENT_KEY] = os.environ[ENVIRONMENT_KEY] = json.dumps({**config, "channel_fd": channel})
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        worker.main()
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
