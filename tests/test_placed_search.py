"""The search on uneven networks: what it takes for granted of windows, groups, whole state and bounds, and that equal
input gives an equal plan."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from simulated import Cluster as TimedCluster
from simulated import Device as TimedDevice
from simulated import interleaved, pipeline, zero_bubble
from test_grouped_reduction import regions
from test_placement import drawn_matrix
from test_uneven import SLOW, cut_at, even, job_of, solved, step_s

from autopar.equal_meshes import EqualMeshes
from autopar.planner.candidates import Candidate, smallest_cuts
from autopar.planner.configuration import Configuration
from autopar.planner.placed_prices import MAX_WINDOW, Prices
from autopar.planner.placement import sketched
from autopar.planner.places import Places
from autopar.planner.regional import PlacedAnswer, _glanced, _LaidOut
from autopar.planner.solution import Solution
from autopar.planner.traffic import Traffic
from autopar.planning import Job
from autopar.uneven import CutSketch
from autopar.whole_state import whole_state_gain_s
from cost_model.cluster import Cluster
from cost_model.network import Network
from cost_model.prices import price_replicas
from cost_model.program import Program
from cost_model.replicas import schedule_bound_s
from cost_model.simulate import simulate

ROOT = Path(__file__).parent.parent


def drawn_program(draw: random.Random) -> Program:
    microbatches, times = draw.choice([1, 4, 8, 24]), [draw.choice([0.5, 1.0, 3.0]) for _ in range(2)]
    match draw.randrange(3):
        case 0:
            return interleaved(2, 2, 2 * microbatches, *times)
        case 1:
            return zero_bubble(4, microbatches, *times, draw.random())
    stages = [(draw.random(), draw.random()) for _ in range(draw.randint(1, 5))]
    schedule = draw.choice(["1f1b", "gpipe"])
    return replace(pipeline(schedule, microbatches, stages), window=draw.randint(1, 6) if schedule == "1f1b" else 1)


def test_no_schedule_takes_less_than_its_bound() -> None:
    draw, nearest = random.Random(0), []
    for _ in range(60):
        what, delay_s = drawn_program(draw), draw.choice([0.0, 0.3, 2.0])
        cluster = TimedCluster((TimedDevice(),) * what.num_devices, delay_s + draw.choice([0.0, 0.4, 2.0]), delay_s)
        step, bound_s = simulate(what, cluster), schedule_bound_s(price_replicas(what, cluster), what.microbatches)
        assert bound_s <= step.step_time_s * (1 + 1e-12), (what.schedule, what.pp, what.microbatches)
        nearest.append(bound_s / step.step_time_s)
    assert np.mean(np.array(nearest) > 0.999) > 0.2


@pytest.mark.parametrize(("latency_s", "busy_s"), [(0.2, 0.0), (0.7, 0.05), (0.3, 0.3)])
def test_the_window_is_the_narrowest_that_hides_the_messages(latency_s: float, busy_s: float) -> None:
    """Stages of 0.25 s: one wide as asked for takes no longer than one of twice the width, a narrower one does."""
    count, nbytes, microbatches = 3, 1e6, 64
    rows = ((latency_s,),), ((nbytes / max(busy_s, 1e-9),),)
    network = Network(("here",), *rows, (0,) * count, tuple(range(count)), (None,) * count)
    places = Places(Cluster("line", (SLOW,) * count, (), "nccl", network))
    window = Prices(places, Traffic(count, 1, 1, microbatches, 0.25, nbytes, 0.0)).window(
        np.arange(count).reshape(count, 1, 1)
    )
    timed = TimedCluster((TimedDevice(),) * count, latency_s + busy_s, latency_s)

    def seconds(window: int) -> float:
        return simulate(
            replace(pipeline("1f1b", microbatches, [(0.1, 0.15)] * count), window=window), timed
        ).step_time_s

    assert seconds(window) <= seconds(2 * window) * 1.01
    assert window > 1 and seconds(window) < seconds(window - 1) * 0.95


@pytest.mark.parametrize(("hop", "count"), [(0, 4), (2, 4), (4, 12)])
def test_prices_know_what_the_widest_window_has_under_way(hop: int, count: int) -> None:
    """Behind a long hop few stages keep few microbatches under way, and its channel no more than a window of them."""
    far_s, microbatches, devices = 2.0, 96, range(count)
    regions = tuple(int(device > hop) for device in devices)
    delays = ((0.001, far_s), (far_s, 0.001))
    network = Network(("a", "b"), delays, ((1e12, 1e12),) * 2, regions, tuple(devices), (None,) * count)
    price = Prices(
        Places(Cluster("line", (SLOW,) * count, (), "nccl", network)),
        Traffic(count, 1, 1, microbatches, 0.02, 1.0, 0.0),
    )
    pairs = {(a, b): delays[regions[a]][regions[b]] for a in devices for b in devices}
    timed = TimedCluster((TimedDevice(),) * count, uneven=True, transfers_s=pairs, delays_s=pairs)
    what = replace(pipeline("1f1b", microbatches, [(0.008, 0.012)] * count), window=MAX_WINDOW)
    priced_s = price.cost_s(np.arange(count).reshape(count, 1, 1))
    assert priced_s == pytest.approx(simulate(what, timed).step_time_s, rel=0.1)


@pytest.mark.parametrize(("count", "groups"), [(2, 4), (4, 2), (1, 1), (8, 1)])
def test_gradients_are_summed_by_region_where_regions_are_far(count: int, groups: int) -> None:
    prices = Prices(Places(regions(8 // count, count)), Traffic(1, 8, 1, 1, 0.1, 0.0, 1e8))
    together, mixed = np.arange(8), np.arange(8).reshape(2, 4).T.ravel()
    assert prices.dp_inner(together.reshape(1, 8, 1)) == groups
    assert prices.dp_inner(mixed.reshape(1, 8, 1)) == 1
    both = np.stack([together, mixed]).reshape(2, 1, 8, 1)
    assert prices.costs_s(both).tolist() == [prices.cost_s(cells) for cells in both]
    assert (prices.costs_s(both)[0] < prices.costs_s(both)[1]) == (groups > 1)


@pytest.mark.parametrize("far", [1e6, 1e10])
def test_whole_state_gains_no_more_than_what_is_said(far: float) -> None:
    """Eight replicas in two regions: sums by region cross the slow link with a part, ZeRO 1 with all but a part."""
    cluster, pins = regions(4, 2, 1e10, far), {"pp": 1, "dp": 8, "microbatch_size": 1024, "placement": tuple(range(8))}
    split, level_3 = (job_of(cluster, 512, 4, zero=zero, **pins) for zero in (1, 3))  # type: ignore[arg-type]
    whole = job_of(cluster, 512, 4, zero=0, dp_inner=4, **pins)  # type: ignore[arg-type]
    plans = [job.plan(solved(job)) for job in (split, whole, level_3)]
    gains = [
        whole_state_gain_s(plan, job.program(plan), cluster)
        for plan, job in zip(plans, (split, whole, level_3), strict=True)
    ]
    assert gains[1:] == [0.0, np.inf]
    saved_s = split.step_s(plans[0]) - whole.step_s(plans[1])
    assert saved_s <= gains[0] + 1e-9
    assert (gains[0] > 0.1 * split.step_s(plans[0])) == (far < 1e10)
    assert (saved_s > 0.1 * split.step_s(plans[0])) == (far < 1e10)


def test_plans_of_whole_state_split_none() -> None:
    """Where they have the choices of a plan that splits it, and where these leave no room for it."""
    job = job_of(regions(4, 2, 1e10, 1e6), 512, 4, zero=None, recompute=None)  # type: ignore[arg-type]
    known = replace(job.pins(None), dp=8, pp=1, microbatch_size=1024)
    answer = EqualMeshes(job, known)._searched(known, 1)[0]
    assert isinstance(answer, Solution) and zero_levels(job, answer) == {"1"}
    placed = PlacedAnswer(answer, [replace(answer, placement=tuple(range(8)))])
    peak_bytes = job.peaks(job.plan(answer))[0]
    for room in (1.0, 0.9):
        own = job.under(job.options.parallelism, int(room * peak_bytes))
        equal = EqualMeshes(own, known)
        assert equal._whole(known, [placed], np.inf) == []
        found = equal._whole(known, [placed], 0.0)
        assert [zero_levels(own, each) for each in found if isinstance(each, Solution)] == [set()]
        assert (found[0].stages == answer.stages) == (room == 1.0)


def test_whole_state_is_asked_of_plans_that_split_it_to_fit() -> None:
    """Theirs is a choice of each parameter, not what is fastest."""
    job = job_of(regions(4, 2, 1e10, 1e6), 512, 4, zero=None, recompute=None)  # type: ignore[arg-type]
    known = replace(job.pins(None), dp=8, pp=1, microbatch_size=1024)
    tight = EqualMeshes(job.under(job.options.parallelism, 13_000_000), known)._searched(known, 1)[0]
    assert isinstance(tight, Solution) and any("zero:" in key for own in tight.stages[0].assignments for key in own)
    assert zero_levels(job, tight) and not zero_levels(job.under(replace(job.options.parallelism, zero=0), None), tight)


def zero_levels(job: Job, solution: Solution) -> set[str]:
    stages = job.plan(solution).stages
    return {level for stage in stages for key, level in stage.choices.items() if key.startswith("zero:")}


def test_state_is_whole_where_regions_are_far() -> None:
    """Though the fastest links, on which meshes are planned first, would split it."""
    pins = {"pp": 1, "dp": 8, "microbatch_size": 1024}
    job = job_of(regions(4, 2, 1e10, 1e6), 512, 4, zero=None, **pins)  # type: ignore[arg-type]
    plan = job.plan(solved(job))
    assert not any(key.startswith("zero:") for stage in plan.stages for key in stage.choices) and plan.dp_inner == 4
    pinned = job_of(job.cluster, 512, 4, zero=1, **pins)
    assert job.step_s(plan) < 0.9 * step_s(pinned, solved(pinned))


def test_cuts_that_sketches_find_are_faster_once_rewritten() -> None:
    """From stages of 22, 3, 3 and 3 segments back to about as many in each."""
    job, found = even()
    uneven = cut_at(found, (22, 25, 28, found.stages[-1].last))
    first = CutSketch(job, uneven).better(uneven)[0]
    assert step_s(job, first) < 0.6 * step_s(job, uneven)
    assert step_s(job, first) <= 1.025 * step_s(job, found)


def test_meshes_are_judged_by_placements_that_exchanges_find() -> None:
    """Where all links differ devices exchanged make a long pipeline twice as fast as it was laid out, replicas less."""
    places, laid_out = Places(drawn_matrix(12)), []
    for pp, dp in ((12, 1), (1, 12)):
        prices = Prices(places, Traffic(pp, dp, 1, 16, 0.4 / pp, 8e6, 1e8 / pp))
        c = Configuration(dp, 1, pp, "1f1b", 1, 16)
        found = sketched(prices, prices.bound_s())
        laid_out.append(_LaidOut(found.cost_s, pp, Candidate(pp, c, prices, prices.bound_s()), found))
    assert min(laid_out, key=_LaidOut.key).candidate.prices.shape == (1, 12, 1)
    assert min(_glanced(laid_out, 4), key=_LaidOut.key).candidate.prices.shape == (12, 1, 1)


def test_stages_are_cut_where_little_is_sent() -> None:
    """Wide values within layers are no ends of stages while there are narrow ones beside them."""
    assert smallest_cuts([16.0, 1.0, 16.0, 1.0, 16.0], 2) == [1.0]
    assert smallest_cuts([8.0, 4.0, 2.0], 4) == [8.0, 4.0, 2.0]
    assert smallest_cuts([3.0], 1) == []
    for count in range(2, 30):
        for pp in range(2, count + 1):
            assert len(smallest_cuts([1.0] * (count - 1), pp)) == pp - 1


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
from test_placed_search import plans_of_drawn_networks
sys.stdout.write("".join(plans_of_drawn_networks({devices})))
"""


def plans_of_drawn_networks(devices: int) -> list[str]:
    """Plan files for a network of several kinds of devices, and for one of one kind."""
    from unseen_networks import drawn

    jobs = [
        job_of(drawn(seed, devices, mixed=mixed), 256, 8, recompute=None, zero=None)  # type: ignore[arg-type]
        for seed, mixed in ((1, True), (5, False))
    ]
    return [job.decide(0.0).plan.to_json() for job in jobs]


@pytest.mark.parametrize("devices", [6, pytest.param(12, marks=pytest.mark.slow)])
def test_plans_are_the_same_bytes_in_every_process(devices: int) -> None:
    """Whatever order sets of strings have in a process."""
    script = SCRIPT.format(paths=[str(ROOT / "tests"), str(ROOT / "benchmarks")], devices=devices)
    seed = "77" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    other = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, timeout=240)
    assert other.returncode == 0, other.stderr
    first, second = other.stdout.decode(), "".join(plans_of_drawn_networks(devices))
    assert first == second and len(first) > 1000
