"""Names of segments in words."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

_NUMBERED = re.compile(r"((?:[^.]*\.)*?)(\d+)((?:\..*)?)")


def folded(labels: Sequence[str]) -> str:
    """Labels in order, a run that counts up written once ("token, h.0..5, norm"), and so equal neighbours ("h x 3")."""
    runs = [list(run) for _, run in itertools.groupby(enumerate(labels), key=lambda item: _run_of(*item))]
    return ", ".join(_run_text([label for _, label in run]) for run in runs)


def split_number(label: str) -> tuple[str, int, str] | None:
    """What stands before the first part of a dotted name that is a number, the number, what stands after; else None."""
    found = _NUMBERED.fullmatch(label)
    return None if found is None else (found[1], int(found[2]), found[3])


def _run_of(position: int, label: str) -> tuple[str, int, str]:
    """Equal for neighbours in one run."""
    parts = split_number(label)
    return (label, 0, "") if parts is None else (parts[0], parts[1] - position, parts[2])


def _run_text(run: Sequence[str]) -> str:
    first, last = split_number(run[0]), split_number(run[-1])
    if len(run) == 1:
        return run[0]
    if first is None or last is None:
        return f"{run[0]} x {len(run)}"
    return f"{first[0]}{first[1]}..{last[1]}{first[2]}"
