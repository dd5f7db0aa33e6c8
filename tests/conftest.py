"""Settings of the whole suite."""

from __future__ import annotations

import gc
import itertools
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read as torch is imported: processes of tests run beside each other
TESTS_BETWEEN_COLLECTIONS = 300
_finished = itertools.count(1)


def pytest_collection_finish() -> None:
    """Garbage is looked for less often: what libraries and caches hold is half a million objects, walked each time.

    None of them is frozen: ``collector_paused`` would count those anew for every plan.
    """
    gc.collect()
    gc.set_threshold(10_000, 20, 50)


def pytest_runtest_logfinish() -> None:
    """What plans leave behind is old when the collector first sees it, and few collections of its own come to that."""
    if next(_finished) % TESTS_BETWEEN_COLLECTIONS == 0:
        gc.collect()
