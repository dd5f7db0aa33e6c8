"""Processes as tests see them: through /proc, without trusting what is tested."""

from __future__ import annotations

import time
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Processes started by a process, and by those, that have not ended."""
    parents = _parents()
    found = [pid]
    for ancestor in found:
        found += [child for child, parent in parents.items() if parent == ancestor and child not in found]
    return found[1:]


def all_gone(pids: list[int], within_s: float = 5.0) -> bool:
    """Whether all of them end in time; zombies that nobody has reaped count as ended."""
    deadline = time.monotonic() + within_s
    while any(pid in _parents() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _parents() -> dict[int, int]:
    """Parent of every process that has not ended."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    return parents
