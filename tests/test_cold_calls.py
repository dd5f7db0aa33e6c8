"""Calls whose code has left the caches: prices by hand, the curves of a file, and what is measured of them."""

import dataclasses
import math

import pytest
from simulated import Cluster as Simulated
from simulated import Device, issue, op, program, stage_program
from test_calibrate import invented_text

from autopar.calibrate import _cold_calls
from autopar.calibrate_cold import COLD_PRODUCTS, cold_s
from cost_model.block_price import spent_seconds
from cost_model.cluster import Cluster
from cost_model.cold_calls import ColdCalls, cold_seconds
from cost_model.device import BLAS
from cost_model.errors import ClusterFileError
from cost_model.prices import price_stages
from cost_model.program import Block, Collective, Instruction, OpCost

CALLS = ColdCalls(op=((1.0, 10.0), (math.e, 20.0)), view=((2.0, 5.0),), product=((2.0, 40.0),), overhead_s=0.25)
OP = OpCost("elementwise", 0.0, 0.0, "float32")


def named(name: str, seconds: float) -> Instruction:
    return dataclasses.replace(op(seconds, "elementwise"), op=name)


def compute_s(
    instructions: tuple[Instruction, ...], *devices: ColdCalls, waited_s: float = 0.0, between_s: float = 0.0
) -> float:
    """Of a block whose ops take their flops in seconds and its views half a second, run over and over."""
    whole_s = {i.collective: waited_s for i in instructions if i.collective is not None}
    block = Block("forward", (), instructions, ())
    own_s = sum(spent_seconds(block, 0.5, lambda cost: cost.flops, dict.fromkeys(whole_s, 0.0)))
    spent_s = spent_seconds(block, 0.5, lambda cost: cost.flops, whole_s)
    cooled = [Device(cold_calls=calls, op_overhead_s=calls.overhead_s) for calls in devices]
    return own_s + sum(*cold_seconds([block], [spent_s], between_s, cooled)) if devices else own_s


def test_a_curve_is_straight_in_the_logarithm_and_flat_outside() -> None:
    found = [CALLS.longer_s(s, OP, 0.25) for s in (0.0, 0.99, 1.0, math.sqrt(math.e), math.e, 100.0)]
    assert found == pytest.approx([0.0, 0.0, 10.0, 15.0, 20.0, 20.0])
    assert [CALLS.longer_s(s, None, 0.0) for s in (1.9, 2.0, 9.0)] == [0.0, 5.0, 5.0]


def test_a_call_is_longer_by_what_ran_since_the_last_of_its_op() -> None:
    block = (named("a", 0.25), named("a", 0.25), named("b", 3.0), named("a", 0.25), issue(None))
    # a: 0.5 s behind the one at the end of the run before, then at once, then behind b; b: 1.25 s; the view: 3.75 s
    longer_s = 0.0 + 0.0 + CALLS.longer_s(1.25, OP, 0.25) + 20.0 + 5.0
    assert compute_s(block, CALLS) == pytest.approx(compute_s(block) + longer_s)


def test_waiting_for_a_collective_is_time_too() -> None:
    what = Collective("all_reduce", "tp", 8)
    block = (named("a", 0.25), dataclasses.replace(issue(what), op="autopar.all_reduce"))
    assert compute_s(block, CALLS, waited_s=0.5) == compute_s(block)
    assert compute_s(block, CALLS, waited_s=9.0) == compute_s(block) + 20.0


def test_an_op_that_calls_others_brings_back_more_code_and_a_product_its_own() -> None:
    assert CALLS.longer_s(9.0, OP, 4 * 0.25) == 2 * CALLS.longer_s(9.0, OP, 0.25)
    assert CALLS.longer_s(9.0, dataclasses.replace(OP, kind="convolution"), 1.0) == 40.0


def test_small_products_of_all_ops_run_one_code() -> None:
    small = OpCost("matmul", 0.25, 0.0, "float32", (1, 8, 8, 8))
    block = tuple(dataclasses.replace(op(0.25), op=name, cost=small) for name in ("aten.mm", "aten.addmm"))
    assert compute_s(block, CALLS, between_s=9.0) == compute_s(block) + 20.0


def test_what_runs_between_two_runs_of_a_block_is_time_too() -> None:
    block = (named("a", 0.25), named("b", 0.25), named("a", 0.25))
    # a, b and a again: 0.25 + 9, 0.5 + 9 and 0.25 s behind their last calls
    assert compute_s(block, CALLS) == compute_s(block)
    assert compute_s(block, CALLS, between_s=9.0) == compute_s(block) + 20.0 + 20.0


def cycle_s(microbatches: int, forward: str, backward: str, *, optimizer_s: float) -> tuple[float, float]:
    """Seconds of (forward, backward) blocks of one op of a quarter of a second each, and one of nothing in both."""
    own = stage_program(0, 1, [named(forward, 0.25)], [named(backward, 0.25)], optimizer_s=optimizer_s)
    device = Device(cold_calls=CALLS)
    (price,) = price_stages(program([own], microbatches, "1f1b"), Simulated((device,)))
    return price.chunks[0].forward.total_s, price.chunks[0].backward.total_s


def test_a_step_is_one_round_of_its_blocks_and_of_what_is_done_once() -> None:
    assert cycle_s(1, "a", "a", optimizer_s=9.0) == (0.25 + 2 * 20.0, 0.25)
    assert cycle_s(1, "a", "b", optimizer_s=9.0) == (0.25 + 2 * 20.0, 0.25 + 20.0)
    assert cycle_s(1, "a", "b", optimizer_s=0.25) == (0.25, 0.25)


def test_only_the_first_microbatch_follows_on_what_is_done_once() -> None:
    assert cycle_s(4, "a", "b", optimizer_s=9.0) == (0.25 + 2 * 5.0, 0.25 + 5.0)


def test_the_slowest_device_counts() -> None:
    block = (named("a", 0.25), named("b", 3.0))
    assert compute_s(block, CALLS.faster(2.0), CALLS) == compute_s(block, CALLS)


def test_a_device_twice_as_fast_takes_half_of_everything() -> None:
    slow = (named("a", 0.5), named("b", 6.0), named("a", 1.0))
    fast = (named("a", 0.25), named("b", 3.0), named("a", 0.5))
    assert compute_s(fast, CALLS.faster(2.0)) == pytest.approx(compute_s(slow, CALLS) / 2)


def test_a_file_gives_all_figures_or_none() -> None:
    plain = invented_text()
    assert Cluster.from_toml(plain, "invented.toml").devices[0].cold_calls is None
    old, curve = "[device.overhead]\n", "[[1e-3, 1e-5], [1e-2, 2e-5]]"
    text = plain.replace(
        old, f"{old}cold_op = {curve}\ncold_view = {curve}\ncold_product = {curve}\ncold_overhead = 3e-6\n"
    )
    points = ((1e-3, 1e-5), (1e-2, 2e-5))
    assert Cluster.from_toml(text, "invented.toml").devices[0].cold_calls == ColdCalls(points, points, points, 3e-6)
    with pytest.raises(ClusterFileError, match="cold_view"):
        Cluster.from_toml(plain.replace(old, f"{old}cold_op = {curve}\n"), "invented.toml")


def test_what_stands_between_calls_grows_whatever_single_passes_say() -> None:
    passes = {
        (256, 1): [(2e-3, 0.0, 0.0, 0.0)],
        (512, 1): [(1e-3, 1e-6, 0.0, 9e-6)],
        (512, 2): [(2e-3, 3e-6, 1e-6, 8e-6)] * 2,
    }
    found = _cold_calls(passes)
    assert found == [
        pytest.approx(row) for row in ((1.25e-4, 0.0, 0.0, 0.0), (1e-3, 1e-6, 0.0, 9e-6), (2e-3, 3e-6, 1e-6, 8e-6))
    ]


def test_measured_curves_are_written_and_read() -> None:
    cold = ((1e-4, 0.0, 2e-6, 1e-6), (1e-3, 1e-5, 4e-6, 3e-5))
    calls = Cluster.from_toml(invented_text(cold=cold), "invented.toml").devices[0].cold_calls
    assert calls is not None
    assert calls.overhead_s == pytest.approx(3e-6)
    costs = (OP, None, dataclasses.replace(OP, kind="matmul"))
    assert [calls.longer_s(1e-3, cost, calls.overhead_s) for cost in costs] == [1e-5, 4e-6, 3e-5]
    assert calls.longer_s(1e-4, OP, calls.overhead_s) < 1e-8


def test_calls_behind_products_take_longer_than_behind_none() -> None:
    nothing_s, *_ = cold_s(BLAS, (8, 1), 0.01)
    between_s, op_s, view_s, product_s = cold_s(BLAS, COLD_PRODUCTS[-1], 0.05)
    assert between_s > 10 * nothing_s and min(op_s, view_s, product_s) > 0
