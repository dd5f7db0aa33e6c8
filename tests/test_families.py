"""Models a user brings: every family runs sharded as on one device; rules are about ops, not models."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from families import FAMILIES, HUGGING_FACE, TRANSFORMERS
from parity import check_parity, cpu_cluster, largest_error, reference
from rules import count_rules, split_share, time_enumeration
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)

import autopar
from cost_model.errors import ParallelismError
from passes.segment import segment
from passes.trace import trace

SGD = functools.partial(torch.optim.SGD, lr=0.1)
GRIDS: dict[str, dict[str, int]] = {
    "dp2": {"dp": 2, "tp": 1, "pp": 1},
    "tp2": {"dp": 1, "tp": 2, "pp": 1},
    "pp2": {"dp": 1, "tp": 1, "pp": 2},
    "zero3": {"dp": 2, "tp": 1, "pp": 1, "zero": 3},
    "dp2-tp2": {"dp": 2, "tp": 2, "pp": 1},
    "tp2-pp2": {"dp": 1, "tp": 2, "pp": 2},
    "automatic": {},
}
QUICK = [
    ("wide_resnet", "dp2"),
    ("wide_resnet", "tp2-pp2"),
    ("unet", "tp2-pp2"),
    ("recommender", "dp2-tp2"),
    ("albert", "tp2"),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _check(family: str, grid: str) -> None:
    model, batch = FAMILIES[family]()
    pins = GRIDS[grid]
    devices = pins["dp"] * pins["tp"] * pins["pp"] if pins else 2
    check_parity(model, batch, devices, 1e-4, SGD, **pins)


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(("family", "grid"), QUICK)
def test_some_families_run_as_on_one_device(family: str, grid: str) -> None:
    _check(family, grid)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_as_on_one_device(family: str, grid: str) -> None:
    if (family, grid) not in QUICK:
        _check(family, grid)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ops_of_the_transformers_families_have_rules() -> None:
    """At least 98 of 100."""
    known = count_rules(HUGGING_FACE)
    assert len(known) > 80
    missing = [name for name, has_map in known.items() if not has_map]
    assert len(missing) <= len(known) // 50, missing


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_strategies_of_a_deep_model_are_found_in_half_a_second() -> None:
    assert time_enumeration(32, [2, 4, 8])["equal blocks once"] < 0.5


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_tensor_parallelism_splits_matrix_products(family: str) -> None:
    """Over 95 % of the matrix-multiply flops of one device are really split over two, where messages cost nothing."""
    assert split_share(family) > 0.95


@pytest.mark.usefixtures("thread_ranks")
def test_running_statistics_and_counters_are_those_of_one_device() -> None:
    model, batch = FAMILIES["wide_resnet"]()
    _, trained = reference(model, batch, SGD)
    pins = autopar.Parallelism(dp=2, tp=2, pp=1)
    with autopar.compile(model, cpu_cluster(4), batch, optimizer=SGD, parallelism=pins) as exe:
        for _ in range(3):
            exe.step(batch)
        state = exe.full_state_dict()
        assert any("batch norm" in note and "global batch" in note for note in exe.notes)
        assert 'run.count("norm.num_batches_tracked", 1)' in exe.code(0)
    expected = {k: v for k, v in trained.state_dict().items() if "running" in k}
    assert len(expected) == 14 and largest_error(state, expected) < 1e-5
    assert int(state["norm.num_batches_tracked"]) == 3


def test_batch_norm_allows_one_microbatch() -> None:
    model, batch = FAMILIES["wide_resnet"]()
    pins = autopar.Parallelism(dp=2, microbatch_size=2)
    with pytest.raises(ParallelismError, match="one microbatch"):
        autopar.estimate(model, cpu_cluster(2), batch, parallelism=pins)


def test_skip_connections_are_carried_over_cuts() -> None:
    model, batch = FAMILIES["unet"]()
    graph = trace(model, batch).global_graph
    parts = segment(graph)
    assert len(parts) > 12
    made = [name for part in parts for name in part.gives]
    assert made and all(graph.tensor(name).shape[0] == graph.batch for name in made)
    for before, after in zip(parts, parts[1:], strict=False):
        assert set(after.carried) <= {*before.carried, *before.gives, *([before.entry] if before.entry else [])}
        assert set(after.reads) <= set(after.carried) and after.entry == before.exit
