"""What the ranks of tests/test_pool.py run; imported by them alone."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def keeps_freed_memory() -> bool:
    """Whether the pages of a freed tensor stay with the process."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    tensor = torch.ones(2**24)
    before = resident()
    del tensor
    return resident() > before - 2**10


class Target:
    """Methods that answer, raise, end the process or wait."""

    def __init__(self, *, rank: int, world_size: int, payload: Any) -> None:
        self.rank, self.world_size, self.payload = rank, world_size, payload

    def echo(self, payload: Any) -> Any:
        return payload

    def sink(self, payload: Any) -> float:
        return 1.0

    def who(self, _: Any) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "world_size": self.world_size,
            "payload": self.payload,
            "pid": os.getpid(),
            "threads": torch.get_num_threads(),
            "keeps": keeps_freed_memory(),
            "secret": os.environ.get("AUTOPAR_WORKER"),
        }

    def sum(self, payload: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(payload)
        return payload

    def fail_on(self, rank: int) -> None:
        if self.rank == rank:
            print("a line on stdout")
            raise ValueError("no such batch")
        self._wait_for_the_others()

    def exit_on(self, rank: int) -> None:
        if self.rank == rank:
            print("last words")
            os._exit(3)
        self._wait_for_the_others()

    def wait_except(self, rank: int) -> None:
        """All but one rank hang in a collective, and that one sleeps."""
        if self.rank == rank:
            time.sleep(600)
        self._wait_for_the_others()

    def stall(self, _: Any) -> None:
        time.sleep(600)

    def _wait_for_the_others(self) -> None:
        dist.all_reduce(torch.zeros(4))
