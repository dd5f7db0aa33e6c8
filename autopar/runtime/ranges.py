"""Ranges that torch.profiler shows of a step, named as the estimated trace names them; nothing where none profiles."""

from __future__ import annotations

import contextlib

import torch
from torch.profiler import record_function


def is_profiled() -> bool:
    """Whether a profiler runs; asking takes a third of a microsecond, an unseen range ten times as long."""
    return torch._C._autograd._profiler_enabled()


class SegmentRange:
    """The range of the segment of the model that a function is in."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()

    def enter(self, label: str | None) -> None:
        """End the range that there is, and begin that of a segment."""
        self._open.close()
        if label is not None and is_profiled():
            self._open.enter_context(record_function(label))
