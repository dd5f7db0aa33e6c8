"""Everyday modules run as on one device; what couples the samples of a batch is right, or refused by name under dp."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from common_modules import COMMON, COUPLED
from parity import check_parity
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)

SGD = functools.partial(torch.optim.SGD, lr=0.1)
DP, TP, PP = {"dp": 2, "tp": 1, "pp": 1}, {"dp": 1, "tp": 2, "pp": 1}, {"dp": 1, "tp": 1, "pp": 2}
GRIDS = {"dp2": DP, "tp2": TP, "pp2": PP, "zero3": {**DP, "zero": 3}}
QUICK = [("mapped", "dp2"), ("parametrized", "tp2"), ("attention", "pp2")]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(
    ("name", "grid"),
    [
        pytest.param(name, grid, marks=() if (name, grid) in QUICK else pytest.mark.slow)
        for name in COMMON
        for grid in (*GRIDS, "automatic")
    ],
)
def test_everyday_modules_run_as_on_one_device(name: str, grid: str) -> None:
    check_parity(*COMMON[name](), 2, 1e-5, SGD, **GRIDS.get(grid, {}))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "grid"), [("mapped", "dp2"), ("transformer", "tp2"), ("bothways", "zero3")])
def test_everyday_modules_on_processes(name: str, grid: str) -> None:
    check_parity(*COMMON[name](), 2, 1e-5, SGD, **GRIDS[grid])


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("name", COUPLED)
def test_a_batch_of_coupled_samples_is_split(name: str) -> None:
    assert check_parity(*COUPLED[name](), 2, 1e-5, SGD, **DP).dp == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["contrastive", "balanced"])
@pytest.mark.parametrize("grid", ["dp2", "tp2", "zero3"])
def test_coupled_samples_on_processes(name: str, grid: str) -> None:
    check_parity(*COUPLED[name](), 2, 1e-5, SGD, **GRIDS[grid])
