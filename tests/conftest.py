"""Settings of the whole suite."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read as torch is imported: processes of tests run beside each other
MOST_DEAD_CLASSES = 1500
_living_classes = 0


def pytest_configure(config: pytest.Config) -> None:
    """Said before tests are imported, whose number of examples depends on it.

    Where slow tests are left out, changes are held against the same random examples; a run of all tests draws new ones.

    Shells have what they start in the background ignore interrupts, and its children with it: those that tests
    interrupt would never end.
    """
    from effort import LEFT_OUT

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.option.markexpr == "not slow":
        os.environ[LEFT_OUT] = "1"
        settings.register_profile("the same examples", derandomize=True)
        settings.load_profile("the same examples")


def pytest_collection_finish() -> None:
    """Garbage is looked for less often: what libraries and caches hold is half a million objects, walked each time.

    None of them is frozen: ``collector_paused`` would count those anew for every plan.
    """
    gc.collect()
    gc.set_threshold(10_000, 20, 50)


def pytest_runtest_logfinish() -> None:
    """What plans leave behind is old when the collector first sees it, and few collections of its own come to that.

    fx gives every graph module a class, and each trace patches ``nn.Module``, of which all subclasses are told.
    """
    global _living_classes
    if _graph_classes() > _living_classes + MOST_DEAD_CLASSES:
        gc.collect()
        _living_classes = _graph_classes()


def _graph_classes() -> int:
    fx = sys.modules.get("torch.fx._lazy_graph_module")
    return 0 if fx is None else sum(len(kind.__subclasses__()) for kind in (fx.GraphModule, fx._LazyGraphModule))


@pytest.fixture(scope="session", autouse=True)
def known_answers() -> Iterator[None]:
    """Equal models are traced once for all tests that plan them."""
    from asked_once import asked_once

    with asked_once():
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_ranks() -> Iterator[None]:
    """Ranks are forked from a process that has imported what they need."""
    from forked_ranks import NURSERY, forked

    with forked():
        yield
    NURSERY.end()
