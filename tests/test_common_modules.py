"""Everyday modules run as on one device; what couples the samples of a batch is right, or refused by name under dp."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from common_modules import COMMON, COUPLED
from parity import check_parity, cpu_cluster
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)

import autopar
from cost_model.errors import ParallelismError

SGD = functools.partial(torch.optim.SGD, lr=0.1)
DP, TP, PP = {"dp": 2, "tp": 1, "pp": 1}, {"dp": 1, "tp": 2, "pp": 1}, {"dp": 1, "tp": 1, "pp": 2}
GRIDS = {"dp2": DP, "tp2": TP, "pp2": PP, "zero3": {**DP, "zero": 3}}
QUICK = [("mapped", "dp2"), ("parametrized", "tp2"), ("attention", "pp2"), ("circular", "dp2")]


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


@pytest.mark.parametrize(
    ("pins", "samples"),
    [({"pp": 2}, (1, 8)), ({"microbatch_size": 4}, (2, 4)), ({"microbatch_size": 8}, (1, 8)), ({"dp": 2}, (2, 4))],
    ids=str,
)
def test_coupled_samples_of_a_replica_are_one_microbatch(pins: dict[str, int], samples: tuple[int, int]) -> None:
    model, batch = COUPLED["contrastive"]()
    plan = autopar.estimate(model, cpu_cluster(2), batch, parallelism=autopar.Parallelism(**pins)).plan
    assert (plan.microbatches, plan.dp, plan.microbatch_size) == (1, *samples)


def test_sizes_that_cut_coupled_samples_are_refused_with_those_that_do_not() -> None:
    model, batch = COUPLED["contrastive"]()
    for pins, said in (
        (
            {"microbatch_size": 2},
            "one microbatch, of 8 samples under dp=1 or 4 samples under dp=2; leave microbatch_size None",
        ),
        ({"dp": 2, "microbatch_size": 2}, "one microbatch, of 4 samples; leave microbatch_size None"),
    ):
        with pytest.raises(ParallelismError, match=said):
            autopar.estimate(model, cpu_cluster(2), batch, parallelism=autopar.Parallelism(**pins))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["contrastive", "balanced"])
@pytest.mark.parametrize("grid", ["dp2", "tp2", "zero3"])
def test_coupled_samples_on_processes(name: str, grid: str) -> None:
    check_parity(*COUPLED[name](), 2, 1e-5, SGD, **GRIDS[grid])
