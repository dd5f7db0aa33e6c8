"""Recompute: what is kept, what is made again, and that nothing else changes."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from effort import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from models import example_gpt, hf_gpt2
from parity import ADAMW, check_parity, cpu_cluster
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn

import autopar
from autopar.options import Options
from autopar.planning import Job, Planned, plan_model
from cost_model.errors import ConfigError, ParallelismError
from cost_model.liveness import ChunkStorages
from cost_model.parallelism import RECOMPUTES, Parallelism
from cost_model.plan import StagePlan
from passes.recompute import Flow, repeated

MEMORY_LOW, MEMORY_HIGH = 0.0, 0.03


@functools.cache
def planned(level: str, **pins: int) -> Planned:
    model, batch = example_gpt(attention="explicit")
    options = Options.of(None, ADAMW, Parallelism(recompute=level, **pins), None, None, None)
    devices = math.prod(pins.get(name, 1) for name in ("dp", "tp", "pp"))
    found = plan_model(model, cpu_cluster(devices), batch, options)
    found.linked.verify()
    return found


# --- Which values are kept


def random_flow(rng: np.random.Generator) -> tuple[Flow, frozenset[str]]:
    """Up to seven values, each made of up to two earlier ones."""
    names = [f"v{i}" for i in range(int(rng.integers(2, 8)))]
    operands = {n: tuple(rng.permutation(names[:i])[: int(rng.integers(0, 3))]) for i, n in enumerate(names)}
    fixed = frozenset(n for n in names if rng.random() < 0.3)
    nbytes = {n: None if n not in fixed and rng.random() < 0.2 else int(rng.integers(1, 9)) for n in names}
    return Flow(operands, nbytes, fixed), frozenset(n for n in names if rng.random() < 0.4)


def brute_force(flow: Flow, needed: frozenset[str]) -> int:
    """Fewest bytes of a set of kept values, with fixed ones kept wherever they are read."""
    best = []
    able = [n for n, size in flow.nbytes.items() if size is not None and n not in flow.fixed]
    for chosen in itertools.chain.from_iterable(itertools.combinations(able, k) for k in range(len(able) + 1)):
        again = flow.made_again(needed, chosen)
        read = needed.union(*(flow.operands[n] for n in again))
        best.append(sum(flow.nbytes[n] or 0 for n in read if n in flow.fixed or n in chosen))
    return min(best)


@settings(max_examples=drawn(200), deadline=None)
@given(seed=st.integers(0, 10**6))
def test_selective_keeps_the_fewest_bytes(seed: int) -> None:
    flow, needed = random_flow(np.random.default_rng(seed))
    kept, again = repeated(flow, "selective", needed, ())
    assert sum(flow.nbytes[n] or 0 for n in kept) == brute_force(flow, needed)
    assert not again & (kept | flow.fixed)
    assert needed <= kept | again


def test_of_equal_sets_the_one_that_repeats_least() -> None:
    flow = Flow({"x": (), "a": ("x",), "b": ("a",)}, {"x": 4, "a": 4, "b": 4}, frozenset(["x"]))
    assert repeated(flow, "selective", {"b"}, ()) == (frozenset(["b"]), frozenset())
    assert repeated(flow, "full", {"b"}, ()) == (frozenset(["x"]), frozenset(["a", "b"]))
    assert repeated(flow, "full", {"b"}, {"a"}) == (frozenset(["x"]), frozenset(["a", "b"]))
    assert repeated(flow, "selective", {"b"}, {"b"}) == (frozenset(["b"]), frozenset())
    assert repeated(flow, "none", {"b"}, ()) == (frozenset(["b"]), frozenset())


# --- The program


def again(found: Planned, stage: int = 0) -> list[str]:
    """Ops whose results are made again in backward; views left out."""
    lines = found.linked.program.stages[stage].chunks[0].backward.instructions
    return [line.op for line in lines if line.cost is not None and any(v.name.endswith("_again") for v in line.outputs)]


@pytest.mark.parametrize("level", ["selective", "full"])
def test_views_of_what_is_made_again_lie_in_it(level: str) -> None:
    """Also those that only the backward takes: a transpose has no memory of its own."""
    block = planned(level, dp=2).linked.program.stages[0].chunks[0].backward
    lies = {v.name: v.storage for v in (*block.inputs, *(v for i in block.instructions for v in i.outputs))}
    turned = [i for i in block.instructions if i.op in ("aten.transpose.int", "aten.t.default")]
    assert turned and all(i.outputs[0].storage == lies[i.inputs[0]] for i in turned)


def test_each_level_repeats_what_it_says() -> None:
    assert again(planned("none")) == []
    selective, full = again(planned("selective")), again(planned("full"))
    products = ("aten.mm.default", "aten.addmm.default")
    assert not any(op in products for op in selective) and "aten.bmm.default" in selective
    assert any(op in products for op in full) and len(full) > len(selective)


def test_a_segment_keeps_what_enters_it() -> None:
    """full: two blocks, the head and the embedding keep one activation each, at most."""
    stage = planned("full").linked.program.stages[0]
    activation = 8 * 16 * 32 * 4
    carried = ChunkStorages.of(stage.chunks[0], stage).carried
    assert sum(size == activation for size in carried.values()) <= len(planned("full").plan.segment_labels)
    assert all(size <= activation for size in carried.values())


@pytest.mark.parametrize("level", ["selective", "full"])
def test_no_collective_is_repeated(level: str) -> None:
    none, found = planned("none", tp=2), planned(level, tp=2)
    for before, after in zip(none.linked.program.stages, found.linked.program.stages, strict=True):
        (before,), (after,) = before.chunks, after.chunks
        assert [b.collectives() for b in after.blocks] == [b.collectives() for b in before.blocks]


@pytest.mark.parametrize("pins", [{}, {"tp": 2}], ids=str)
def test_levels_trade_time_for_memory(pins: dict[str, int]) -> None:
    none, selective, full = (planned(level, **pins).estimate for level in RECOMPUTES)
    assert none.peak_bytes > selective.peak_bytes > full.peak_bytes
    assert none.step_time_s < selective.step_time_s < full.step_time_s


@pytest.mark.parametrize("tp", [1, 2])
def test_the_search_prices_levels_as_they_turn_out(tp: int) -> None:
    """What a level adds to a microbatch and what it keeps, in the search and of the rewritten program."""
    model, batch = example_gpt(n_layer=2, attention="explicit", n_embd=128, block_size=64)
    job = Job.of(model, cpu_cluster(tp), batch, Options.of(None, ADAMW, None, None, None, None))
    base: tuple[float, float] | None = None
    for level in RECOMPUTES:
        under = job.under(Parallelism(dp=1, tp=tp, recompute=level), None)
        (stage,) = under.solve().stages
        found = under.planned(under.decide(0.0))
        priced = found.estimate.stages[0]
        program = found.linked.program.stages[0]
        carried = sum(ChunkStorages.of(program.chunks[0], program).carried.values())
        assert stage.saved_bytes == pytest.approx(carried, rel=0.1), level
        times = (stage.time_s, priced.forward_s + priced.backward_s)
        base = base or times
        assert times[0] - base[0] == pytest.approx(times[1] - base[1], rel=0.2), level


# --- It trains as one device does


class Conditioned(nn.Module):
    """Every layer reads what the first one makes, as a decoder's do an encoder's output; detached, it gets no gradient
    from them."""

    def __init__(self, *, detached: bool = False) -> None:
        super().__init__()
        self.detached = detached
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 1)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        made = self.first(x)
        context = torch.tanh(made)
        for layer in self.layers:
            made = layer(made + (context.detach() if self.detached else context))
        return (self.last(made) ** 2).mean()


@pytest.mark.usefixtures("thread_ranks")
def test_segments_of_which_each_reads_several_values() -> None:
    """They are made again one after the other, and run as on one device."""
    batch, peaks = {"x": torch.randn(512, 8)}, {}
    for level in ("none", "full"):
        pins = Parallelism(dp=1, tp=1, pp=1, microbatch_size=512, recompute=level)
        found = plan_model(Conditioned(), cpu_cluster(1), batch, Options.of(None, ADAMW, pins, None, None, None))
        peaks[level] = found.estimate.peak_bytes
        lines = found.linked.program.stages[0].chunks[0].forward.instructions
        assert len({line.segment for line in lines if line.segment >= 0}) >= 8
    assert peaks["full"] < 0.6 * peaks["none"]
    batch, pins = {"x": batch["x"].double()}, {"pp": 1, "recompute": "full"}
    check_parity(Conditioned().double(), batch, 2, 1e-9, dp=2, tp=1, zero=3, overlap=True, **pins)
    check_parity(Conditioned().double(), batch, 4, 1e-9, dp=1, tp=2, **{**pins, "pp": 2})
    check_parity(Conditioned(detached=True).double(), batch, 2, 1e-9, dp=2, tp=1, **pins)


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(
    ("attention", "pins"),
    [
        ("explicit", {"tp": 2, "recompute": "full"}),
        ("fused", {"tp": 2, "recompute": "selective"}),
        ("fused", {"pp": 2, "recompute": "full", "microbatch_size": 2}),
        ("explicit", {"dp": 2, "pp": 2, "recompute": "selective", "microbatch_size": 2}),
    ],
    ids=str,
)
def test_parity(attention: str, pins: dict[str, Any]) -> None:
    model, batch = example_gpt(torch.float64, attention=attention, tied=attention == "fused")
    devices = math.prod(pins.get(name, 1) for name in ("dp", "tp", "pp"))
    plan = check_parity(model, batch, devices, 1e-9, **{"dp": 1, "tp": 1, "pp": 1, **pins})
    assert all(set(stage.recompute) == {pins["recompute"]} for stage in plan.stages)


@pytest.mark.usefixtures("thread_ranks")
def test_parity_of_a_model_of_hugging_face() -> None:
    model, batch = hf_gpt2("eager")
    check_parity(model, batch, 2, 1e-5, tp=2, recompute="full")


# --- Memory as measured


@pytest.mark.usefixtures("shared_ranks")
def test_measured_peaks_fall_and_are_as_estimated() -> None:
    model, batch = example_gpt(attention="explicit", n_layer=4)
    peaks = []
    for level in RECOMPUTES:
        parallelism = Parallelism(pp=2, microbatch_size=4, schedule="1f1b", recompute=level)
        with autopar.compile(model, cpu_cluster(2), batch, optimizer=ADAMW, parallelism=parallelism) as exe:
            found = autopar.compare(exe, batch, 1, warmup=1)
        assert MEMORY_LOW <= found.peak_memory_error <= MEMORY_HIGH, level
        peaks.append(found.measured_peak_bytes)
    assert peaks[0] > 1.1 * peaks[1] and peaks[1] > 1.05 * peaks[2], peaks


# --- Plans


def test_levels_of_a_stage_are_checked() -> None:
    with pytest.raises(ConfigError, match="as many recompute levels"):
        StagePlan(0, 2, {}, ("full",))
    with pytest.raises(ConfigError, match="as many recompute levels"):
        StagePlan(0, 2, {}, ("none", "none"))
    with pytest.raises(ConfigError, match="did you mean 'full'"):
        StagePlan(0, 1, {}, ("ful",))
    assert StagePlan(3, 6, {}, ("none", "full", "selective")).recompute_levels == {4: "full", 5: "selective"}


def test_a_plan_file_keeps_the_levels() -> None:
    plan = planned("selective").plan
    assert autopar.Plan.from_json(plan.to_json()) == plan


def test_a_pin_that_a_given_plan_contradicts() -> None:
    model, batch = example_gpt(attention="explicit")
    plan = planned("selective").plan
    assert plan.recompute == "selective"
    with pytest.raises(ParallelismError, match="recompute=full is pinned but the given plan has recompute=selective"):
        autopar.estimate(model, cpu_cluster(1), batch, parallelism=Parallelism(recompute="full"), plan=plan)
