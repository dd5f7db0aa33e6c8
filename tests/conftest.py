"""Settings of the whole suite."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """Garbage is looked for less often: what libraries and caches hold is millions of objects, walked each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)
