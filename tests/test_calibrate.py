"""The measured machine: fits that recover what they were made from, the kept file, and real measurements."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import example_gpt

import autopar
from autopar import calibrate
from autopar.calibrate_elements import element_probes
from autopar.calibrate_fit import (
    Machine,
    MessageTime,
    OpTime,
    fit_gemm,
    fit_stream,
    mean_row,
    render_cluster,
    with_rows,
)
from autopar.calibrate_images import image_probes
from autopar.calibrate_operands import drawn
from autopar.calibrate_orders import order_probes
from autopar.calibrate_probes import all_probes, reference_product
from autopar.calibrate_rate import usual_seconds
from autopar.calibrate_step import step_s
from autopar.calibrate_worker import (
    ALONE,
    MESSAGE_KINDS,
    NARROW,
    STEP_KINDS,
    Cold,
    Steps,
    cpu_seconds,
    message_ranks,
    op_call,
)
from autopar.cluster import Cluster
from autopar.runtime.pool import WorkerPool
from cost_model.cluster import ONCE_KINDS
from cost_model.device import BLAS, GEMM_KINDS, ONEDNN, PRODUCT_LIBRARIES, STREAM_KINDS, Device, attention_cost
from cost_model.device_rows import GemmRow, StreamRow, is_small_product
from cost_model.errors import ConfigError, WorkerError
from cost_model.ops import price_of
from cost_model.ops.convolution import DEPTHWISE
from cost_model.parallelism import Parallelism
from cost_model.program import OpCost

ROOT = Path(__file__).parents[1]

# --- Fits -----------------------------------------------------------------------------------------------------------


def product(b: int, m: int, n: int, k: int) -> OpCost:
    return OpCost("matmul", 2.0 * b * m * n * k, 4.0 * b * (m * k + k * n + m * n), "float32", (b, m, n, k))


SHAPES = [(1, 1024, n, k) for n in (64, 256, 1024) for k in (64, 256, 1024)]
SHAPES += [(1, 256, 256, 2048), (1, 8, 8, 8), (32, 128, 128, 64), (32, 128, 64, 128), (1, 64, 512, 512)]


def test_a_product_row_is_recovered_from_its_own_times() -> None:
    true = GemmRow(1.0, 12.0, 5.0, 20.0, 0.0, 1e-6, 2e-6, 512.0)
    times = [OpTime("matmul", product(*shape), true.seconds(product(*shape), 9e10, 1e15)) for shape in SHAPES]
    rate, row = fit_gemm(times)
    assert rate == pytest.approx(9e10, rel=1e-6)
    for name in ("half_m", "half_n", "half_k", "per_matrix_s", "overhead_s"):
        assert getattr(row, name) == pytest.approx(getattr(true, name), rel=1e-4)


def test_no_unknown_of_a_fit_is_negative_however_noisy_its_times() -> None:
    noise = np.random.default_rng(0)
    times = [OpTime("matmul", product(*s), product(*s).flops / 1e11 * noise.uniform(0.7, 1.3) + 1e-6) for s in SHAPES]
    rate, row = fit_gemm(times)
    assert rate > 0 and min(row.half_m, row.half_n, row.half_k, row.per_matrix_s, row.overhead_s) >= 0


def test_small_products_go_to_what_multiplies_batches_where_a_quicker_library_takes_the_large_ones() -> None:
    device = Cluster.from_toml(invented_text(), "invented.toml").devices[0]
    rows = {**device.rows, "batched_matmul": dataclasses.replace(device.rows["batched_matmul"], overhead_s=1.0)}
    quick, plain = (dataclasses.replace(device, rows=rows, products=name) for name in (ONEDNN, BLAS))
    small, large = product(1, 16, 512, 128), product(1, 128, 128, 128)
    assert quick.op_time_s(small) > 1.0 > plain.op_time_s(small)
    assert quick.op_time_s(large) == plain.op_time_s(large) < 1.0
    assert quick.op_time_s(dataclasses.replace(small, dtype="float64")) < 1.0


def test_causal_and_full_attention_share_a_row() -> None:
    true = GemmRow(1.0, 30.0, 0.0, 20.0, 0.0, 0.0, 1e-5, 512.0)
    costs = [
        attention_cost(32, t, t, d, causal=causal, backward=False, nbytes=1.0, dtype="float32")
        for t in (64, 128, 1024, 2048)
        for d in (32, 64, 128)
        for causal in (True, False)
    ]
    rate, row = fit_gemm([OpTime("attention", cost, true.seconds(cost, 8e10, 1e15)) for cost in costs])
    assert rate == pytest.approx(8e10, rel=1e-6) and row.half_k == pytest.approx(20.0, rel=1e-4)


def stream_times(kind: str, op: str, row: StreamRow) -> list[OpTime]:
    sizes = [10.0, *(x for x, _ in row.points)]
    costs = [OpCost(kind, 0.0, nbytes, "float32", op=op) for nbytes in sizes]
    return [OpTime(kind, cost, row.overhead_s if cost.nbytes == 10.0 else row.seconds(cost.nbytes)) for cost in costs]


def test_a_stream_row_is_recovered_from_its_own_times() -> None:
    true = StreamRow(((1e5, 3e10), (1e6, 5e10), (3e7, 1e10)), 2e-6)
    row = fit_stream(stream_times("copy", "aten.cat.default", true))
    assert row.overhead_s == true.overhead_s
    assert np.allclose(row.points, true.points)


def test_bytes_that_overhead_hides_still_take_time() -> None:
    row = fit_stream(stream_times("copy", "aten.cat.default", StreamRow(((1e4, 1e15),), 2e-6)))
    assert 2e-6 < row.seconds(1e4) < 2.5e-6


def test_the_row_of_a_kind_is_the_geometric_mean_of_its_ops() -> None:
    mean = mean_row([StreamRow(((1e6, 1e9),), 1e-6), StreamRow(((1e6, 4e9),), 4e-6)])
    assert mean.points[0] == (1e6, pytest.approx(2e9)) and mean.overhead_s == pytest.approx(2e-6)


def invented_text(
    num_ranks: int = 2, more: Sequence[OpTime] = (), cold: Sequence[Cold] = (), steps: Steps | None = None
) -> str:
    """The file of a machine whose products run at 90 Gflop/s and whose other ops stream at 10 GB/s."""
    gemm = GemmRow(1.0, 10.0, 10.0, 10.0, 0.0, 1e-6, 2e-6, 512.0)
    products = ("matmul", "batched_matmul", "convolution", "convolution_backward")
    times = [OpTime(kind, product(*s), gemm.seconds(product(*s), 9e10, 1e15)) for kind in products for s in SHAPES]
    for kind, backward in (("attention", False), ("attention_backward", True)):
        for t, d in ((64, 64), (128, 32), (256, 64), (1024, 64), (128, 128), (8, 8)):
            cost = attention_cost(32, t, t, d, causal=False, backward=backward, nbytes=1.0, dtype="float32")
            times.append(OpTime(kind, cost, gemm.seconds(cost, 6e10, 1e15)))
    for kind in STREAM_KINDS:
        times += stream_times(kind, f"aten.{kind}.default", StreamRow(((1e5, 2e10), (1e7, 1e10)), 3e-6))
    messages = [
        MessageTime(kind, ranks, nbytes, 1e-4 + nbytes / 1e9)
        for kind in MESSAGE_KINDS
        for ranks in message_ranks(num_ranks)
        for nbytes in (1024, 2**20)
    ]
    machine = Machine("an invented machine", num_ranks, 2.0, 8 * 2**30, 2**30, ONEDNN, cold, steps)
    return render_cluster(machine, [*times, *more], {"float32": 1e-3, "float64": 2e-3}, messages)


def test_the_rendered_file_prices_as_measured() -> None:
    cluster = Cluster.from_toml(invented_text(), "invented.toml")
    device = cluster.devices[0]
    assert device.op_time_s(product(1, 1024, 256, 1024)) == pytest.approx(
        GemmRow(1.0, 10.0, 10.0, 10.0, 0.0, 1e-6, 2e-6).seconds(product(1, 1024, 256, 1024), 9e10, 1e15), rel=1e-3
    )
    assert device.peak("float64") == pytest.approx(device.peak("float32") / 2)
    assert device.op_time_s(OpCost("norm", 0.0, 1e7, "float32")) == pytest.approx(1e-3 + 3e-6, rel=1e-3)
    assert cluster.collective_time_s("all_reduce", 2**20, (0, 1)) == pytest.approx(1e-4 + 2**20 / 1e9, rel=1e-3)
    assert cluster.memory_cap_bytes == 7 * 2**30 and cluster.backend == "gloo" and cluster.name == "local-2"
    assert cluster.products == ONEDNN


def test_an_op_unlike_its_kind_has_a_row_of_its_own_and_leaves_that_of_its_kind() -> None:
    def added(*more: OpTime) -> Device:
        return Cluster.from_toml(invented_text(more=more), "invented.toml").devices[0]

    alone = stream_times("elementwise", "aten.where.self", StreamRow(((1e5, 1e9), (1e7, 1e9)), 3e-6))
    device = added(*(dataclasses.replace(time, row=ALONE) for time in alone))
    assert device.op_time_s(OpCost("elementwise", 0.0, 1e6, "float32", op="aten.where.self")) == pytest.approx(1.003e-3)
    assert device.rows["elementwise"] == added().rows["elementwise"]


def test_things_take_their_lows_at_the_usual_rate_of_the_slowest_rank() -> None:
    """Of three passes the second is slow on both ranks, and rank 1 is slower than rank 0 in the third."""
    alone = np.array([1e-6, 2e-4, 3e-3])
    rates = np.array([[1.0, 1.0], [1.5, 1.4], [1.1, 1.2]])
    found = usual_seconds(alone[:, None, None] * rates)
    low = np.quantile(rates, 0.15)
    assert found == pytest.approx(alone * low * np.median([1.0 / low, 1.5 / low, 1.2 / low]))


def test_what_disturbs_one_thing_moves_no_other_and_itself_little() -> None:
    noise = np.random.default_rng(0)
    quiet = np.exp(noise.normal(-9, 2, (40, 1, 1))) * np.exp(noise.normal(0, 0.01, (40, 6, 2)))
    disturbed = quiet.copy()
    disturbed[7, :4] *= 3.0
    before, after = usual_seconds(quiet), usual_seconds(disturbed)
    assert after == pytest.approx(before, rel=0.03)
    assert np.median(disturbed[7].max(axis=1)) > 2.9 * np.median(quiet[7].max(axis=1))


def test_a_processor_that_is_slower_most_of_the_time_is_priced_so() -> None:
    quiet = np.full((10, 6, 2), 1e-3)
    slower = quiet.copy()
    slower[:, 2:] *= 1.2
    assert usual_seconds(slower) == pytest.approx(1.2 * usual_seconds(quiet))


def test_ops_keep_their_rows_and_costs_and_take_turns_on_cores() -> None:
    cost = OpCost("copy", 0.0, 1e6, "float32", op="aten.cat.default")
    probe = next(probe for probe in all_probes(BLAS) if probe.row == "copy")
    passes = [(cost, [1e-3, 1e-3])] * 3
    assert calibrate._op_times([probe], [passes], 2.0) == [OpTime("copy", cost, pytest.approx(2e-3))]


def test_narrow_rows_take_the_time_of_finding_them() -> None:
    """Lookups of 2 KiB a row and of 32 bytes a row, at 10 GB/s and 50 ns a row besides: both are priced as measured."""
    name, overhead_s, per_row_s = "aten.embedding.default", 3e-6, 5e-8

    def lookup(row: str, rows: int, width: int) -> OpTime:
        cost = OpCost("gather", 0.0, float(rows * width), "float32", op=name, rows=rows)
        return OpTime(row, cost, overhead_s + rows * per_row_s + cost.nbytes / 1e10)

    wide = [lookup("gather", rows, 2**11) for rows in (0, 2**6, 2**9, 2**14)]
    text = invented_text(more=[*(time for time in wide[1:]), lookup(NARROW, 2**13, 2**5)])
    row = with_rows(
        fit_stream([dataclasses.replace(t, cost=t.cost) for t in wide]), wide[-1], lookup(NARROW, 2**13, 2**5)
    )
    assert row.per_row_s == pytest.approx(per_row_s, rel=0.01)
    assert row.seconds(2**12 * 2**11, 2**12) == pytest.approx(lookup("gather", 2**12, 2**11).seconds, rel=0.01)
    device = Cluster.from_toml(text, "invented.toml").devices[0]
    found = device.op_time_s(lookup(NARROW, 2**12, 2**4).cost)
    assert found > 0.8 * 2**12 * per_row_s
    assert device.op_time_s(OpCost("gather", 0.0, 1e6, "float32", op="aten.index.Tensor")) < 4e-4


def test_steps_that_were_measured_take_their_time_beside_ops() -> None:
    device = Cluster.from_toml(invented_text(steps=(5e-4, 6e-6)), "invented.toml").devices[0]
    assert device.step_s(10) == pytest.approx(5.6e-4)
    assert Cluster.from_toml(invented_text(), "invented.toml").devices[0].step_s(10) == 0.0


def test_a_step_of_nothing_takes_longer_the_more_it_updates() -> None:
    any_s, each_s = step_s(BLAS)
    assert 2e-5 < any_s < 2e-2 and 1e-7 < each_s < 1e-4


def test_transfers_that_were_measured_take_their_ranks_to_handle() -> None:
    plain = Cluster.from_toml(invented_text(), "invented.toml")
    assert plain.handling_time_s(2**20, 0, 1) == 0.0
    curve = '[[levels.measured]]\nkind = "transfer behind"\nranks = 2\npoints = [[1024, 1.0], [1048576, 1e-3]]\n'
    cluster = Cluster.from_toml(invented_text() + curve, "invented.toml")
    assert cluster.handling_time_s(2**20, 0, 1) == pytest.approx(1e-3)
    assert cluster.handling_time_s(2**10, 0, 1) == cluster.transfer_time_s(2**10, 0, 1)  # never more than all of it
    assert cluster.handling_time_s(2**20, 1, 1) == 0.0


def test_what_comes_once_a_step_takes_what_was_measured_so() -> None:
    """In programs and in the search, which shards state where gradients and parameters move for less than a sum."""
    plain = Cluster.from_toml(invented_text(), "invented.toml")
    lines = "".join(
        f'[[levels.measured]]\nkind = "{kind} once"\nranks = 2\npoints = [[1024, 1e-6], [1048576, 1e-5]]\n'
        for kind in ONCE_KINDS
    )
    quick = Cluster.from_toml(invented_text() + lines, "invented.toml")
    for kind in ("all_reduce", *ONCE_KINDS):
        whole_s = plain.collective_time_s(kind, 2**20, (0, 1))
        assert plain.once_time_s(kind, 2**20, (0, 1)) == quick.collective_time_s(kind, 2**20, (0, 1)) == whole_s
        assert quick.once_time_s(kind, 2**20, (0, 1)) == (whole_s if kind == "all_reduce" else pytest.approx(1e-5))
        assert quick.once_time_s(kind, 2**20, (0,)) == 0.0
    model, batch = example_gpt()
    pins = Parallelism(dp=2, tp=1, pp=1, zero=1, microbatch_size=2, overlap=False)
    slow, fast = (autopar.estimate(model, cluster, batch, parallelism=pins) for cluster in (plain, quick))
    shorter_s = slow.step_time_s - fast.step_time_s
    moved_s = sum(slow.stages[0].op_kinds_s[kind] - fast.stages[0].op_kinds_s[kind] for kind in ONCE_KINDS)
    assert shorter_s == pytest.approx(moved_s) and moved_s > 1e-4
    free = dataclasses.replace(pins, zero=None)
    chosen = [autopar.estimate(model, cluster, batch, parallelism=free).plan for cluster in (plain, quick)]
    assert ["zero 1" in plan.saving_text() for plan in chosen] == [False, True]


def test_one_rank_needs_no_network() -> None:
    cluster = Cluster.from_toml(invented_text(1), "invented.toml")
    assert cluster.levels == () and cluster.collective_time_s("all_reduce", 2**20, (0,)) == 0.0


# --- Probes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", PRODUCT_LIBRARIES)
def test_every_kind_has_probes_that_the_op_table_prices_as_that_kind(library: str) -> None:
    small = [p for p in all_probes(library) if " 16 KiB" in p.label or ", 8 x 8" in p.label or "8 x 8 x 8" in p.label]
    costs = [(probe.row, probe.cost()) for probe in small]
    kinds = {row: "batched_matmul" if library == ONEDNN and is_small_product(c) else c.kind for row, c in costs}
    assert {row: kind for row, kind in kinds.items() if row not in ("other", ALONE)} == {
        row: row for row in (*GEMM_KINDS, *STREAM_KINDS) if row != "other" and row in kinds
    }
    assert {probe.row for probe in all_probes(BLAS) if not probe.row.startswith("dtype:")} == {
        *GEMM_KINDS,
        *STREAM_KINDS,
        ALONE,
        NARROW,
    }


def test_probes_write_into_no_memory_that_others_read() -> None:
    """What they are drawn from is shared: numbers that grow with every call would make others' times their own."""
    bank = drawn(1).untyped_storage()
    numbers = torch.tensor([], dtype=torch.float32).set_(bank)  # type: ignore[call-overload]
    before = numbers.sum(dtype=torch.float64)
    for probe in all_probes(BLAS):
        if probe.label.endswith(" 1 KiB"):
            probe.call()()
    assert numbers.sum(dtype=torch.float64) == before


def test_probes_of_images_have_rows_of_their_own_whose_times_grow_with_their_bytes() -> None:
    """Rows of their kinds tell nothing of them: maxima over windows take sixteen times as long as other reductions."""
    costs: dict[str, list[float]] = {}
    for probe in image_probes():
        cost = probe.cost()
        assert probe.row == ALONE and cost.op is not None
        costs.setdefault(cost.op, []).append(cost.nbytes)
    assert len(costs) == 10 and set(DEPTHWISE.values()) < set(costs)
    for sizes in costs.values():
        assert sizes == sorted(set(sizes)) and sizes[0] < 4096 and sizes[-1] > 2**21


def test_probes_of_order_have_rows_of_their_own_whose_times_grow_with_their_bytes() -> None:
    costs: dict[str, list[float]] = {}
    for probe in order_probes():
        cost = probe.cost()
        assert probe.row == ALONE and cost.op is not None
        costs.setdefault(cost.op, []).append(cost.nbytes)
    assert {name.split(".")[1] for name in costs} == {"sort", "topk", "cumsum", "var_mean"}
    for sizes in costs.values():
        assert sizes == sorted(set(sizes)) and sizes[0] < 4096 and sizes[-1] > 2**21


def test_probes_of_single_elements_have_rows_of_their_own_and_say_how_many_they_find() -> None:
    """A lookup of 8 numbers a row finds as many rows, one of numbers as many numbers."""
    probes = {probe.label: probe for probe in element_probes()}
    names = {probe.cost().op for probe in probes.values() if probe.label.endswith(" 128 KiB") and probe.row == ALONE}
    assert len(names) == len(probes.keys() - {label for label in probes if label.startswith("narrow")}) // 3
    found = {label: probe.cost().rows for label, probe in probes.items() if probe.row == NARROW}
    assert {found[f"narrow {name}"] for name in ("layer norm", "layer norm backward", "sum", "variance", "mask")} == {
        8192
    }
    assert set(found.values()) == {8192, 65536}


def test_copies_of_a_probe_share_no_memory() -> None:
    probe = next(p for p in all_probes(BLAS) if p.label.startswith("add, 16 KiB"))
    made = [tensor for _ in range(3) for tensor in probe.make()[1]]
    assert len({tensor.data_ptr() for tensor in made}) == 6


def test_cpu_seconds_sees_work_and_not_sleep() -> None:
    def busy() -> None:
        end = time.thread_time() + 2e-3
        while time.thread_time() < end:
            pass

    assert cpu_seconds([busy], 0.01) == pytest.approx(2e-3, rel=0.2)
    assert cpu_seconds([lambda: time.sleep(2e-3)], 0.01) < 1e-3


# --- The kept file --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOPAR_CACHE_DIR", str(tmp_path))
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of ranks that were measured; the measurement itself is replaced."""
    asked: list[int] = []

    def measure(num_ranks: int, note: str = "") -> str:
        asked.append(num_ranks)
        time.sleep(0.1)
        return invented_text(num_ranks)

    monkeypatch.setattr(calibrate, "measure", measure)
    return asked


def test_a_machine_is_measured_once(folder: Path, measured: list[int]) -> None:
    first = Cluster.local(2)
    assert Cluster.local(2) == first and type(first) is Cluster and measured == [2]
    assert calibrate.cache_path(2).parent == folder and Cluster.load(calibrate.cache_path(2)) == first
    Cluster.local(4)
    calibrate.local_cluster(2, refresh=True)
    assert measured == [2, 4, 2]


def test_what_makes_ranks_faster_is_part_of_the_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = calibrate.cache_path(2)
    monkeypatch.setenv("HOME_PAGE", "unrelated")
    assert calibrate.cache_path(2) == before
    monkeypatch.setenv("LD_PRELOAD", "another-malloc.so")
    assert calibrate.cache_path(2) != before


def test_callers_at_once_measure_once(folder: Path, measured: list[int]) -> None:
    threads = [threading.Thread(target=Cluster.local, args=(2,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert measured == [2]


def test_a_broken_file_is_said_and_replaced(
    folder: Path, measured: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate.cache_path(2).write_text('schema = 1\nname = "half')
    assert Cluster.local(2).num_devices == 2 and measured == [2]
    assert "measuring again" in capsys.readouterr().err


def test_a_failed_measurement_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(num_ranks: int, note: str = "") -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "measure", fail)
    with pytest.raises(KeyboardInterrupt):
        Cluster.local(2)
    assert [path.suffix for path in folder.iterdir()] == [".lock"]


def test_other_launched_ranks_wait_for_the_first(
    folder: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    writer = threading.Timer(0.3, lambda: calibrate._write(calibrate.cache_path(2), invented_text()))
    writer.start()
    assert Cluster.local(2).num_devices == 2 and measured == []
    writer.join()
    monkeypatch.setattr(calibrate, "_RANK_WAIT_S", 0.3)
    with pytest.raises(WorkerError, match=r"rank 0 has not written .* in 0 s"):
        Cluster.local(4)


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", True])
def test_counts_that_are_refused(count: object) -> None:
    with pytest.raises(ConfigError, match="whole number"):
        Cluster.local(count)  # type: ignore[arg-type]


def cuda_machine(monkeypatch: pytest.MonkeyPatch, name: str, count: int) -> None:
    class Properties:
        total_memory = 33 * 10**9

    replacements: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "get_device_name": lambda index: name,
        "get_device_properties": lambda index: Properties,
    }
    for function, replacement in replacements.items():
        monkeypatch.setattr(torch.cuda, function, replacement)


def test_cuda_devices_are_known_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_machine(monkeypatch, "Tesla V100-SXM3-32GB", 16)
    cluster = Cluster.local(12)
    assert (cluster.num_devices, cluster.backend, cluster.name) == (12, "nccl", "local-12")
    assert cluster.devices[0].name == "v100-sxm2-32gb" and cluster.devices[0].memory_bytes == 33 * 10**9
    cuda_machine(monkeypatch, "GeForce 256", 2)
    with pytest.raises(ConfigError, match=r"no device file for GeForce 256; known: .*Next: describe"):
        Cluster.local(2)


# --- Real measurements ----------------------------------------------------------------------------------------------


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_PASSES", 1)
    monkeypatch.setattr(calibrate, "_OP_BUDGET_S", 0.0)
    monkeypatch.setattr(calibrate, "MESSAGE_BYTES", (2**10, 2**16, 2**20))


@pytest.mark.slow
def test_a_hurried_measurement_of_this_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    cluster = Cluster.local(2)
    device = cluster.devices[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    here_s = cpu_seconds([reference_product(device.products).call()], 0.1)
    torch.set_num_threads(threads)
    assert device.op_time_s(product(1, 1024, 1024, 512)) == pytest.approx(here_s, rel=0.5)
    assert device.op_time_s(OpCost("elementwise", 0.0, 3 * 2**20, "float32")) < here_s
    assert 1e-6 < cluster.collective_time_s("all_reduce", 2**20, (0, 1)) < 1.0
    assert 0 < cluster.memory_cap_bytes < calibrate.usable_memory_bytes() / 2
    assert len(list(folder.glob("local-2-*.toml"))) == 1


def processes_with(variable: str, value: str) -> list[int]:
    """Processes whose environment holds this."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if f"{variable}={value}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_an_interrupted_measurement_leaves_no_process_and_no_file(folder: Path) -> None:
    code = "from autopar.cluster import Cluster; Cluster.local(2)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "measuring this machine with 2 rank(s)" in process.stderr.readline()
    while len(processes_with("AUTOPAR_CACHE_DIR", str(folder))) < 3:
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    process.stderr.close()
    deadline = time.monotonic() + 5
    while processes_with("AUTOPAR_CACHE_DIR", str(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with("AUTOPAR_CACHE_DIR", str(folder)) == []
    assert list(folder.glob("*.toml")) == []


@pytest.mark.slow
def test_a_block_costs_what_its_ops_were_measured_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of a transformer block, two ranks at once, against the sum of its ops' prices.

    The block multiplies by torch's own way, whatever else is faster here.
    """
    monkeypatch.setattr(calibrate, "_fastest_products", lambda pool: BLAS)
    device = Cluster.local(2).devices[0]
    environment = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(Path(__file__).parent)))}
    with WorkerPool(2, target="calibrate_targets:BlockRank", env=environment) as pool:
        pool.call("__init__", None)
        costs = [OpCost(**cost) for cost in pool.call("costs", None)[0]]
        measured_s = max(pool.call("seconds", {"runs": 40}))
    assert sum(map(device.op_time_s, costs)) == pytest.approx(measured_s, rel=0.15)


def test_messages_of_an_odd_number_of_ranks_are_measured() -> None:
    """Transfers go between pairs, of which the last rank is in none."""
    with WorkerPool(3, target="autopar.calibrate_worker:Calibrator") as pool:
        pool.call("__init__", None)
        for kind, ranks in (("transfer", 2), ("all_reduce", 3), *((kind, 3) for kind in STEP_KINDS)):
            payload = {"kind": kind, "ranks": ranks, "nbytes": 4096, "repeats": 2}
            assert 0 < max(pool.call("measure_message", payload)) < 5


@pytest.mark.parametrize(
    ("weight", "groups", "transposed", "names"),
    [
        ((32, 1, 3, 3), 32, False, list(DEPTHWISE.values())),
        ((32, 1, 3, 3), 32, True, list(DEPTHWISE.values())),
        ((32, 1, 7, 7), 32, False, ["depthwise convolution", "aten.convolution_backward.default"]),
        ((32, 2, 3, 3), 16, False, ["aten.convolution.default", "aten.convolution_backward.default"]),
        ((64, 1, 3, 3), 32, False, ["aten.convolution.default", "aten.convolution_backward.default"]),
    ],
)
def test_convolutions_whose_channels_do_not_meet_are_told_apart(
    weight: tuple[int, ...], groups: int, transposed: bool, names: list[str]
) -> None:
    kernel = torch.zeros(weight)
    image = torch.zeros(2, 32, 8, 8)
    window: list[Any] = [[1, 1], [weight[-1] // 2] * 2, [1, 1], transposed, [0, 0], groups]
    out = torch.ops.aten.convolution.default(image, kernel, None, *window)
    forward = op_call(torch.ops.aten.convolution.default, (image, kernel, None, *window), {}, out)
    args = (out, image, kernel, None, *window, [True, True, False])
    gradients = torch.ops.aten.convolution_backward.default(*args)
    backward = op_call(torch.ops.aten.convolution_backward.default, args, {}, gradients)
    costs = [price_of(forward), price_of(backward)]
    assert [cost and cost.op for cost in costs] == names
