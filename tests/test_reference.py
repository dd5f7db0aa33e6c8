"""The reference benchmark: its rewrites are whole programs, its quick price the simulator's, its fit finds minima."""

import functools
import sys
from pathlib import Path

import pytest
import torch

from cost_model.cluster import Cluster
from cost_model.device_rows import Tiling
from cost_model.memory import allocator_rounding, stage_peak
from cost_model.simulate import simulate

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def builder(benchmarks):
    from reference_build import Builder
    from reference_models import Shape

    optimizer = functools.partial(torch.optim.Adam, lr=1e-4, foreach=False, fused=True)
    return Builder(Shape(layers=4, hidden=64, heads=4, seq=32, vocab=128), 16, torch.float16, optimizer)


def peaks(program):
    return [
        stage_peak(s, program.pp, program.microbatches, program.schedule, allocator_rounding("cuda")).memory.total_bytes
        for s in program.stages
    ]


@pytest.mark.parametrize("streams", [False, True])
def test_quick_price_is_the_simulators(builder, streams):
    from reference_build import Layout
    from reference_hardware import Work

    cluster = Cluster.load("dgx2-v100-32gb", 8)
    for layout in (Layout(2, 4, (4,), "1f1b", 2), Layout(2, 2, (2, 2), "1f1b", 2), Layout(1, 2, (2, 1, 1), "gpipe", 4)):
        program = builder.program(layout)
        expected = simulate(program, cluster, streams=streams, blocking=not streams).step_time_s
        assert Work(program, streams=streams).seconds(cluster) == pytest.approx(expected, rel=1e-12)


def test_recompute_trades_memory_for_a_second_forward(builder):
    from reference_build import Layout
    from reference_programs import recomputed

    program = builder.program(Layout(1, 2, (2, 2), "1f1b", 4))
    again = recomputed(program)
    assert all(after < before for after, before in zip(peaks(again), peaks(program), strict=True))
    for before, after in zip(program.chain, again.chain, strict=True):
        redone = len(after.backward.instructions) - len(before.backward.instructions)
        blocks = {i.segment for i in before.forward.instructions if i.op == "aten._softmax.default"}
        assert redone == sum(i.segment in blocks for i in before.forward.instructions)
    assert recomputed(program, (0, 0)) == program


def test_synchronised_gradients_are_summed_every_microbatch(builder):
    from reference_build import Layout
    from reference_programs import synchronised

    program = builder.program(Layout(2, 1, (4,), "1f1b", 2))
    moved = synchronised(program)
    cluster = Cluster.load("dgx2-v100-32gb", 2)
    (once,) = [c for c in program.stages[0].step.collectives if c.axis == "dp"]
    extra = (program.microbatches - 1) * cluster.collective_time_s(once.kind, once.nbytes, (0, 1))
    before, after = (simulate(p, cluster).step_time_s for p in (program, moved))
    assert after - before == pytest.approx(extra, rel=1e-9)


def test_fit_finds_constants_and_respects_bounds(benchmarks):
    from reference_fit import fit

    def errors(x):
        return [a * x[0] + b * x[1] - (3.0 * a + 0.5 * b) for a, b in ((1, 1), (2, 1), (1, 5))]

    assert fit(errors, (1.0, 1.0), ((0, 10), (0, 10))) == pytest.approx([3.0, 0.5], rel=1e-4)
    assert fit(errors, (1.0, 1.0), ((0, 2), (0, 10)))[0] == pytest.approx(2.0)


@pytest.mark.parametrize(("held_s", "each_s"), [(9.0, 3.0), (0.0, 7.0), (1.0, 5.0)], ids=["all", "nothing", "a part"])
def test_one_communicator_stalls_pipelines_by_what_buffers_do_not_hold(benchmarks, held_s, each_s):
    """Blocks of 3 s, messages of 2: hidden behind them, or a receive and a send after each other beside them."""
    from reference_gpipe import Hop, half_pass_s

    hops = [Hop(wire_s=2.0, held_s=held_s, delay_s=0.0)] * 2
    few, many = (half_pass_s([3.0] * 3, hops, count) for count in (20, 30))
    assert many - few == pytest.approx(10 * each_s)
    assert half_pass_s([3.0] * 3, hops, 1) == 3 * 3.0 + 2 * 2.0


def test_what_buffers_hold_is_exchanged_without_waiting_for_the_other(benchmarks):
    """Four stages, forwards of 1 s, backwards of 3, messages of 1: two exchanges stand between the blocks of a
    microbatch, or one and a half: a side that comes late waits for nothing."""
    from reference_blocking import blocking_1f1b_s

    transfers_s = {(a, b): 1.0 for a in range(4) for b in (a - 1, a + 1)}

    def each_s(*, held):
        few, many = (blocking_1f1b_s([(1.0, 3.0)] * 4, transfers_s, count, held=held) for count in (20, 40))
        return (many - few) / 20

    assert each_s(held=False) == pytest.approx(1.0 + 3.0 + 2 * 1.0)
    assert each_s(held=True) == pytest.approx(1.0 + 3.0 + 1.5 * 1.0)


def test_tiles_are_counted_in_waves():
    """81 tiles on 80 units take two waves; a ragged tile counts as a whole one."""
    tiling = Tiling(units=80, shapes=((128, 128),), half=0.0)
    assert tiling.factor(80, 128, 128) == pytest.approx(1.0)
    assert tiling.factor(81, 128, 128) == pytest.approx(160 / 81)
    assert tiling.factor(80, 65, 128) == pytest.approx(128 / 65)


def test_the_best_tile_is_taken_and_small_ones_load_more():
    tiling = Tiling(units=80, shapes=((256, 128), (64, 64)), half=64.0)
    large, small = 1 + 32 * (1 / 256 + 1 / 128), 1 + 32 * (1 / 64 + 1 / 64)
    assert tiling.factor(80, 256, 128) == pytest.approx(1.0)
    assert tiling.factor(80, 64, 64) == pytest.approx(small / large)
