"""How much random tests draw: all of it where slow tests run too, a part where they are left out (``make test``); and
how long something took, whatever the hour.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable

FEWER = 3
LEFT_OUT = "AUTOPAR_SLOW_TESTS_ARE_LEFT_OUT"
"""Set for this process and those it starts."""


def drawn(count: int) -> int:
    """Of so many examples, those that this run draws."""
    return max(1, count // FEWER) if LEFT_OUT in os.environ else count


YARDSTICK_S = 0.036
"""Processor seconds of ``_yardstick`` on the machine that the limits of tests are written for."""


def paced_s(work: Callable[[], object]) -> float:
    """Processor seconds that a call takes, fewer on a machine that is slow: as many times fewer as a fixed piece of
    Python takes longer there, right before or right after it. What tests before it left in memory is not collected in
    that time."""
    gc.freeze()
    try:
        before_s, seconds, after_s = _cpu_s(_yardstick), _cpu_s(work), _cpu_s(_yardstick)
    finally:
        gc.unfreeze()
    return seconds / max(1.0, before_s / YARDSTICK_S, after_s / YARDSTICK_S)


def _cpu_s(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _yardstick() -> None:
    known = dict[int, tuple[int, object]]()
    for i in range(300_000):
        known[i % 1000] = (i, known.get(i % 777))
        if i % 1000 == 0:
            known = {}
