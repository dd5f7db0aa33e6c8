"""Timed: what a rank does runs in a profiler's range, is noted while somebody measures, and waits by name."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import record_function

from autopar.runtime.held import Held
from autopar.runtime.measure import Event, title_of
from autopar.runtime.ranges import is_profiled

Tree = Any
Part = tuple[int, int]
"""(microbatch, chunk)."""


class Timed(Held):
    """events: what was done since somebody began to measure."""

    def __init__(self, rank: int, world_size: int, payload: Tree) -> None:
        super().__init__(rank, world_size, payload)
        self.events: list[Event] | None = None

    def _timed(self, name: str, part: Part, run: Callable[[], Any], label: str = "") -> Any:
        """Run, in a profiler's range, and while measuring note when."""
        microbatch, chunk = part
        if self.events is None:
            if not is_profiled():
                return run()
            with record_function(title_of(name, microbatch, label, chunk)):
                return run()
        self._synchronise()
        start = time.perf_counter()
        result = run()
        self._synchronise()
        self.events.append(Event(name, microbatch, label, start, time.perf_counter(), chunk))
        return result

    @contextlib.contextmanager
    def _waiting_for(self, peer: int | None) -> Iterator[None]:
        """Remember whom this rank waits for; an error leaves it known."""
        before, self.peer = self.peer, peer
        yield
        self.peer = before

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
